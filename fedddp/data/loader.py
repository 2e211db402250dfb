"""A client to this rank's batches: normalised, and augmented when training.

The batches of a pass do not depend on the number of ranks that share them, nor on whether pixels
are held on the device or streamed: everything random is drawn for a pass before it starts.
"""

from __future__ import annotations

import math
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
from fedddp.data.targets import IGNORED, Boxes, Targets, select
from fedddp.data.transforms import ImageShift, augment, augment_boxes, draw_augmentation, jitter
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
    targets: Targets
    """Classes (b,) int64, labels (b, K) float32, masks (b, H, W) int64, or boxes; on the device."""
    count: int
    """Real examples: b, or 0 when this rank has none and holds one padding example of weight 0."""
    total: int
    """Examples of the batch over all ranks of the group, >= 1; 0 for an empty batch of Poisson sampling."""


@dataclass(slots=True)
class _Part:
    """The examples of a pass that this rank takes in one batch."""

    rows: slice
    """Positions in the pass."""
    length: int
    """How many these are: b, >= 1."""
    count: int
    total: int


def blank_batch(images: Images, device: torch.device) -> Batch:
    """Return a batch of two blank images of the shape of `images`, to try a model with."""
    shape = {"multilabel": (images.classes,), "mask": images.shape[1:]}.get(images.target, ())
    kind = torch.float32 if images.target == "multilabel" else torch.int64
    targets: Targets = torch.zeros(2, *shape, dtype=kind)
    if images.target == "boxes":
        targets = Boxes.join([(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))] * 2)
    return Batch(torch.zeros(2, *images.shape, device=device), targets.to(device), 2, 2)


def micro_batches(batch: Batch, count: int, rank: int, ranks: int) -> Iterator[Batch]:
    """Yield this rank's part of every micro-batch; the micro-batches do not depend on the number of ranks.

    A rank without an example in one gets the first of its batch as a padding example, with a count of 0.
    """
    count = min(count, batch.total)
    if count == 1:
        yield batch
        return

    def local_index(position: int) -> int:
        """Return how many of the batch's first `position` examples this rank holds: r, r + R, r + 2R, ..."""
        return -((rank - position) // ranks)

    for number in range(count):
        first = local_index(batch.total * number // count)
        end = local_index(batch.total * (number + 1) // count)
        held = end - first if batch.count else 0
        own = slice(first, end) if held else slice(1)
        yield Batch(batch.images[own], batch.targets[own], held, batch.total)


_Read = tuple[list[_Part], Tensor, Boxes | None]
"""Parts of a pass, their planes, and their boxes where these are read with the images."""


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
        self._targets = images.targets.to(device)
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
        whole, rest = divmod(len(examples), batch_size)
        sizes = [batch_size] * whole + [rest] * (rest > 0)
        yield from self.take(examples, sizes[:most], client, rng, shard, train=train)

    def take(
        self,
        examples: Indices,
        sizes: Sequence[int],
        client: int | None,
        rng: Generator | None,
        shard: tuple[int, int],
        *,
        train: bool,
    ) -> Iterator[Batch]:
        """Yield `examples`, (n,), as they are, in batches of `sizes`, each >= 1; others as for `batches`."""
        draws = (
            draw_augmentation(self.data.augment, len(examples), rng) if train and rng is not None else None
        )
        shifts = self.data.feature_shift
        shift = None if shifts is None or client is None else shifts.of_client(client, self.seed)
        pass_seed = 0 if rng is None or self._pixels is not None else int(rng.integers(2**62))
        if not sizes:
            return
        parts = list(_parts(sizes, shard))
        if self._pixels is not None:
            read = self._held(examples, parts)
        else:
            read = self._streamed(examples, parts, sizes, shard, pass_seed)
        for some, planes, boxes in read:
            rows = _rows(some)
            of_rows = None if draws is None else draws[rows].to(self.device)
            images, targets = self._prepare(planes, boxes, examples[rows], of_rows, shift, client or 0)
            if train and isinstance(targets, Boxes):
                targets = targets.counted()
            end = 0
            for part in some:
                start, end = end, end + part.length
                yield Batch(images[start:end], targets[start:end], part.count, part.total)

    def _prepare(
        self,
        planes: Tensor,
        boxes: Boxes | None,
        examples: Indices,
        draws: Tensor | None,
        shift: ImageShift | None,
        client: int,
    ) -> tuple[Tensor, Targets]:
        """Return the images and the targets of `examples`: shifted, augmented by `draws`, normalised.

        Args:
            planes: their pixels, uint8, with masks behind the channels.
            boxes: their boxes as they were read; None: those that are held.
            examples: their indices.
            draws: of the augmentation; None for none.
            shift: the feature shift of `client`.
            client: the client, whose noise they have.
        """
        kind, channels = self.data.augment, self.images.shape[0]
        images, masks = planes[:, :channels], planes[:, channels:]
        targets = select(self._targets, torch.from_numpy(examples)) if boxes is None else boxes
        if shift is not None:
            images = images.float().mul_(1 / 255)
            images = shift.apply(images, examples, stream_seed("noise", self.seed, client))
            masks = shift.turn(masks)
        if draws is not None:
            images, masks = augment(images, draws, kind), augment(masks, draws, kind, fill=IGNORED)
            if isinstance(targets, Boxes):
                targets = augment_boxes(targets, draws, kind, *images.shape[2:])
            if "color" in kind:
                images = jitter(images if shift is not None else images.float().mul_(1 / 255), draws)
        if self.images.target == "mask":
            targets = masks[:, 0].long()
        return self.normalize(images), targets

    def _held(self, examples: Indices, parts: list[_Part]) -> Iterator[_Read]:
        """Yield several batches at a time with their pixels, taken on the device."""
        assert self._pixels is not None
        image_bytes = 4 * math.prod(self.images.shape)
        together = max(1, CHUNK_BYTES // (image_bytes * max(part.length for part in parts)))
        for start in range(0, len(parts), together):
            some = parts[start : start + together]
            chosen = examples[_rows(some)]
            yield some, self._pixels.index_select(0, torch.from_numpy(chosen).to(self.device)), None

    def _streamed(
        self,
        examples: Indices,
        parts: list[_Part],
        sizes: Sequence[int],
        shard: tuple[int, int],
        pass_seed: int,
    ) -> Iterator[_Read]:
        """Yield batch by batch with its pixels, read by the workers.

        A dataset that draws at random, as transforms of its own do, draws by `pass_seed` and example.
        """
        assert self.images.source is not None
        if shard not in self._streams:
            pin = self.device.type == "cuda"
            self._streams[shard] = _Stream(self.images.source, self.data.workers, pin, shard)
        stream = self._streams[shard].read(examples, sizes, pass_seed)
        for part, (planes, boxes) in zip(parts, stream, strict=True):
            moved = None if boxes is None else boxes.to(self.device)
            yield [part], planes.to(self.device, non_blocking=True), moved


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


def _parts(sizes: Sequence[int], shard: tuple[int, int]) -> Iterator[_Part]:
    """Yield this rank's part of every batch of a pass."""
    (rank, ranks), end = shard, 0
    for size in sizes:
        start, end = end, end + size
        own = max(0, -((rank - size) // ranks))  # as of rank, rank + ranks, ... below size
        rows = slice(start + rank, end, ranks) if own else slice(start, start + 1)
        yield _Part(rows, max(own, 1), own, size)


def _rows(parts: list[_Part]) -> slice | Indices:
    """Return the positions in the pass of consecutive parts."""
    first, last = parts[0].rows, parts[-1].rows
    if len(parts) == 1 or first.step == 1:
        return slice(first.start, last.stop, first.step)
    return np.concatenate([np.arange(part.rows.start, part.rows.stop, part.rows.step) for part in parts])


_Planes = tuple[Tensor, Boxes | None]
"""Planes of a batch, (b, C, H, W), and its boxes."""


class _Stream:
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
        try:
            for batch in self._loader:
                if isinstance(batch, str):
                    raise ValueError(batch)
                yield batch
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
        self.ranks, self.pass_seed = ranks, 0
        self.examples: Indices = np.empty(0, dtype=np.int64)
        self.sizes: Sequence[int] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        by_rank = [_parts(self.sizes, (rank, self.ranks)) for rank in range(self.ranks)]
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
