"""A client to this rank's batches: normalised, and augmented when training.

The batches of a pass do not depend on the number of ranks that share them, nor on whether pixels
are held on the device or streamed: everything random is drawn for a pass before it starts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fedddp.data.datasets import DataConfig, Images
from fedddp.data.decode import Decoded
from fedddp.data.transforms import augment
from fedddp.rng import generators_kept, stream_seed
from fedddp.section import ConfigError

Indices = NDArray[np.int64]

SOCKET_PATH_BYTES, SOCKET_NAME_BYTES = 104, 40
"""The longest path of a Unix socket (macOS; Linux: 108), and the part that multiprocessing appends."""

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
    """Real examples: b, or 0 when this rank has none and holds one padding example of weight 0."""
    total: int
    """Examples of the batch over all ranks of the group, >= 1."""


@dataclass(frozen=True)
class _Part:
    """The examples of a pass that this rank takes in one batch."""

    rows: Indices
    """(b,) positions in the pass."""
    count: int
    total: int


class ClientLoader:
    """The images of one dataset, as batches on this rank's device."""

    def __init__(self, images: Images, data: DataConfig, device: torch.device, *, seed: int) -> None:
        """Put `images` on `device`, or get ready to stream them.

        Args:
            images: the dataset.
            data: how to augment, shift and stream it.
            device: the device of the batches.
            seed: the seed of the run; the clients' feature shifts and noise follow from it.
        """
        self.images, self.data, self.device, self.seed = images, data, device, seed
        self._pixels = None if images.pixels is None else images.pixels.to(device)
        self._labels = torch.from_numpy(images.labels).to(device)
        self.normalize = Normalizer(images.mean, images.std, device)
        self._streams: dict[tuple[int, int], _Stream] = {}

    def batches(
        self,
        indices: Indices,
        batch_size: int,
        *,
        client: int | None = None,
        rng: Generator | None = None,
        shard: tuple[int, int] = (0, 1),
        train: bool = False,
        most: int | None = None,
    ) -> Iterator[Batch]:
        """Yield one pass over `indices`, batch by batch; no batches if there are none.

        The last batch may be smaller; nothing is repeated or left out. Passes do not overlap:
        the next one ends this one.

        Args:
            indices: examples of the dataset; (n,).
            batch_size: examples per batch over all ranks of the group, >= 1.
            client: the client that holds them, for `data.feature_shift`.
            rng: draws the permutation of the pass, then the augmentation; None keeps the order of
                `indices`.
            shard: (rank, ranks) of the group; rank r takes every ranks-th example of a batch from
                its r-th on.
            train: augment, which needs `rng`.
            most: batches at most; None: the whole pass.
        """
        if not len(indices):
            return
        examples = indices if rng is None else rng.permutation(indices)
        draws = None
        if train and rng is not None and self.data.augment != "none":
            draws = torch.from_numpy(rng.random((len(examples), 3), np.float32))
        shifts = self.data.feature_shift
        shift = None if shifts is None or client is None else shifts.of_client(client, self.seed)
        pass_seed = 0 if rng is None or self._pixels is not None else int(rng.integers(2**62))
        examples = examples if most is None else examples[: most * batch_size]
        parts = list(_parts(len(examples), batch_size, shard))
        if self._pixels is not None:
            read = self._held(examples, parts)
        else:
            read = self._streamed(examples, parts, batch_size, shard, pass_seed)
        for some, taken in read:
            rows = some[0].rows if len(some) == 1 else np.concatenate([part.rows for part in some])
            chosen = examples[rows]
            images = taken
            if shift is not None:
                images = images.float().mul_(1 / 255)
                images = shift.apply(images, chosen, stream_seed("noise", self.seed, client or 0))
            if draws is not None:
                images = augment(images, draws[torch.from_numpy(rows)].to(self.device), self.data.augment)
            images = self.normalize(images)
            targets = self._labels.index_select(0, torch.from_numpy(chosen).to(self.device))
            end = 0
            for part in some:
                start, end = end, end + len(part.rows)
                yield Batch(images[start:end], targets[start:end], part.count, part.total)

    def _held(self, examples: Indices, parts: list[_Part]) -> Iterator[tuple[list[_Part], Tensor]]:
        """Yield several batches at a time with their pixels, taken on the device."""
        assert self._pixels is not None
        image_bytes = 4 * int(np.prod(self.images.shape))
        together = max(1, CHUNK_BYTES // (image_bytes * max(len(part.rows) for part in parts)))
        for start in range(0, len(parts), together):
            some = parts[start : start + together]
            chosen = examples[np.concatenate([part.rows for part in some])]
            yield some, self._pixels.index_select(0, torch.from_numpy(chosen).to(self.device))

    def _streamed(
        self, examples: Indices, parts: list[_Part], batch_size: int, shard: tuple[int, int], pass_seed: int
    ) -> Iterator[tuple[list[_Part], Tensor]]:
        """Yield batch by batch with its pixels, read by the workers.

        A dataset that draws at random, as transforms of its own do, draws by `pass_seed` and example.
        """
        assert self.images.source is not None
        if shard not in self._streams:
            pin = self.device.type == "cuda"
            self._streams[shard] = _Stream(self.images.source, self.data.workers, pin, shard)
        stream = self._streams[shard].read(examples, batch_size, pass_seed)
        for part, pixels in zip(parts, stream, strict=True):
            yield [part], pixels.to(self.device, non_blocking=True)


class Normalizer:
    """Turns pixels into what a model takes: (value − mean) / std per channel, as one product and one sum."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        """Take the mean and the deviation of each channel, where the full range of a pixel is 1."""
        means, deviations = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
        self._offset = (-means / deviations).float().to(device)
        self._factor = (1 / deviations).float().to(device)
        self._byte_factor = (1 / (255 * deviations)).float().to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return `pixels` (n, C, H, W), uint8 or float in [0, 1], as normalised float32."""
        factor = self._byte_factor if pixels.dtype == torch.uint8 else self._factor
        return pixels.to(torch.float32, copy=True).mul_(factor).add_(self._offset)

    def pixels(self, images: Tensor) -> Tensor:
        """Return the uint8 pixels of normalised `images` (n, C, H, W)."""
        return ((images - self._offset) / self._byte_factor).round().clamp(0, 255).to(torch.uint8)


def _parts(examples: int, batch_size: int, shard: tuple[int, int]) -> Iterator[_Part]:
    """Yield this rank's part of every batch of a pass."""
    rank, ranks = shard
    for start in range(0, examples, batch_size):
        batch = np.arange(start, min(start + batch_size, examples))
        own = batch[rank::ranks]
        yield _Part(own if len(own) else batch[:1], len(own), len(batch))


class _Stream:
    """A data loader whose workers are kept from pass to pass."""

    def __init__(self, source: Decoded, workers: int, pin_memory: bool, shard: tuple[int, int]) -> None:
        if workers:
            _check_socket_folder()
        self._sampler = _PartSampler(shard[1])
        loader: DataLoader[Tensor | str] = DataLoader(
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

    def read(self, examples: Indices, batch_size: int, pass_seed: int) -> Iterator[Tensor]:
        """Yield the pixels of this rank's part of every batch.

        Raises:
            ValueError: an image cannot be read, or a worker was killed.
        """
        sampler = self._sampler
        sampler.examples, sampler.size, sampler.pass_seed = examples, batch_size, pass_seed
        try:
            for pixels in self._loader:
                if isinstance(pixels, str):
                    raise ValueError(pixels)
                yield pixels
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ValueError(
                f"a worker that reads images ended ({' '.join(str(error).split())[:160]}); if /dev/shm is "
                "small (Docker: --shm-size), set data.workers=0"
            ) from error


class _PartSampler:
    """The batches of a pass: of each batch the first rank's part, the second's, and so on.

    Accelerate's sharding assigns whole batches, rank after rank, and where batches are uneven, as the
    parts of a last batch, it repeats or drops examples. Here it assigns the parts, one per rank, so
    that no example is repeated or dropped. (No attribute is named `batch_size`: accelerate drops
    batches of another size.)
    """

    def __init__(self, ranks: int) -> None:
        self.ranks, self.size, self.pass_seed = ranks, 1, 0
        self.examples: Indices = np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        examples, ranks = len(self.examples), range(self.ranks)
        by_rank = [_parts(examples, self.size, (rank, self.ranks)) for rank in ranks]
        for parts in zip(*by_rank, strict=True):
            for part in parts:
                yield [(index, self.pass_seed) for index in self.examples[part.rows].tolist()]


class _Readable(Dataset[Any]):
    """Pixels of `source`, or why they cannot be read: a worker would turn the error into a traceback."""

    def __init__(self, source: Decoded) -> None:
        self.source = source

    def __getitems__(self, items: list[tuple[int, int]]) -> list[Tensor | str]:
        """Return the pixels of a batch; the name is the one that torch's loader looks for."""
        with generators_kept():
            return [self._read(index, pass_seed) for index, pass_seed in items]

    def _read(self, index: int, pass_seed: int) -> Tensor | str:
        try:
            return self.source.read_seeding(index, pass_seed)
        except ValueError as error:
            return str(error)


def _check_socket_folder() -> None:
    """Refuse a temporary folder in which the workers' sockets cannot be made: they would wait for ever."""
    folder = tempfile.gettempdir()
    if len(folder.encode()) + SOCKET_NAME_BYTES > SOCKET_PATH_BYTES:
        raise ConfigError(
            f"TMPDIR={folder} is too long for the sockets of data.workers; set TMPDIR=/tmp, or data.workers=0"
        )


def _collate(items: list[Tensor | str]) -> Tensor | str:
    problem = next((item for item in items if isinstance(item, str)), None)
    return problem or torch.stack([item for item in items if isinstance(item, Tensor)])
