"""The interface of aggregation rules, and the admission of client updates that comes before any of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedddp.algorithms.algorithm import AggregatedUpdate, ClientUpdate
from fedddp.distributed.world import World
from fedddp.models.flat import norm
from fedddp.section import PositiveFloat, Section


class InvalidUpdateError(ValueError):
    """A client's update is not finite, or too large to be summed exactly."""


@dataclass(frozen=True)
class AdmittedUpdate:
    """A client's update as it enters the aggregation."""

    vectors: dict[str, Tensor] | None
    """The vectors to aggregate, with "buffers" among them; None when the client is left out."""
    valid: bool
    """Whether all that the client sent was finite and could be summed."""
    clipped: bool
    """Whether its update was longer than `clip_norm`."""
    largest: float = math.inf
    """No weighted magnitude exceeds it."""


@dataclass(frozen=True, kw_only=True)
class Aggregation(Section, ABC):
    """How the client updates of a round become one; what they are clipped to, and which are invalid."""

    key = "aggregation"
    chosen_by_name = True

    robust: ClassVar[bool] = False
    """Whether the rule needs the updates apart, and so a whole cohort of them."""

    @property
    def bytes_per_element(self) -> int:
        """Bytes per parameter that a rank's accumulator holds; of a robust rule per client."""
        return 4

    @property
    def any_grouping(self) -> bool:
        """Whether the result has the same bits whichever group trains a client."""
        return True

    clip_norm: PositiveFloat | None = None
    """Largest Euclidean norm of a client's update, > 0; longer ones are scaled down; none: not clipped."""

    on_invalid_update: Literal["stop", "skip", "clip"] = "stop"
    """What to do with NaN, infinity or overflow in an update: end the run, leave the client out, or
    replace what is not finite by 0 and clip the rest."""

    def min_clients(self) -> int:
        """Return the fewest clients of a round that the rule can aggregate."""
        return 1

    @abstractmethod
    def accumulator(
        self, lengths: Mapping[str, int], clients: int, like: Tensor, integer_buffers: Tensor
    ) -> Accumulator:
        """Return an empty accumulator for a cohort of at most `clients` clients.

        Args:
            lengths: length of each vector of an update, and of the float "buffers", by name.
            clients: size of the cohort.
            like: a vector with the dtype and device of the model.
            integer_buffers: the model's integer buffers, which are aggregated by maximum.
        """

    def admit(
        self,
        client: int,
        update: ClientUpdate,
        buffers: Tensor,
        *,
        example_weight: float = 1.0,
        loss: float = 0.0,
        limit: float = math.inf,
    ) -> AdmittedUpdate:
        """Clip and check one client's update and buffers.

        Args:
            client: the client.
            update: what it sends.
            buffers: its float buffers; (B,).
            example_weight: what `buffers` will be multiplied by.
            loss: its training loss, which must be finite too.
            limit: largest weighted value that can be summed.

        Raises:
            InvalidUpdateError: NaN, infinity or overflow, and `on_invalid_update` is "stop".
        """
        vectors = {**update.vectors, "buffers": buffers}
        clipped = self._clip_norm(vectors)
        weights = dict.fromkeys(vectors, update.weight) | {"buffers": example_weight}
        bound = _bound(vectors, weights)
        # The bound is cheap; the largest value itself decides near the limit.
        largest = bound if bound < limit else _largest(vectors, weights)
        valid = largest < limit and math.isfinite(loss)
        if not valid and self.on_invalid_update == "stop":
            raise InvalidUpdateError(_describe(client, largest, limit, loss))
        if not valid and self.on_invalid_update == "skip":
            return AdmittedUpdate(None, valid=False, clipped=False)
        if not valid:
            for name, vector in vectors.items():
                bound = min(limit / max(abs(weights[name]), 1e-12), torch.finfo(vector.dtype).max) / 2
                vectors[name] = torch.nan_to_num(vector, 0.0, 0.0, 0.0).clamp(-bound, bound)
            largest, clipped = limit, self._clip_norm(vectors) or clipped
        return AdmittedUpdate(vectors, valid=valid, clipped=clipped, largest=largest)

    def _clip_norm(self, vectors: dict[str, Tensor]) -> bool:
        """Shorten the update to `clip_norm`; return whether it was longer."""
        if self.clip_norm is None:
            return False
        length = float(norm(vectors["update"]))
        clipped = self.clip_norm < length < math.inf
        if clipped:
            vectors["update"] = vectors["update"] * (self.clip_norm / length)
        return clipped


class Accumulator(ABC):
    """The updates of this rank's clients, then of all ranks'; subclasses say how they are kept."""

    limit = math.inf
    """Largest weighted value that can be taken in."""

    def __init__(self, rule: Aggregation, like: Tensor, integer_buffers: Tensor) -> None:
        self.rule, self.like = rule, like
        self.counts = torch.zeros(3, dtype=torch.int64)
        """Updates that were aggregated, invalid, clipped; on the CPU."""
        self.integer_buffers = torch.full_like(integer_buffers, torch.iinfo(torch.int64).min)

    def min_clients(self) -> int:
        """Return the fewest updates that can be aggregated."""
        return self.rule.min_clients()

    @abstractmethod
    def reset(self, clients: int) -> None:
        """Start over for a cohort of at most `clients`; the memory is kept."""
        self.counts.zero_()
        self.integer_buffers.fill_(torch.iinfo(torch.int64).min)

    def add(
        self,
        client: int,
        update: ClientUpdate,
        buffers: Tensor,
        example_weight: float,
        integer_buffers: Tensor,
        loss: float = 0.0,
        trained: tuple[float, int] = (0.0, 0),
        *,
        clipped: bool = False,
    ) -> bool:
        """Add one client's update, and its buffers by example weight; see `Aggregation.admit`.

        `trained` is on how many examples, and steps, it trained: sums that are masked add these up too.
        `clipped` is whether the update was longer than `privacy.clip` before.

        Returns:
            Whether it was valid; else its state must not be kept.

        Raises:
            InvalidUpdateError: NaN, infinity or overflow, and `on_invalid_update` is "stop".
        """
        admitted = self.rule.admit(
            client, update, buffers, example_weight=example_weight, loss=loss, limit=self.limit
        )
        counts = self.counts.numpy()  # faster element by element than the tensor
        counts[1] += not admitted.valid
        counts[2] += admitted.clipped or (clipped and admitted.valid)
        if admitted.vectors is not None:
            taken = self._take(client, admitted.vectors, update.weight, example_weight, admitted.largest)
            counts[0] += taken
            if integer_buffers.numel():
                torch.maximum(self.integer_buffers, integer_buffers, out=self.integer_buffers)
        return admitted.valid

    @abstractmethod
    def _take(
        self,
        client: int,
        vectors: Mapping[str, Tensor],
        weight: float,
        example_weight: float,
        largest: float,
    ) -> bool:
        """Take in the admitted vectors of one client; return whether they count.

        Args:
            client: the client.
            vectors: its update and its float "buffers", by name.
            weight: of the update.
            example_weight: of the buffers.
            largest: no weighted magnitude exceeds it.
        """

    def reduce(self, world: World) -> None:
        """Collective. Bring together what all ranks took in, but for `numbers`."""
        world.max(self.integer_buffers)

    def numbers(self) -> list[Tensor]:
        """Return the small tensors that are summed over the ranks with others in one message."""
        return [self.counts]

    @abstractmethod
    def result(self) -> AggregatedUpdate:
        """Return the aggregated update; on the coordinator, after `reduce`."""

    def state(self) -> dict[str, Tensor]:
        """Return all that a round stopped before its end needs to be resumed."""
        return {"counts": self.counts, "integer_buffers": self.integer_buffers}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the `state` of a stopped round."""
        self.counts.copy_(state["counts"])
        self.integer_buffers.copy_(state["integer_buffers"])


def _bound(vectors: Mapping[str, Tensor], weights: Mapping[str, float]) -> float:
    """Return what no weighted magnitude exceeds, by way of the norms; NaN or infinity if a value is."""
    bounds = []
    for name, vector in vectors.items():
        length = math.sqrt(float(torch.dot(flat := vector.flatten(), flat))) if vector.numel() else 0.0
        # Twice, for rounding, and a little more, for squares that underflow.
        bounds.append(2 * (length + 1e-15) * max(abs(weights[name]), 1e-300))
    return max(bounds, default=0.0) if all(map(math.isfinite, bounds)) else math.nan


def _largest(vectors: Mapping[str, Tensor], weights: Mapping[str, float]) -> float:
    """Return the largest weighted magnitude; NaN or infinity if a value is."""
    largest = [
        torch.stack(vector.aminmax()).abs().amax().double() * max(abs(weights[name]), 1e-300)
        for name, vector in vectors.items()
        if vector.numel()
    ]
    return float(torch.stack(largest).amax()) if largest else 0.0


def _describe(client: int, largest: float, limit: float, loss: float) -> str:
    fix = "lower local.lr, set local.clip_norm, or choose aggregation.on_invalid_update=skip"
    if not math.isfinite(loss):
        what = f"training loss became {loss}"
    elif not math.isfinite(largest):
        what = "update has NaN or infinite values"
    else:
        what = f"weighted update reaches {largest:.3g}, beyond the {limit:.3g} that sums hold"
        fix = f"{fix}, or aggregation.sums=float32" if limit < 2.0**62 else fix
    return f"client {client}: its {what}; {fix}"
