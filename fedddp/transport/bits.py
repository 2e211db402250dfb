"""Small whole numbers packed into bytes without gaps, and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 8
"""Numbers that are packed together: eight of b bits are b bytes."""


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes `count` numbers of `bits` bits take."""
    return -(-count * bits // 8)


def pack(values: Tensor, bits: int) -> Tensor:
    """Return `values` as ⌈d·bits/8⌉ bytes.

    Up to 8 bits, number i takes the bits from i·bits of the bytes, lowest first. Of wider numbers the lowest
    8 bits come first, a byte each, then the others packed likewise.

    Args:
        values: whole numbers in [0, 2^bits); (d,), of any integer type, on the CPU.
        bits: in [1, 32].

    Returns:
        The bytes; uint8, (⌈d·bits/8⌉,).
    """
    if bits > 8:
        return torch.cat([(values & 255).to(torch.uint8), pack(values >> 8, bits - 8)])
    narrow = values.to(torch.uint8)
    if bits == 8:
        return narrow
    grouped = pad(narrow, (0, -len(narrow) % GROUP)).view(-1, GROUP)
    words = torch.zeros(len(grouped), dtype=torch.int64)
    for position in range(GROUP):
        words |= grouped[:, position].to(torch.int64) << (bits * position)
    packed = words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)
    return packed[: packed_bytes(len(narrow), bits)]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the `count` numbers that `pack` packed.

    Returns:
        (count,), uint8 up to 8 bits, else int64.
    """
    if bits > 8:
        high = unpack(packed[count:], bits - 8, count).to(torch.int64)
        return packed[:count].to(torch.int64) | high << 8
    if bits == 8:
        return packed[:count]
    groups = -(-count // GROUP)
    words = torch.zeros(groups, 8, dtype=torch.uint8)
    words[:, :bits] = pad(packed, (0, groups * bits - len(packed))).view(groups, bits)
    word, mask = words.view(torch.int64).view(-1), (1 << bits) - 1
    values = torch.empty(groups, GROUP, dtype=torch.uint8)
    for position in range(GROUP):
        values[:, position] = (word >> (bits * position)) & mask
    return values.view(-1)[:count]
