"""The handwritten digits that ship with fedddp."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NAMES = [str(digit) for digit in range(10)]
"""The classes."""


def read_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return 1,797 grey images, (n, 8, 8) uint8, and the digit on each, (n,)."""
    pixels, labels = _read()
    return pixels.copy(), labels.copy()


@functools.cache
def _read() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    table = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), delimiter=",")
    pixels = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return pixels, table[:, -1].astype(np.int64)
