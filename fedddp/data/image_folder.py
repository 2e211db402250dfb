"""Image folders: CLASS/IMAGE, in train/ and val/ (or test/), or split by a fraction; also below centres."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fedddp.data.image_files import is_hidden, is_image, read_image
from fedddp.data.pixels import Range
from fedddp.section import ConfigError

logger = logging.getLogger(__name__)

TESTED = ("val", "test")
"""Names of the folder with the images that are tested; the first that is there is taken."""

_NAMED = 10  # of centres or classes, in a line


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The images below CLASS folders, RGB or of several bands; hidden folders and files are no part of it."""

    def __init__(
        self,
        root: Path,
        class_to_idx: dict[str, int] | None = None,
        *,
        centres: Mapping[str, Path] | None = None,
        value_range: Range | None = None,
    ) -> None:
        """Scan folders.

        Args:
            root: holds CLASS folders.
            class_to_idx: the classes of the training set and their labels, for a test set; None: the classes
                are those of all folders, by name.
            centres: the folder of every centre with CLASS folders, instead of `root` itself.
            value_range: as for `to_uint8`.

        Raises:
            ConfigError: there is no class folder, no image, or a class that the training set lacks.
        """
        self.root, self.value_range = root, value_range
        self.skipped: Counter[str] = Counter()
        folders = centres or {"": root}
        found = [self._scan(folder) for folder in folders.values()]
        names = sorted(set().union(*found))
        self.class_to_idx = self._labels(names, class_to_idx)
        self.classes = sorted(self.class_to_idx, key=self.class_to_idx.__getitem__)
        """Names of the classes, by label."""
        self.samples = [
            (file, self.class_to_idx[name])
            for by_class in found
            for name in sorted(by_class)
            for file in by_class[name]
        ]
        """Files and their labels."""
        self.targets = [label for _, label in self.samples]
        self.centres = list(folders) if centres else []
        """Names of the natural clients."""
        self.ids: NDArray[np.str_] | None = None
        """(examples,) the centre of each."""
        if centres:
            sizes = [sum(map(len, by_class.values())) for by_class in found]
            self.ids = np.repeat(np.array(self.centres), sizes)
        if not self.samples:
            raise ConfigError(f"data.root={root} has no images; put them in CLASS folders, such as cat/1.png")
        self._report()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, uint8 (C, H, W), and its label."""
        file, label = self.samples[index]
        return read_image(file, self.value_range), label

    def _scan(self, root: Path) -> dict[str, list[str]]:
        """Return the image files of every class folder of `root`; count others, but for hidden ones."""
        names = sorted(folder.name for folder in _folders(root))
        if not names:
            raise ConfigError(f"data.root={root} has no class folders; put images in CLASS folders")
        for file in root.iterdir():
            if file.is_file() and not file.name.startswith("."):
                self.skipped[_ending(file)] += 1
        return {name: self._images(root / name) for name in names}

    def _images(self, folder: Path) -> list[str]:
        found = []
        for place, _, names in sorted(os.walk(folder, followlinks=True)):
            for name in sorted(names):
                file = Path(place, name)
                if is_hidden(file.relative_to(folder)):
                    continue
                if is_image(file):
                    found.append(str(file))
                else:
                    self.skipped[_ending(file)] += 1
        return found

    def _labels(self, names: list[str], known: dict[str, int] | None) -> dict[str, int]:
        """Return the label of every class; those of the training set if they are known."""
        if known is None:
            return {name: label for label, name in enumerate(names)}
        unknown = sorted(set(names) - known.keys())
        if unknown:
            raise ConfigError(
                f"data.root={self.root}: class {unknown[0]!r} is not in the training set; add training "
                "images of it, or remove the folder"
            )
        missing = sorted(known.keys() - set(names))
        if missing:
            logger.warning(
                "%s has no folder for the class %s: it is not tested", self.root, ", ".join(missing)
            )
        self._tested = set(names)
        return known

    def _report(self) -> None:
        """Log the classes without images, and the files that are no images by their endings."""
        found = set(self.targets)
        listed = getattr(self, "_tested", set(self.classes))
        empty = sorted(name for name in listed if self.class_to_idx[name] not in found)
        if empty:
            logger.warning("%s has no images of the class %s", self.root, ", ".join(empty))
        if self.skipped:
            endings = ", ".join(f"{count} × {ending}" for ending, count in self.skipped.most_common())
            logger.warning(
                "%s: %d images; skipped %d files that are no images by their endings (%s)",
                self.root,
                len(self.samples),
                self.skipped.total(),
                endings,
            )


def image_folder(
    root: Path, test_fraction: float, value_range: Range | None = None
) -> tuple[ImageFolder, ImageFolder] | ImageFolder:
    """Return the training and the test set below `root`, or one set where they are not split.

    Folders CENTRE/CLASS/IMAGE or CENTRE/train/CLASS/IMAGE are natural clients, named in `ids`.

    Raises:
        ConfigError: there is no such folder, it has no images, or some are below centres and others are not.
    """
    check_folder(root)
    both = split_folders(
        root,
        "image_folder reads train/CLASS/IMAGE and val/CLASS/IMAGE (or test/...), or CLASS/IMAGE, of which "
        "data.test_fraction is tested",
    )
    if both is not None:
        log_unread(root, [root])
        training = ImageFolder(both[0], value_range=value_range)
        return training, ImageFolder(both[1], training.class_to_idx, value_range=value_range)
    centres = _centres(root)
    parts = split_centres(centres, test_fraction, root)
    if parts is not None:
        logger.info("%s: %d centres, %s", root, len(parts[0]), ", ".join(parts[0]))
        training = ImageFolder(root, centres=parts[0], value_range=value_range)
        return training, ImageFolder(root, training.class_to_idx, centres=parts[1], value_range=value_range)
    unsplit = ImageFolder(root, centres=centres, value_range=value_range)
    if centres:
        logger.warning(
            "%s is read as CENTRE/CLASS/IMAGE: %d centres, %s; %d classes, %s; if the first are classes, "
            "move the images right into their folders",
            *(root, len(unsplit.centres), _some(unsplit.centres)),
            *(len(unsplit.classes), _some(unsplit.classes)),
        )
    return unsplit


def check_folder(root: Path) -> None:
    """Refuse what is no folder.

    Raises:
        ConfigError: it is none.
    """
    if not root.is_dir():
        raise ConfigError(f"data.root={root} is not a folder; give the folder that holds the images")


def split_folders(root: Path, layouts: str) -> tuple[Path, Path] | None:
    """Return the folders of the training and the test set in `root`; None: it is not split.

    Raises:
        ConfigError: only one of them is there; `layouts` names what is read.
    """
    tested = next((root / name for name in TESTED if (root / name).is_dir()), None)
    train = root / "train"
    if train.is_dir() and tested is not None:
        return train, tested
    if train.is_dir() or tested is not None:
        missing = " or ".join(TESTED) if tested is None else "train"
        raise ConfigError(f"data.root={root} has no folder {missing}; {layouts}")
    return None


def log_unread(root: Path, folders: Sequence[Path]) -> None:
    """Log which folder is tested where there is more than one, of a dataset whose parts lie in `folders`."""
    several = [folder for folder in folders if all((folder / name).is_dir() for name in TESTED)]
    if several:
        where = "" if several == [root] else f" of {', '.join(folder.name for folder in several)}"
        logger.info("%s: tests on %s/%s; %s/ is not read", root, TESTED[0], where, TESTED[1])


def split_centres(
    centres: Mapping[str, Path] | None, test_fraction: float, root: Path
) -> tuple[dict[str, Path], dict[str, Path]] | None:
    """Return the folders of the training and the test set of every centre; None: they are not split.

    Raises:
        ConfigError: only some are split; or none is, and there is no `test_fraction`.
    """
    layouts = "split all centres into train/ and val/ (or test/), or none"
    both = {name: split_folders(folder, layouts) for name, folder in (centres or {}).items()}
    unsplit = [name for name, found in both.items() if found is None]
    if unsplit and len(unsplit) < len(both):
        raise ConfigError(
            f"data.root={root}: the centre {unsplit[0]} has no folder train, which others have; {layouts}"
        )
    if not both or unsplit:
        if not test_fraction:
            raise ConfigError(
                f"data.root={root} is not split into train and test; set data.test_fraction, e.g. 0.2"
            )
        return None
    log_unread(root, list((centres or {}).values()))
    found = {name: parts for name, parts in both.items() if parts is not None}
    return {name: parts[0] for name, parts in found.items()}, {
        name: parts[1] for name, parts in found.items()
    }


def _centres(root: Path) -> dict[str, Path] | None:
    """Return the folders of centres, or None where the images lie in class folders right below `root`."""
    direct, deep = [], []
    for folder in _folders(root):
        files = (file for file in folder.iterdir() if not file.name.startswith("."))
        if any(is_image(file) and file.is_file() for file in files):
            direct.append(folder)
        elif _has_images(folder):
            deep.append(folder)
    if direct and deep:
        raise ConfigError(
            f"data.root={root} has images in {direct[0].name}/, and in folders of {deep[0].name}/; "
            "image_folder reads CLASS/IMAGE, or CENTRE/CLASS/IMAGE for all of them"
        )
    if not deep:
        return None
    return {folder.name: folder for folder in deep}


def _has_images(folder: Path) -> bool:
    files = (Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
    return any(is_image(file) and not is_hidden(file.relative_to(folder)) for file in files)


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _ending(file: Path) -> str:
    return file.suffix.lower() or "no ending"
