"""The values of the masks of a folder: which there are, and whether 255 is a class or does not count."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedddp.data.image_files import read_mask, size_of
from fedddp.data.items import naming
from fedddp.data.labelling import MOST_MASK_CLASSES
from fedddp.data.targets import IGNORED
from fedddp.section import ConfigError

logger = logging.getLogger(__name__)

_READERS = 8


@dataclass(frozen=True)
class MaskValues:
    """What the masks in one folder hold: those of a part, of one centre if there are centres."""

    centre: str
    """The centre; "" where there are none."""

    files: Sequence[tuple[str, NDArray[np.int64]]]
    """Each mask, and the values that occur in it, rising."""

    @cached_property
    def all(self) -> set[int]:
        """The values of all masks."""
        return {value for _, values in self.files for value in values.tolist()}

    @property
    def folder(self) -> Path:
        """The folder of the first mask."""
        return Path(self.files[0][0]).parent

    def first(self, wanted: Iterable[int], *, beside: bool = False) -> str | None:
        """Return the first mask with one of the values; `beside`: and 255 too."""
        some = set(wanted)
        return next(
            (f for f, v in self.files if some & set(v.tolist()) and (not beside or IGNORED in v)), None
        )


def values_of(images: Sequence[str], masks: Sequence[str]) -> list[NDArray[np.int64]]:
    """Return the values of every mask, rising.

    Raises:
        ValueError: a mask cannot be read, is of another size than its image, or has values beyond 0..255.
    """
    with ThreadPoolExecutor(_READERS) as readers:  # Pillow decodes without Python's lock
        return list(readers.map(_values, images, masks))


def binary_folders(root: Path, folders: Sequence[MaskValues]) -> list[bool]:
    """Return for every folder whether the value 255 of its masks is class 1, and not one that does not count.

    It is where all masks of a dataset have 0 and 255 only; and in a folder of such masks, where all others
    have 0 and 1 only. It does not count where a mask of the same centre has it beside another class.

    Raises:
        ConfigError: it could be either.
    """
    every = set[int]().union(*(folder.all for folder in folders))
    if IGNORED in every and every <= {0, IGNORED}:
        logger.info("%s: masks of 0 and 255 only: 255 is class 1", root)
        return [True] * len(folders)
    classes = every - {0, IGNORED}
    beside = {folder.centre: file for folder in folders if (file := folder.first(classes, beside=True))}
    # Where 255 is seen not to count, or there are classes that only numbers can have:
    other = next(iter(beside.values()), None) or next(
        (file for folder in folders if (file := folder.first(classes - {1}))), None
    )
    found = []
    for folder in folders:
        alone = folder.all <= {0, IGNORED} and IGNORED in folder.all
        found.append(alone and folder.centre not in beside)
        mixed = next((file for file, values in folder.files if values.tolist() == [0, IGNORED]), None)
        one = folder.first({1})
        if found[-1] and other:
            raise _ambiguous(root, folder.files[0][0] if mixed is None else mixed, other)
        if mixed and one and not other:
            raise _ambiguous(root, mixed, one)
        if found[-1]:
            logger.info(
                "%s: masks of 0 and 255 only, beside others of 0 and 1: 255 is class 1", folder.folder
            )
    return found


def _ambiguous(root: Path, file: str, other: str) -> ConfigError:
    return ConfigError(
        f"data.root={root}: {file} has 0 and 255 only, but {other} has other classes, so that 255 may be a "
        "class or mark pixels that do not count; write 1 where it is a class, or give masks 0 where it is not"
    )


def check_gaps(root: Path, values: Sequence[int], file: str) -> None:
    """Log that classes without a name have no pixel; refuse most of them to have none.

    Args:
        root: of the dataset.
        values: those of all masks that are classes, rising.
        file: the name of the file that names classes.

    Raises:
        ConfigError: more classes lack a pixel than have one, such as in masks of 0 and 127.
    """
    count = max(values) + 1
    gaps = count - len({0, *values})
    some = ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")
    if gaps > len(values):
        raise ConfigError(
            f"data.root={root}: masks have the values {some}, which would be {count} classes, of which "
            f"{gaps} have no pixel; number them 0, 1, 2, ..., or name all classes in {file}"
        )
    if gaps:
        logger.warning(
            "%s: masks have the values %s, so that there are %d classes, of which %d have no pixel; number "
            "them 0, 1, 2, ... or name them in %s",
            *(root, some, count, gaps, file),
        )


def _values(image: str, mask: str) -> NDArray[np.int64]:
    with naming(mask):
        values = read_mask(mask)
    with naming(image):
        size = size_of(image)
    if size is not None:
        check_size(image, size, mask, values.shape)
    found = np.unique(values)
    if found[0] < 0 or found[-1] > IGNORED:
        worst = found[0] if found[0] < 0 else found[-1]
        raise ValueError(
            f"{mask} has the value {worst}; classes are 0 to {MOST_MASK_CLASSES - 1}, and {IGNORED} marks "
            "pixels that do not count"
        )
    return found


def check_size(image: str, size: tuple[int, int], mask: str, other: tuple[int, ...]) -> None:
    """Refuse a mask of another size, (height, width), than its image.

    Raises:
        ValueError: it is.
    """
    if size != other:
        raise ValueError(
            f"{mask} is {other[0]}x{other[1]} pixels, but its image {image} {size[0]}x{size[1]}; give both "
            "one size"
        )
