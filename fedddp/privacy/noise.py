"""Gaussian noise on the grid of the exact sums, from a named stream or from the operating system.

Whatever is added is a multiple of 2⁻⁴⁰, as the sums are. The low bits of floating-point noise, from which
values can be distinguished (Mironov, 2012), so do not exist.
"""

from __future__ import annotations

import math
import os
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedddp.aggregation.mean import FRACTION_BITS
from fedddp.rng import stream

UNIT = 2.0**-FRACTION_BITS
"""u, the distance of two values of the grid."""

LARGEST_SIGMA = 2.0**18
"""Largest standard deviation; ten of it and a sum of clipped updates fit into an int64."""

DITHER = 2.0**-20
"""Width, in σ, of the uniform noise that makes the low bits of secret noise uniform."""

Floats = NDArray[np.float64]


def grid_noise(
    length: int, sigma: float, source: Literal["seeded", "secret"], name: tuple[int | str, ...]
) -> Tensor:
    """Return round(N(0, σ²)/u), in units of the grid; (length,) int64, on the CPU.

    Args:
        length: number of draws.
        sigma: σ, in [0, `LARGEST_SIGMA`].
        source: of the randomness.
        name: of the stream, if `seeded`: no two releases have the same.

    Raises:
        ValueError: σ is too large for the grid.
    """
    check_sigma(sigma)
    normal = secret_normal(length) if source == "secret" else stream(*name).standard_normal(length)
    units = np.rint(normal * (sigma / UNIT)).astype(np.int64)
    return torch.from_numpy(units + secret_dither(length, sigma) if source == "secret" else units)


def check_sigma(sigma: float) -> None:
    """Raise ValueError where noise of standard deviation `sigma` is too large for the grid."""
    if not sigma <= LARGEST_SIGMA:
        raise ValueError(
            f"privacy: noise of standard deviation {sigma:.3g} does not fit into exact sums, which hold "
            f"{LARGEST_SIGMA:g}; lower privacy.clip or the noise"
        )


def secret_seed() -> int:
    """Return 63 bits from the operating system's random source, to name streams by that are kept nowhere."""
    return int.from_bytes(os.urandom(8), "little") >> 1


def secret_normal(length: int) -> Floats:
    """Return N(0, 1) from the operating system's random source; (length,) float64. No key is kept.

    By Box and Muller from integers of 53 bits: 8.6 standard deviations at most.
    """
    pairs = -(-length // 2)
    integers = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64) >> np.uint64(11)
    uniform = (integers.astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:length]


def secret_dither(length: int, sigma: float) -> NDArray[np.int64]:
    """Return uniform noise of width 2^-20·σ at most, a power of two, in units of the grid; (length,) int64.

    A float64 has 53 bits: noise above 2^13 would be even in units of the grid, and its last bits would show
    those of the sum. Added to it, this makes them uniform, and only adds to the noise.
    """
    bits = int(math.log2(max(DITHER * sigma / UNIT, 1.0)))
    drawn = np.frombuffer(os.urandom(8 * length), dtype=np.uint64).view(np.int64)
    return (drawn & ((1 << bits) - 1)) - (1 << bits >> 1)
