"""Predict masks and boxes of image files, in pixels of the files, and draw them."""

from __future__ import annotations

import csv
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fedddp.data.items import naming
from fedddp.data.resizing import Placement
from fedddp.inference.model import BATCH_SIZES, TrainedModel
from fedddp.inference.pictures import Prediction, distinct_folders
from fedddp.storage.examined import IGNORED, BoxesOfImage
from fedddp.tracking import overlays

logger = logging.getLogger(__name__)

NOT_SEEN = "(not seen)"
"""What stands for the pixels that the model did not see, among the classes of a mask."""


@dataclass(frozen=True)
class MaskOfFile:
    """The class of every pixel of an image file."""

    file: Path
    mask: NDArray[np.uint8]
    """(height, width) of the file; 255 where the model did not see it."""
    classes: tuple[str, ...]
    picture: Image.Image
    """The image with the mask on it, as large as the file."""

    @property
    def counts(self) -> list[int]:
        """Pixels of each class; those that the model did not see have none."""
        counts: list[int] = np.bincount(self.mask.flatten(), minlength=256)[: len(self.classes)].tolist()
        return counts

    @property
    def outside(self) -> int:
        """Pixels that the model did not see."""
        return int((self.mask == IGNORED).sum())

    @property
    def shares(self) -> Prediction:
        """The classes with their shares of the file's pixels, the largest first; what was not seen is one."""
        counts = [*zip(self.counts, self.classes, strict=True)]
        if self.outside:
            counts.append((self.outside, NOT_SEEN))
        shares = sorted(counts, key=lambda one: -one[0])
        all_pixels = self.mask.size
        return Prediction(
            self.file, tuple(name for _, name in shares), tuple(count / all_pixels for count, _ in shares)
        )

    def foreground(self, *, background: bool) -> Prediction:
        """Return what is written below a picture: the classes but background that were found, their share."""
        counts = self.counts
        found = [label for label in range(int(background), len(counts)) if counts[label]]
        names = ", ".join(self.classes[label] for label in sorted(found, key=lambda label: -counts[label]))
        share = sum(counts[label] for label in found) / max(1, self.mask.size - self.outside)
        return Prediction(self.file, (names or "no foreground",), (share,), shares=True)


@dataclass(frozen=True)
class BoxesOfFile:
    """The boxes that were found in an image file, by falling score."""

    file: Path
    size: tuple[int, int]
    """Height and width of the file."""
    found: BoxesOfImage
    """In pixels of the file."""
    classes: tuple[str, ...]
    picture: Image.Image
    """The image with the boxes on it, as large as the file, or enlarged."""
    seen: tuple[float, float, float, float]
    """Left, top, right and bottom of what the model saw, in pixels of the file."""

    @property
    def cut(self) -> bool:
        """Whether the model did not see all of the file."""
        whole = (0.0, 0.0, *map(float, self.size[::-1]))
        return any(abs(edge - end) > 0.01 for edge, end in zip(self.seen, whole, strict=True))  # of float32

    @property
    def names(self) -> list[str]:
        """The class of each box."""
        return [self.classes[label] for label in self.found.labels.tolist()]

    @property
    def scores(self) -> list[float]:
        """The score of each box."""
        assert self.found.scores is not None
        return [round(score, 6) for score in self.found.scores.tolist()]

    @property
    def summary(self) -> str:
        """How many boxes there are of which class: "2 × car, 1 × person"."""
        return ", ".join(f"{count} × {name}" for name, count in Counter(self.names).most_common()) or "none"


@torch.no_grad()
def find_masks(model: TrainedModel, files: Sequence[Path]) -> Iterator[MaskOfFile]:
    """Yield the mask of every image file; one that is no image is logged and left out."""
    background = bool(getattr(model.task, "background", True))
    for some in _batches(model, files):
        masks = model.predict([pixels for _, _, pixels in some])
        for (file, image, _), classes in zip(some, masks, strict=True):
            place = Placement.of(_size(image), model.shape[1:], model.resize)
            mask = place.mask(classes).numpy()
            picture = overlays.overlay(overlays.picture_of(image.numpy()), mask, background=background)
            picture = hatched(picture, place.region)
            yield MaskOfFile(file, mask, model.classes, picture)


@torch.no_grad()
def find_boxes(model: TrainedModel, files: Sequence[Path], threshold: float) -> Iterator[BoxesOfFile]:
    """Yield the boxes with a score of `threshold` or more of every image file, as `find_masks` does."""
    for some in _batches(model, files):
        detections = model.predict([pixels for _, _, pixels in some])
        offsets = detections.boxes.offsets.tolist()
        for number, (file, image, _) in enumerate(some):
            boxes, labels = detections.boxes.of(number)
            scores = detections.scores[offsets[number] : offsets[number + 1]]
            kept = scores >= threshold
            place = Placement.of(_size(image), model.shape[1:], model.resize)
            placed = place.boxes(boxes)
            kept &= (placed[:, 2:] > placed[:, :2]).all(1)  # and not in the margins
            found = BoxesOfImage(placed[kept].numpy(), labels[kept].numpy(), scores[kept].numpy())
            factor = max(1.0, overlays.scale_to(SMALL, _size(image)))
            picture = overlays.resized(overlays.picture_of(image.numpy()), factor)
            picture = hatched(picture, tuple(factor * edge for edge in place.region))
            overlays.draw_boxes(picture, found, model.classes, factor=factor)
            yield BoxesOfFile(file, _size(image), found, model.classes, picture, place.region)


def hatched(picture: Image.Image, seen: Sequence[float]) -> Image.Image:
    """Return an RGB picture with oblique lines where the model did not see it.

    Args:
        picture: is not changed.
        seen: left, top, right and bottom edge, in pixels of the picture.
    """
    pixels = np.asarray(picture.convert("RGB")).copy()
    left, top, right, bottom = (round(edge) for edge in seen)
    rows, columns = np.indices(pixels.shape[:2])
    outside = (rows < top) | (rows >= bottom) | (columns < left) | (columns >= right)
    period = max(6, max(picture.size) // 40)
    pixels[outside & ((rows + columns) % period < period / 5)] = overlays.UNKNOWN
    return Image.fromarray(pixels)


SMALL = 480
"""Images with fewer pixels across are enlarged where boxes are drawn on them, so that names can be read."""


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[1], image.shape[2]


def _batches(model: TrainedModel, files: Sequence[Path]) -> Iterator[list[tuple[Path, Tensor, Tensor]]]:
    """Yield files with their pixels, uint8 (C, h, w), and with these as the model sees them, (C, H, W)."""
    size = BATCH_SIZES[model.task.target]
    for start in range(0, len(files), size):
        some = []
        for file in files[start : start + size]:
            try:
                image = model.read(file)
                with naming(str(file)):
                    some.append((file, image, model.resized(model.channels(image))))
            except ValueError as error:
                logger.warning("%s", error)
        if some:
            yield some


# ---- files ----


def file_names(files: Sequence[Path]) -> list[str]:
    """Return a name for what is written of each file: the shortest parts of its path that distinguish it."""
    folders = distinct_folders(files)
    names = [file.stem for file in files]
    for last in ([file.stem for file in files], [file.name for file in files]):
        if len(set(names)) < len(names):
            names = ["-".join((*parts, name)) for parts, name in zip(folders, last, strict=True)]
    every, taken = set(names), set[str]()
    for place, name in enumerate(names):
        if name in taken:  # a-b/c.png and a/b-c.png are joined to the same
            numbered = (f"{name}-{number}" for number in itertools.count(2))
            names[place] = next(one for one in numbered if one not in every | taken)
        taken.add(names[place])
    return names


def write_mask(
    one: MaskOfFile, name: str, staging: Path, folder: Path, *, background: bool
) -> dict[str, Any]:
    """Write NAME.mask.png, whose pixels are classes, and NAME.overlay.png; return what is known as JSON.

    Args:
        one: the mask.
        name: of the files, without endings.
        staging: where they are written.
        folder: where they are moved later, which is in the paths of the JSON.
        background: whether class 0 is background, which is not coloured.
    """
    mask, overlay = f"{name}.mask.png", f"{name}.overlay.png"
    overlays.mask_picture(one.mask, background=background).save(staging / mask)
    one.picture.save(staging / overlay)
    return {
        "image": str(one.file),
        "mask": str(folder / mask),
        "overlay": str(folder / overlay),
        "height": one.mask.shape[0],
        "width": one.mask.shape[1],
        "classes": [
            {"class": name, "pixels": count, "share": count / one.mask.size}
            for name, count in zip(one.classes, one.counts, strict=True)
        ],
        "pixels_outside": one.outside,
        "share_outside": one.outside / one.mask.size,
    }


def write_boxes(one: BoxesOfFile, name: str, staging: Path, folder: Path) -> dict[str, Any]:
    """Write NAME.boxes.png; return what is known as JSON. Arguments as for `write_mask`."""
    picture = f"{name}.boxes.png"
    one.picture.save(staging / picture)
    boxes = zip(one.names, one.scores, one.found.boxes.tolist(), strict=True)
    return {
        "image": str(one.file),
        "picture": str(folder / picture),
        "height": one.size[0],
        "width": one.size[1],
        "seen": [round(edge, 2) for edge in one.seen],
        "boxes": [
            {"class": name, "score": score, "box": [round(edge, 2) for edge in box]}
            for name, score, box in boxes
        ],
    }


def write_table(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the boxes of `write_boxes` as CSV: image, class, score, left, top, right, bottom."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "class", "score", "left", "top", "right", "bottom"])
        for row in rows:
            table.writerows([row["image"], one["class"], one["score"], *one["box"]] for one in row["boxes"])
