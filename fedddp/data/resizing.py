"""From images of any size to the square ones of a model, and back: images, masks and boxes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from fedddp.data.targets import IGNORED, Boxes, Target

Way = Literal["crop", "pad", "stretch"]
"""How images become square: their centre; all between black margins; all in other proportions."""

Resize = Literal["auto", "crop", "pad", "stretch"]

Sizes = NDArray[np.int64]
"""Height and width of several images, (n, 2)."""

RESIZE: dict[Way, str] = {
    "crop": "shorter side to size, bilinear with antialiasing, then the centre",
    "pad": "longer side to size, bilinear with antialiasing, then black margins of equal width on both sides",
    "stretch": "both sides to size, bilinear with antialiasing",
}
"""What each does, for the users of an exported model."""


def usual(target: Target) -> Way:
    """Return how images of `target` are resized by default: no part of a mask, and no object, is lost."""
    return "pad" if target in ("mask", "boxes") else "crop"


def torchvision_v2() -> Any:
    """Import `torchvision.transforms.v2.functional` on first use: torchvision takes more than a second."""
    from torchvision.transforms.v2 import functional

    return functional


@dataclass(frozen=True)
class Placement:
    """Where one image lies in what the model sees of it."""

    height: int
    """Of the image, in pixels."""
    width: int
    tall: int
    """Height of the resized image, before it is cut or padded."""
    broad: int
    """Its width."""
    top: int
    """Rows of the resized image above what the model sees; of padding, less than 0."""
    left: int
    """Columns to the left of it."""
    seen: tuple[int, int]
    """Height and width of what the model sees."""

    @classmethod
    def of(cls, image: tuple[int, int], model: tuple[int, int], how: Way = "crop") -> Placement:
        """Return that of an image for a model, by height and width of both; the model's are equal.

        Images of the model's size may have any proportions: they stay as they are.
        """
        if image == model or how == "stretch":
            return cls(*image, *model, 0, 0, model)
        size, side = model[0], min(image) if how == "crop" else max(image)
        tall, broad = (max(1, size * edge // side) for edge in image)
        # As torchvision's `center_crop`, which also pads.
        top, left = (
            round((edge - size) / 2) if how == "crop" else -((size - edge) // 2) for edge in (tall, broad)
        )
        return cls(*image, tall, broad, top, left, model)

    @property
    def share_seen(self) -> float:
        """The share of the image's area that the model sees, in (0, 1]."""
        rows, columns = self.seen
        return min(1.0, rows / self.tall) * min(1.0, columns / self.broad)

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of what the model sees that the image lies in; others are padding."""
        edges = ((self.top, self.tall, self.seen[0]), (self.left, self.broad, self.seen[1]))
        rows, columns = (slice(max(0, -first), min(seen, scaled - first)) for first, scaled, seen in edges)
        return rows, columns

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

    @property
    def region(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what the model sees, in pixels of the image."""
        rows, columns = self.seen
        left, top, right, bottom = self.boxes(torch.tensor([[0.0, 0.0, columns, rows]]))[0].tolist()
        return left, top, right, bottom


@dataclass(frozen=True)
class Resizing:
    """How images of any size become those of a model, and their masks and boxes with them."""

    size: int | None = None
    """Height and width that they get; None: they stay as they are."""
    how: Way = "crop"

    def placement(self, image: tuple[int, int]) -> Placement:
        """Return where an image, by height and width, lies in what the model sees."""
        return Placement.of(image, image if self.size is None else (self.size, self.size), self.how)

    def image(self, images: Tensor) -> Tensor:
        """Return images (..., C, h, w) resized: bilinear with antialiasing; margins are black."""
        return self._resized(images, 0, nearest=False)

    def mask(self, mask: Tensor) -> Tensor:
        """Return a mask (1, h, w) resized as its image; a pixel has the class of the nearest, margins 255."""
        return self._resized(mask, IGNORED, nearest=True)

    def _resized(self, planes: Tensor, margin: int, *, nearest: bool) -> Tensor:
        place = self.placement((planes.shape[-2], planes.shape[-1]))
        if place.seen == (place.height, place.width):
            return planes
        v2 = torchvision_v2()
        mode = v2.InterpolationMode.NEAREST_EXACT if nearest else v2.InterpolationMode.BILINEAR
        scaled: Tensor = v2.resize(planes, [place.tall, place.broad], mode, antialias=True)
        right, bottom = (
            seen - edge + first
            for seen, edge, first in zip(
                place.seen[::-1], (place.broad, place.tall), (place.left, place.top), strict=True
            )
        )
        # Negative widths cut.
        return pad(scaled, (-place.left, right, -place.top, bottom), value=margin)

    def boxes(self, boxes: Boxes, image: tuple[int, int]) -> Boxes:
        """Return the boxes of one image, by its height and width, as they lie once it is resized.

        Parts outside are cut off; of resized images, boxes less than a pixel across or down are left out.
        """
        place = self.placement(image)
        smallest = 0.0
        if place.seen != image:
            scale, offset = (place.broad / place.width, place.tall / place.height), (place.left, place.top)
            corners = boxes.boxes
            corners = corners * corners.new_tensor([*scale, *scale]) - corners.new_tensor([*offset, *offset])
            boxes, smallest = replace(boxes, boxes=corners), 1.0
        return clip_boxes(boxes, *place.seen, smallest)


def clip_boxes(boxes: Boxes, height: int, width: int, smallest: float = 1.0) -> Boxes:
    """Return the boxes within images of one size, without those less than `smallest` pixels across."""
    edges = boxes.boxes.new_tensor([width, height, width, height])
    clipped = boxes.boxes.clamp(min=0).minimum(edges)
    sides = clipped[:, 2:] - clipped[:, :2]
    return replace(boxes, boxes=clipped).where(((sides >= smallest) & (sides > 0)).all(1))


def not_padding(sizes: Sizes, resizing: Resizing) -> Tensor:
    """Return which pixels of resized images are of the image and not of its margins, (n, H, W) bool.

    Args:
        sizes: of the images before.
        resizing: to a size that is not None.
    """
    assert resizing.size is not None
    inside = torch.zeros(len(sizes), resizing.size, resizing.size, dtype=torch.bool)
    for plane, (height, width) in zip(inside, sizes.tolist(), strict=True):
        plane[resizing.placement((height, width)).window] = True
    return inside


def cropping(sizes: Sizes, resizing: Resizing) -> str | None:
    """Return a line on how many images lose how much of their area by `resizing`; None: none does."""
    of_size = {size: resizing.placement(size).share_seen for size in set(map(tuple, sizes.tolist()))}
    lost = np.array([1 - of_size[tuple(size)] for size in sizes.tolist()])
    if not lost.any():
        return None
    share = lost[lost > 0].mean()
    return (
        f"{np.count_nonzero(lost):,} of {len(sizes):,} images lose on average {100 * share:.3g} % of their "
        "area at their edges, with what is labelled there; data.resize=pad keeps all"
    )
