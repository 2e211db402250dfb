"""Clipping: the norm over all vectors that a client sends, and how the bound on it adapts."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fedddp.models.flat import norm
from fedddp.privacy.noise import UNIT

MOST_CHANGE = 50.0
"""Of the logarithm of C per round: `math.exp` overflows far above."""


def joint_norm(vectors: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm of `vectors`, concatenated; NaN or infinity if a value is."""
    lengths = [float(norm(vector)) for vector in vectors.values() if vector.numel()]
    return math.hypot(*lengths) if all(map(math.isfinite, lengths)) else math.nan


def factor_of(length: float, clip: float) -> float:
    """Return min(1, C/‖Δ‖) for a norm of `length`; 1 at 0."""
    return 1.0 if length <= clip else clip / length


def sensitivity(clip: float, elements: int) -> float:
    """Return C + u·√d/2, the largest norm of a clipped update of d `elements` that is rounded to the grid."""
    return clip + UNIT * math.sqrt(elements) / 2


def adapted(clip: float, share: float, *, quantile: float, lr: float, largest: float) -> float:
    """Return C·exp(−η_C(b̃ − γ)), at most `largest`: C falls where more than γ of the clients are unclipped.

    Args:
        clip: C.
        share: b̃, the noisy share of clients whose update is not longer than C.
        quantile: γ.
        lr: η_C.
        largest: what exact sums allow.
    """
    change = min(max(-lr * (share - quantile), -MOST_CHANGE), MOST_CHANGE)
    return min(max(clip * math.exp(change), UNIT), largest)
