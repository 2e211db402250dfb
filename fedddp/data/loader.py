"""A client to this rank's batches: normalised, and augmented when training.

The batches of a pass do not depend on the number of ranks that share them, nor on whether pixels
are held on the device or streamed: everything random is drawn for a pass before it starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from fedddp.data.datasets import DataConfig, Images
from fedddp.data.stream import Part, Stream, parts_of
from fedddp.data.targets import IGNORED, Boxes, Targets, select
from fedddp.data.transforms import ImageShift, augment, augment_boxes, draw_augmentation, jitter
from fedddp.rng import stream_seed

Indices = NDArray[np.int64]

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


_Read = tuple[list[Part], Tensor, Boxes | None]
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
        self._streams: dict[tuple[int, int], Stream] = {}

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
        parts = list(parts_of(sizes, shard))
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

    def _held(self, examples: Indices, parts: list[Part]) -> Iterator[_Read]:
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
        parts: list[Part],
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
            self._streams[shard] = Stream(self.images.source, self.data.workers, pin, shard)
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


def _rows(parts: list[Part]) -> slice | Indices:
    """Return the positions in the pass of consecutive parts."""
    first, last = parts[0].rows, parts[-1].rows
    if len(parts) == 1 or first.step == 1:
        return slice(first.start, last.stop, first.step)
    return np.concatenate([np.arange(part.rows.start, part.rows.stop, part.rows.step) for part in parts])
