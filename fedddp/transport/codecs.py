"""Codecs: how the vectors that clients send become fewer bytes, and vectors again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from numpy.random import Generator
from torch import Tensor

from fedddp.section import PositiveInt
from fedddp.transport import bits
from fedddp.transport.codec import Codec, in_rows, split, uniform
from fedddp.transport.eden import EDEN

__all__ = ["EDEN", "QSGD", "Cast", "Codec", "Int8", "Sign", "TopK"]

INT8_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class Cast(Codec):
    """The update in half precision, rounded to nearest; 2d bytes.

    It is applied to the update, never to the weights, whose small changes half precision would lose.
    """

    dtype: Literal["bf16", "fp16"] = "bf16"
    """bf16: 8 bits of precision and the range of float32; fp16: 11 bits, but infinite beyond 65504."""

    @property
    def _kind(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]

    def pack(self, vector: Tensor, rng: Generator) -> list[Tensor]:
        """Return the rounded elements."""
        return [vector.to(self._kind)]

    def unpack(self, body: Tensor, length: int) -> Tensor:
        """Widen the elements."""
        return split(body, self._kind, length)[0].float()


@dataclass(frozen=True, kw_only=True)
class Int8(Codec):
    """8 bits per element with a scale max|x|/127 per block of 256, stochastic rounding: unbiased.

    d + 4⌈d/256⌉ bytes. NaN or infinity makes its block NaN.
    """

    def pack(self, vector: Tensor, rng: Generator) -> list[Tensor]:
        """Return the scales, then the levels ⌊x/scale + u⌋, u uniform in [0, 1)."""
        rows = in_rows(vector, INT8_BLOCK)
        scales = rows.abs().amax(1, keepdim=True) / 127
        levels = (rows / scales).nan_to_num_(0.0, 0.0, 0.0)  # 0/0 in a block of zeros
        levels = levels.add_(uniform(rng, rows.numel()).view_as(rows)).floor_().clamp_(-127, 127)
        return [scales, levels.to(torch.int8).view(-1)[: len(vector)]]

    def unpack(self, body: Tensor, length: int) -> Tensor:
        """Multiply levels by their scales."""
        scales, levels = split(body, torch.float32, -(-length // INT8_BLOCK))
        rows = in_rows(levels.view(torch.int8).float(), INT8_BLOCK)
        return (rows * scales[:, None]).view(-1)[:length]


@dataclass(frozen=True, kw_only=True)
class QSGD(Codec):
    """‖v‖·sign(v)·ξ with ξ a multiple of 1/s by stochastic rounding: unbiased (Alistarh et al., 2017).

    arXiv:1610.02132; applied to the update after local training it is FedPAQ's (arXiv:1909.13014). Each of
    the 2s + 1 symbols takes ⌈log2(2s + 1)⌉ bits, and each norm 4 bytes: a fixed width, not Elias codes, so
    that the length is known in advance. NaN or infinity makes its bucket NaN.
    """

    levels: Annotated[int, Interval(ge=1, le=32767)] = 16
    """s, in [1, 32767]; 1, 3, 7, 15, 127 are the most that 2, 3, 4, 5, 8 bits per element hold."""

    bucket: PositiveInt | None = None
    """Elements that share a norm, >= 1; none: all. The error is at most √bucket/s of the squared norm."""

    @property
    def _bits(self) -> int:
        return (2 * self.levels).bit_length()

    def pack(self, vector: Tensor, rng: Generator) -> list[Tensor]:
        """Return the norms, then the packed symbols sign·level + s."""
        rows = in_rows(vector, self.bucket or len(vector))
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).float()
        ratios = (rows.abs() / norms).nan_to_num_(0.0, 0.0, 0.0)  # 0/0 in a bucket of zeros
        ratios = ratios.mul_(self.levels).add_(uniform(rng, rows.numel()).view_as(rows))
        levels = ratios.floor_().clamp_(max=self.levels).copysign_(rows).add_(self.levels)
        symbols = levels.to(torch.int32).view(-1)[: len(vector)]
        return [norms, bits.pack(symbols, self._bits)]

    def unpack(self, body: Tensor, length: int) -> Tensor:
        """Multiply levels by their norm over s."""
        size = self.bucket or length
        norms, packed = split(body, torch.float32, -(-length // size))
        levels = bits.unpack(packed, self._bits, length).float() - self.levels
        return (in_rows(levels, size) * (norms / self.levels)[:, None]).view(-1)[:length]


@dataclass(frozen=True, kw_only=True)
class TopK(Codec):
    """The k elements of largest magnitude, with error feedback (Stich et al., 2018, arXiv:1809.07599).

    Values in float32, 4k bytes, then their places: ⌈log2 d⌉ bits each, or a bit per element of the vector
    where that is shorter. With k = d there are no places.
    """

    error_feedback: ClassVar[bool] = True

    fraction: Annotated[float, Interval(gt=0, le=1)] = 0.01
    """Share of the elements that is sent, in (0, 1]; 1 sends all."""

    k: PositiveInt | None = None
    """Elements that are sent, >= 1, instead of a share."""

    def count(self, length: int) -> int:
        """Return how many of `length` elements are sent, at least 1."""
        return min(length, self.k or max(1, round(self.fraction * length)))

    def pack(self, vector: Tensor, rng: Generator) -> list[Tensor]:
        """Return the largest elements in their order, then their places."""
        length, k = len(vector), self.count(len(vector))
        if k == length:
            return [vector]
        places = torch.topk(vector.abs(), k, sorted=False).indices.sort().values
        width = (length - 1).bit_length()
        if k * width < length:
            return [vector[places], bits.pack(places, width)]
        chosen = torch.zeros(length, dtype=torch.uint8)
        chosen[places] = 1
        return [vector[places], bits.pack(chosen, 1)]

    def unpack(self, body: Tensor, length: int) -> Tensor:
        """Put the elements in their places, zeros elsewhere."""
        k, width = self.count(length), (length - 1).bit_length()
        values, packed = split(body, torch.float32, k)
        if k == length:
            return values
        if k * width < length:
            places = bits.unpack(packed, width, k).long()
        else:
            places = bits.unpack(packed, 1, length).nonzero().view(-1)
        return torch.zeros(length).index_copy_(0, places, values)


@dataclass(frozen=True, kw_only=True)
class Sign(Codec):
    """(‖p‖₁/d)·sign(p), a bit per element, with error feedback (Karimireddy et al., 2019, arXiv:1901.09847).

    4 + ⌈d/8⌉ bytes. The sign of 0 is +1. NaN or infinity makes the whole vector NaN or infinite.
    """

    error_feedback: ClassVar[bool] = True

    def pack(self, vector: Tensor, rng: Generator) -> list[Tensor]:
        """Return the scale, then a bit for each element below 0."""
        scale = vector.abs().mean(dtype=torch.float64).float().view(1)
        return [scale, bits.pack((vector < 0), 1)]

    def unpack(self, body: Tensor, length: int) -> Tensor:
        """Give the scale its signs."""
        scale, packed = split(body, torch.float32, 1)
        return scale * (1 - 2 * bits.unpack(packed, 1, length).float())
