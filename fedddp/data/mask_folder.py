"""Folders of images and their masks: images/NAME.png and masks/NAME.png, also split, and below centres."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fedddp.data.image_files import is_hidden, is_image, read_image, read_mask
from fedddp.data.image_folder import TESTED, check_folder, log_unread, split_centres, split_folders
from fedddp.data.items import naming
from fedddp.data.labelling import MOST_MASK_CLASSES
from fedddp.data.mask_values import MaskValues, binary_folders, check_gaps, check_size, values_of
from fedddp.data.pixels import Range
from fedddp.data.targets import IGNORED
from fedddp.section import ConfigError

logger = logging.getLogger(__name__)

IMAGES = "images"
MASKS = ("masks", "labels", "annotations", "segmentations")
"""Names of the folder with the masks."""

ENDINGS = ("", "_mask", "_seg")
"""What a mask's name may have after that of its image."""

CLASSES = "classes.txt"
"""File in the root with the name of each class, one per line."""

LAYOUTS = (
    "mask_folder reads images/NAME and masks/NAME, in train/ and val/ (or test/), or split by "
    "data.test_fraction; all of it also in one folder per centre"
)


class MaskFolder(Dataset[tuple[Tensor, Tensor]]):
    """Images and their masks, which are read when they are asked for."""

    def __init__(self, folders: Mapping[str, Path], root: Path, value_range: Range | None = None) -> None:
        """List the pairs.

        Args:
            folders: the folders with images/ and masks/, by the name of the centre; {"": folder} without.
            root: of the dataset, for errors.
            value_range: of the images, as for `to_uint8`.

        Raises:
            ConfigError: a folder has no images, or an image no mask, or a mask no image.
        """
        pairs = [_pairs(folder) for folder in folders.values()]
        self.root, self.value_range = root, value_range
        self.images = [image for of in pairs for image, _ in of]
        """Files."""
        self.masks = [mask for of in pairs for _, mask in of]
        """The file of each image's mask."""
        self.centres = [name for name in folders if name]
        """Names of the natural clients."""
        self.ids: NDArray[np.str_] | None = None
        """(examples,) the centre of each."""
        if self.centres:
            self.ids = np.repeat(np.array(self.centres), [len(of) for of in pairs])
        self.classes: list[str] = []
        """Names of the classes, by their numbers in the masks."""
        self.binary: frozenset[str] = frozenset()
        """Centres ("" without) in whose masks the value 255 is class 1, and not one that does not count."""

    @property
    def reading(self) -> str:
        """How masks are read, where their files alone do not decide it: decoded pixels are as old as this."""
        return f"255 is 1 in {sorted(self.binary)}" if self.binary else ""

    def values(self) -> list[MaskValues]:
        """Return the values of the masks in every folder.

        Raises:
            ValueError: as for `values_of`.
        """
        found = list(zip(self.masks, values_of(self.images, self.masks), strict=True))
        if self.ids is None:
            return [MaskValues("", found)]
        return [
            MaskValues(centre, [found[i] for i in np.flatnonzero(self.ids == centre)])
            for centre in self.centres
        ]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image, uint8 (C, H, W), and its mask, uint8 (H, W).

        Raises:
            ValueError: they differ in size, or the mask has values beyond the classes.
        """
        image = read_image(self.images[index], self.value_range)
        with naming(self.masks[index]):
            mask = read_mask(self.masks[index])
        check_size(self.images[index], (image.shape[1], image.shape[2]), self.masks[index], mask.shape)
        if ("" if self.ids is None else str(self.ids[index])) in self.binary:
            mask = np.where(mask == IGNORED, 1, mask)
        wrong = (mask != IGNORED) & ((mask < 0) | (mask >= len(self.classes)))
        if wrong.any():
            raise ValueError(
                f"{self.masks[index]} has the value {mask[wrong][0]}, but data.root={self.root} has "
                f"{len(self.classes)} classes; correct the mask or the list of classes"
            )
        return image, torch.from_numpy(mask.astype(np.uint8))


def mask_folder(
    root: Path, test_fraction: float, value_range: Range | None = None
) -> tuple[MaskFolder, MaskFolder] | MaskFolder:
    """Return the training and the test set below `root`, or one set where they are not split.

    Every mask is read once, to know the classes: the lines of `classes.txt`, or the values that are found.
    Masks of 0 and 255 only are of two classes, also those of a centre; in others 255 marks pixels that do not
    count.

    Raises:
        ConfigError: there is no such folder, or it is laid out otherwise.
        ValueError: a mask cannot be read, has another size than its image, or values beyond the classes.
    """
    check_folder(root)
    both = split_folders(root, LAYOUTS)
    if both is not None:
        log_unread(root, [root])
        parts: list[dict[str, Path]] = [{"": both[0]}, {"": both[1]}]
    else:
        centres = _centres(root)
        split = split_centres(centres, test_fraction, root)
        parts = [centres or {"": root}] if split is None else list(split)
    found = [MaskFolder(part, root, value_range) for part in parts]
    folders = [part.values() for part in found]
    flags = iter(binary_folders(root, [folder for of in folders for folder in of]))
    present: set[int] = set()
    for part, of in zip(found, folders, strict=True):
        part.binary = frozenset(folder.centre for folder in of if next(flags))
        for folder in of:
            present |= {1 if v == IGNORED and folder.centre in part.binary else v for v in folder.all}
    classes = _classes(root, sorted(present - {IGNORED}))
    for part in found:
        part.classes = classes
    return (found[0], found[1]) if len(found) == 2 else found[0]


def _classes(root: Path, values: list[int]) -> list[str]:
    """Return the names of the classes, of masks with these values."""
    names = ["background", *map(str, range(1, max(values, default=0) + 1))]
    file = root / CLASSES
    if file.is_file():
        names = file.read_text(encoding="utf-8").rstrip().splitlines()
    if max(values, default=0) >= len(names):
        raise ConfigError(
            f"{file} has {len(names)} names, but masks have the value {max(values)}; give a line for each of "
            f"0 to {max(values)}"
        )
    if len(names) < 2:
        raise ConfigError(
            f"data.root={root}: all masks have the value 0 only; give masks with the number of a class for "
            "each pixel"
        )
    if len(names) > MOST_MASK_CLASSES:
        raise ConfigError(
            f"{file} has {len(names)} names; masks have at most {MOST_MASK_CLASSES} classes, 0 to "
            f"{MOST_MASK_CLASSES - 1}"
        )
    if not file.is_file():
        check_gaps(root, values, CLASSES)
    return [name.strip() for name in names]


# ---- files ----


def _centres(root: Path) -> dict[str, Path] | None:
    """Return the folders of centres, or None where images/ lies in `root`; log them.

    Raises:
        ConfigError: there is neither.
    """
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    centres = {}
    for folder in folders:
        inside = [folder, *(folder / part for part in ("train", *TESTED))]
        if any(named(place, [IMAGES]) for place in inside):
            centres[folder.name] = folder
    here = named(root, [IMAGES])
    if here and centres:
        raise ConfigError(
            f"data.root={root} has {here[0].name}/, and the folder {next(iter(centres))}/ with {IMAGES}/ of "
            f"its own; {LAYOUTS}"
        )
    if not here and not centres:
        raise ConfigError(f"data.root={root} has no folder {IMAGES}; {LAYOUTS}")
    if here:
        return None
    logger.info("%s: %d centres, %s", root, len(centres), ", ".join(centres))
    others = [folder.name for folder in folders if folder.name not in centres and any(_walk(folder))]
    if others:
        logger.warning(
            "%s: not read as centres, for lack of a folder %s/: %s", root, IMAGES, ", ".join(others)
        )
    return centres


def named(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the folders in `folder` with these names, in small letters or capitals."""
    if not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if entry.name.lower() in names and entry.is_dir()]
    return sorted(found, key=lambda entry: (names.index(entry.name.lower()), entry))


def mask_folders(folder: Path) -> list[Path]:
    """Return the folders with masks in `folder`; none where no images/ lies beside them."""
    return named(folder, MASKS) if named(folder, [IMAGES]) else []


def _pairs(folder: Path) -> list[tuple[str, str]]:
    """Return the images of a folder, by name, and their masks."""
    here, there = named(folder, [IMAGES]), named(folder, MASKS)
    if len(here) != 1:
        which = f"{here[0].name}/ and {here[1].name}/; give one" if here else f"no folder {IMAGES}"
        raise ConfigError(f"data.root: {folder} has {which}; {LAYOUTS}")
    if len(there) != 1:
        which = f"{there[0].name}/ and {there[1].name}/" if there else "no folder masks"
        raise ConfigError(f"data.root: {folder} has {which} beside {IMAGES}/; give one folder, {MASKS[0]}/")
    images, masks = _by_name(here[0]), _by_name(there[0])
    if not images:
        raise ConfigError(f"data.root: {here[0]} has no images; put them there, such as 1.png")
    pairs, taken = [], set()
    for name, image in images.items():
        fitting = [name + ending for ending in ENDINGS if name + ending in masks]
        if len(fitting) != 1:
            number = f"{len(fitting)} masks, {' and '.join(fitting)}," if fitting else "no mask"
            raise ConfigError(f"{image} has {number} in {there[0]}; give one, {name}.png or {name}_mask.png")
        pairs.append((image, masks[fitting[0]]))
        taken.add(fitting[0])
    left = sorted(masks.keys() - taken)
    if left:
        raise ConfigError(f"{masks[left[0]]} has no image in {here[0]}; add it or remove the mask")
    return pairs


def _by_name(folder: Path) -> dict[str, str]:
    """Return the files of images below `folder` by their paths without ending, in the order of these."""
    files: dict[str, str] = {}
    for file in sorted(_walk(folder)):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise ConfigError(f"{files[name]} and {file} have one name; keep one of them")
        files[name] = str(file)
    return files


def _walk(folder: Path) -> Iterable[Path]:
    for place, _, names in os.walk(folder, followlinks=True):
        for file in (Path(place, name) for name in names):
            if is_image(file) and not is_hidden(file.relative_to(folder)):
                yield file
