"""The Gaussian mechanism in closed form: δ(ε), and its inverses, for any number of compositions.

Noise N(0, σ²I) on a sum of sensitivity S is μ-Gaussian differentially private with μ = S/σ, and T of them
are so with μ = √T·S/σ (Dong et al., 2022, arXiv:1905.02383). All here follows from one formula:
δ(ε) = Φ(−ε/μ + μ/2) − e^ε·Φ(−ε/μ − μ/2) (Balle and Wang, 2018, arXiv:1805.06530, theorem 8).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

BISECTIONS = 200
"""Halvings of an interval; more change no bit of a float64."""


def delta_of(epsilon: float, mu: float) -> float:
    """Return the smallest δ of a mechanism with μ = `mu` > 0, for ε = `epsilon` >= 0."""
    ratio = epsilon / mu
    first, second = torch.special.log_ndtr(
        torch.tensor([mu / 2 - ratio, -mu / 2 - ratio], dtype=torch.float64)
    ).tolist()
    return math.exp(first) - math.exp(min(epsilon + second, 0.0))


def epsilon_of(mu: float, delta: float) -> float:
    """Return the smallest ε >= 0 of a mechanism with μ = `mu` >= 0, for `delta` in (0, 1)."""
    if mu == 0 or delta_of(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while delta_of(high, mu) > delta:
        high *= 2
    return _first(lambda epsilon: delta_of(epsilon, mu) <= delta, 0.0, high)


def mu_of(epsilon: float, delta: float) -> float:
    """Return the largest μ with which a mechanism is (`epsilon`, `delta`)-differentially private.

    The noise of a sum of sensitivity S then has σ = S/μ: the analytic Gaussian mechanism of Balle and Wang.
    `epsilon` is > 0, `delta` in (0, 1).
    """
    high = 1.0
    while delta_of(epsilon, high) <= delta:
        high *= 2
    return 1 / _first(lambda inverse: delta_of(epsilon, 1 / inverse) <= delta, 1 / high, 1e9)


def _first(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return where `holds` begins to hold between `low`, where it does not, and `high`, where it does."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
