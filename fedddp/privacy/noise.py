"""Gaussian noise on the grid of the exact sums, from a named stream or from the operating system.

Whatever is added is a multiple of 2⁻⁴⁰, as the sums are. The low bits of floating-point noise, from which
values can be distinguished (Mironov, 2012), so do not exist.
"""

from __future__ import annotations

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
    if not sigma <= LARGEST_SIGMA:
        raise ValueError(
            f"privacy: noise of standard deviation {sigma:.3g} does not fit into exact sums, which hold "
            f"{LARGEST_SIGMA:g}; lower privacy.clip or the noise"
        )
    normal = secret_normal(length) if source == "secret" else stream(*name).standard_normal(length)
    return torch.from_numpy(np.rint(normal * (sigma / UNIT)).astype(np.int64))


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
