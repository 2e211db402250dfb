"""The weighted mean of a cohort's updates, exact in any order and any grouping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedddp.aggregation.aggregation import Accumulator, Aggregation
from fedddp.algorithms.algorithm import AggregatedUpdate
from fedddp.distributed.world import World

FRACTION_BITS = 40
"""One unit of the fixed-point sums is 2^-40; with weights that sum to 1 a mean may reach 2^22."""

CACHED = 1 << 17
"""Elements of a vector that are added at a time on a CPU, where they then stay in the cache."""

SMALL = 1 << 18
"""Elements of sums that travel with a round's numbers, where CPUs send both: another message takes longer."""

SHIFT = 1.5 * 2.0 ** (52 - FRACTION_BITS)
"""Added to a float64 value below `SHIFTABLE`, it leaves the rounded fixed-point value in the low bits."""
SHIFT_BITS = int(torch.tensor(SHIFT, dtype=torch.float64).view(torch.int64))
SHIFTABLE = 2.0 ** (50 - FRACTION_BITS)


@dataclass(frozen=True, kw_only=True)
class Mean(Aggregation):
    """Weighted mean of the updates; additive, so memory and traffic do not grow with the cohort."""

    sums: Literal["exact", "float32"] = "exact"
    """`exact`: int64 fixed point, the same bits for any grouping; `float32`: half the memory and traffic."""

    @property
    def bytes_per_element(self) -> int:
        """Bytes per parameter of the sums."""
        return 8 if self.sums == "exact" else 4

    @property
    def any_grouping(self) -> bool:
        """Whether the sums are exact."""
        return self.sums == "exact"

    def accumulator(
        self, lengths: Mapping[str, int], clients: int, like: Tensor, integer_buffers: Tensor
    ) -> Sums:
        """Return empty sums; arguments as for `Aggregation.accumulator`."""
        return Sums(self, lengths, clients, like, integer_buffers)


class Sums(Accumulator):
    """Sums of weighted updates, in fixed point or in float32."""

    rule: Mean

    def __init__(
        self, rule: Mean, lengths: Mapping[str, int], clients: int, like: Tensor, integer_buffers: Tensor
    ) -> None:
        """Start at zero; arguments as for `Aggregation.accumulator`."""
        super().__init__(rule, like, integer_buffers)
        self.exact = rule.sums == "exact"
        self.limit = self._limit(clients)
        dtype = torch.int64 if self.exact else torch.float32
        self.sums = {
            name: torch.zeros(length, dtype=dtype, device=like.device)
            for name, length in {**lengths, "buffers": lengths.get("buffers", 0)}.items()
        }
        self.shifts = dict.fromkeys(self.sums, 0)
        """How often `SHIFT` is contained in each vector's sums, until `reduce`."""
        self.small_sums: list[Tensor] = []
        """The sums, from `reduce` on, where they travel with `numbers`."""
        self.scratch = torch.empty(0, dtype=torch.float64)
        self.weights = torch.zeros(2, dtype=torch.int64)
        """Sums of the weights and of the example weights; on the CPU, where they are read every round."""

    def _limit(self, clients: int) -> float:
        """Return the weighted value below which the sum over a cohort cannot overflow."""
        return (2.0 ** (62 - FRACTION_BITS) if self.exact else 2.0**126) / max(1, clients)

    def reset(self, clients: int) -> None:
        """Start over at zero."""
        super().reset(clients)
        self.limit = self._limit(clients)
        for tensor in (*self.sums.values(), self.weights):
            tensor.zero_()
        self.shifts = dict.fromkeys(self.sums, 0)

    def _take(
        self,
        client: int,
        vectors: Mapping[str, Tensor],
        weight: float,
        example_weight: float,
        largest: float,
    ) -> bool:
        """Add the weighted vectors."""
        for name, vector in vectors.items():
            factor = example_weight if name == "buffers" else weight
            if not self.exact:
                self.sums[name].add_(vector, alpha=factor)
            elif vector.numel():
                self._add_exactly(name, vector, factor, shiftable=largest < SHIFTABLE)
        self.weights.numpy()[:] += (_fixed(weight), _fixed(example_weight))  # faster than by torch
        return True

    def _add_exactly(self, name: str, vector: Tensor, weight: float, *, shiftable: bool) -> None:
        """Add `vector` in fixed point: its bits once `SHIFT` is added, or rounded where it is too large."""
        self.shifts[name] += int(shiftable)
        if shiftable and vector.device.type == "cpu":
            self._add_by_numpy(self.sums[name].numpy(), vector.numpy(), weight)
            return
        for piece, summed in self._pieces(vector, self.sums[name]):
            if shiftable:
                summed.add_(self._widened(piece).mul_(weight).add_(SHIFT).view(torch.int64))
            else:
                scaled = self._widened(piece).mul_(weight * 2.0**FRACTION_BITS)
                summed.add_(scaled.round_().to(torch.int64))

    def _add_by_numpy(self, total: NDArray[np.int64], vector: NDArray[Any], weight: float) -> None:
        """Add `vector` (n,), whose values are shiftable, to `total` (n,): torch multiplies when it adds."""
        space = self._space(min(len(vector), CACHED)).numpy()
        for start in range(0, len(vector), CACHED):
            piece = slice(start, start + CACHED)
            values = vector[piece]
            wide = space[: len(values)]
            np.copyto(wide, values)  # to widen and multiply at once would go through a buffer of NumPy's
            np.multiply(wide, weight, out=wide)
            np.add(wide, SHIFT, out=wide)
            np.add(total[piece], wide.view(np.int64), out=total[piece])

    def _pieces(self, first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut two vectors up alike."""
        size = CACHED if first.device.type == "cpu" else max(1, first.numel())
        return zip(torch.split(first, size), torch.split(second, size), strict=True)

    def _space(self, length: int) -> Tensor:
        """Return float64 memory of that length, of use until the next call."""
        if self.scratch.numel() < length:
            self.scratch = torch.empty(length, dtype=torch.float64, device=self.like.device)
        return self.scratch[:length]

    def _widened(self, piece: Tensor) -> Tensor:
        """Copy `piece` into float64, where it stays until the next call."""
        return self._space(piece.numel()).copy_(piece)

    def _remove_shifts(self) -> None:
        for name, shifts in self.shifts.items():
            if shifts:
                self.sums[name].sub_((shifts * SHIFT_BITS + 2**63) % 2**64 - 2**63)  # int64 wraps around
                self.shifts[name] = 0

    def reduce(self, world: World) -> None:
        """Collective. Replace the sums of this rank by those of all ranks, but for `numbers`."""
        self._remove_shifts()
        sums = list(self.sums.values())
        small = self.exact and sum(len(s) for s in sums) <= SMALL
        self.small_sums = sums if small and world.all_send_sums_from_cpu else []
        if not self.small_sums:
            world.sum_held(*sums)
        super().reduce(world)

    def numbers(self) -> list[Tensor]:
        """Return the counts and the weights, and small sums."""
        return [*super().numbers(), self.weights, *self.small_sums]

    def result(self) -> AggregatedUpdate:
        """Return the weighted means."""
        weight, example_weight = (int(w) / 2.0**FRACTION_BITS for w in self.weights)
        self._remove_shifts()
        means = {}
        for name, summed in self.sums.items():
            divisor = example_weight if name == "buffers" else weight
            if self.exact:
                divisor *= 2.0**FRACTION_BITS
            if divisor:
                means[name] = torch.empty_like(summed, dtype=self.like.dtype)
                for mean, piece in self._pieces(means[name], summed):
                    mean.copy_(self._widened(piece).div_(divisor))
        return AggregatedUpdate(means, int(self.counts[0]))

    def state(self) -> dict[str, Tensor]:
        """Return the sums and their weights."""
        self._remove_shifts()
        sums = {f"sum.{name}": summed for name, summed in self.sums.items()}
        return {**super().state(), **sums, "weights": self.weights}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the `state` of a stopped round."""
        super().load(state)
        self.weights.copy_(state["weights"])
        for name, summed in self.sums.items():
            summed.copy_(state[f"sum.{name}"])


def _fixed(value: float) -> int:
    return round(value * 2.0**FRACTION_BITS)
