"""Image files with labels, boxes or a mask file each: what the readers of published datasets return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fedddp.data.image_files import read_image, read_mask, size_of
from fedddp.data.items import naming
from fedddp.data.pixels import Range
from fedddp.data.targets import IGNORED


class LabelledFiles(Dataset[tuple[Tensor, Any]]):
    """Image files, each with what it is labelled with."""

    def __init__(
        self,
        images: Sequence[str | Path],
        targets: Any,
        classes: Sequence[str],
        ids: Any = None,
        value_range: Range | None = None,
        sizes: tuple[Sequence[tuple[int, int] | None], Path] | None = None,
    ) -> None:
        """Take the files.

        Args:
            images: the files.
            targets: of each image: labels (n, K) of 0 and 1, or n dicts of boxes and labels.
            classes: the names of the classes.
            ids: the natural owner of each image; None: they have none.
            value_range: as for `to_uint8`.
            sizes: height and width that each image must have (None: any), and the file that lists them.
        """
        self.images, self.targets, self.classes = [str(image) for image in images], targets, list(classes)
        self.ids, self.value_range, self._sizes = ids, value_range, sizes

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """Return an image, uint8 (C, H, W), and what it is labelled with.

        Raises:
            ValueError: it cannot be read, or is of another size than is listed.
        """
        image = read_image(self.images[index], self.value_range)
        self._check_size(index, (image.shape[1], image.shape[2]))
        return image, self.targets[index]

    def label_and_size(self, index: int) -> tuple[Any, tuple[int, int]] | None:
        """Return what an image is labelled with, and its height and width by the header of its file.

        None where only reading the image shows its size.

        Raises:
            ValueError: it is of another size than is listed.
            OSError: the header cannot be read.
        """
        size = size_of(self.images[index])
        if size is None:
            return None
        self._check_size(index, size)
        return self.targets[index], size

    def _check_size(self, index: int, size: tuple[int, int]) -> None:
        if self._sizes is not None:
            check_listed_size(self.images[index], size, self._sizes[0][index], self._sizes[1])


class MaskedFiles(Dataset[tuple[Tensor, Tensor]]):
    """Image files and their mask files, whose values are translated to classes."""

    def __init__(
        self,
        images: Sequence[str | Path],
        masks: Sequence[str | Path],
        classes: Sequence[str],
        numbers: Mapping[int, int],
        ids: Any = None,
    ) -> None:
        """Take the files.

        Args:
            images: the files of the images.
            masks: those of their masks.
            classes: the names of the classes.
            numbers: the class of every value of a mask; others than these and 255 are refused.
            ids: the natural owner of each image; None: they have none.
        """
        self.images, self.masks = [str(file) for file in images], [str(file) for file in masks]
        self.classes, self.ids = list(classes), ids
        self._numbers = np.full(IGNORED + 1, -1, np.int64)
        self._numbers[IGNORED] = IGNORED
        for value, number in numbers.items():
            self._numbers[value] = number

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image, uint8 (C, H, W), and its mask, uint8 (H, W).

        Raises:
            ValueError: the mask has a value that is no class.
        """
        file = self.masks[index]
        with naming(file):
            values = read_mask(file)
        known = (values >= 0) & (values <= IGNORED)
        mask = np.where(known, self._numbers[np.where(known, values, 0)], -1)
        if (mask < 0).any():
            raise ValueError(
                f"{file}, the mask of {self.images[index]}, has the value {values[mask < 0][0]}, which is no "
                "class of this dataset; replace it by the published file"
            )
        return read_image(self.images[index]), torch.from_numpy(mask.astype(np.uint8))


def label_table(present: Sequence[Iterable[int]], classes: int) -> NDArray[np.uint8]:
    """Return labels (n, classes) of 0 and 1, of which labels each of n images has."""
    table = np.zeros((len(present), classes), np.uint8)
    for row, labels in zip(table, present, strict=True):
        row[list(labels)] = 1
    return table


def box_target(
    boxes: Sequence[Sequence[float]], labels: Sequence[int], **marks: Sequence[bool]
) -> dict[str, Tensor]:
    """Return the boxes of an image as `boxes_of` takes them.

    Args:
        boxes: left, top, right and bottom edge of each of n.
        labels: their classes.
        marks: "iscrowd" or "difficult" of each.
    """
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        **{name: torch.tensor(values, dtype=torch.bool) for name, values in marks.items()},
    }


def check_listed_size(
    image: str, size: tuple[int, int], listed: tuple[int, int] | None, file: str | Path
) -> None:
    """Refuse an image of another size, (height, width), than `file` lists; None: it lists none.

    Raises:
        ValueError: it is.
    """
    if listed is not None and size != listed:
        raise ValueError(
            f"{image} is {size[0]}x{size[1]} pixels, but {file} lists {listed[0]}x{listed[1]} for it; "
            "correct the file, or give the image that was annotated"
        )


def check_files(files: Iterable[str | Path], listed_in: str | Path) -> None:
    """Refuse a list with a file that is not there.

    Raises:
        ValueError: the first such file.
    """
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"{file} is missing, but {listed_in} lists it; complete the dataset's files")


def lines_of(file: Path, dataset: str, root: Path) -> list[str]:
    """Return the lines of a file of a dataset, without empty ones.

    Raises:
        ValueError: it is not there.
    """
    if not file.is_file():
        raise ValueError(
            f"data.root={root} has no intact {dataset} ({file.relative_to(root)} is missing); pass "
            f"--data.download true, or point data.root at the folder that holds {dataset}"
        )
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
