"""Image folders: CLASS/IMAGE, in train/ and val/ (or test/), or split off by a fraction."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision import datasets

from fedddp.data.pixels import to_uint8
from fedddp.section import ConfigError

logger = logging.getLogger(__name__)


class ImageFolder(datasets.DatasetFolder):
    """The images below CLASS folders, as RGB; hidden folders and files are no part of it.

    torchvision's own class takes hidden folders for classes, drops files by a short list of endings without a
    word, and cuts 16-bit values off at 255.
    """

    def __init__(self, root: Path, class_to_idx: dict[str, int] | None = None) -> None:
        """Scan `root`, whose classes are its folders, or those of the training set where given.

        Raises:
            ConfigError: there is no class folder, no image, or a class that the training set lacks.
        """
        self.known = class_to_idx
        # Files beside the class folders; those in them are seen by the scan.
        beside = (file for file in root.iterdir() if file.is_file() and not _hidden(file.relative_to(root)))
        self.skipped = Counter(map(_ending, beside))
        super().__init__(str(root), read_rgb, is_valid_file=self._takes, allow_empty=True)
        if not self.samples:
            raise ConfigError(f"data.root={root} has no images; put them in CLASS folders, such as cat/1.png")
        self._report()

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the class folders and their labels, by name; the order is that of the training set."""
        names = sorted(p.name for p in Path(directory).iterdir() if p.is_dir() and not p.name.startswith("."))
        if not names:
            raise ConfigError(f"data.root={directory} has no class folders; put images in CLASS folders")
        if self.known is None:
            return names, {name: label for label, name in enumerate(names)}
        unknown = sorted(set(names) - self.known.keys())
        if unknown:
            raise ConfigError(
                f"data.root={directory}: class {unknown[0]!r} is not in the training set; add training "
                "images of it, or remove the folder"
            )
        missing = sorted(self.known.keys() - set(names))
        if missing:
            logger.warning(
                "%s has no folder for the class %s: it is not tested", directory, ", ".join(missing)
            )
        return list(self.known), {name: self.known[name] for name in names}

    def _takes(self, path: str) -> bool:
        """Return whether a file in a class folder is an image; others are counted, but for hidden ones."""
        file = Path(path).relative_to(self.root)
        if _hidden(file):
            return False
        taken = _ending(file) in Image.registered_extensions()
        if not taken:
            self.skipped[_ending(file)] += 1
        return taken

    def _report(self) -> None:
        """Log the classes without images, and the files that are no images by their endings."""
        found = {label for _, label in self.samples}
        empty = sorted(name for name, label in self.class_to_idx.items() if label not in found)
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


def image_folder(root: Path, test_fraction: float) -> tuple[ImageFolder, ImageFolder] | ImageFolder:
    """Return the training and the test set below `root`, or one set where they are not split.

    Raises:
        ConfigError: there is no such folder, or it has no images.
    """
    if not root.is_dir():
        raise ConfigError(f"data.root={root} is not a folder; give the folder that holds the images")
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    train = root / "train"
    if train.is_dir() and held_out is not None:
        training = ImageFolder(train)
        return training, ImageFolder(held_out, training.class_to_idx)
    if train.is_dir() or held_out is not None:
        missing = "val or test" if held_out is None else "train"
        raise ConfigError(
            f"data.root={root} has no folder {missing}; image_folder reads train/CLASS/IMAGE and "
            "val/CLASS/IMAGE (or test/...), or CLASS/IMAGE, of which data.test_fraction is tested"
        )
    if not test_fraction:
        raise ConfigError(
            f"data.root={root} is not split into train and test; set data.test_fraction, e.g. 0.2"
        )
    return ImageFolder(root)


def read_rgb(path: str) -> Tensor:
    """Return the picture in a file as uint8 (3, H, W)."""
    with Image.open(path) as picture:
        return to_uint8(picture, path).expand(3, -1, -1)


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _ending(file: Path) -> str:
    return file.suffix.lower() or "no ending"
