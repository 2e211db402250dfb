"""Names to torch datasets: bundled, torchvision's, published ones, folders, and the user's own."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import inspect
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Subset

from fedddp.data import decode, listed
from fedddp.data.digits import NAMES as DIGITS
from fedddp.data.digits import read_digits
from fedddp.data.held_out import held_out
from fedddp.data.synthetic import SHAPES, render
from fedddp.data.targets import Target
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

TARGETS: dict[str, tuple[Target, ...]] = {
    "digits": ("class",),
    "shapes": ("class",),
    "scenes": ("class", "multilabel", "mask", "boxes"),
    "image_folder": ("class",),
    "mask_folder": ("mask",),
    "coco": ("multilabel", "mask", "boxes"),
    "femnist": ("class",),
    **dict.fromkeys(TORCHVISION, ("class",)),
    "oxford-pet": ("class", "mask"),
    "voc": ("multilabel", "mask", "boxes"),
    "cityscapes": ("mask",),
    "celeba": ("multilabel",),
}
"""Datasets that `data.dataset` knows by name, and what they can be labelled with."""

NAMES = tuple(TARGETS)
"""Datasets that `data.dataset` knows by name."""

GIVES: dict[Target, str] = {
    "class": "one class per image",
    "multilabel": "several labels per image",
    "mask": "a mask per image",
    "boxes": "boxes per image",
}


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
    target: Target = "class",
    download: bool = False,
    image_size: int | None = None,
    examples: int | None = None,
    test_fraction: float = 0.2,
    value_range: Sequence[float] | None = None,
) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return the training and the test set as map-style torch datasets, which give (image, target).

    Args:
        name: one of `NAMES`, or the dotted path of the user's callable.
        root: folder with the dataset's files.
        target: what images are labelled with, in torchvision's form: a class, labels (K,) of 0 and 1, a mask
            (H, W), or a dict of boxes (n, 4) and labels (n,).
        download: download missing files (those of torchvision).
        image_size: height and width of synthetic images; 32 by default, 48 of scenes.
        examples: synthetic training examples to draw; 10,000 by default, 2,000 scenes.
        test_fraction: share of every class and centre that is tested, of datasets without a test set.
        value_range: values of 16-bit and floating image files that become black and white, as for `to_uint8`.

    Raises:
        ValueError: the dataset has other targets, files are missing or corrupt, or the callable cannot be
            imported or called.
    """
    if "." in name:
        return _call(name, root, train=True), _call(name, root, train=False)
    _check_target(name, target)
    folder = local_path(root, "data.root")
    limits = None if value_range is None else (value_range[0], value_range[1])
    if name in ("digits", "shapes", "scenes"):
        return _bundled(name, target, image_size, examples, test_fraction)
    if name in ("image_folder", "mask_folder"):
        return _folder(name, folder, test_fraction, limits)
    if name == "coco":
        from fedddp.data.coco import coco

        return coco(folder, target, limits)
    if name == "femnist":
        from fedddp.data.leaf import femnist

        return femnist(folder)
    if target == "class":
        class_name, parts = TORCHVISION[name]
        train, test = (_torchvision(class_name, name, folder, download, part) for part in parts)
        return _split(train, test_fraction) if parts is _WHOLE else (train, test)
    if download:
        _download(name, target, folder)
    return _published(name, folder, "train", target), _published(name, folder, "test", target)


def _check_target(name: str, target: Target) -> None:
    """Refuse a target that a dataset does not have."""
    if target not in TARGETS[name]:
        has = " or ".join(GIVES[one] for one in TARGETS[name])
        others = ", ".join(other for other, targets in TARGETS.items() if target in targets)
        if target == "class":
            others = "digits, image_folder, one of torchvision such as cifar10"
        raise ValueError(
            f"data.dataset={name} gives {has}, but the task needs {GIVES[target]}; use {others}, or your own "
            "dataset by its dotted path"
        )


def _bundled(
    name: str, target: Target, image_size: int | None, examples: int | None, test_fraction: float
) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return the digits, or synthetic images."""
    if name == "digits":
        pixels, labels = read_digits()
        return _split(
            decode.Arrays(torch.from_numpy(pixels), torch.from_numpy(labels), DIGITS), test_fraction
        )
    if name == "shapes":
        count, size = examples or 10_000, image_size or 32
        return _shapes("train", count, size), _shapes("test", max(1, count // 5), size)
    from fedddp.data import scenes

    count, size = examples or 2_000, image_size or 48
    return scenes.dataset("train", count, size, target), scenes.dataset(
        "test", max(1, count // 5), size, target
    )


def _shapes(part: str, count: int, size: int) -> decode.Arrays:
    pixels, labels, cameras = render(part, count, size)
    return decode.Arrays(pixels, labels, list(SHAPES), ids=cameras)


def _folder(
    name: str, root: Path, test_fraction: float, value_range: tuple[float, float] | None
) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return the images of a folder; one that is not split is, within every centre and class."""
    if name == "mask_folder":
        from fedddp.data.mask_folder import mask_folder

        masked = mask_folder(root, test_fraction, value_range)
        if isinstance(masked, tuple):
            return masked
        return _split(masked, test_fraction, np.zeros(len(masked), np.int64), masked.ids)
    from fedddp.data.image_folder import image_folder

    found = image_folder(root, test_fraction, value_range)
    return found if isinstance(found, tuple) else _split(found, test_fraction, owners=found.ids)


def _published(name: str, root: Path, part: str, target: Target) -> Dataset[Any]:
    """Return a part of a dataset that is read in its own layout."""
    from fedddp.data import published

    if name == "voc":
        return published.voc(root, part, target)
    read = {
        "oxford-pet": published.oxford_pet,
        "cityscapes": published.cityscapes,
        "celeba": published.celeba,
    }
    return read[name](root, part)


def _download(name: str, target: Target, root: Path) -> None:
    """Download a dataset, by torchvision, that is not there."""
    year = {"year": "2012", "image_set": "train"}
    ways: dict[str, tuple[str, str, dict[str, Any]]] = {
        "voc": ("VOCdevkit/VOC2012", "VOCSegmentation" if target == "mask" else "VOCDetection", year),
        "oxford-pet": ("oxford-iiit-pet", "OxfordIIITPet", {"split": "trainval"}),
        "celeba": ("celeba/img_align_celeba", "CelebA", {"split": "train"}),
    }
    if name in ways and not (root / ways[name][0]).is_dir():
        _torchvision(ways[name][1], name, root, True, ways[name][2])


def _split(
    dataset: Dataset[Any],
    fraction: float,
    classes: NDArray[np.int64] | None = None,
    owners: NDArray[Any] | None = None,
) -> tuple[Dataset[Any], Dataset[Any]]:
    """Split off a fraction of every class, and of every owner, always the same, as the test set."""
    labels = listed.labels(dataset, type(dataset).__name__) if classes is None else classes
    numbers = None
    if owners is not None:
        numbers = np.unique(owners, return_inverse=True)[1].reshape(-1)
        labels = numbers * (int(labels.max()) + 1) + labels
    train, test = held_out(labels, fraction, numbers)
    return Subset(dataset, train.tolist()), Subset(dataset, test.tolist())


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
