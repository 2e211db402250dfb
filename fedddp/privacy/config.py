"""The section `privacy`: how the clients' data are protected, and what that costs."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval

from fedddp.privacy.accountant import Account, Sampling
from fedddp.section import PositiveFloat, Section
from fedddp.simulation.cohort import CohortConfig

Probability = Annotated[float, Interval(gt=0, lt=1)]

FIRST_CLIP = 0.1
"""C of the first round of adaptive clipping, by default; Andrew et al., 2021."""

COUNT_SHARE = 1 / 20
"""σ_b by default, of the expected cohort; likewise."""


@dataclass(frozen=True, kw_only=True)
class Privacy(Section, ABC):
    """How the clients' data are protected: all of a client's together, or (ExampleDP) each example."""

    key: ClassVar[str] = "privacy"
    chosen_by_name: ClassVar[bool] = True

    weighs_equally: ClassVar[bool] = True
    """Whether all clients weigh the same: their numbers of examples are protected too."""

    delta: Probability
    """δ, in (0, 1): the probability with which ε may fail; below 1 / data.clients (ExampleDP: below one over
    a client's examples), such as 1e-5."""

    noise: Literal["seeded", "secret"] = "seeded"
    """`seeded`: noise that follows from `seed`, for research: with the seed it can be removed, so every ε
    is shown as simulated. `secret`: noise from the operating system's random source, stored nowhere."""

    strict: bool = False
    """Record and show nothing of a round but what is protected: no losses, no cohorts."""


@dataclass(frozen=True, kw_only=True)
class CalibratedDP(Section, ABC):
    """Settings of a noise that is given, or follows from an ε for all rounds together."""

    noise_multiplier: PositiveFloat | None = None
    """z, the noise's standard deviation in C, > 0; give this or `target_epsilon`."""

    target_epsilon: PositiveFloat | None = None
    """ε after all `rounds`, > 0: the smallest z that is enough is computed before the first."""

    stop_at_epsilon: PositiveFloat | None = None
    """End the run before the round that would exceed this ε, > 0; by default `target_epsilon`, if any."""

    def __post_init__(self) -> None:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("noise_multiplier or target_epsilon must be given, and not both")

    @property
    def budget(self) -> float:
        """The ε that the run may not exceed; infinite where there is none."""
        given = [bound for bound in (self.stop_at_epsilon, self.target_epsilon) if bound is not None]
        return min(given, default=math.inf)


@dataclass(frozen=True, kw_only=True)
class CentralDP(CalibratedDP, Privacy):
    """Clip each client's update, add noise to the sum (DP-FedAvg; McMahan et al., 2018, arXiv:1710.06963).

    mean = [Σ_S Δ_k·min(1, C/‖Δ_k‖) + N(0, (zC)²I)] / (qN), the norm over all vectors that a client sends.
    Every client weighs 1, and qN is `cohort.size`, in every round. The coordinator sees the updates; what it
    publishes, the models of all rounds, is (ε, δ)-differentially private for each client.
    """

    clip: PositiveFloat | None = None
    """C, the largest norm of what a client sends, > 0; with `adaptive` of the first round, by default 0.1."""

    adaptive: bool = False
    """Adapt C to a quantile of the norms, for a little more noise (Andrew et al., 2021, arXiv:1905.03871)."""

    quantile: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """γ, the share of clients that adaptive clipping leaves unclipped, in [0, 1]."""

    clip_lr: PositiveFloat = 0.2
    """η_C, > 0: C ← C·exp(−η_C(b̃ − γ)), b̃ the noisy share of clients that were not clipped."""

    count_noise: PositiveFloat | None = None
    """σ_b, the deviation of the noise on the number of unclipped clients, > 0; none: cohort.size / 20."""

    amplification: Literal["auto", "none", "without_replacement"] = "auto"
    """How the account uses that cohorts are random and unknown. `auto`: Poisson sampling where
    `cohort.sampling` is `poisson`, else nothing; `none`: nothing; `without_replacement`: cohorts of fixed
    size, by Rényi divergences for one client in another's place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is None and not self.adaptive:
            raise ValueError("clip has no default; give a value, such as the median norm of the updates")

    @property
    def first_clip(self) -> float:
        """C of the first round."""
        return FIRST_CLIP if self.clip is None else self.clip

    def sampling(self, cohorts: str) -> Sampling:
        """Return what the account knows of cohorts that are sampled by `cohorts`, of `cohort.sampling`."""
        if self.amplification != "auto":
            return self.amplification
        return "poisson" if cohorts == "poisson" else "none"

    def account(self, cohort: CohortConfig, population: int, rounds: int) -> Account:
        """Return the account of a run of `rounds` rounds with cohorts of `population` clients."""
        return Account(
            sampling=self.sampling(cohort.sampling),
            population=population,
            cohort=cohort.size,
            delta=self.delta,
            rounds=rounds,
        )

    def noise_of_count(self, cohort: int) -> float:
        """Return σ_b for an expected cohort of `cohort` clients."""
        return COUNT_SHARE * cohort if self.count_noise is None else self.count_noise

    def noise_of_update(self, noise_multiplier: float, cohort: int) -> float:
        """Return z_Δ, the noise on the sum of updates in C: more than z where the count takes a part.

        z_Δ = (z⁻² − (2σ_b)⁻²)^(−½), so that both releases together cost as much as one with z.

        Raises:
            ValueError: σ_b is too small for z.
        """
        if not self.adaptive:
            return noise_multiplier
        count = self.noise_of_count(cohort)
        left = noise_multiplier**-2 - (2 * count) ** -2
        if left <= 0:
            raise ValueError(
                f"privacy.count_noise={count:g} is too little for a noise multiplier of "
                f"{noise_multiplier:.4g}, of which it must be more than half; raise it"
            )
        return float(left**-0.5)


@dataclass(frozen=True, kw_only=True)
class LocalDP(Privacy):
    """Every client clips what it sends and adds noise itself: the coordinator is not trusted either.

    Noise N(0, σ²) on every element, σ by the analytic Gaussian mechanism for a sensitivity of 2C (Balle and
    Wang, 2018, arXiv:1805.06530). ε grows with each of a client's local trainings; the history has the
    largest of all clients. Every client weighs the same.
    """

    epsilon: PositiveFloat
    """ε of one local training, > 0."""

    clip: PositiveFloat
    """C, the largest norm of what a client sends before the noise, > 0."""

    stop_at_epsilon: PositiveFloat | None = None
    """End the run before a client's ε, over all its local trainings, would exceed this, > 0; none: never."""


@dataclass(frozen=True, kw_only=True)
class ExampleDP(CalibratedDP, Privacy):
    """Each example is protected, by DP-SGD inside its client (Abadi et al., 2016, arXiv:1607.00133).

    g = [Σ_B g_i·min(1, C/‖g_i‖) + N(0, (zC)²I)] / b at every step, b = `local.batch_size`. Batches B are
    drawn by Poisson sampling, each example with probability q_k = min(1, b/n_k): `local.steps` of them, or
    `local.epochs` times ⌈n_k/b⌉. ε is the largest of all clients. Numbers of examples n_k are public.
    """

    weighs_equally: ClassVar[bool] = False

    clip: PositiveFloat
    """C, the largest norm of an example's gradient, over all trainable parameters, > 0."""
