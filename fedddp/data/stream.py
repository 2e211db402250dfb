"""The parts of batches that a rank takes, and the processes that read their examples."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fedddp.data.decode import Decoded
from fedddp.data.targets import Boxes
from fedddp.rng import generators_kept
from fedddp.section import ConfigError

Indices = NDArray[np.int64]

SOCKET_PATH_BYTES, SOCKET_NAME_BYTES = 104, 40
"""The longest path of a Unix socket (macOS; Linux: 108), and the part that multiprocessing appends."""

SIGNAL_S = 1.0
"""Seconds after which a signal has come that a worker ended."""


@dataclass(slots=True)
class Part:
    """The examples of a pass that this rank takes in one batch."""

    rows: slice
    """Positions in the pass."""
    count: int
    total: int

    @property
    def length(self) -> int:
        """How many positions these are: b, >= 1, since a rank without an example takes one as padding."""
        return max(self.count, 1)


def parts_of(sizes: Sequence[int], shard: tuple[int, int]) -> Iterator[Part]:
    """Yield this rank's part of every batch of a pass."""
    (rank, ranks), end = shard, 0
    for size in sizes:
        start, end = end, end + size
        own = max(0, -((rank - size) // ranks))  # as of rank, rank + ranks, ... below size
        rows = slice(start + rank, end, ranks) if own else slice(start, start + 1)
        yield Part(rows, own, size)


_Planes = tuple[Tensor, Boxes | None]
"""Planes of a batch, (b, C, H, W), and its boxes."""


class Stream:
    """A data loader whose workers are kept from pass to pass."""

    def __init__(self, source: Decoded, workers: int, pin_memory: bool, shard: tuple[int, int]) -> None:
        if workers:
            _check_socket_folder()
        self._sampler = _PartSampler(shard[1])
        loader: DataLoader[_Planes | str] = DataLoader(
            _Readable(source),
            batch_sampler=self._sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            collate_fn=_collate,
            # So that starting the loader draws nothing from torch's global generator.
            generator=torch.Generator(),
        )
        if shard[1] > 1:
            from accelerate.data_loader import prepare_data_loader  # here: it takes a second to import

            loader = prepare_data_loader(
                loader, num_processes=shard[1], process_index=shard[0], even_batches=False
            )
        self._loader = loader

    def read(self, examples: Indices, sizes: Sequence[int], pass_seed: int) -> Iterator[_Planes]:
        """Yield the planes of this rank's part of every batch, and their boxes.

        Raises:
            ValueError: an image cannot be read, or a worker was killed.
        """
        sampler = self._sampler
        sampler.examples, sampler.sizes, sampler.pass_seed = examples, sizes, pass_seed
        with naming_ended_workers(OSError, EOFError):
            for batch in self._loader:
                if isinstance(batch, str):
                    raise ValueError(batch)
                yield batch


class _PartSampler:
    """The batches of a pass: of each batch the first rank's part, the second's, and so on.

    Accelerate's sharding assigns whole batches, rank after rank, and where batches are uneven, as the
    parts of a last batch, it repeats or drops examples. Here it assigns the parts, one per rank, so
    that no example is repeated or dropped. (No attribute is named `batch_size`: accelerate drops
    batches of another size.)
    """

    def __init__(self, ranks: int) -> None:
        self.ranks, self.pass_seed = ranks, 0
        self.examples: Indices = np.empty(0, dtype=np.int64)
        self.sizes: Sequence[int] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        by_rank = [parts_of(self.sizes, (rank, self.ranks)) for rank in range(self.ranks)]
        for parts in zip(*by_rank, strict=True):
            for part in parts:
                yield [(index, self.pass_seed) for index in self.examples[part.rows].tolist()]


_Example = tuple[Tensor, Boxes | None]


class _Readable(Dataset[Any]):
    """Examples of `source`, or why they cannot be read: a worker would turn the error into a traceback."""

    def __init__(self, source: Decoded) -> None:
        self.source = source

    def __getitems__(self, items: list[tuple[int, int]]) -> list[_Example | str]:
        """Return the pixels of a batch; the name is the one that torch's loader looks for."""
        with generators_kept():
            return [self._read(index, pass_seed) for index, pass_seed in items]

    def _read(self, index: int, pass_seed: int) -> _Example | str:
        try:
            return self.source.read_seeding(index, pass_seed)
        except ValueError as error:
            return str(error)


@contextlib.contextmanager
def naming_ended_workers(*broken: type[Exception]) -> Iterator[None]:
    """Turn torch's error for a worker that was killed into one line, for the block.

    It comes from a signal handler, wherever the program is by then.

    Args:
        broken: errors of a connection to a worker, which may come before.

    Raises:
        ValueError: a worker was killed.
    """
    caught: tuple[type[Exception], ...] = (RuntimeError, *broken)
    try:
        yield
    except caught as error:
        reason = str(error)
        if isinstance(error, broken):
            try:
                time.sleep(SIGNAL_S)
            except RuntimeError as later:
                reason = str(later)
        if "DataLoader worker" not in reason:
            raise
        raise ValueError(
            f"a worker that reads images ended ({' '.join(reason.split())[:160]}); if /dev/shm is small "
            "(Docker: --shm-size), set data.workers=0"
        ) from error


def _check_socket_folder() -> None:
    """Refuse a temporary folder in which the workers' sockets cannot be made: they would wait for ever."""
    folder = tempfile.gettempdir()
    if len(folder.encode()) + SOCKET_NAME_BYTES > SOCKET_PATH_BYTES:
        raise ConfigError(
            f"TMPDIR={folder} is too long for the sockets of data.workers; set TMPDIR=/tmp, or data.workers=0"
        )


def _collate(items: list[_Example | str]) -> _Planes | str:
    problem = next((item for item in items if isinstance(item, str)), None)
    if problem is not None:
        return problem
    examples = [item for item in items if not isinstance(item, str)]
    boxes = [of_image for _, of_image in examples if of_image is not None]
    return torch.stack([planes for planes, _ in examples]), Boxes.cat(boxes) if boxes else None
