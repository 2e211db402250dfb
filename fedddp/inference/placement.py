"""Where the part of an image that a model sees lies in the image: masks and boxes back to its own pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedddp.data.targets import IGNORED
from fedddp.data.transforms import resized


@dataclass(frozen=True)
class Placement:
    """The resizing of one image, whose shorter side becomes that of the model, and the cut of its centre."""

    height: int
    """Of the image, in pixels."""
    width: int
    tall: int
    """Height of the resized image, before the cut."""
    broad: int
    """Its width."""
    top: int
    """Rows of the resized image above what the model sees."""
    left: int
    """Columns to the left of it."""

    @classmethod
    def of(cls, size: tuple[int, int], model: tuple[int, int]) -> Placement:
        """Return that of an image of `size` for a model of images of `model`; both height and width."""
        if size == model:
            return cls(*size, *size, 0, 0)
        return cls(*size, *resized(*size, model[0]))

    def mask(self, classes: Tensor) -> Tensor:
        """Return a mask of what the model sees, uint8 (H, W), as one of the image, (height, width).

        A pixel has the class of the nearest one that the model sees; 255 where it lies outside of the cut.
        """
        rows, columns = (
            (torch.arange(count, dtype=torch.float64) + 0.5).mul(scaled / count).floor().long() - first
            for count, scaled, first in (
                (self.height, self.tall, self.top),
                (self.width, self.broad, self.left),
            )
        )
        found = torch.full((self.height, self.width), IGNORED, dtype=torch.uint8)
        inside = [
            (axis >= 0) & (axis < seen) for axis, seen in zip((rows, columns), classes.shape, strict=True)
        ]
        part = classes[rows[inside[0]]][:, columns[inside[1]]]
        found[inside[0][:, None] & inside[1]] = part.flatten()
        return found

    def boxes(self, boxes: Tensor) -> Tensor:
        """Return boxes (n, 4) in pixels of what the model sees in pixels of the image."""
        offset = boxes.new_tensor([self.left, self.top, self.left, self.top])
        scale = (self.width / self.broad, self.height / self.tall)
        edges = boxes.new_tensor([self.width, self.height, self.width, self.height])
        return ((boxes + offset) * boxes.new_tensor([*scale, *scale])).clamp(min=0).minimum(edges)
