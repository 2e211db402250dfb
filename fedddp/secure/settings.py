"""The settings of secure aggregation: who is whose neighbour, how many must remain, who drops out."""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Literal

from annotated_types import Ge, Interval, Le

from fedddp.rng import stream
from fedddp.section import LARGEST, ConfigError, Fraction, Section, class_name

FEWEST = 3
"""Fewer clients than these cannot hide in their sum: each of two can subtract its own update."""


class Drop(IntEnum):
    """The point of the protocol before which a client drops out."""

    SHARES = 1
    """It has published its keys, and sends no shares."""
    UPDATE = 2
    """It has sent its shares, and sends no masked update."""
    UNMASKING = 3
    """It has sent its masked update, and does not answer when the coordinator unmasks the sum."""


@dataclass(frozen=True, kw_only=True)
class SecureAggregation(Section, ABC):
    """A protocol by which the coordinator receives the sum of the clients' updates, and no single one."""

    key = "secure_aggregation"
    chosen_by_name = True

    threshold: Annotated[float, Interval(ge=0.5, le=1)] = 0.6
    """Share of the clients that hold a client's secrets which must remain to recover one, in [0.5, 1]; always
    more than half of them."""

    drop_before_shares: Fraction = 0.0
    """Probability that a client drops out after it has published its keys, in [0, 1)."""

    drop_before_update: Fraction = 0.0
    """Probability that a client drops out after its shares, before its masked update, in [0, 1)."""

    drop_before_unmasking: Fraction = 0.0
    """Probability that a client drops out after it has sent its masked update, in [0, 1)."""

    def needed(self, holders: int) -> int:
        """Return t, how many of the `holders` of a secret's shares must remain; more than half of them."""
        return max(holders // 2 + 1, math.ceil(self.threshold * holders - 1e-9))

    def drops(self, clients: Iterable[int], seed: int, round_index: int) -> dict[int, Drop]:
        """Return which clients drop out of a round, and where; from a random stream of each client."""
        chances = (self.drop_before_shares, self.drop_before_update, self.drop_before_unmasking)
        found = {}
        for client in clients if any(chances) else ():
            draws = stream("secure-dropout", seed, round_index, client).random(len(chances))
            points = [
                point for point, draw, chance in zip(Drop, draws, chances, strict=True) if draw < chance
            ]
            if points:
                found[client] = points[0]
        return found

    @abstractmethod
    def neighbours(self, clients: Sequence[int], seed: int, round_index: int) -> dict[int, list[int]]:
        """Return with which other clients each one shares secrets and masks; symmetric, known to all."""

    def degree(self, clients: int) -> int:
        """Return how many neighbours each of `clients` clients has."""
        return len(self.neighbours(range(clients), 0, 0)[0]) if clients else 0

    def check_installed(self) -> None:
        """Raise ConfigError when the package `cryptography` is not installed."""
        if importlib.util.find_spec("cryptography") is None:
            raise ConfigError(
                f"{self.key}={class_name(type(self))} needs the package cryptography; "
                'pip install "fedddp[secure]"'
            )


@dataclass(frozen=True, kw_only=True)
class SecAgg(SecureAggregation):
    """Secure aggregation with masks between all pairs of clients (Bonawitz et al., 2017, arXiv:1611.04482).

    A client of a cohort of n makes n masks, and the protocol of a round has n² steps.
    """

    def neighbours(self, clients: Sequence[int], seed: int, round_index: int) -> dict[int, list[int]]:
        """Return all others for each client."""
        return {client: [other for other in clients if other != client] for client in clients}


@dataclass(frozen=True, kw_only=True)
class SecAggPlus(SecureAggregation):
    """Secure aggregation with masks between k neighbours on a shuffled ring (Bell et al., 2020).

    SecAgg+, doi:10.1145/3372297.3417885. A client makes k + 1 masks; k = O(log n) for a cohort of n.
    """

    neighbours_per_client: Literal["auto"] | Annotated[int, Ge(2), Le(LARGEST)] = "auto"
    """Neighbours k of a client, even, >= 2; `auto`: the smallest even number from 4·log2(n) on. A cohort of
    at most k + 1 clients is that of SecAgg."""

    def __post_init__(self) -> None:
        if self.neighbours_per_client != "auto" and self.neighbours_per_client % 2:
            raise ValueError(
                f"neighbours_per_client must be even, got {self.neighbours_per_client}: half of them are on "
                "either side of a ring"
            )

    def neighbours(self, clients: Sequence[int], seed: int, round_index: int) -> dict[int, list[int]]:
        """Return the k nearest on a ring that is shuffled in every round, k/2 on either side."""
        n = len(clients)
        ring = stream("secure-ring", seed, round_index).permutation(list(clients)).tolist()
        half = self._half(n)
        around = [step for step in range(-half, half + 1) if step]
        return {
            client: sorted({ring[(i + step) % n] for step in around} - {client})
            for i, client in enumerate(ring)
        }

    def _half(self, clients: int) -> int:
        """Return k/2, or as many as reach all the others."""
        k = self.neighbours_per_client
        half = math.ceil(2 * math.log2(max(clients, 2))) if k == "auto" else k // 2
        return min(half, clients // 2)
