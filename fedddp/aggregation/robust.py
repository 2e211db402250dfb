"""Robust aggregation: rules for cohorts with malicious (Byzantine) clients, which see the updates apart."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from fedddp.aggregation.aggregation import Accumulator, Aggregation
from fedddp.algorithms.algorithm import AggregatedUpdate
from fedddp.distributed.world import World
from fedddp.section import NonNegativeInt, PositiveInt

WEISZFELD_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class RobustAggregation(Aggregation):
    """A rule over the updates of a round, which are gathered at the coordinator; subclass it for your own.

    Per round the coordinator holds m vectors (P + B,). Float buffers are aggregated by their coordinate
    median, whatever the rule: an example-weighted mean would be open to malicious clients. Integer buffers
    are aggregated by maximum.
    """

    robust: ClassVar[bool] = True

    @abstractmethod
    def aggregate(self, updates: Tensor, weights: Tensor) -> Tensor:
        """Return one update (P,); on the coordinator.

        Args:
            updates: the clients' updates Δ_k, ordered by client; (m, P), m >= `min_clients()`.
            weights: the clients' weights, p_k or 1/m, in the same order; (m,) float64. The rules here
                count clients equally and leave them aside.
        """

    def accumulator(
        self, lengths: Mapping[str, int], clients: int, like: Tensor, integer_buffers: Tensor
    ) -> UpdateStack:
        """Return an empty stack; arguments as for `Aggregation.accumulator`."""
        return UpdateStack(self, lengths, like, integer_buffers)


class UpdateStack(Accumulator):
    """The updates of this rank's clients, then, at the coordinator, of all ranks'."""

    rule: RobustAggregation

    def __init__(
        self, rule: RobustAggregation, lengths: Mapping[str, int], like: Tensor, integer_buffers: Tensor
    ) -> None:
        """Start with none; arguments as for `Aggregation.accumulator`."""
        super().__init__(rule, like, integer_buffers)
        self.size, self.length = lengths["update"], lengths["update"] + lengths.get("buffers", 0)
        self.rows: dict[int, Tensor] = {}
        self.weights: dict[int, float] = {}

    def reset(self, clients: int) -> None:
        """Start over with none."""
        super().reset(clients)
        self.rows, self.weights = {}, {}

    def _take(
        self,
        client: int,
        vectors: Mapping[str, Tensor],
        weight: float,
        example_weight: float,
        largest: float,
    ) -> bool:
        """Keep one client's update and buffers; a client without examples has no vote."""
        if not example_weight:
            return False
        self.rows[client] = torch.cat([vectors["update"], vectors["buffers"]])
        self.weights[client] = weight
        return True

    def reduce(self, world: World) -> None:
        """Collective. Bring all updates to the coordinator."""
        for rank, weights in enumerate(world.gather(self.weights)[1:], start=1):
            for client in sorted(weights):
                if world.rank == rank:
                    world.send(self.rows.pop(client), 0)
                elif world.is_coordinator:
                    self.rows[client] = self.like.new_empty(self.length)
                    world.receive(self.rows[client], rank)
            if world.is_coordinator:
                self.weights |= weights
        super().reduce(world)

    def result(self) -> AggregatedUpdate:
        """Return the rule's update, and the median of the buffers."""
        rows, weights = self._stacked()
        update = self.rule.aggregate(rows[:, : self.size], weights).to(self.like.dtype)
        return AggregatedUpdate({"update": update, "buffers": _median(rows[:, self.size :])}, len(rows))

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """Return the updates with their buffers (m, P + B) and the weights (m,), ordered by client."""
        clients = sorted(self.rows)
        rows = [self.rows[client] for client in clients]
        weights = torch.tensor([self.weights[client] for client in clients], dtype=torch.float64)
        return torch.stack(rows) if rows else self.like.new_empty(0, self.length), weights.to(
            self.like.device
        )

    def state(self) -> dict[str, Tensor]:
        """Return the updates, their clients and weights."""
        rows, weights = self._stacked()
        clients = torch.tensor(sorted(self.rows), dtype=torch.int64)
        return {**super().state(), "clients": clients, "rows": rows, "weights": weights}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the `state` of a stopped round."""
        super().load(state)
        clients = state["clients"].tolist()
        self.rows = dict(zip(clients, state["rows"].to(self.like.device), strict=True))
        self.weights = dict(zip(clients, state["weights"].tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class CoordinateMedian(RobustAggregation):
    """The median of every coordinate (Yin et al., 2018, arXiv:1803.01498)."""

    def aggregate(self, updates: Tensor, weights: Tensor) -> Tensor:
        """Return the median along the cohort; of an even number, the mean of the middle two."""
        return _median(updates)


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(RobustAggregation):
    """The mean of every coordinate without its ⌊βm⌋ largest and ⌊βm⌋ smallest values (arXiv:1803.01498).

    Yin et al., 2018. It is robust while at most ⌊βm⌋ of a round's m clients are malicious.
    """

    beta: Annotated[float, Interval(ge=0, lt=0.5), "CoordinateMedian is its limit"] = 0.2
    """Share β cut off at each side, in [0, 0.5)."""

    def aggregate(self, updates: Tensor, weights: Tensor) -> Tensor:
        """Return the mean of the remaining values of every coordinate."""
        cut = math.floor(self.beta * len(updates) + 1e-9)  # 0.3 * 10 is 3, in floats too
        return _mean(updates.sort(0).values[cut : len(updates) - cut])


@dataclass(frozen=True, kw_only=True)
class Krum(RobustAggregation):
    """The update nearest to its neighbours (Blanchard et al., 2017, arXiv:1703.02757).

    Scores are the sums of the n − f − 2 smallest squared distances to the others; the least wins.
    """

    attackers: NonNegativeInt = 1
    """Clients f of a round that may be malicious, >= 0; a round needs 2f + 3 clients."""

    def min_clients(self) -> int:
        """Return 2f + 3."""
        return 2 * self.attackers + 3

    def aggregate(self, updates: Tensor, weights: Tensor) -> Tensor:
        """Return the update with the least score."""
        return updates[_scores(_distances(updates), self.attackers).argmin()]


@dataclass(frozen=True, kw_only=True)
class MultiKrum(Krum):
    """The mean of the updates with the least Krum scores (Blanchard et al., 2017, arXiv:1703.02757)."""

    keep: PositiveInt | None = None
    """Updates that are averaged, >= 1; by default n − f."""

    def aggregate(self, updates: Tensor, weights: Tensor) -> Tensor:
        """Return the mean of the updates with the least scores."""
        keep = self.keep or len(updates) - self.attackers
        best = _scores(_distances(updates), self.attackers).argsort(stable=True)[:keep]
        return _mean(updates[best.sort().values])


@dataclass(frozen=True, kw_only=True)
class Bulyan(Krum):
    """Krum again and again, then a trimmed mean around the median (El Mhamdi et al., 2018, arXiv:1802.07927).

    θ = n − 2f updates are chosen by Krum, one after the other among those left; of every coordinate the
    θ − 2f values nearest to the median are averaged.
    """

    attackers: NonNegativeInt = 1
    """Clients f of a round that may be malicious, >= 0; a round needs 4f + 3 clients."""

    def min_clients(self) -> int:
        """Return 4f + 3."""
        return 4 * self.attackers + 3

    def aggregate(self, updates: Tensor, weights: Tensor) -> Tensor:
        """Return the mean of the θ − 2f values of every coordinate nearest to the median of θ."""
        f, distances, left = self.attackers, _distances(updates), list(range(len(updates)))
        chosen = []
        for _ in range(len(updates) - 2 * f):
            among = torch.tensor(left, device=updates.device)
            scores = _scores(distances[among][:, among], f)
            chosen.append(left.pop(int(scores.argmin())))
        some = updates[sorted(chosen)]
        nearest = (some - _median(some)).abs().argsort(dim=0, stable=True)[: len(some) - 2 * f]
        return _mean(some.gather(0, nearest.sort(0).values))


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(RobustAggregation):
    """The point with the least sum of distances to the updates (Pillutla et al., 2022, arXiv:1912.13445).

    By Weiszfeld's iteration from the coordinate median, unweighted; it is robust while fewer than half of
    the clients are malicious.
    """

    def aggregate(self, updates: Tensor, weights: Tensor) -> Tensor:
        """Return the geometric median, to float32 precision where it converges."""
        rows = updates.double()
        point = _median(rows)
        for _ in range(WEISZFELD_STEPS):
            distances = torch.linalg.vector_norm(rows - point, dim=1)
            # Smoothed by a fraction of the median distance, which a minority of clients cannot choose.
            closeness = 1 / distances.clamp_min(1e-12 + 1e-9 * float(distances.median()))
            point = (closeness / closeness.sum()) @ rows
        return point


def _median(rows: Tensor) -> Tensor:
    ordered, middle = rows.sort(0).values, len(rows) // 2
    return ordered[middle] if len(rows) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _mean(rows: Tensor) -> Tensor:
    return rows.double().mean(0)


def _distances(updates: Tensor) -> Tensor:
    """Return squared distances (n, n) in float64, infinite to oneself."""
    exact = updates.double()
    return torch.stack([(exact - update).square().sum(1) for update in exact]).fill_diagonal_(math.inf)


def _scores(distances: Tensor, attackers: int) -> Tensor:
    """Return Krum's scores (n,); at least one neighbour counts, as Bulyan's last choices need."""
    neighbours = max(1, len(distances) - attackers - 2)
    return distances.sort(1).values[:, :neighbours].sum(1)
