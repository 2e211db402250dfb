"""Rules that hold when some clients lie: they see the updates apart, and count them equally."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedddp.aggregation.mean import Accumulator, Mean
from fedddp.algorithms.algorithm import Total
from fedddp.distributed.world import World

WEISZFELD_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Robust(Mean, ABC):
    """A rule over the updates apart, which are gathered at the coordinator: m vectors (P + B,) a round.

    Float buffers are combined by their coordinate median, whatever the rule: an example-weighted mean
    would leave liars a way in. Integer buffers by maximum, as ever.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sums != "exact":
            raise ValueError(
                f"sums={self.sums} is for Mean, {type(self).__name__} sums nothing; leave it out"
            )

    @abstractmethod
    def choose(self, updates: Tensor) -> Tensor:
        """Return one update (P,) for the cohort's `updates` (m, P), ordered by client."""

    def accumulator(self, lengths: Mapping[str, int], clients: int, like: Tensor, counters: Tensor) -> Rows:
        """Return an empty collection of rows; see `Mean.accumulator`."""
        return Rows(self, lengths, clients, like, counters)


class Rows(Accumulator):
    """The contributions of this rank's clients, then, at the coordinator, of all ranks'."""

    rule: Robust

    def __init__(
        self, rule: Robust, lengths: Mapping[str, int], clients: int, like: Tensor, counters: Tensor
    ) -> None:
        """Start with none; see `Mean.accumulator`."""
        super().__init__(rule, {}, clients, like, counters)
        self.limit = math.inf  # nothing is summed
        self.size, self.length = lengths["update"], lengths["update"] + lengths.get("buffers", 0)
        self.rows: dict[int, Tensor] = {}

    def _take(self, client: int, vectors: Mapping[str, Tensor], weight: float, example_weight: float) -> None:
        """Keep one client's update and buffers, whatever its weights."""
        self.rows[client] = torch.cat([vectors["update"], vectors["buffers"]])

    def combine(self, world: World) -> None:
        """Collective. Bring all rows to the coordinator."""
        for rank, clients in enumerate(world.gather(sorted(self.rows))[1:], start=1):
            for client in clients:
                if world.rank == rank:
                    world.send(self.rows.pop(client), 0)
                elif world.is_coordinator:
                    self.rows[client] = self.like.new_empty(self.length)
                    world.receive(self.rows[client], rank)
        world.sum(self.counts)
        world.max(self.counters)

    def total(self) -> Total:
        """Return what the rule chooses, and the median of the buffers; of `Robust.least` rows or more."""
        rows = self._stacked()
        update = self.rule.choose(rows[:, : self.size]).to(self.like.dtype)
        return Total({"update": update, "buffers": _median(rows[:, self.size :])}, len(rows))

    def _stacked(self) -> Tensor:
        rows = [self.rows[client] for client in sorted(self.rows)]
        return torch.stack(rows) if rows else self.like.new_empty(0, self.length)

    def state(self) -> dict[str, Tensor]:
        """Return everything that a round stopped in the middle needs to go on."""
        clients = torch.tensor(sorted(self.rows), dtype=torch.int64)
        whole = {"counts": self.counts, "counters": self.counters}
        return {"clients": clients, "rows": self._stacked(), **whole}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` returned."""
        rows = state["rows"].to(self.like.device)
        self.rows = dict(zip(state["clients"].tolist(), rows, strict=True))
        self.counts.copy_(state["counts"])
        self.counters.copy_(state["counters"])


@dataclass(frozen=True, kw_only=True)
class CoordinateMedian(Robust):
    """The median of every coordinate (Yin et al., 2018, arXiv:1803.01498)."""

    def choose(self, updates: Tensor) -> Tensor:
        """Return the median along the cohort; of an even number, the mean of the middle two."""
        return _median(updates)


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(Robust):
    """The mean of every coordinate without its ⌊βm⌋ largest and ⌊βm⌋ smallest values (arXiv:1803.01498).

    Yin et al., 2018. It holds while at most ⌊βm⌋ of a round's m clients lie.
    """

    beta: float = 0.2
    """Part β cut off at each side, in [0, 0.5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta < 0.5:
            raise ValueError(f"beta must be in [0, 0.5), got {self.beta}; CoordinateMedian is its limit")

    def choose(self, updates: Tensor) -> Tensor:
        """Return the mean of what is left of every sorted column."""
        cut = math.floor(self.beta * len(updates) + 1e-9)  # 0.3 * 10 is 3, in floats too
        return _mean(updates.sort(0).values[cut : len(updates) - cut])


@dataclass(frozen=True, kw_only=True)
class Krum(Robust):
    """The update nearest to its neighbours (Blanchard et al., 2017, arXiv:1703.02757).

    Scores are the sums of the n − f − 2 smallest squared distances to the others; the least wins.
    """

    attackers: int = 1
    """Clients f of a round that may lie, >= 0; a round needs 2f + 3 clients."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attackers < 0:
            raise ValueError(f"attackers must be >= 0, got {self.attackers}")

    def least(self) -> int:
        """Return 2f + 3."""
        return 2 * self.attackers + 3

    def choose(self, updates: Tensor) -> Tensor:
        """Return the update with the least score."""
        return updates[_scores(_distances(updates), self.attackers).argmin()]


@dataclass(frozen=True, kw_only=True)
class MultiKrum(Krum):
    """The mean of the updates with the least Krum scores (Blanchard et al., 2017, arXiv:1703.02757)."""

    keep: int | None = None
    """Updates that are averaged, >= 1; by default n − f."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep must be >= 1, got {self.keep}; leave it out for all but the attackers")

    def choose(self, updates: Tensor) -> Tensor:
        """Return the mean of the best."""
        keep = self.keep or len(updates) - self.attackers
        best = _scores(_distances(updates), self.attackers).argsort(stable=True)[:keep]
        return _mean(updates[best.sort().values])


@dataclass(frozen=True, kw_only=True)
class Bulyan(Krum):
    """Krum again and again, then a trimmed mean around the median (El Mhamdi et al., 2018, arXiv:1802.07927).

    θ = n − 2f updates are chosen by Krum, one after the other among those left; of every coordinate the
    θ − 2f values nearest to the median are averaged.
    """

    attackers: int = 1
    """Clients f of a round that may lie, >= 0; a round needs 4f + 3 clients."""

    def least(self) -> int:
        """Return 4f + 3."""
        return 4 * self.attackers + 3

    def choose(self, updates: Tensor) -> Tensor:
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
class GeometricMedian(Robust):
    """The point with the least sum of distances to the updates (Pillutla et al., 2022, arXiv:1912.13445).

    By Weiszfeld's iteration from the coordinate median, unweighted; it holds while fewer than half lie.
    """

    def choose(self, updates: Tensor) -> Tensor:
        """Return the geometric median, to float32 precision where it converges."""
        rows = updates.double()
        point = _median(rows)
        for _ in range(WEISZFELD_STEPS):
            distances = torch.linalg.vector_norm(rows - point, dim=1)
            weights = 1 / distances.clamp_min(1e-12 + 1e-9 * float(distances.max()))
            point = (weights / weights.sum()) @ rows
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
