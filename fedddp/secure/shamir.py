"""Shamir's secret sharing (1979) over the prime field of p = 2^521 − 1."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**521 - 1
"""A Mersenne prime, larger than any secret of 32 bytes."""


def split(secret: int, threshold: int, points: Sequence[int], prime: int = PRIME) -> dict[int, int]:
    """Return shares of `secret`, of which any `threshold` recover it and fewer reveal nothing.

    The coefficients are random from the operating system.

    Args:
        secret: in [0, prime).
        threshold: t, from 1 to the number of points.
        points: where the polynomial of degree t − 1 is evaluated, different, in [1, prime).
        prime: of the field.
    """
    assert 0 <= secret < prime
    assert 1 <= threshold <= len({point for point in points if 0 < point < prime}) == len(points)
    return evaluate([secret, *(secrets.randbelow(prime) for _ in range(threshold - 1))], points, prime)


def evaluate(coefficients: Sequence[int], points: Sequence[int], prime: int = PRIME) -> dict[int, int]:
    """Return the values of a polynomial, by point, modulo `prime`; the constant coefficient is first."""
    values = dict.fromkeys(points, 0)
    for coefficient in reversed(coefficients):
        values = {x: (value * x + coefficient) % prime for x, value in values.items()}
    return values


def recover(shares: Mapping[int, int], prime: int = PRIME) -> int:
    """Return the secret of at least `threshold` shares, by Lagrange's interpolation at 0."""
    secret = 0
    for x, value in shares.items():
        numerator = denominator = 1
        for other in shares:
            if other != x:
                numerator = numerator * other % prime
                denominator = denominator * (other - x) % prime
        secret += value * numerator * pow(denominator, -1, prime)
    return secret % prime
