"""What an example is labelled with: a class, several labels, a mask, or boxes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Target = Literal["class", "multilabel", "mask", "boxes"]

IGNORED = 255
"""Class of a mask's pixel that counts neither in a loss nor in a metric."""

DIFFICULT, CROWD = 1, 2
"""Kinds of boxes that are not trained, need not be found, and may be: an object; a region of many objects."""


@dataclass(frozen=True)
class Boxes:
    """The boxes of several images, one image after the other."""

    boxes: Tensor
    """(m, 4) float32: left, top, right and bottom edge in pixels, left < right and top < bottom."""

    labels: Tensor
    """(m,) int64, in range(classes)."""

    offsets: Tensor
    """(n + 1,) int64, on the CPU; the boxes of image i are those from offsets[i] to offsets[i + 1]."""

    ignored: Tensor | None = None
    """(m,) uint8: `DIFFICULT`, `CROWD`, or 0 of boxes that count; None: all count. Batches to train with have
    none that does not."""

    @classmethod
    def join(cls, images: Iterable[tuple[Tensor, Tensor]]) -> Boxes:
        """Return the boxes of several images from those of each: `(boxes, labels)` as `of` returns them."""
        return cls.cat(
            cls(boxes, labels, torch.tensor([0, len(labels)], dtype=torch.int64)) for boxes, labels in images
        )

    @classmethod
    def cat(cls, parts: Iterable[Boxes]) -> Boxes:
        """Return the boxes of several parts, each of any number of images, on one device."""
        listed = list(parts)
        if not listed:
            return cls(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), torch.zeros(1).long())
        counts = torch.cat([listed[0].offsets.new_zeros(1), *(part.offsets.diff() for part in listed)])
        labels = torch.cat([part.labels for part in listed])
        ignored = None
        if any(part.ignored is not None for part in listed):
            ignored = torch.cat(
                [
                    torch.zeros_like(part.labels, dtype=torch.uint8) if part.ignored is None else part.ignored
                    for part in listed
                ]
            )
        return cls(torch.cat([part.boxes for part in listed]), labels, counts.cumsum(0), ignored)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.offsets) - 1

    def of(self, image: int) -> tuple[Tensor, Tensor]:
        """Return the boxes (k, 4) of one image, and their labels (k,)."""
        start, end = self.offsets[image].item(), self.offsets[image + 1].item()
        return self.boxes[start:end], self.labels[start:end]

    def __getitem__(self, images: slice) -> Boxes:
        """Return the boxes of consecutive images."""
        first, last, _ = images.indices(len(self))
        offsets = self.offsets[first : last + 1]
        rows = slice(int(offsets[0]), int(offsets[-1]))
        return self._rows(rows, offsets - offsets[0])

    def index_select(self, images: Tensor) -> Boxes:
        """Return the boxes of the images with these indices, (k,) int64 on the CPU."""
        starts, counts = self.offsets[images], self.offsets.diff()[images]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        # Row r of image i is row `starts[i] + r` of all.
        rows = torch.arange(int(offsets[-1])) + torch.repeat_interleave(starts - offsets[:-1], counts)
        return self._rows(rows.to(self.boxes.device), offsets)

    def where(self, kept: Tensor) -> Boxes:
        """Return the boxes for which `kept`, (m,) bool, is true, of as many images."""
        before = torch.cat([self.offsets.new_zeros(1), kept.cpu().cumsum(0)])
        return self._rows(kept, before[self.offsets])

    def counted(self) -> Boxes:
        """Return the boxes that count, without those that are ignored."""
        if self.ignored is None:
            return self
        return replace(self.where(self.ignored == 0), ignored=None)

    def _rows(self, rows: Any, offsets: Tensor) -> Boxes:
        ignored = None if self.ignored is None else self.ignored[rows]
        return Boxes(self.boxes[rows], self.labels[rows], offsets, ignored)

    def to(self, device: torch.device) -> Boxes:
        """Return the boxes on `device`."""
        ignored = None if self.ignored is None else self.ignored.to(device)
        return Boxes(self.boxes.to(device), self.labels.to(device), self.offsets, ignored)


Targets = Tensor | Boxes


def select(targets: Targets, images: Tensor) -> Targets:
    """Return the targets of the images with these indices, (k,) int64 on the CPU."""
    if isinstance(targets, Boxes):
        return targets.index_select(images)
    return targets.index_select(0, images.to(targets.device))


@dataclass(frozen=True)
class Detections:
    """What a detector found in several images; by falling score within an image."""

    boxes: Boxes
    """The boxes and their classes."""

    scores: Tensor
    """(m,) float32, in [0, 1]: that of each box."""

    def of(self, image: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (k, 4), labels (k,) and scores (k,) of one image, on the CPU."""
        start, end = self.boxes.offsets[image].item(), self.boxes.offsets[image + 1].item()
        boxes, labels = self.boxes.of(image)
        return boxes.cpu(), labels.cpu(), self.scores[start:end].cpu()
