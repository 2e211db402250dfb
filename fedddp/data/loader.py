"""A client to this rank's batches: normalised, and augmented when training.

The batches of a pass do not depend on the number of ranks that share them, nor on whether pixels
are held on the device or streamed: everything random is drawn for the whole pass before it starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from fedddp.data.datasets import Data, Images
from fedddp.data.transforms import apply_shift, augmented
from fedddp.rng import stream_seed

v2: Any = functional  # its functions are not typed as exported

Indices = NDArray[np.int64]

CHUNK_BYTES = 32 * 2**20
"""Batches are converted together up to so many bytes of float pixels; small clients in one go."""


@dataclass(frozen=True)
class Batch:
    """This rank's share of one batch of its group."""

    images: Tensor
    """(b, C, H, W) float32 on the device, normalised."""
    targets: Tensor
    """(b,) int64 on the device."""
    count: int
    """Real examples: b, or 0 when this rank has none and the one stand-in must weigh nothing."""
    total: int
    """Examples of the batch over all ranks of the group, >= 1."""


@dataclass(frozen=True)
class _Part:
    """Which examples of a pass this rank takes in one batch."""

    rows: Indices
    """(b,) places in the pass."""
    count: int
    total: int


class Feed:
    """The images of one set, as batches on this rank's device."""

    def __init__(self, images: Images, data: Data, device: torch.device, *, seed: int) -> None:
        """Put `images` on `device`, or get ready to stream them.

        Args:
            images: the set.
            data: how to augment, skew and stream.
            device: where batches are wanted.
            seed: the seed of the run; the clients' looks and noise follow from it.
        """
        self.images, self.data, self.device, self.seed = images, data, device, seed
        self._pixels = None if images.pixels is None else images.pixels.to(device)
        self._labels = torch.from_numpy(images.labels).to(device)
        self._streams: dict[tuple[int, int], _Stream] = {}

    def batches(
        self,
        indices: Indices,
        batch_size: int,
        *,
        client: int | None = None,
        order: Generator | None = None,
        share: tuple[int, int] = (0, 1),
        train: bool = False,
    ) -> Iterator[Batch]:
        """Yield one pass over `indices`, batch by batch; no batches if there are none.

        The last batch may be smaller; nothing is repeated or left out. Passes do not overlap:
        the next one ends this one.

        Args:
            indices: (examples,) of the set.
            batch_size: examples of a batch over all ranks of the group, >= 1.
            client: whose they are, for `data.skew`.
            order: shuffles and augments the pass; None keeps the order of `indices`.
            share: (rank, ranks) of the group; rank r takes every ranks-th example of a batch from
                its r-th on.
            train: augment, which needs `order`.
        """
        if not len(indices):
            return
        examples = indices if order is None else order.permutation(indices)
        draws = None
        if train and order is not None and self.data.augment != "none":
            draws = torch.from_numpy(order.random((len(examples), 3), np.float32))
        skew = self.data.skew
        look = skew.look(client, self.seed) if skew is not None and client is not None else None
        parts = list(_parts(len(examples), batch_size, share))
        if self._pixels is not None:
            read = self._held(examples, parts)
        else:
            read = self._streamed(examples, parts, batch_size, share)
        for some, pixels in read:
            rows = np.concatenate([part.rows for part in some])
            chosen = examples[rows]
            images = v2.to_dtype(pixels, torch.float32, scale=True)
            if look is not None:
                images = apply_shift(images, look, chosen, stream_seed("noise", self.seed, client or 0))
            if draws is not None:
                own_draws = draws[torch.from_numpy(rows)].to(self.device)
                images = augmented(images, own_draws, self.data.augment)
            images = v2.normalize(images, list(self.images.mean), list(self.images.std), True)
            targets = self._labels[torch.from_numpy(chosen).to(self.device)]
            lengths = [len(part.rows) for part in some]
            pieces = zip(some, torch.split(images, lengths), torch.split(targets, lengths), strict=True)
            for part, own_images, own_targets in pieces:
                yield Batch(own_images, own_targets, part.count, part.total)

    def _held(self, examples: Indices, parts: list[_Part]) -> Iterator[tuple[list[_Part], Tensor]]:
        """Yield several batches at a time with their pixels, taken on the device."""
        assert self._pixels is not None
        image_bytes = 4 * int(np.prod(self.images.shape))
        together = max(1, CHUNK_BYTES // (image_bytes * max(len(part.rows) for part in parts)))
        for start in range(0, len(parts), together):
            some = parts[start : start + together]
            chosen = examples[np.concatenate([part.rows for part in some])]
            yield some, self._pixels[torch.from_numpy(chosen).to(self.device)]

    def _streamed(
        self, examples: Indices, parts: list[_Part], batch_size: int, share: tuple[int, int]
    ) -> Iterator[tuple[list[_Part], Tensor]]:
        """Yield batch by batch with its pixels, read by the workers."""
        assert self.images.source is not None
        if share not in self._streams:
            pin = self.device.type == "cuda"
            self._streams[share] = _Stream(self.images.source, self.data.workers, pin, share)
        stream = self._streams[share].read(examples, batch_size)
        for part, pixels in zip(parts, stream, strict=True):
            yield [part], pixels.to(self.device, non_blocking=True)


def _parts(examples: int, batch_size: int, share: tuple[int, int]) -> Iterator[_Part]:
    """Yield this rank's part of every batch of a pass."""
    rank, ranks = share
    for start in range(0, examples, batch_size):
        batch = np.arange(start, min(start + batch_size, examples))
        own = batch[rank::ranks]
        yield _Part(own if len(own) else batch[:1], len(own), len(batch))


class _Stream:
    """A data loader whose workers live on from pass to pass."""

    def __init__(self, source: Dataset[Any], workers: int, pin_memory: bool, share: tuple[int, int]) -> None:
        self._plan = _Plan(share[1])
        loader: DataLoader[Tensor | str] = DataLoader(
            _Careful(source),
            batch_sampler=self._plan,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            collate_fn=_collate,
            # So that starting the loader draws nothing from torch's global generator.
            generator=torch.Generator(),
        )
        if share[1] > 1:
            loader = prepare_data_loader(
                loader, num_processes=share[1], process_index=share[0], even_batches=False
            )
        self._loader = loader

    def read(self, examples: Indices, batch_size: int) -> Iterator[Tensor]:
        """Yield the pixels of this rank's part of every batch."""
        self._plan.examples, self._plan.size = examples, batch_size
        for pixels in self._loader:
            if isinstance(pixels, str):
                raise ValueError(pixels)
            yield pixels


class _Plan:
    """The batches of a pass: of each batch the first rank's part, the second's, and so on.

    Accelerate's sharding deals whole batches, rank after rank, and where batches do not come out
    even, as parts of a last batch, it repeats or leaves out examples. What it deals here are the
    parts, one for every rank, so nothing is added and nothing is missing. (No attribute is named
    `batch_size`: accelerate holds back the batches that are not of that size.)
    """

    def __init__(self, ranks: int) -> None:
        self.ranks, self.size = ranks, 1
        self.examples: Indices = np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[list[int]]:
        examples, ranks = len(self.examples), range(self.ranks)
        by_rank = [_parts(examples, self.size, (rank, self.ranks)) for rank in ranks]
        for parts in zip(*by_rank, strict=True):
            for part in parts:
                yield self.examples[part.rows].tolist()


class _Careful(Dataset[Any]):
    """Pixels of `source`, or why they cannot be read: from a worker, errors come as tracebacks."""

    def __init__(self, source: Dataset[Any]) -> None:
        self.source = source

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            pixels: Tensor = self.source[index][0]
        except ValueError as error:
            return str(error)
        return pixels


def _collate(items: list[Tensor | str]) -> Tensor | str:
    problem = next((item for item in items if isinstance(item, str)), None)
    return problem or torch.stack([item for item in items if isinstance(item, Tensor)])
