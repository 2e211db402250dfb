"""Which part of a model travels between clients and the coordinator: all but what stays at the clients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedddp.algorithms.algorithm import Algorithm, AsynchronousAlgorithm, ClientUpdate
from fedddp.models.flat import FlatModel


@dataclass(frozen=True)
class Shared:
    """The elements of the parameters that travel, as pieces of the flat vector, and whether buffers do."""

    pieces: tuple[tuple[int, int], ...] | None = None
    """Beginning and end of each piece, rising; None: all elements."""
    buffers: bool = True

    @classmethod
    def of(cls, algorithm: Algorithm, flat: FlatModel) -> Shared:
        """Return what travels of the model in `flat`: all but the elements that `algorithm` keeps silent."""
        silent = None if isinstance(algorithm, AsynchronousAlgorithm) else algorithm.silent(flat)
        if silent is None or not bool(silent.any()):
            return cls(buffers=not algorithm.local_buffers)
        edge = torch.ones(1, dtype=torch.bool, device=silent.device)
        padded = torch.cat([edge, silent, edge])  # pieces begin and end where the mask changes
        changes = torch.nonzero(padded[1:] != padded[:-1])[:, 0].tolist()
        return cls(tuple(zip(changes[::2], changes[1::2], strict=True)), not algorithm.local_buffers)

    def length(self, size: int) -> int:
        """Return how many of `size` parameters travel."""
        return size if self.pieces is None else sum(end - start for start, end in self.pieces)

    def pack(self, vector: Tensor) -> Tensor:
        """Return the elements of `vector` (P,) that travel; `vector` itself where all do."""
        return vector if self.pieces is None else torch.cat([vector[a:b] for a, b in self.pieces])

    def put(self, packed: Tensor, into: Tensor) -> Tensor:
        """Write `packed` over the elements of `into` (P,) that travel; return `into`."""
        if self.pieces is None:
            return into.copy_(packed)
        parts = torch.split(packed, [end - start for start, end in self.pieces])
        for (start, end), part in zip(self.pieces, parts, strict=True):
            into[start:end] = part
        return into

    def packed(self, update: ClientUpdate) -> ClientUpdate:
        """Return a client's update without the elements of its "update" that stay."""
        if self.pieces is None:
            return update
        return ClientUpdate({**update.vectors, "update": self.pack(update.vectors["update"])}, update.weight)
