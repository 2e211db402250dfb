"""What a run's rounds cost: ε from noise and sampling, and the noise for an ε, by dp-accounting.

dp-accounting takes seconds to import: that is left to the first query, and a round that every client may
take part in needs none (`gaussian`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedddp.privacy.gaussian import epsilon_of, mu_of
from fedddp.section import ConfigError

Sampling = Literal["poisson", "without_replacement", "none"]
Relation = Literal["add_or_remove", "replace"]

FINEST, COARSEST = 1e-4, 1e-3
"""Steps of the privacy losses that a distribution is kept at; dp-accounting's own is the finest."""

ORDERS = (*range(2, 64), 80, 128, 256, 512)
"""Of the divergences that a calibration begins with: whole ones, whose series always converge."""

BOUND_ORDERS = (*range(2, 11), 12, 14, 16, 20, 24, 32, 48, 64, 96, 128, 256)
"""Of the divergences of `renyi_bounds`."""

TOLERANCE = 2e-7
"""Relative error of a calibrated noise multiplier; always above the smallest that is enough."""


class Release(NamedTuple):
    """Some rounds that release the same."""

    rate: float
    """q, the probability with which a client is in the cohort of a round, in (0, 1]."""
    noise_multiplier: float
    """z, the noise's standard deviation in sensitivities, > 0."""
    rounds: int
    """How many, >= 0."""


def require_library() -> None:
    """Raise ConfigError where dp-accounting is not installed; imports nothing."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise ConfigError(
            'privacy needs the package dp-accounting; pip install "fedddp[privacy]", '
            "or account without sampling by privacy.amplification=none"
        )


@dataclass(frozen=True, kw_only=True)
class Account:
    """How a run is accounted: who is sampled, and what two neighbouring populations are."""

    sampling: Sampling
    """`poisson`: add or remove one client; `without_replacement`: replace one by another; `none`: replace
    one's update by zeros, in cohorts that are known."""
    population: int
    """N, > 0."""
    cohort: int
    """Clients of a round, for Poisson sampling on average; 1 to N."""
    delta: float
    """δ, in (0, 1)."""
    rounds: int
    """Rounds that the run is given: more are accounted at finer steps."""

    @property
    def needs_library(self) -> bool:
        """Whether a query needs dp-accounting."""
        return self.sampling != "none" and not (self.sampling == "poisson" and self.cohort == self.population)

    @property
    def words(self) -> str:
        """The account in words."""
        rate = self.cohort / self.population
        return {
            "poisson": f"Poisson cohorts, q = {rate:.4g}; add or remove a client",
            "without_replacement": f"{self.cohort} of {self.population:,} clients; replace a client",
            "none": "no amplification by sampling; a client's update or zeros",
        }[self.sampling]

    def epsilon(self, noise_multiplier: float, rounds: int) -> float:
        """Return ε after so many `rounds` with that noise."""
        if rounds == 0:
            return 0.0
        if not self.needs_library:
            return epsilon_of(math.sqrt(rounds) / noise_multiplier, self.delta)
        if self.sampling == "poisson":
            step = step_of(self.rounds)
            base = _loss_distribution(self.cohort / self.population, noise_multiplier, "add_or_remove", step)
            return float(base.self_compose(rounds).get_epsilon_for_delta(self.delta))
        return self._by_renyi(noise_multiplier, rounds)

    def _by_renyi(self, noise_multiplier: float, rounds: int) -> float:
        """Return ε by Rényi divergences: an upper bound, fast, and the only one without replacement."""
        if self.sampling == "poisson":
            release = Release(self.cohort / self.population, noise_multiplier, rounds)
            return renyi_epsilon([release], self.delta, ORDERS)
        return without_replacement_epsilon(self.population, self.cohort, noise_multiplier, rounds, self.delta)

    def noise_multiplier(self, epsilon: float, rounds: int) -> float:
        """Return the smallest noise multiplier z, to 7 digits, with which `rounds` rounds cost `epsilon`."""
        if not self.needs_library:
            z = math.sqrt(rounds) / mu_of(epsilon, self.delta)
            while self.epsilon(z, rounds) > epsilon:  # by the last digit
                z *= 1 + 1e-9
            return z
        bound = _calibrated(lambda z: self._by_renyi(z, rounds), epsilon, 0.3, 30.0)
        if self.sampling == "without_replacement":
            return bound
        # Slower queries, for which the faster ones give the interval.
        return _calibrated(lambda z: self.epsilon(z, rounds), epsilon, bound / 1.2, bound)

    def most_rounds(self, noise_multiplier: float, budget: float, limit: int) -> int:
        """Return how many rounds, at most `limit`, cost no more than ε = `budget`."""
        return most_rounds(lambda rounds: self.epsilon(noise_multiplier, rounds), budget, limit)


def most_rounds(epsilon_after: Callable[[int], float], budget: float, limit: int) -> int:
    """Return after how many rounds, at most `limit`, ε is no more than `budget`; it grows with rounds."""
    if epsilon_after(limit) <= budget:
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if epsilon_after(middle) <= budget else (low, middle)
    return low


def epsilon(releases: Sequence[Release], delta: float, relation: Relation = "add_or_remove") -> float:
    """Return ε of rounds with Poisson cohorts, by privacy loss distributions.

    Args:
        releases: what was released; noise multipliers are in C, the norm that updates are clipped to.
        delta: δ, in (0, 1).
        relation: of neighbouring populations; `replace` is one client in another's place.
    """
    step = step_of(sum(release.rounds for release in releases))
    parts = [
        _loss_distribution(rate, noise, relation, step).self_compose(count)
        for rate, noise, count in releases
        if count
    ]
    composed = functools.reduce(lambda one, other: one.compose(other), parts)
    return float(composed.get_epsilon_for_delta(delta))


def renyi_epsilon(releases: Sequence[Release], delta: float, orders: Sequence[float] | None = None) -> float:
    """Return an upper bound of `epsilon` by Rényi differential privacy, in milliseconds.

    `orders` are those of the divergences, > 1; None for dp-accounting's own.
    """
    dp = _library()
    accountant = dp.rdp.RdpAccountant(orders)
    for rate, noise, count in releases:
        event = dp.GaussianDpEvent(noise)
        accountant.compose(event if rate == 1 else dp.PoissonSampledDpEvent(rate, event), count)
    return float(accountant.get_epsilon(delta))


def renyi_bounds(
    rates: NDArray[np.float64], steps: NDArray[np.int64], noise_multiplier: float, delta: float
) -> NDArray[np.float64]:
    """Return an upper bound of ε for each of many sampling rates, by Rényi divergences of a few orders.

    That of the Gaussian with Poisson sampling, of a whole order a, is log(Σ_k C(a,k) (1 − q)^(a−k) q^k
    exp(k(k−1)/(2z²))) / (a − 1) (Mironov et al., 2019, arXiv:1908.10530); `renyi_epsilon` takes 10 ms each.

    Args:
        rates: q, each in (0, 1]; (n,).
        steps: how often each is released; (n,).
        noise_multiplier: z, > 0.
        delta: δ, in (0, 1).

    Returns:
        (n,), >= 0.
    """
    with np.errstate(divide="ignore"):
        log_q, log_rest = np.log(rates)[:, None], np.log1p(-rates)[:, None]
    best = np.full(len(rates), math.inf)
    for a in BOUND_ORDERS:
        k = np.arange(a + 1)
        chosen = [math.lgamma(a + 1) - math.lgamma(i + 1) - math.lgamma(a - i + 1) for i in range(a + 1)]
        rest = np.multiply(log_rest, a - k, where=k < a, out=np.zeros((len(rates), a + 1)))
        terms = np.array(chosen) + k * log_q + rest + k * (k - 1) / (2 * noise_multiplier**2)
        divergence = np.logaddexp.reduce(terms, axis=1) / (a - 1)
        of_delta = math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1)
        best = np.minimum(best, steps * divergence + of_delta)
    return best.clip(0.0)


def without_replacement_epsilon(
    population: int, cohort: int, noise_multiplier: float, rounds: int, delta: float
) -> float:
    """Return ε of rounds with `cohort` of `population` clients, one client replaced by another.

    The sum then changes by up to 2C: dp-accounting's Rényi accountant expects noise in units of that.
    """
    dp = _library()
    accountant = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    event = dp.GaussianDpEvent(noise_multiplier / 2)
    accountant.compose(dp.SampledWithoutReplacementDpEvent(population, cohort, event), rounds)
    return float(accountant.get_epsilon(delta))


def step_of(rounds: int) -> float:
    """Return the step of privacy losses for so many rounds: ε is too large by at most 5e-5 up to 3,000."""
    return min(max(math.sqrt(3e-5 / max(rounds, 1)), FINEST), COARSEST)


@functools.lru_cache(maxsize=16)
def _loss_distribution(rate: float, noise_multiplier: float, relation: Relation, step: float) -> Any:
    """Return the privacy loss distribution of a round; the largest ε that the steps allow, never less.

    For `replace` dp-accounting doubles the sensitivity itself.
    """
    dp = _library()
    relations = {
        "add_or_remove": dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace": dp.NeighboringRelation.REPLACE_ONE,
    }
    return dp.pld.privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier,
        sampling_prob=rate,
        value_discretization_interval=step,
        neighboring_relation=relations[relation],
    )


def _library() -> Any:
    require_library()
    import dp_accounting
    import dp_accounting.pld.privacy_loss_distribution
    import dp_accounting.rdp

    return dp_accounting


def _calibrated(query: Callable[[float], float], epsilon: float, low: float, high: float) -> float:
    """Return the smallest z for which `query(z)` is at most `epsilon`; `query` falls with z.

    `low` and `high` are where to begin, 0 < low < high.

    Raises:
        ConfigError: no noise is enough.
    """
    brentq: Any = importlib.import_module("scipy.optimize").brentq  # dp-accounting depends on SciPy

    def excess(log_z: float) -> float:
        return math.log(max(query(math.exp(log_z)), 1e-12) / epsilon)

    while query(high) > epsilon:
        low, high = high, high * 10
        if high > 1e9:
            raise ConfigError(
                f"privacy: no noise reaches ε = {epsilon:g} in so many rounds; raise target_epsilon or "
                "delta, or lower rounds"
            )
    while query(low) <= epsilon:
        low /= 2
    z = math.exp(brentq(excess, math.log(low), math.log(high), xtol=TOLERANCE / 2, rtol=1e-12))
    while query(z) > epsilon:
        z *= 1 + TOLERANCE
    return z
