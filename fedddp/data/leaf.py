"""FEMNIST by LEAF: handwritten characters with their writers as natural clients (Caldas et al., 2018)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedddp.data.decode import Arrays
from fedddp.section import ConfigError

logger = logging.getLogger(__name__)

CLASSES = [
    *map(str, range(10)),
    *map(chr, range(ord("A"), ord("Z") + 1)),
    *map(chr, range(ord("a"), ord("z") + 1)),
]
"""Digits, capital and small letters."""

SIDE = 28

LAYOUT = "femnist reads train/*.json and test/*.json as LEAF's preprocess.sh writes them to data/femnist/data"


def femnist(root: Path) -> tuple[Arrays, Arrays]:
    """Return the training and the test set: grey images of 28 x 28 pixels on white, and their writers.

    A writer has one name in both sets. Of LEAF's split by writer (`-t user`), all test writers are others.

    Args:
        root: a folder with train/ and test/ at any depth.

    Raises:
        ConfigError: files are missing, or are none of LEAF's.
    """
    folders = [_folder(root, part) for part in ("train", "test")]
    (train, trained), (test, tested) = (_read(folder) for folder in folders)
    known = set(trained)
    others = [writer for writer in dict.fromkeys(tested) if writer not in known]
    if others:
        logger.info("%s: %d writers have no training images, such as %s", folders[1], len(others), others[0])
    return train, test


def _folder(root: Path, part: str) -> Path:
    found = sorted(
        {file.parent for file in root.rglob(f"{part}/*.json") if not file.name.startswith(".")},
        key=lambda folder: (len(folder.parts), folder),
    )
    if not found:
        raise ConfigError(f"data.root={root} has no {part}/*.json; {LAYOUT}")
    if len(found) > 1:
        raise ConfigError(
            f"data.root={root} has the folders {found[0]} and {found[1]}; point data.root at the one dataset "
            "to read"
        )
    return found[0]


def _read(folder: Path) -> tuple[Arrays, list[str]]:
    """Return the images in the JSON files of a folder, file by file and writer by writer, and the writers."""
    pixels, labels = [], []
    writers: list[str] = []
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            for user in content["users"]:
                data = content["user_data"][user]
                values, classes = np.array(data["x"], np.float64), np.array(data["y"], np.float64)
                pixels.append(_bytes(values.reshape(len(classes), SIDE, SIDE)))
                labels.append(_labels(classes))
                writers += [str(user)] * len(classes)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} is no file of LEAF's FEMNIST ({type(error).__name__}: {error}); it needs users and "
                "user_data with x, 784 values in 0..1 per image, and y, classes 0 to 61"
            ) from None
    if not writers:
        raise ConfigError(f"{folder} has no images; {LAYOUT}")
    ids: Any = np.array(writers)
    images, classes_of = torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(labels))
    return Arrays(images, classes_of, CLASSES, ids), writers


def _bytes(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"values from {values.min():g} to {values.max():g}")
    return np.rint(values * 255).astype(np.uint8)


def _labels(classes: NDArray[np.float64]) -> NDArray[np.int64]:
    labels = classes.astype(np.int64)
    if not ((labels == classes) & (labels >= 0) & (labels < len(CLASSES))).all():
        raise ValueError(f"classes from {classes.min():g} to {classes.max():g}")
    return labels
