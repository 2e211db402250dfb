"""Cohorts: which clients take part in a round, and which client group trains which client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedddp.rng import stream
from fedddp.section import NonNegativeInt, PositiveInt, Section


@dataclass(frozen=True, kw_only=True)
class CohortConfig(Section):
    """The clients sampled for a round, without replacement."""

    key = "cohort"

    size: PositiveInt = 10
    """Clients per round m (the expected number with `poisson`), from 1 to the population."""

    extra: NonNegativeInt = 0
    """Clients sampled beyond `size`, >= 0: a round keeps the first `size` that arrive (`clock`)."""

    sampling: Literal["fixed", "poisson"] = "fixed"
    """`fixed`: exactly `size` clients; `poisson`: each client with probability size / population."""

    def __post_init__(self) -> None:
        if self.extra and self.sampling == "poisson":
            raise ValueError(
                f"extra={self.extra} cannot be combined with sampling=poisson; use sampling=fixed"
            )

    def sample(self, population: int, seed: int, round_index: int) -> NDArray[np.int64]:
        """Return the clients of a round in ascending order, the extra ones included.

        A function of the arguments only.
        """
        rng = stream("cohort", seed, round_index)
        if self.sampling == "poisson":
            # A binomial number of clients, each equally likely: Poisson sampling without a draw per client.
            size = int(rng.binomial(population, self.size / population))
        else:
            size = self.size + self.extra
        return np.sort(rng.choice(population, size, replace=False, shuffle=False)).astype(np.int64)


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
