"""Plain Python references of the codecs of `fedddp.transport`: one element, one bit at a time."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.random import Generator

from fedddp.transport.codecs import EDEN, QSGD, Cast, Codec, Int8, Sign, TopK
from fedddp.transport.eden import BLOCK, LEVELS, ROTATIONS, SMALLEST

F = np.float32
Coded = tuple[bytes, list[np.float32]]
"""The payload after its header, and the decoded vector."""


def floats(values: Iterable[Any]) -> bytes:
    return b"".join(struct.pack("<f", float(value)) for value in values)


def bits_of(values: Sequence[int], width: int) -> bytes:
    """Pack low bits first; of numbers above 8 bits the low bytes of all come first."""
    if width > 8:
        return bytes(v & 255 for v in values) + bits_of([v >> 8 for v in values], width - 8)
    stream = [value >> position & 1 for value in values for position in range(width)]
    stream += [0] * (-len(stream) % 8)
    return bytes(
        sum(bit << n for n, bit in enumerate(stream[start : start + 8])) for start in range(0, len(stream), 8)
    )


def cast(codec: Cast, x: list[np.float32], rng: Generator) -> Coded:
    if codec.dtype == "fp16":
        halves = [np.float16(value) for value in x]
        return b"".join(struct.pack("<e", half) for half in halves), [F(half) for half in halves]
    coded, decoded = b"", []
    for value in x:
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        upper, lower = bits >> 16, bits & 0xFFFF
        upper += lower > 0x8000 or (lower == 0x8000 and upper % 2)  # to nearest, ties to even
        coded += struct.pack("<H", upper)
        decoded.append(F(struct.unpack("<f", struct.pack("<I", upper << 16))[0]))
    return coded, decoded


def int8(codec: Int8, x: list[np.float32], rng: Generator) -> Coded:
    draws = rng.random(256 * math.ceil(len(x) / 256), dtype=np.float32)
    scales = [max(abs(v) for v in x[start : start + 256]) / F(127) for start in range(0, len(x), 256)]
    levels = []
    for i, value in enumerate(x):
        scale = scales[i // 256]
        level = math.floor(value / scale + draws[i]) if scale else 0
        levels.append(max(-127, min(127, level)))
    decoded = [F(level) * scales[i // 256] for i, level in enumerate(levels)]
    return floats(scales) + struct.pack(f"<{len(x)}b", *levels), decoded


def qsgd(codec: QSGD, x: list[np.float32], rng: Generator) -> Coded:
    size, s = codec.bucket or len(x), codec.levels
    buckets = math.ceil(len(x) / size)
    draws = rng.random(buckets * size, dtype=np.float32)
    norms = []
    for start in range(0, len(x), size):
        norms.append(F(math.sqrt(math.fsum(float(v) ** 2 for v in x[start : start + size]))))
    symbols, decoded = [], []
    for i, value in enumerate(x):
        norm = norms[i // size]
        level = min(s, math.floor(abs(value) / norm * F(s) + draws[i])) if norm else 0
        signed = -level if value < 0 else level
        symbols.append(signed + s)
        decoded.append(F(signed) * (norm / F(s)))
    return floats(norms) + bits_of(symbols, math.ceil(math.log2(2 * s + 1))), decoded


def top_k(codec: TopK, x: list[np.float32], rng: Generator) -> Coded:
    k = codec.count(len(x))
    places = sorted(sorted(range(len(x)), key=lambda i: -abs(x[i]))[:k])
    values = floats(x[i] for i in places)
    decoded = [x[i] if i in places else F(0) for i in range(len(x))]
    width = math.ceil(math.log2(len(x)))
    if k == len(x):
        return values, decoded
    if k * width < len(x):
        return values + bits_of(places, width), decoded
    return values + bits_of([int(i in places) for i in range(len(x))], 1), decoded


def sign(codec: Sign, x: list[np.float32], rng: Generator) -> Coded:
    scale = F(math.fsum(abs(float(v)) for v in x) / len(x))
    negative = [int(v < 0) for v in x]
    return floats([scale]) + bits_of(negative, 1), [-scale if bit else scale for bit in negative]


def hadamard(x: list[np.float32]) -> list[np.float32]:
    """Return H x / √d by the recursion H(2d) = [[H, H], [H, −H]], butterflies of neighbours first."""
    x, half = list(x), 1
    while half < len(x):
        for start in range(0, len(x), 2 * half):
            for i in range(start, start + half):
                x[i], x[i + half] = x[i] + x[i + half], x[i] - x[i + half]
        half *= 2
    return [value * F(1 / math.sqrt(len(x))) for value in x]


def eden(codec: EDEN, x: list[np.float32], rng: Generator) -> Coded:
    seed = int(rng.integers(2**63))
    own = np.random.Generator(np.random.PCG64(seed))
    positive = [F(level) for level in LEVELS[codec.bits]]
    levels = [-level for level in reversed(positive)] + positive
    edges = [(low + high) / F(2) for low, high in itertools.pairwise(levels)]
    assert len(x) <= BLOCK
    size = max(SMALLEST, 1 << (len(x) - 1).bit_length())
    rotated = x + [F(0)] * (size - len(x))
    all_signs = []
    for _ in range(ROTATIONS):
        drawn = own.integers(0, 256, math.ceil(size / 8), dtype=np.uint8)
        signs = [-1 if drawn[i // 8] >> (i % 8) & 1 else 1 for i in range(size)]
        rotated = hadamard([F(sign) * value for sign, value in zip(signs, rotated, strict=True)])
        all_signs.append(signs)
    norm = math.sqrt(math.fsum(float(v) ** 2 for v in x))
    unit = F(math.sqrt(size) / norm) if norm else F(0)
    chosen = [sum(int(value * unit > edge) for edge in edges) for value in rotated]
    product = math.fsum(float(v) * float(levels[c]) for v, c in zip(rotated, chosen, strict=True))
    scale = F(norm**2 / product) if norm else F(0)
    back = [levels[c] * scale for c in chosen]
    for signs in reversed(all_signs):
        back = [F(sign) * value for sign, value in zip(signs, hadamard(back), strict=True)]
    return struct.pack("<q", seed) + floats([scale]) + bits_of(chosen, codec.bits), back[: len(x)]


def coded(codec: Codec, x: list[np.float32], rng: Generator) -> Coded:
    """Return the whole payload of `x` and what it decodes to."""
    by_codec = {Cast: cast, Int8: int8, QSGD: qsgd, TopK: top_k, Sign: sign, EDEN: eden}
    body, decoded = by_codec[type(codec)](codec, x, rng)  # type: ignore[operator]
    return struct.pack("<q", len(x)) + body, decoded
