"""EDEN: a random rotation, then the best levels for what is then nearly Gaussian."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from annotated_types import Interval
from numpy.random import Generator
from torch import Tensor

from fedddp.transport import bits
from fedddp.transport.codec import Codec, split

BLOCK = 4096
"""Elements that are rotated together, a power of two."""
SMALLEST = 128
"""Elements of the smallest block, zeros included: a few elements rotated alone are not Gaussian either."""
ROTATIONS = 2
"""Hadamard transforms, each after random signs. After one alone a vector with few large elements is still
far from Gaussian, and the decoded vector is biased."""
CACHED = 1 << 17
"""Elements that are transformed at a time: they stay in the processor's cache."""

LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.7979,),
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1519),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}
"""The positive Lloyd-Max levels of a standard Gaussian by bits (Max, 1960); the negative ones mirror them."""


@dataclass(frozen=True, kw_only=True)
class EDEN(Codec):
    """Rotated at random, quantised to 1 to 4 bits, scaled to be unbiased (Vargaftik et al., 2022).

    arXiv:2108.08842; with one bit it is DRIVE (arXiv:2105.08339). x̂ = S·R⁻¹Q with S = ‖x‖²/⟨Rx, Q⟩ per block
    of 4096 elements; zeros fill up the last block to a power of two, 128 or more. R is twice a Hadamard
    transform after random signs, which follow from a seed in the payload. The error is 0.571, 0.133, 0.0358
    or 0.0096 of the squared norm for 1 to 4 bits, whatever the vector. Bytes: 8, 4 per block, and ⌈bits·d/8⌉
    of the filled-up d. NaN or infinity makes its block NaN.
    """

    bits: Annotated[int, Interval(ge=1, le=4)] = 4
    """Bits per element, in [1, 4]."""

    def pack(self, vector: Tensor, rng: Generator) -> list[Tensor]:
        """Return the seed of the rotation, the scales S, then the packed levels."""
        seed = int(rng.integers(2**63))
        levels = self._levels()
        edges = (levels[1:] + levels[:-1]) / 2
        scales, chosen = [], []
        for rows, signs in _blocks(vector, seed):
            rotated = rows.clone()
            for sign in signs:
                hadamard_(rotated.mul_(sign))
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
            unit = torch.where(norms == 0, 0.0, math.sqrt(rows.shape[1]) / norms).float()
            nearest = torch.bucketize(rotated * unit, edges)
            products = (rotated.double() * levels[nearest]).sum(1)
            # Of zeros nothing is left to scale.
            scales.append(torch.where(norms[:, 0] == 0, 0.0, norms[:, 0].square() / products).float())
            chosen.append(nearest.view(-1))
        return [torch.tensor([seed]), *scales, bits.pack(torch.cat(chosen), self.bits)]

    def unpack(self, body: Tensor, length: int) -> Tensor:
        """Rotate the scaled levels back."""
        (seed,), body = split(body, torch.int64, 1)
        shapes = _shapes(length)
        scales, packed = split(body, torch.float32, sum(count for count, _ in shapes))
        total = sum(count * size for count, size in shapes)
        values = self._levels()[bits.unpack(packed, self.bits, total).long()]
        for rows, signs in _blocks(values, int(seed), shapes):
            own, scales = scales[: len(rows)], scales[len(rows) :]
            rows.mul_(own[:, None])
            for sign in reversed(signs):
                hadamard_(rows).mul_(sign)
        return values[:length]

    def _levels(self) -> Tensor:
        """Return all levels in ascending order; (2^bits,)."""
        positive = torch.tensor(LEVELS[self.bits])
        return torch.cat([-positive.flip(0), positive])


def _shapes(length: int) -> list[tuple[int, int]]:
    """Return number and size of the full blocks, then of the last one, which is filled up."""
    full, rest = divmod(length, BLOCK)
    shapes = [(full, BLOCK)] if full else []
    return [*shapes, (1, max(SMALLEST, 1 << (rest - 1).bit_length()))] if rest else shapes


def _blocks(
    vector: Tensor, seed: int, shapes: list[tuple[int, int]] | None = None
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield the blocks of one size as rows (views of `vector` where it is full), with their random signs."""
    shapes = shapes or _shapes(len(vector))
    rng, start = np.random.Generator(np.random.PCG64(seed)), 0
    for count, size in shapes:
        total = count * size
        rows = vector[start : start + total]
        if len(rows) < total:
            rows = torch.cat([rows, rows.new_zeros(total - len(rows))])
        signs = []
        for _ in range(ROTATIONS):
            drawn = torch.from_numpy(rng.integers(0, 256, -(-total // 8), dtype=np.uint8))
            signs.append((1 - 2 * bits.unpack(drawn, 1, total).float()).view(count, size))
        yield rows.view(count, size), signs
        start += total


def hadamard_(rows: Tensor) -> Tensor:
    """Replace each row of `rows` (n, 2^j) by its Walsh-Hadamard transform over √(2^j), its own inverse."""
    size = rows.shape[1]
    for part in torch.split(rows, max(1, CACHED // size)):
        half = 1
        while half < size:
            pairs = part.view(len(part), -1, 2, half)
            first, second = pairs[:, :, 0], pairs[:, :, 1]
            difference = first - second
            first.add_(second)
            second.copy_(difference)
            half *= 2
    return rows.mul_(1 / math.sqrt(size))
