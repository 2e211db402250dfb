"""COCO-style data: a JSON file of images, categories and annotations for each of training and test set."""

from __future__ import annotations

import itertools
import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fedddp.data.annotated import LabelledFiles, box_target, check_listed_size, label_table
from fedddp.data.image_files import read_image
from fedddp.data.labelling import MOST_MASK_CLASSES
from fedddp.data.pixels import Range
from fedddp.data.targets import IGNORED, Target
from fedddp.section import ConfigError

logger = logging.getLogger(__name__)

LAYOUT = (
    "coco reads annotations/*train*.json and annotations/*val*.json, or train.json and val.json, with the "
    "images in the root, in images/, or in a folder such as train2017/"
)
Annotation = dict[str, Any]


def coco(root: Path, target: Target, value_range: Range | None = None) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return the training and the test set of COCO-style data.

    Classes are the categories of the training set by rising id. Labels leave crowds out, and their boxes
    are marked. In masks class 0 is the background, smaller objects lie on larger ones, and pixels of crowds
    do not count.

    Args:
        root: folder of the JSON files and the images.
        target: "boxes", "multilabel" or "mask".
        value_range: as for `to_uint8`.

    Raises:
        ConfigError: JSON files or images are missing, or the files are no COCO-style data.
    """
    train = _Part(root, "train")
    test = _Part(root, "val")
    if test.categories != train.categories:
        raise ConfigError(
            f"{test.file} has other categories than {train.file}; give both files the same ids and names"
        )
    return train.dataset(target, value_range), test.dataset(target, value_range)


class _Part:
    """One JSON file."""

    def __init__(self, root: Path, name: str) -> None:
        self.file = _json_file(root, name)
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            self.categories = sorted((int(one["id"]), str(one["name"])) for one in content["categories"])
            entries = sorted(((int(one["id"]), one) for one in content["images"]), key=lambda entry: entry[0])
            sizes = [(int(one.get("height") or 0), int(one.get("width") or 0)) for _, one in entries]
            names = [str(one["file_name"]) for _, one in entries]
            by_image: dict[int, list[Annotation]] = defaultdict(list)
            for one in content["annotations"]:
                by_image[int(one["image_id"])].append(one)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self.file} is no COCO-style file ({type(error).__name__}: {error}); it needs images with "
                "id and file_name, categories with id and name, and annotations with image_id and category_id"
            ) from None
        if not names:
            raise ConfigError(f"{self.file} lists no images; give a file with some")
        twice = next((a for (a, _), (b, _) in itertools.pairwise(entries) if a == b), None)
        if twice is not None:
            raise ConfigError(f"{self.file} has two images with the id {twice}; give each an id of its own")
        self.sizes = [size if min(size) > 0 else None for size in sizes]
        """Height and width of each image; None where the file does not have them."""
        self.annotations = [by_image.pop(number, []) for number, _ in entries]
        if by_image:
            raise ConfigError(
                f"{self.file}: an annotation has the image_id {next(iter(by_image))}, which no image has; "
                "correct it"
            )
        self.images = _images(root, name, self.file, names)
        self.numbers = {number: label for label, (number, _) in enumerate(self.categories)}

    def dataset(self, target: Target, value_range: Range | None) -> Dataset[Any]:
        """Return the images with what `target` asks for."""
        names = [name for _, name in self.categories]
        if target == "mask":
            return _Masks(self, names, value_range)
        if target == "multilabel":
            singles = [[one for one in of if not one.get("iscrowd")] for of in self.annotations]
            table = label_table([[self.label(one) for one in of] for of in singles], len(names))
            return LabelledFiles(self.images, table, names, None, value_range)
        found = [self._boxes(of, size) for of, size in zip(self.annotations, self.sizes, strict=True)]
        dropped = sum(len(of) - len(one["labels"]) for of, one in zip(self.annotations, found, strict=True))
        if dropped:
            logger.warning("%s: left out %d boxes without area or outside of their image", self.file, dropped)
        return LabelledFiles(self.images, found, names, None, value_range, (self.sizes, self.file))

    def label(self, annotation: Annotation) -> int:
        """Return the class of an annotation."""
        number = annotation.get("category_id")
        if number not in self.numbers:
            raise ConfigError(
                f"{self.file}: annotation {annotation.get('id')} has the category_id {number}, which no "
                "category has; correct it"
            )
        return self.numbers[number]

    def _boxes(self, annotations: list[Annotation], size: tuple[int, int] | None) -> dict[str, Tensor]:
        """Return the boxes of an image that have an area within it."""
        boxes, labels, crowds = [], [], []
        for one in annotations:
            x, y, width, height = self._box(one)
            label = self.label(one)
            inside = x + width > 0 and y + height > 0 and (size is None or (x < size[1] and y < size[0]))
            if width > 0 and height > 0 and inside:
                boxes.append([x, y, x + width, y + height])
                labels.append(label)
                crowds.append(bool(one.get("iscrowd")))
        return box_target(boxes, labels, iscrowd=crowds)

    def _box(self, annotation: Annotation) -> list[float]:
        try:
            x, y, width, height = (float(value) for value in annotation["bbox"])
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"{self.file}: annotation {annotation.get('id')} has the bbox {annotation.get('bbox')}; give "
                "[x, y, width, height]"
            ) from None
        return [x, y, width, height]


class _Masks(Dataset[tuple[Tensor, Tensor]]):
    """The images of a part, with masks that are drawn from the outlines of its annotations."""

    def __init__(self, part: _Part, names: list[str], value_range: Range | None) -> None:
        if len(names) >= MOST_MASK_CLASSES:
            raise ConfigError(
                f"{part.file} has {len(names)} categories; masks have at most {MOST_MASK_CLASSES - 1}"
            )
        self.images, self.classes, self.value_range = part.images, ["background", *names], value_range
        self.masks = [str(part.file)] * len(part.images)
        """The file that each mask comes from: decoded pixels in a cache are as old as this."""
        self._annotations, self._file, self._sizes = part.annotations, part.file, part.sizes
        self._labels = [[part.label(one) for one in of] for of in part.annotations]
        for of in part.annotations:
            for one in of:
                self._check(one)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image, uint8 (C, H, W), and its mask, uint8 (H, W)."""
        image = read_image(self.images[index], self.value_range)
        size = (image.shape[1], image.shape[2])
        check_listed_size(self.images[index], size, self._sizes[index], self._file)
        drawn = []
        for label, one in zip(self._labels[index], self._annotations[index], strict=True):
            inside = _region(one["segmentation"], size)
            if inside is None:
                raise ValueError(
                    f"{self._file}: annotation {one.get('id')} is not of the size of {self.images[index]}, "
                    f"{size[0]}x{size[1]}; correct the file"
                )
            drawn.append((not one.get("iscrowd"), -int(inside.sum()), label + 1, inside))
        mask = np.zeros(size, np.uint8)
        # Crowds first, then from large to small: what is drawn last lies on top.
        for single, _, label, inside in sorted(drawn, key=lambda one: one[:2]):
            mask[inside] = label if single else IGNORED
        return image, torch.from_numpy(mask)

    def _check(self, annotation: Annotation) -> None:
        """Refuse an annotation without an outline that can be drawn."""
        outline = annotation.get("segmentation")
        if isinstance(outline, dict) and isinstance(outline.get("counts"), list) and "size" in outline:
            return
        polygons = isinstance(outline, list) and bool(outline)
        if polygons and all(isinstance(p, list) and len(p) >= 6 and not len(p) % 2 for p in outline or ()):
            return
        kind = "a compressed run-length code" if isinstance(outline, dict) else "no polygons"
        raise ConfigError(
            f"{self._file}: annotation {annotation.get('id')} has {kind} for its segmentation, but masks are "
            "drawn from polygons [[x1, y1, x2, y2, x3, y3, ...]] or plain run lengths; convert it"
        )


def _region(outline: Any, size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """Return which pixels lie in an outline, (H, W); None: it is of another size.

    A pixel lies in a polygon if its centre does. Plain run lengths are of pixels outside and inside in turn,
    down the columns.
    """
    height, width = size
    if isinstance(outline, dict):
        counts = np.array(outline["counts"], np.int64)
        if tuple(outline["size"]) != size or counts.sum() != height * width:
            return None
        inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return inside.reshape(width, height).T
    covered = np.zeros(size, np.bool_)
    for polygon in outline:
        covered |= _inside(np.array(polygon, np.float64).reshape(-1, 2), size)
    return covered


def _inside(corners: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which pixels' centres lie in a polygon: those with an odd number of edges to their left."""
    height, width = size
    centres = np.arange(height) + 0.5
    edges = np.zeros((height, width + 1), np.int64)  # in the column of the first centre behind an edge
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        (rows,) = np.nonzero((y1 > centres) != (y2 > centres))
        x = x1 + (x2 - x1) * (centres[rows] - y1) / ((y2 - y1) or 1)
        edges[rows, np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)] += 1
    inside: NDArray[np.bool_] = edges.cumsum(axis=1)[:, :width] % 2 == 1
    return inside


# ---- files ----


def _json_file(root: Path, name: str) -> Path:
    """Return the JSON file of a part, "train" or "val"."""
    places = (root / "annotations", root)
    for folder in places:
        found = sorted(folder.glob(f"*{name}*.json")) if folder.is_dir() else []
        found = [file for file in found if not file.name.startswith(".")]
        # COCO itself has captions and key points beside the objects.
        objects = [file for file in found if "instances" in file.name] if len(found) > 1 else found
        if len(objects) == 1:
            return objects[0]
        if found:
            raise ConfigError(
                f"data.root={root} has {len(found)} files *{name}*.json in {folder}, such as {found[0].name} "
                f"and {found[1].name}; keep one, or name it instances_{name}.json"
            )
    raise ConfigError(f"data.root={root} has no file *{name}*.json; {LAYOUT}")


def _images(root: Path, name: str, file: Path, names: list[str]) -> list[str]:
    """Return the files of images, all below one of the folders of `LAYOUT`."""
    inside = [folder for folder in (root / "images", root) if folder.is_dir()]
    parts = [place for folder in inside for place in sorted(folder.glob(f"{name}*")) if place.is_dir()]
    for folder in (root, *parts, root / "images"):
        if any((folder / image).is_file() for image in names):
            files = [folder / image for image in names]
            missing = next((image for image in files if not image.is_file()), None)
            if missing is not None:
                raise ConfigError(f"{missing} is missing, but {file} lists it; complete the images")
            return [str(image) for image in files]
    raise ConfigError(f"{file} lists the image {names[0]}, which is not below data.root={root}; {LAYOUT}")
