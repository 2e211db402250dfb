"""Cohorts: which clients take part in a round, and which client group trains which client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedddp.rng import stream
from fedddp.section import NonNegativeInt, PositiveInt, Section, find_function

BUILT_IN = ("fixed", "poisson")
PER_CLIENT = 1
"""Examples that a client costs besides its own."""
REMEMBERED = 0.8
"""Weight of what a group's pace was learned from, a round later."""

SAMPLER = "f(population, size, round_index, rng)"
"""The form of a user's own sampler."""


@dataclass(frozen=True, kw_only=True)
class CohortConfig(Section):
    """The clients sampled for a round, without replacement."""

    key = "cohort"

    size: PositiveInt = 10
    """Clients per round m (the expected number with `poisson`), from 1 to the population."""

    extra: NonNegativeInt = 0
    """Clients sampled beyond `size`, >= 0: a round keeps the first `size` that arrive (`clock`)."""

    sampling: Literal["fixed", "poisson"] | str = "fixed"
    """`fixed`: exactly `size` clients; `poisson`: each client with probability size / population; or
    the dotted path of your own f(population, size, round_index, rng), which returns the clients' numbers."""

    def __post_init__(self) -> None:
        if self.sampling not in BUILT_IN:
            find_function(self.sampling, "sampling", BUILT_IN, SAMPLER)
        if self.extra and self.sampling != "fixed":
            raise ValueError(
                f"extra={self.extra} cannot be combined with sampling={self.sampling}; use sampling=fixed"
            )

    def sample(self, population: int, seed: int, round_index: int) -> NDArray[np.int64]:
        """Return the clients of a round in ascending order, the extra ones included.

        A function of the arguments only, as a user's own sampler must be: every rank calls it.

        Raises:
            ValueError: the user's own sampler returns no numbers of clients, or one twice.
        """
        rng = stream("cohort", seed, round_index)
        if self.sampling not in BUILT_IN:
            return self._own_sample(population, round_index, rng)
        if self.sampling == "poisson":
            # A binomial number of clients, each equally likely: Poisson sampling without a draw per client.
            size = int(rng.binomial(population, self.size / population))
        else:
            size = self.size + self.extra
        return np.sort(rng.choice(population, size, replace=False, shuffle=False)).astype(np.int64)

    def _own_sample(self, population: int, round_index: int, rng: np.random.Generator) -> NDArray[np.int64]:
        sampler = find_function(self.sampling, "cohort.sampling", BUILT_IN, SAMPLER)
        returned = np.asarray(sampler(population, self.size, round_index, rng))
        whole = returned.ndim == 1 and (returned.dtype.kind in "iu" or not len(returned))
        clients = np.unique(returned.astype(np.int64)) if whole else np.array([-1])
        if len(clients) and (clients[0] < 0 or clients[-1] >= population or len(clients) < len(returned)):
            raise ValueError(
                f"cohort.sampling={self.sampling} must return different whole numbers from 0 to "
                f"{population - 1}, got {np.array2string(returned, threshold=10)} in round {round_index}"
            )
        return clients


@dataclass
class Assigner:
    """Assigns clients to client groups so that all end together, by the pace that it learns of each."""

    groups: int
    """G, >= 1."""
    learns: bool = True
    """Not where the bits of a result depend on the assignment, which must not depend on time then."""
    work: NDArray[np.float64] | float = 0.0
    """What each group has trained, (G,), in examples and clients; older rounds count less."""
    seconds: NDArray[np.float64] | float = 0.0
    """How long it took, (G,), likewise."""
    rounds: int = 0

    def assign(self, clients: NDArray[np.int64], examples: NDArray[np.int64]) -> list[list[int]]:
        """Assign each client, longest first, to the group that would end first (Graham's LPT rule).

        Args:
            clients: the cohort; (m,).
            examples: of each client of the population; (N,).

        Returns:
            The clients of each group, in the order in which it trains them.
        """
        assignment: list[list[int]] = [[] for _ in range(self.groups)]
        work, pace = examples[clients] + PER_CLIENT, self._pace()
        ends = np.zeros(self.groups)
        for position in np.lexsort((clients, -work)):
            ends_with = ends + work[position] * pace
            group = int(ends_with.argmin())
            assignment[group].append(int(clients[position]))
            ends[group] = ends_with[group]
        return assignment

    def learn(
        self, assignment: list[list[int]], examples: NDArray[np.int64], seconds: NDArray[np.float64]
    ) -> None:
        """Learn from the `seconds`, (G,), that the groups took for the clients of an `assignment`.

        The first round is left out: it allocates memory and loads kernels.
        """
        self.rounds += 1
        if self.learns and self.rounds > 1:
            work = np.array([(examples[clients] + PER_CLIENT).sum() for clients in assignment])
            self.work = REMEMBERED * self.work + work
            self.seconds = REMEMBERED * self.seconds + seconds

    def _pace(self) -> NDArray[np.float64]:
        """Return each group's seconds per unit of work, (G,); all are 1 until each has trained."""
        return np.divide(self.seconds, self.work) if np.all(self.work > 0) else np.ones(self.groups)
