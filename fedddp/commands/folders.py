"""What a folder of images holds, for `fedddp init`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MEASURED = 1000
"""Images whose size is looked up, evenly spaced."""

TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Folder:
    """What a folder of images holds."""

    root: str
    """As it was given."""
    classes: tuple[str, ...]
    train: int
    """Images to train on, and to test on where the folder is not split."""
    test: int
    """Images of test/ or val/; 0 where the folder is not split."""
    per_class: tuple[int, ...]
    """Training images of every class; of masks empty."""
    sizes: Counter[tuple[int, int]]
    """Width and height, of the images that were measured."""
    skipped: int
    unreadable: tuple[str, ...]
    """Of those measured."""
    centres: tuple[str, ...] = ()
    """The folders of natural clients; empty without."""
    masks: bool = False
    """Whether each image has a mask."""

    @property
    def trained(self) -> int:
        """Images that are left to train on."""
        return self.train if self.test else round(self.train * (1 - TEST_FRACTION))

    @property
    def side(self) -> int:
        """Median of the shorter sides, in pixels."""
        return int(statistics.median(min(size) for size in self.sizes.elements()))


def look(root: Path, given: str) -> Folder:
    """Return what the folder `root`, which the user `given`, holds.

    Raises:
        ValueError: there is no such folder, no class folder or no image, or an image has no mask.
    """
    return _look_at_masks(root, given) if _has_masks(root) else _look_at_classes(root, given)


def _has_masks(root: Path) -> bool:
    """Return whether images/ lies beside a folder of masks, in `root` or in a folder of a centre."""
    from fedddp.data.mask_folder import IMAGES, MASKS, named

    inside = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    parts = ("", "train", "val", "test")
    places = [folder / part for folder in (root, *inside) for part in parts]
    return any(named(place, [IMAGES]) and named(place, MASKS) for place in places)


def _look_at_masks(root: Path, given: str) -> Folder:
    from fedddp.data.mask_folder import mask_folder

    both = mask_folder(root, TEST_FRACTION)
    train, test = both if isinstance(both, tuple) else (both, None)
    sizes, unreadable = _measure(root, train.images)
    return Folder(
        root=given,
        classes=tuple(train.classes),
        train=len(train),
        test=len(test) if test else 0,
        per_class=(),
        sizes=sizes,
        skipped=0,
        unreadable=tuple(unreadable),
        centres=tuple(train.centres),
        masks=True,
    )


def _look_at_classes(root: Path, given: str) -> Folder:
    from fedddp.data.image_folder import image_folder

    both = image_folder(root, TEST_FRACTION)
    train, test = both if isinstance(both, tuple) else (both, None)
    counts = Counter(label for _, label in train.samples)
    sizes, unreadable = _measure(root, [path for path, _ in train.samples])
    return Folder(
        root=given,
        classes=tuple(train.classes),
        train=len(train.samples),
        test=len(test.samples) if test else 0,
        per_class=tuple(counts[label] for label in range(len(train.classes))),
        sizes=sizes,
        skipped=train.skipped.total() + (test.skipped.total() if test else 0),
        unreadable=tuple(unreadable),
        centres=tuple(train.centres),
    )


def _measure(root: Path, files: Sequence[str]) -> tuple[Counter[tuple[int, int]], list[str]]:
    """Return the sizes of some images by their headers, and those that cannot be read.

    Raises:
        ValueError: none can be read.
    """
    from PIL import Image

    from fedddp.data.image_files import read_image, size_of

    sizes: Counter[tuple[int, int]] = Counter()
    unreadable = []
    for path in files[:: max(1, len(files) // MEASURED)]:
        try:
            height, width = size_of(path) or read_image(path).shape[1:]
            sizes[width, height] += 1
        except (OSError, ValueError, Image.DecompressionBombError):
            unreadable.append(path)
    if not sizes:
        raise ValueError(f"{root}: none of its images can be read, the first is {unreadable[0]}; check them")
    return sizes, unreadable
