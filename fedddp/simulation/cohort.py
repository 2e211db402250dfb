"""Cohorts: which clients take part in a round, and which client group trains which client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedddp.rng import stream
from fedddp.section import NonNegativeInt, PositiveInt, Section, find_function

BUILT_IN = ("fixed", "poisson")
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


def assign(clients: NDArray[np.int64], load: NDArray[np.int64], groups: int) -> list[list[int]]:
    """Assign `clients` to `groups`, longest first to the least loaded (Graham's LPT rule).

    Args:
        clients: the cohort; shape (m,).
        load: work of each of them, e.g. examples; shape (m,).
        groups: number of client groups, >= 1.

    Returns:
        The clients of each group, in the order in which it trains them.
    """
    assignment: list[list[int]] = [[] for _ in range(groups)]
    loads = np.zeros(groups, dtype=np.int64)
    for position in np.lexsort((clients, -load)):
        group = int(loads.argmin())
        assignment[group].append(int(clients[position]))
        loads[group] += load[position] + 1  # a client without examples costs something too
    return assignment
