"""Example-level differential privacy: what DP-SGD inside clients costs, and the clipped sum of a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedddp.aggregation.mean import FRACTION_BITS
from fedddp.algorithms.local import LocalConfig
from fedddp.privacy.accountant import Account, most_rounds, renyi_bounds
from fedddp.privacy.config import ExampleDP
from fedddp.privacy.local import Participations
from fedddp.privacy.noise import grid_noise
from fedddp.privacy.protection import ActiveProtection, Terms

CLIENTS = "privacy-clients.jsonl"
"""File of the run directory with the ε of every client."""

QUERIES = 8
"""Clients, at most, whose ε is computed exactly to find the largest one, and groups of all others."""

ROWS = 8
"""Clipped gradients that are added in float32, without rounding."""

BLOCK, SLACK = 4096, 2.0**-12
"""Elements whose squares are added in float32, and the relative error of a norm, at most."""


class Cost(NamedTuple):
    """What the DP-SGD of some clients is accounted by."""

    examples: int
    """n_k, > 0."""
    steps: int
    """T_k, steps over all of a client's local trainings, > 0."""


class ExampleAccount:
    """The ε of a run: of the client with the largest, by T_k steps with Poisson batches of rate q_k.

    Neighbours are a client's data with an example and without, and n_k is public.
    """

    def __init__(
        self,
        sizes: NDArray[np.int64],
        local: LocalConfig,
        passes: int,
        participations: Participations,
        *,
        delta: float,
        rounds: int,
        repeated: int = 0,
    ) -> None:
        """Take what each client trains on, and how.

        Args:
            sizes: n_k of every client; (N,).
            local: its local training.
            passes: how often a client trains in one round (`Algorithm.passes`).
            participations: how often clients are sampled.
            delta: δ, in (0, 1).
            rounds: rounds that the run is given: more are accounted at finer steps.
            repeated: rounds that are charged again, to every client.

        Raises:
            ValueError: δ is too large to protect an example.
        """
        self.sizes, self.batch_size, self.participations = sizes, local.batch_size, participations
        self.delta, self.repeated = delta, repeated
        kinds, which = np.unique(sizes, return_inverse=True)
        self.steps = np.array([passes * local.steps_on(n) for n in kinds.tolist()], dtype=np.int64)[which]
        """Of one local training; (N,)."""
        self.longest = int((self.steps * participations.after(rounds)).max(initial=1))
        self.known: dict[tuple[Cost, float], float] = {}
        largest = int(sizes.max(initial=1))
        if delta >= 1 / largest:
            raise ValueError(
                f"privacy.delta={delta:g} must be below {1 / largest:.3g}, one over the {largest:,} examples "
                "of a client: a larger δ allows to publish an example as it is; lower privacy.delta"
            )

    @property
    def full_batches(self) -> int:
        """Clients that take all their examples at every step, as they have no more than a batch."""
        return int(((self.sizes > 0) & (self.sizes <= self.batch_size)).sum())

    @property
    def words(self) -> str:
        """The account in words."""
        rates = sorted(min(1.0, self.batch_size / n) for n in self.sizes.tolist() if n)
        span = "none" if not rates else f"{rates[0]:.4g} to {rates[-1]:.4g}"
        return f"Poisson batches, q = {span}; add or remove an example of the client with the largest ε"

    def trainings(self, rounds: int) -> NDArray[np.int64]:
        """Return how often each client is charged for a local training, of `rounds` charged rounds; (N,)."""
        again = min(rounds, self.repeated)
        return self.participations.after(rounds - again) + again

    def epsilon(self, noise_multiplier: float, rounds: int) -> float:
        """Return the largest ε of a client after so many `rounds`, repeated ones included."""
        return self._worst(noise_multiplier, self.trainings(rounds))[0]

    def noise_multiplier(self, epsilon: float, rounds: int) -> float:
        """Return the smallest z with which no client's ε exceeds `epsilon` in `rounds` rounds."""
        trainings, noise = self.participations.after(rounds), 1.0
        _, worst = self._worst(noise, trainings)
        while worst is not None:
            noise = self._account(worst.examples).noise_multiplier(epsilon, worst.steps)
            found, other = self._worst(noise, trainings)
            # The client that was the worst with less noise need not be so now; each is looked at once.
            worst = None if found <= epsilon else other
        return noise

    def most_rounds(self, noise_multiplier: float, budget: float, limit: int) -> int:
        """Return how many rounds, at most `limit`, cost no client more than ε = `budget`."""
        return most_rounds(lambda rounds: self.epsilon(noise_multiplier, rounds), budget, limit)

    def table(self, noise_multiplier: float, rounds: int) -> list[dict[str, Any]]:
        """Return client, n_k, steps and ε of every client; where clients differ much, ε is an upper bound."""
        trainings = self.trainings(rounds)
        costs = [
            Cost(*pair) for pair in zip(self.sizes.tolist(), (self.steps * trainings).tolist(), strict=True)
        ]
        distinct = sorted({cost for cost in costs if cost.steps})
        largest, _ = self._worst(noise_multiplier, trainings)
        if len(distinct) <= QUERIES:
            found = {cost: self._epsilon(noise_multiplier, cost) for cost in distinct}
        else:
            bounds = self._bounds(noise_multiplier, distinct)
            found = {cost: min(bound, largest) for cost, bound in zip(distinct, bounds.tolist(), strict=True)}
        return [
            {
                "client": client,
                "examples": cost.examples,
                "steps": cost.steps,
                "epsilon": found.get(cost, 0.0),
            }
            for client, cost in enumerate(costs)
        ]

    def _worst(self, noise_multiplier: float, trainings: NDArray[np.int64]) -> tuple[float, Cost | None]:
        """Return the largest ε of a client, or a little more, and what it is of; 0 if no client trained."""
        front = _front(self.sizes, self.steps * trainings)
        bounds = self._bounds(noise_multiplier, front)
        largest, worst = 0.0, None
        left = list(np.argsort(-bounds))
        for _ in range(min(QUERIES, len(left))):
            if bounds[left[0]] <= largest:
                return largest, worst
            cost = front[left.pop(0)]
            found = self._epsilon(noise_multiplier, cost)
            largest, worst = (found, cost) if found > largest else (largest, worst)
        # Groups of neighbours, each by the highest rate and the most steps in it.
        others = [front[i] for i in sorted(left) if bounds[i] > largest]
        for group in np.array_split(np.arange(len(others)), min(QUERIES, len(others)) or 1):
            if len(group):
                cost = Cost(min(others[i].examples for i in group), max(others[i].steps for i in group))
                found = self._epsilon(noise_multiplier, cost)
                largest, worst = (found, cost) if found > largest else (largest, worst)
        return largest, worst

    def _bounds(self, noise_multiplier: float, costs: list[Cost]) -> NDArray[np.float64]:
        rates = np.array([min(1.0, self.batch_size / cost.examples) for cost in costs])
        steps = np.array([cost.steps for cost in costs], dtype=np.int64)
        return renyi_bounds(rates, steps, noise_multiplier, self.delta)

    def _epsilon(self, noise_multiplier: float, cost: Cost) -> float:
        key = (cost, noise_multiplier)
        if key not in self.known:
            self.known[key] = self._account(cost.examples).epsilon(noise_multiplier, cost.steps)
        return self.known[key]

    def _account(self, examples: int) -> Account:
        """Return the account of a client of so many examples, whose rounds are its steps."""
        return Account(
            sampling="poisson",
            population=examples,
            cohort=min(self.batch_size, examples),
            delta=self.delta,
            rounds=self.longest,
        )


def _front(sizes: NDArray[np.int64], steps: NDArray[np.int64]) -> list[Cost]:
    """Return the costs that can be the largest: no other client with as few examples takes more steps."""
    front: list[Cost] = []
    for examples, taken in sorted(set(zip(sizes.tolist(), (-steps).tolist(), strict=True))):
        if -taken > (front[-1].steps if front else 0):
            front.append(Cost(examples, -taken))
    return front


class ExampleProtection(ActiveProtection):
    """Accounts for the noise that clients add while they train; what they send needs no more of it."""

    def __init__(self, privacy: ExampleDP, account: ExampleAccount, terms: Terms) -> None:
        """Take what the run is held to.

        Raises:
            ValueError: C does not fit the run.
        """
        super().__init__(terms, noise=privacy.noise, strict=privacy.strict)
        self.account = account
        largest = int(account.sizes.max(initial=1))
        limit = 2.0 ** (60 - FRACTION_BITS) / largest
        if privacy.clip > limit:
            raise ValueError(
                f"privacy.clip={privacy.clip:g} is more than the {limit:.4g} with which exact sums hold the "
                f"gradients of {largest:,} examples; lower it"
            )

    def epsilon(self, rounds: int) -> float:
        """Return the largest ε of a client after `rounds` rounds, those that were charged again included."""
        return self.account.epsilon(self.terms.noise_multiplier, rounds + self.terms.repeated)

    def write(self, directory: Path, rounds: int) -> None:
        """Write the ε of every client; not under `privacy.strict`, as it names their numbers of examples."""
        if not self.strict:
            rows = self.account.table(self.terms.noise_multiplier, rounds + self.terms.repeated)
            text = "".join(f"{json.dumps(row)}\n" for row in rows)
            (directory / CLIENTS).write_text(text, encoding="utf-8")


# ---- the sum of a step, in units of 2⁻⁴⁰ ----


def grid_exponent(clip: float) -> int:
    """Return e: clipped gradients are rounded to multiples of 2^e, between C·2⁻²⁰ and C·2⁻¹⁹.

    The sum of `ROWS` elements of a size of up to C is exact in float32 then.
    """
    return max(math.frexp(clip)[1] - 20, -FRACTION_BITS)


def example_sensitivity(clip: float, elements: int) -> float:
    """Return C·(1 + 2⁻¹²) + 2^e·√d/2: the largest norm of a clipped gradient of d `elements`, rounded."""
    return clip * (1 + SLACK) + 2.0 ** grid_exponent(clip) * math.sqrt(elements) / 2


def add_clipped(total: Tensor, rows: Tensor, clip: float) -> None:
    """Add the clipped `rows` to `total`, exactly; the result depends neither on their order nor on ranks.

    A row that is not finite counts as 0: else one example could make the sum NaN.

    Args:
        total: (d,) int64, in units of 2⁻⁴⁰; changed in place.
        rows: gradients of single examples; (b, d), floating; may be changed in place.
        clip: C.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    exponent, lengths = grid_exponent(clip), _lengths(rows)
    factors = torch.where(lengths > clip, clip / lengths, 1.0).mul_(2.0**-exponent).to(rows.dtype)
    rows.mul_(factors[:, None]).round_()
    rows[~lengths.isfinite()] = 0
    for start in range(0, len(rows), ROWS):
        total.add_(rows[start : start + ROWS].sum(0).to(torch.int64), alpha=2 ** (exponent + FRACTION_BITS))


def _lengths(rows: Tensor) -> Tensor:
    """Return the norm of each row, (b,) float64, exact to `SLACK`: float32 adds few squares."""
    blocks = rows.shape[1] // BLOCK
    many = rows[:, : blocks * BLOCK].view(len(rows), blocks, BLOCK)
    rest = rows[:, blocks * BLOCK :]
    parts = [torch.linalg.vector_norm(many, dim=2), torch.linalg.vector_norm(rest, dim=1, keepdim=True)]
    lengths: Tensor = torch.linalg.vector_norm(torch.cat(parts, dim=1).double(), dim=1)
    return lengths


def step_noise(
    privacy: ExampleDP, noise_multiplier: float, elements: int, name: tuple[int | str, ...]
) -> Tensor:
    """Return N(0, (zS)²) in units of 2⁻⁴⁰, S the sensitivity; (elements,) int64, on the CPU.

    `name` is that of the stream, if the noise is seeded.
    """
    sigma = noise_multiplier * example_sensitivity(privacy.clip, elements)
    return grid_noise(elements, sigma, privacy.noise, name)
