"""The weighted mean of a cohort's contributions, exact whatever the order and the grouping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedddp.algorithms.algorithm import Contribution, Total
from fedddp.distributed.world import World
from fedddp.models.flat import norm

FRACTION_BITS = 40
"""One unit of the fixed-point sums is 2^-40; with weights that sum to 1 a mean may reach 2^22."""

CACHED = 1 << 15
"""Numbers of a vector that are added at a time on a CPU."""


class InvalidUpdateError(ValueError):
    """A client's contribution is not finite, or too large to be summed exactly."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Weighted mean of the contributions; additive, so memory and traffic do not grow with the cohort."""

    sums: Literal["exact", "float32"] = "exact"
    """`exact`: int64 fixed point, the same bits for any grouping; `float32`: half the memory and traffic."""

    clip_norm: float | None = None
    """Largest Euclidean norm of a client's update, > 0; longer ones are scaled down to it."""

    on_invalid_update: Literal["stop", "skip", "clip"] = "stop"
    """What to do with NaN, infinity or overflow in an update: end the run, leave the client out, or
    replace what is not finite by 0 and cut the rest."""

    def __post_init__(self) -> None:
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be > 0, got {self.clip_norm}; leave it out for no clipping")

    def least(self) -> int:
        """Return the fewest clients of a round that the rule can combine."""
        return 1

    def accumulator(
        self, lengths: Mapping[str, int], clients: int, like: Tensor, counters: Tensor
    ) -> Accumulator:
        """Return an empty accumulator for a cohort of at most `clients` clients.

        Args:
            lengths: length of each additive vector, by name.
            clients: size of the cohort.
            like: a vector with the dtype and device of the model.
            counters: the model's integer buffers, which are combined by maximum.
        """
        return Accumulator(self, lengths, clients, like, counters)

    def admit(
        self,
        client: int,
        contribution: Contribution,
        buffers: Tensor,
        *,
        example_weight: float = 1.0,
        loss: float = 0.0,
        limit: float = math.inf,
    ) -> Admitted:
        """Return what of one client's contribution, and of its buffers, goes into the sums.

        Args:
            client: whose it is.
            contribution: what it sends.
            buffers: its float buffers; (B,).
            example_weight: what `buffers` will be multiplied by.
            loss: its training loss, which must be finite too.
            limit: largest weighted value that can be summed.

        Raises:
            InvalidUpdateError: NaN, infinity or overflow, and the rule is to stop.
        """
        vectors, clipped = {**contribution.vectors, "buffers": buffers}, False
        if self.clip_norm is not None:
            length = float(norm(vectors["update"]))
            clipped = self.clip_norm < length < math.inf
            if clipped:
                vectors["update"] = vectors["update"] * (self.clip_norm / length)
        weights = dict.fromkeys(vectors, contribution.weight) | {"buffers": example_weight}
        largest = _largest(vectors, weights)
        valid = largest < limit and math.isfinite(loss)
        if not valid and self.on_invalid_update == "stop":
            raise InvalidUpdateError(_describe(client, largest, limit, loss))
        if not valid and self.on_invalid_update == "skip":
            return Admitted(None, valid=False, clipped=False)
        if not valid:
            for name, vector in vectors.items():
                bound = min(limit, torch.finfo(vector.dtype).max) / 2 / max(weights[name], 1e-12)
                vectors[name] = torch.nan_to_num(vector, 0.0, 0.0, 0.0).clamp(-bound, bound)
        return Admitted(vectors, valid=valid, clipped=clipped)


@dataclass(frozen=True)
class Admitted:
    """A contribution as the rule lets it into the sums."""

    vectors: dict[str, Tensor] | None
    """The vectors to add, with "buffers" among them; None when the client is left out."""
    valid: bool
    """Whether all that the client sent was finite and could be summed."""
    clipped: bool
    """Whether its update was longer than `clip_norm`."""


class Accumulator:
    """Sums of weighted contributions of this rank's clients, then of all ranks'."""

    def __init__(
        self, rule: Mean, lengths: Mapping[str, int], clients: int, like: Tensor, counters: Tensor
    ) -> None:
        """Start at zero; see `Mean.accumulator`."""
        self.rule = rule
        self.like = like
        self.exact = rule.sums == "exact"
        # Weighted values below the limit cannot make the sum over the cohort overflow.
        self.limit = (2.0 ** (62 - FRACTION_BITS) if self.exact else 2.0**126) / max(1, clients)
        dtype = torch.int64 if self.exact else torch.float32
        self.sums = {
            name: torch.zeros(length, dtype=dtype, device=like.device)
            for name, length in {**lengths, "buffers": lengths.get("buffers", 0)}.items()
        }
        # Weights and counts stay on the CPU: they are read as numbers after every round.
        self.weights = torch.zeros(2, dtype=torch.int64)
        self.counts = torch.zeros(3, dtype=torch.int64)  # contributions, invalid, clipped
        self.counters = torch.zeros_like(counters)

    def add(
        self,
        client: int,
        contribution: Contribution,
        buffers: Tensor,
        example_weight: float,
        counters: Tensor,
        loss: float = 0.0,
    ) -> bool:
        """Add one client's contribution, and its buffers by example weight; see `Mean.admit`.

        Returns:
            Whether it was valid; else nothing that the client learned is to be trusted.

        Raises:
            InvalidUpdateError: NaN, infinity or overflow, and the rule is to stop.
        """
        admitted = self.rule.admit(
            client, contribution, buffers, example_weight=example_weight, loss=loss, limit=self.limit
        )
        self.counts[1] += int(not admitted.valid)
        self.counts[2] += int(admitted.clipped)
        if admitted.vectors is not None:
            self._take(client, admitted.vectors, contribution.weight, example_weight)
            self.counts[0] += 1
            torch.maximum(self.counters, counters, out=self.counters)
        return admitted.valid

    def _take(self, client: int, vectors: Mapping[str, Tensor], weight: float, example_weight: float) -> None:
        """Take in what was admitted of one client."""
        for name, vector in vectors.items():
            self._add(name, vector, example_weight if name == "buffers" else weight)
        self.weights += torch.tensor([_fixed(weight), _fixed(example_weight)])

    def _add(self, name: str, vector: Tensor, weight: float) -> None:
        if not vector.numel():
            return
        if self.exact:
            # Piece by piece: on a CPU the float64 and int64 copies stay in the cache.
            size = CACHED if vector.device.type == "cpu" else vector.numel()
            pieces = zip(torch.split(vector, size), torch.split(self.sums[name], size), strict=True)
            for piece, summed in pieces:
                summed.add_(piece.double().mul_(weight * 2.0**FRACTION_BITS).round_().to(torch.int64))
        else:
            self.sums[name].add_(vector, alpha=weight)

    def combine(self, world: World) -> None:
        """Collective. Replace the sums of this rank by those of all ranks."""
        world.sum(*self.sums.values(), self.weights, self.counts)
        world.max(self.counters)

    def total(self) -> Total:
        """Return the weighted means; of the combined sums, if `combine` was called."""
        weight, example_weight = (int(w) / 2.0**FRACTION_BITS for w in self.weights)
        means = {}
        for name, summed in self.sums.items():
            divisor = example_weight if name == "buffers" else weight
            if self.exact:
                divisor *= 2.0**FRACTION_BITS
            means[name] = (summed.double() / divisor).to(self.like.dtype) if divisor else None
        return Total({n: v for n, v in means.items() if v is not None}, int(self.counts[0]))

    def state(self) -> dict[str, Tensor]:
        """Return everything that a round stopped in the middle needs to go on."""
        extra = {"weights": self.weights, "counts": self.counts, "counters": self.counters}
        return {**{f"sum.{name}": summed for name, summed in self.sums.items()}, **extra}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` returned."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def _fixed(value: float) -> int:
    return round(value * 2.0**FRACTION_BITS)


def _largest(vectors: Mapping[str, Tensor], weights: Mapping[str, float]) -> float:
    """Return the largest weighted magnitude; NaN or infinity if a value is."""
    largest = [
        torch.stack(vector.aminmax()).abs().amax().double() * max(weights[name], 1e-300)
        for name, vector in vectors.items()
        if vector.numel()
    ]
    return float(torch.stack(largest).amax()) if largest else 0.0


def _describe(client: int, largest: float, limit: float, loss: float) -> str:
    if not math.isfinite(loss):
        what = f"training loss became {loss}"
    elif not math.isfinite(largest):
        what = "update has NaN or infinite values"
    else:
        what = f"update reaches {largest:.3g}, beyond {limit:.3g}"
    return (
        f"client {client}: its {what}; lower local.lr, set local.clip_norm, or choose "
        "aggregation.on_invalid_update=skip"
    )
