"""The interface of codecs: a vector to the bytes that are sent, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn.functional import pad

from fedddp.section import Section

HEADER = 8
"""Bytes at the start of a payload: the length d of the vector, a little-endian int64."""


@dataclass(frozen=True, kw_only=True)
class Codec(Section, ABC):
    """How a vector becomes the bytes that are sent; subclass it for your own.

    The receiver knows the codec and its settings from the configuration, and all else from the payload. NaN
    or infinity in a vector must decode to NaN or infinity somewhere, so that the update is seen as invalid.
    """

    key: ClassVar[str] = "transport.up"
    chosen_by_name: ClassVar[bool] = True

    error_feedback: ClassVar[bool] = False
    """Whether the sender keeps what the codec left out, and adds it to its next vector."""

    @abstractmethod
    def pack(self, vector: Tensor, rng: Generator) -> list[Tensor]:
        """Return the parts of the payload after its header.

        Args:
            vector: float32, (d,), d >= 1, on the CPU; read only.
            rng: the random stream of this client in this round; draw from nothing else.

        Returns:
            Tensors of any type, which are sent as their bytes, one after the other.
        """

    @abstractmethod
    def unpack(self, body: Tensor, length: int) -> Tensor:
        """Return the decoded vector; float32, (length,).

        Args:
            body: the payload after its header; uint8.
            length: d, the length of the vector.
        """

    def encode(self, vector: Tensor, rng: Generator) -> Tensor:
        """Return the payload of `vector` (d,): what is sent, header included; uint8, on the CPU."""
        plain = vector.detach().to("cpu", torch.float32).contiguous()
        parts = [torch.tensor([len(plain)]), *self.pack(plain, rng)]
        return torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])

    def decode(self, payload: Tensor) -> Tensor:
        """Return the vector of a `payload`; float32, (d,), on the CPU."""
        return self.unpack(payload[HEADER:], int(payload[:HEADER].view(torch.int64)))


def split(body: Tensor, dtype: torch.dtype, count: int) -> tuple[Tensor, Tensor]:
    """Return the first `count` numbers of `body` as `dtype`, and the rest of its bytes."""
    end = count * dtype.itemsize
    return body[:end].clone().view(dtype), body[end:]


def in_rows(vector: Tensor, size: int) -> Tensor:
    """Return `vector` (d,) in rows of `size`, zeros after its end; (⌈d/size⌉, size)."""
    return pad(vector, (0, -len(vector) % size)).view(-1, size)


def uniform(rng: Generator, count: int) -> Tensor:
    """Return `count` numbers from [0, 1), multiples of 2^-24; float32."""
    return torch.from_numpy(rng.random(count, dtype="float32"))
