"""A synthetic dataset of coloured shapes, for benchmarks and tests without files."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedddp.rng import stream

Plane = NDArray[np.float32]
Mask = NDArray[np.bool_]

CAMERAS = 100
"""Natural clients: each example is of one of so many cameras, each with its own background."""

_CHUNK = 1000


def _disc(u: Plane, v: Plane, centre: float = 0.0, radius: float = 1.0) -> Mask:
    return np.asarray(np.square(u - centre) + np.square(v) <= radius**2)


def _square(u: Plane, v: Plane, side: float = 0.8) -> Mask:
    return np.asarray(np.maximum(np.abs(u), np.abs(v)) <= side)


def _star(u: Plane, v: Plane) -> Mask:
    return np.asarray(np.hypot(u, v) <= 0.62 + 0.38 * np.cos(5 * np.arctan2(v, u)))


SHAPES: dict[str, Callable[[Plane, Plane], Mask]] = {
    "disc": _disc,
    "ring": lambda u, v: _disc(u, v) & ~_disc(u, v, 0.0, 0.6),
    "triangle": lambda u, v: (v >= -0.5) & (np.abs(u) * 3**0.5 + v <= 1),
    "square": _square,
    "frame": lambda u, v: _square(u, v) & ~_square(u, v, 0.45),
    "cross": lambda u, v: _square(u, v, 0.95) & (np.minimum(np.abs(u), np.abs(v)) <= 0.28),
    "bar": lambda u, v: (np.abs(u) <= 0.3) & (np.abs(v) <= 1),
    "pair": lambda u, v: _disc(u, v, -0.6, 0.38) | _disc(u, v, 0.6, 0.38),
    "crescent": lambda u, v: _disc(u, v) & ~_disc(u, v, 0.45, 0.8),
    "star": _star,
}
"""The classes: whether a point (u, v) lies in the shape, which has a radius of about 1."""


def render(part: str, examples: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `examples` images of shapes, equal for equal arguments.

    Each is turned, scaled, moved, coloured and noisy at random.

    Args:
        part: name of the random stream, such as "train" and "test".
        examples: number of images, >= 0.
        size: height and width in pixels.

    Returns:
        uint8 images (examples, 3, size, size), int64 classes (examples,) as evenly spread as can
        be, and int64 cameras (examples,) in range(CAMERAS).
    """
    rng = stream("shapes", part)
    labels = rng.permutation(np.arange(examples) % len(SHAPES))
    cameras = rng.integers(CAMERAS, size=examples)
    tints = stream("shapes", "cameras").uniform(0.0, 0.45, (CAMERAS, 3))
    pixels = np.empty((examples, 3, size, size), dtype=np.uint8)
    for start in range(0, examples, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        pixels[chunk] = _draw(labels[chunk], tints[cameras[chunk]], size, rng)
    return torch.from_numpy(pixels), torch.from_numpy(labels), torch.from_numpy(cameras)


def _draw(
    labels: NDArray[np.int64], tints: NDArray[np.float64], size: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    count = len(labels)
    angle = rng.uniform(0, 2 * np.pi, (count, 1, 1)).astype(np.float32)
    radius = rng.uniform(0.4, 0.75, (count, 1, 1)).astype(np.float32)
    x0, y0 = rng.uniform(-0.25, 0.25, (2, count, 1, 1)).astype(np.float32)
    line = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = (line[None, None, :] - x0) / radius, (line[None, :, None] - y0) / radius
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    inside = np.empty((count, size, size), dtype=np.bool_)
    for label, contains in enumerate(SHAPES.values()):
        own = labels == label
        inside[own] = contains(u[own], v[own])
    colours = rng.uniform(0.55, 1.0, (count, 3))[:, :, None, None]
    images = np.where(inside[:, None], colours, tints[:, :, None, None]).astype(np.float32)
    images += 0.08 * rng.standard_normal(images.shape, dtype=np.float32)
    return np.asarray(np.clip(images, 0, 1) * 255 + 0.5).astype(np.uint8)
