"""The sizes of the protocol's messages; without the cryptography, so that a plan can count them."""

from __future__ import annotations

from collections.abc import Mapping

KEY_BYTES = 32
"""Length of a key, a seed, and the secrets that are shared."""
TAG_BYTES = 16
"""How much longer a sealed message is than its text."""
SHARE_BYTES = 66
"""Length of a share, big-endian: of a number below 2^521."""
NUMBER_BYTES = 8
"""Length of a client's number, in messages that name clients, and of an element of a vector."""
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES
"""Two shares for one client, sealed."""
NUMBERS = 7
"""Weight, example weight, clients, sum and count of the loss, steps, clipped: a client's vector ends so."""


def vector_length(lengths: Mapping[str, int], buffers: int, integer_buffers: int) -> int:
    """Return the elements L of a client's vector.

    Args:
        lengths: of the vectors of its update, by name (`Algorithm.lengths`).
        buffers: float buffers of the model.
        integer_buffers: its integer buffers.
    """
    return sum(lengths.values()) + buffers + integer_buffers + NUMBERS


def traffic(length: int, degree: int) -> tuple[int, int]:
    """Return the bytes that one client sends and receives in a run of the protocol without drop-outs.

    Args:
        length: elements L of the vector.
        degree: neighbours k of a client; n − 1 in SecAgg.
    """
    revealed = (degree + 1) * (NUMBER_BYTES + SHARE_BYTES)
    up = 2 * KEY_BYTES + degree * SEALED_BYTES + NUMBER_BYTES * length + revealed
    forwarded = degree * (2 * KEY_BYTES + NUMBER_BYTES + SEALED_BYTES + NUMBER_BYTES)
    return up, forwarded + NUMBER_BYTES * (degree + 1)
