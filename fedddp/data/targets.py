"""What an example is labelled with: a class, several labels, a mask, or boxes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Target = Literal["class", "multilabel", "mask", "boxes"]

IGNORED = 255
"""Class of a mask's pixel that counts neither in a loss nor in a metric."""


@dataclass(frozen=True)
class Boxes:
    """The boxes of several images, one image after the other."""

    boxes: Tensor
    """(m, 4) float32: left, top, right and bottom edge in pixels, left < right and top < bottom."""

    labels: Tensor
    """(m,) int64, in range(classes)."""

    offsets: Tensor
    """(n + 1,) int64, on the CPU; the boxes of image i are those from offsets[i] to offsets[i + 1]."""

    @classmethod
    def join(cls, images: Iterable[tuple[Tensor, Tensor]]) -> Boxes:
        """Return the boxes of several images from those of each: `(boxes, labels)` as `of` returns them."""
        pairs = list(images)
        counts = torch.tensor([0, *(len(labels) for _, labels in pairs)])
        return cls(
            torch.cat([boxes for boxes, _ in pairs]) if pairs else torch.empty(0, 4),
            torch.cat([labels for _, labels in pairs]) if pairs else torch.empty(0, dtype=torch.int64),
            counts.cumsum(0),
        )

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
        start, end = offsets[0].item(), offsets[-1].item()
        return Boxes(self.boxes[start:end], self.labels[start:end], offsets - start)

    def index_select(self, images: Tensor) -> Boxes:
        """Return the boxes of the images with these indices, (k,) int64 on the CPU."""
        starts, counts = self.offsets[images], self.offsets.diff()[images]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        # Row r of image i is row `starts[i] + r` of all.
        rows = torch.arange(int(offsets[-1])) + torch.repeat_interleave(starts - offsets[:-1], counts)
        rows = rows.to(self.boxes.device)
        return Boxes(self.boxes[rows], self.labels[rows], offsets)

    def to(self, device: torch.device) -> Boxes:
        """Return the boxes on `device`."""
        return Boxes(self.boxes.to(device), self.labels.to(device), self.offsets)


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
