"""Digit scenes: a synthetic dataset of one to four handwritten digits on a textured background.

A scene has a mask, boxes, labels and a class, all of the same digits, so that every task can be tried
without a download. It is taken by one of 20 cameras, which differ in background, tint, brightness and noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from fedddp.data.decode import Arrays
from fedddp.data.digits import NAMES, read_digits
from fedddp.data.held_out import held_out
from fedddp.data.targets import Target
from fedddp.rng import stream

Part = Literal["train", "test"]
Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

CAMERAS = 20
"""Natural clients."""

MOST_DIGITS = 4
SMALLEST = 24
"""Least height and width of a scene, in pixels: smaller ones cannot be read."""

TEXTURES = ("stripes", "checks", "clouds", "slope")

_TESTED = 0.2  # of the digits: the test set of the dataset `digits`
_CANDIDATES = 8
_OVERLAP = 0.3  # of the smaller of two digits' squares, at most
_CHUNK = 500
_CLOUD = 6  # knots of a cloud in each direction


@dataclass(frozen=True)
class Scenes:
    """Scenes and all that is known of them."""

    pixels: NDArray[np.uint8]
    """(n, 3, size, size) RGB."""
    masks: NDArray[np.uint8]
    """(n, size, size): 0 background, d + 1 for a pixel of the digit d."""
    owners: NDArray[np.uint8]
    """(n, size, size): 0 background, k + 1 for a pixel of the k-th digit of the scene."""
    digits: Integers
    """(n, 4): the digits of a scene from back to front; -1 for none."""
    sources: Integers
    """(n, 4): which of the 1,797 handwritten digits they are; -1 likewise."""
    cameras: Integers
    """(n,) in range(CAMERAS)."""


def scenes(part: Part, examples: int, size: int) -> Scenes:
    """Draw scenes, equal for equal arguments.

    Digits that the dataset `digits` tests (by its default `test_fraction`) are in test scenes only, the
    others in training scenes only.

    Args:
        part: "train" or "test".
        examples: number of scenes, >= 0.
        size: height and width in pixels, >= 24; a digit is a quarter to a half of that.

    Raises:
        ValueError: the size is too small.
    """
    if size < SMALLEST:
        raise ValueError(
            f"data.image_size={size} is too small for the digits of data.dataset=scenes; set {SMALLEST} or "
            "more (48 by default)"
        )
    pixels, labels = read_digits()
    pool = held_out(labels, _TESTED)[part == "test"]
    rng = stream("scenes", part)
    cameras = rng.permutation(np.arange(examples) % CAMERAS)
    empty = np.empty((examples, size, size), np.uint8)
    slots = np.empty((examples, MOST_DIGITS), np.int64)
    drawn = Scenes(
        np.empty((examples, 3, size, size), np.uint8),
        *(empty, empty.copy(), slots, slots.copy(), cameras),
    )
    for start in range(0, examples, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        _draw(drawn, chunk, (pixels, labels, pool), rng)
    return drawn


def dataset(part: Part, examples: int, size: int, target: Target) -> Arrays:
    """Return scenes as a torch dataset that gives `target`, with the cameras as `ids`; as for `scenes`."""
    drawn = scenes(part, examples, size)
    names, targets = NAMES, _targets(drawn, target)
    if target == "mask":
        names = ["background", *names]
    return Arrays(torch.from_numpy(drawn.pixels), targets, names, torch.from_numpy(drawn.cameras))


def _targets(drawn: Scenes, target: Target) -> Any:
    if target == "mask":
        return torch.from_numpy(drawn.masks)
    owned = [drawn.owners == slot + 1 for slot in range(MOST_DIGITS)]
    visible = np.stack([own.sum(axis=(1, 2)) for own in owned], axis=1)
    if target == "boxes":
        return _boxes(drawn, owned, visible)
    if target == "class":
        front = visible.argmax(axis=1)
        return torch.from_numpy(drawn.digits[np.arange(len(front)), front])
    present = np.zeros((len(visible), len(NAMES)), np.uint8)
    scene, slot = np.nonzero(visible)
    present[scene, drawn.digits[scene, slot]] = 1
    return torch.from_numpy(present)


def _boxes(drawn: Scenes, owned: list[NDArray[np.bool_]], visible: Integers) -> list[dict[str, Any]]:
    """Return the boxes of every scene, tight around the pixels of a digit that can be seen."""
    corners = np.zeros((*visible.shape, 4), np.float32)
    for slot, own in enumerate(owned):
        for axis, first in ((1, 0), (2, 1)):  # columns, then rows
            line: NDArray[np.bool_] = np.any(own, axis=axis)
            corners[:, slot, first] = line.argmax(axis=1)
            corners[:, slot, first + 2] = line.shape[1] - line[:, ::-1].argmax(axis=1)
    boxes, labels = torch.from_numpy(corners), torch.from_numpy(drawn.digits)
    seen = torch.from_numpy(np.asarray(visible > 0))
    return [{"boxes": boxes[i][seen[i]], "labels": labels[i][seen[i]]} for i in range(len(seen))]


# ---- drawing ----


def _draw(
    drawn: Scenes,
    chunk: slice,
    source: tuple[NDArray[np.uint8], Integers, Integers],
    rng: Generator,
) -> None:
    """Draw the scenes of a chunk; `source` is the digits' images, their classes, and those to choose from."""
    images, labels, pool = source
    cameras, size = drawn.cameras[chunk], drawn.masks.shape[-1]
    style = _cameras()
    canvas = _background(style, cameras, size, rng)
    masks, owners = drawn.masks[chunk], drawn.owners[chunk]
    masks[:], owners[:] = 0, 0
    count = len(cameras)
    wanted = rng.integers(1, MOST_DIGITS + 1, count)
    chosen = pool[rng.integers(len(pool), size=(count, MOST_DIGITS))]
    sides = np.rint(8 * rng.uniform(2.0, 2.6, (count, MOST_DIGITS)) * size / 48).astype(np.int64)
    colours = rng.uniform(0.55, 1.0, (count, MOST_DIGITS, 3)).astype(np.float32)
    strongest = rng.integers(3, size=(count, MOST_DIGITS, 1))
    np.put_along_axis(colours, strongest, np.float32(1), axis=2)
    places = _places(sides, wanted, size, rng)
    for slot in range(MOST_DIGITS):
        there = places[:, slot, 0] >= 0
        drawn.digits[chunk, slot] = np.where(there, labels[chosen[:, slot]], -1)
        drawn.sources[chunk, slot] = np.where(there, chosen[:, slot], -1)
        ink = _ink(images[chosen[:, slot]], sides[:, slot], places[:, slot], size)
        canvas += (colours[:, slot, :, None, None] - canvas) * ink[:, None]
        own = ink >= 0.5
        owners[own] = slot + 1
        masks[own] = np.broadcast_to(labels[chosen[:, slot], None, None] + 1, own.shape)[own]
    canvas *= style.gains[cameras][:, :, None, None]
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    canvas += noise * style.noise[cameras][:, None, None, None]
    drawn.pixels[chunk] = np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)


def _places(sides: Integers, wanted: Integers, size: int, rng: Generator) -> Integers:
    """Return the top left corner of every digit, (n, 4, 2) in pixels; -1 where there is none.

    Of several corners drawn for a digit it takes the one where it overlaps least with those behind it.
    """
    count = len(sides)
    draws = rng.random((count, MOST_DIGITS, _CANDIDATES, 2))
    places = np.full((count, MOST_DIGITS, 2), -1, np.int64)
    for slot in range(MOST_DIGITS):
        side = sides[:, slot]
        corners = np.floor(draws[:, slot] * (size - side + 1)[:, None, None]).astype(np.int64)
        overlap = np.zeros((count, _CANDIDATES))
        for other in range(slot):
            low = np.maximum(corners, places[:, other, None])
            high = np.minimum(
                corners + side[:, None, None], places[:, other, None] + sides[:, other, None, None]
            )
            shared = np.clip(high - low, 0, None).prod(axis=2)
            shared[places[:, other, 0] < 0] = 0
            smaller = np.minimum(side, sides[:, other]) ** 2
            overlap = np.maximum(overlap, shared / smaller[:, None])
        best = overlap.argmin(axis=1)
        rows = np.arange(count)
        fits = (overlap[rows, best] <= _OVERLAP) & (slot < wanted)
        places[fits, slot] = corners[rows, best][fits]
    return places


def _ink(images: NDArray[np.uint8], sides: Integers, places: Integers, size: int) -> Floats:
    """Return how far each pixel is covered by a digit, (n, size, size) in [0, 1]; bilinear."""
    line = np.arange(size)
    weights = []
    for axis in range(2):
        at = line - places[:, axis, None]
        inside = (at >= 0) & (at < sides[:, None]) & (places[:, axis, None] >= 0)
        position = np.clip((at + 0.5) * (8 / sides[:, None]) - 0.5, 0, 7).astype(np.float32)
        near = np.abs(position[:, :, None] - np.arange(8, dtype=np.float32))
        weights.append(np.clip(1 - near, 0, None) * inside[:, :, None])
    # Sums in a fixed sequence, and no matrix product: its last bits differ from machine to machine.
    grey = images.astype(np.float32) / 255
    rows = np.zeros((len(images), size, 8), np.float32)
    for row in range(8):
        rows += weights[0][:, :, row, None] * grey[:, None, row]
    values = np.zeros((len(images), size, size), np.float32)
    for column in range(8):
        values += rows[:, :, column, None] * weights[1][:, None, :, column]
    covered: Floats = np.clip((values - 0.25) / 0.3, 0, 1)
    return covered


# ---- cameras ----


@dataclass(frozen=True)
class _Cameras:
    """What the scenes of each of the cameras have in common."""

    dark: Floats
    """(CAMERAS, 3): one colour of the background, in [0, 1]."""
    light: Floats
    """(CAMERAS, 3): the other."""
    waves: Floats
    """(CAMERAS, 2): waves of the texture per scene, downwards and to the right."""
    gains: Floats
    """(CAMERAS, 3): factor of each colour channel: brightness and tint."""
    noise: Floats
    """(CAMERAS,): standard deviation of the noise of a pixel."""


def _cameras() -> _Cameras:
    rng = stream("scenes", "cameras")
    dark = rng.uniform(0.02, 0.35, (CAMERAS, 3))
    light = dark + rng.uniform(0.05, 0.22, (CAMERAS, 3))
    angle, waves = rng.uniform(0, np.pi, CAMERAS), rng.uniform(1.5, 6, CAMERAS)
    waves = np.stack([waves * np.cos(angle), waves * np.sin(angle)], axis=1)
    gains = rng.uniform(0.5, 1.0, (CAMERAS, 1)) * rng.uniform(0.75, 1.0, (CAMERAS, 3))
    noise = rng.uniform(0.01, 0.07, CAMERAS)
    return _Cameras(*(values.astype(np.float32) for values in (dark, light, waves, gains, noise)))


def _background(style: _Cameras, cameras: Integers, size: int, rng: Generator) -> Floats:
    """Return the background of each scene, (n, 3, size, size) in [0, 1]: two colours mixed by a texture."""
    count = len(cameras)
    phases = rng.uniform(0, 1, (2, count, 1, 1)).astype(np.float32)
    knots = rng.random((count, _CLOUD, _CLOUD), dtype=np.float32)
    line = np.arange(size, dtype=np.float32) / size
    across, down = line[None, None, :], line[None, :, None]
    wave_y, wave_x = style.waves[cameras].T[:, :, None, None]
    texture = np.empty((count, size, size), np.float32)
    for number, kind in enumerate(TEXTURES):
        of = cameras % len(TEXTURES) == number
        y, x = wave_y[of] * down + phases[0, of], wave_x[of] * across + phases[1, of]
        if kind == "stripes":
            texture[of] = 0.5 + 0.5 * np.sin(2 * np.pi * (x + y))
        elif kind == "checks":
            texture[of] = np.floor(2 * (x + y) % 2) != np.floor(2 * (x - y) % 2)
        elif kind == "clouds":
            texture[of] = _clouds(knots[of], size)
        else:
            texture[of] = np.abs((x + y) / 4 % 2 - 1)
    dark, light = style.dark[cameras][:, :, None, None], style.light[cameras][:, :, None, None]
    return dark + (light - dark) * texture[:, None]


def _clouds(knots: Floats, size: int) -> Floats:
    """Return (n, size, size) values between those of the knots, (n, 6, 6): bilinear."""
    position = np.linspace(0, _CLOUD - 1, size, dtype=np.float32)
    weights = np.clip(1 - np.abs(position[:, None] - np.arange(_CLOUD, dtype=np.float32)), 0, None)
    rows = np.zeros((len(knots), size, _CLOUD), np.float32)
    for row in range(_CLOUD):
        rows += weights[:, row, None] * knots[:, row, None, :]
    values = np.zeros((len(knots), size, size), np.float32)
    for column in range(_CLOUD):
        values += rows[:, :, column, None] * weights[:, column]
    return values
