"""Names to torch datasets: bundled, torchvision's, a folder of images, and the user's own."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from fedddp.data import decode
from fedddp.data.synthetic import SHAPES, render
from fedddp.rng import stream
from fedddp.section import local_path

_FLAG: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
_SPLIT: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "test"})
_VAL: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "val"})
_TRAINVAL: tuple[dict[str, Any], dict[str, Any]] = ({"split": "trainval"}, {"split": "test"})
_WHOLE: tuple[dict[str, Any], dict[str, Any]] = ({}, {})

# Name -> class in torchvision.datasets and its arguments for the training and the test set. Only
# CIFAR unpickles its files, and its constructor checks their MD5 sums first. `_WHOLE` sets come
# without a test set; `data.test_fraction` of them becomes one.
TORCHVISION: dict[str, tuple[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "mnist": ("MNIST", _FLAG),
    "fashion-mnist": ("FashionMNIST", _FLAG),
    "kmnist": ("KMNIST", _FLAG),
    "qmnist": ("QMNIST", _FLAG),
    **{
        f"emnist-{part}": ("EMNIST", ({"split": part, **_FLAG[0]}, {"split": part, **_FLAG[1]}))
        for part in ("balanced", "byclass", "bymerge", "digits", "letters", "mnist")
    },
    "usps": ("USPS", _FLAG),
    "semeion": ("SEMEION", _WHOLE),
    "cifar10": ("CIFAR10", _FLAG),
    "cifar100": ("CIFAR100", _FLAG),
    "svhn": ("SVHN", _SPLIT),
    "stl10": ("STL10", _SPLIT),
    "gtsrb": ("GTSRB", _SPLIT),
    "fer2013": ("FER2013", _SPLIT),
    "eurosat": ("EuroSAT", _WHOLE),
    "flowers102": ("Flowers102", _SPLIT),
    "dtd": ("DTD", _SPLIT),
    "food101": ("Food101", _SPLIT),
    "country211": ("Country211", _SPLIT),
    "rendered-sst2": ("RenderedSST2", _SPLIT),
    "oxford-pet": ("OxfordIIITPet", _TRAINVAL),
    "fgvc-aircraft": ("FGVCAircraft", _TRAINVAL),
    "imagenette": ("Imagenette", _VAL),
    "imagenet": ("ImageNet", _VAL),
}

NAMES = ("digits", "shapes", "image_folder", *TORCHVISION)
"""Datasets that `data.dataset` knows by name."""


def find(name: str) -> str:
    """Return the name as `NAMES` spells it; a dotted path as it is."""
    if "." in name:
        return name
    plain = {_plain(known): known for known in NAMES}
    if _plain(name) in plain:
        return plain[_plain(name)]
    close = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
    hint = f"did you mean {plain[close[0]]!r}?" if close else f"known are {', '.join(NAMES)}"
    raise ValueError(f"dataset {name!r} is unknown; {hint} (or give a callable's dotted path)")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def open_dataset(
    name: str,
    root: str,
    *,
    download: bool = False,
    image_size: int | None = None,
    examples: int | None = None,
    test_fraction: float = 0.2,
) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return the training and the test set as map-style torch datasets.

    Args:
        name: one of `NAMES`, or the dotted path of the user's callable.
        root: folder with the dataset's files.
        download: download missing files (those of torchvision).
        image_size: height and width of synthetic images; 32 by default.
        examples: synthetic training examples to draw; 10,000 by default.
        test_fraction: share of every class that is tested, of datasets without a test set.

    Raises:
        ValueError: files are missing or corrupt, or the callable cannot be imported or called.
    """
    folder = local_path(root, "data.root")
    if name == "digits":
        return _split(_digits(), test_fraction)
    if name == "shapes":
        count, size = examples or 10_000, image_size or 32
        return _shapes("train", count, size), _shapes("test", max(1, count // 5), size)
    if name == "image_folder":
        from fedddp.data.image_folder import image_folder  # here: torchvision takes seconds to import

        found = image_folder(folder, test_fraction)
        return found if isinstance(found, tuple) else _split(found, test_fraction)
    if "." in name:
        return _call(name, root, train=True), _call(name, root, train=False)
    class_name, parts = TORCHVISION[name]
    train, test = (_torchvision(class_name, name, folder, download, part) for part in parts)
    return _split(train, test_fraction) if parts is _WHOLE else (train, test)


def _digits() -> decode.Arrays:
    """Read the handwritten digits that ship with fedddp: 1,797 grey images of 8 x 8 pixels."""
    table = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), delimiter=",")
    pixels = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    labels = table[:, -1].astype(np.int64)
    return decode.Arrays(torch.from_numpy(pixels), torch.from_numpy(labels), [str(d) for d in range(10)])


def _shapes(part: str, count: int, size: int) -> decode.Arrays:
    pixels, labels, cameras = render(part, count, size)
    return decode.Arrays(pixels, labels, list(SHAPES), ids=cameras)


def _split(dataset: Dataset[Any], fraction: float) -> tuple[Dataset[Any], Dataset[Any]]:
    """Split off a fraction of every class, always the same, as the test set."""
    labels = decode.labels(dataset, type(dataset).__name__)
    shuffled = stream("test set").permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    position = np.arange(len(labels))
    tested = np.floor(position * fraction) > np.floor((position - 1) * fraction)
    return (
        Subset(dataset, np.sort(by_class[~tested]).tolist()),
        Subset(dataset, np.sort(by_class[tested]).tolist()),
    )


def _call(path: str, root: str, *, train: bool) -> Dataset[Any]:
    """Return what the user's callable makes."""
    try:
        make = pkgutil.resolve_name(path)
        inspect.signature(make).bind(root=root, train=train)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"data.dataset={path}: {_line(error)}; give the dotted path of a callable "
            "f(root: str, train: bool) that returns a dataset"
        ) from error
    dataset: Dataset[Any] = make(root=str(local_path(root, "data.root")), train=train)
    return dataset


def _torchvision(
    class_name: str, name: str, root: Path, download: bool, part: dict[str, Any]
) -> Dataset[Any]:
    arguments = {"root": str(root), **part}
    can_download = name not in ("fer2013", "imagenet")
    if can_download:
        arguments["download"] = download
    try:
        from torchvision import datasets

        with _one_at_a_time(root) if download else contextlib.nullcontext():
            dataset: Any = getattr(datasets, class_name)(**arguments)
    except (OSError, RuntimeError, AssertionError, ValueError) as error:
        fix = f"point data.root at the folder that holds {class_name}"
        if can_download and not download:
            fix = f"pass --data.download true, or {fix}"
        # Torchvision's own advice here is an argument of its constructor.
        reason = _line(error).replace(". You can use download=True to download it", "")
        raise ValueError(f"data.root={root} has no intact {class_name} ({reason}); {fix}") from error
    if name == "qmnist":  # its targets hold more than the class: column 2 is the writer
        columns = dataset.targets
        return decode.Arrays(dataset.data, columns[:, 0], dataset.classes, ids=columns[:, 2])
    if name == "emnist-letters":  # labels start at 1
        return decode.Arrays(dataset.data, dataset.targets - 1, dataset.classes[1:])
    return dataset  # type: ignore[no-any-return]


@contextlib.contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Keep the processes of all nodes from downloading into the same files."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".fedddp.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _line(error: Exception) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
