"""Names to datasets: whatever a dataset is, it becomes `Images`."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import datasets as torchvision_datasets

from fedddp.data import decode
from fedddp.data.partition import IID, FeatureSkew, Indices, Partition, Split, holdout_sizes
from fedddp.data.shapes import SHAPES, render
from fedddp.rng import stream

Memory = Literal["auto", "device", "stream"]
Augment = Literal["none", "flip", "crop", "crop-flip"]

FITS_BYTES = 2 * 2**30
"""Largest set of pixels that `memory=auto` holds on the device of every rank."""

_FLAG: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
_SPLIT: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "test"})
_VAL: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "val"})
_TRAINVAL: tuple[dict[str, Any], dict[str, Any]] = ({"split": "trainval"}, {"split": "test"})
_WHOLE: tuple[dict[str, Any], dict[str, Any]] = ({}, {})

# Name -> class in torchvision.datasets and its arguments for the training and the test set. Only
# CIFAR unpickles its files, and its constructor checks their MD5 sums first. `_WHOLE` sets come
# without a test set; a fifth of them becomes one.
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
"""Datasets that `Data.dataset` knows by name."""


@dataclass(frozen=True)
class Images:
    """Labelled images, all of one shape."""

    labels: NDArray[np.int64]
    """(examples,) in range(classes)."""

    classes: int

    shape: tuple[int, int, int]
    """Channels, height and width."""

    pixels: Tensor | None
    """uint8 (examples, C, H, W) when they are held in memory; else None."""

    source: Dataset[tuple[Tensor, int]] | None
    """Where pixels come from otherwise: gives a uint8 image of `shape` and its label."""

    ids: NDArray[np.int64] | None
    """(examples,) the natural owner of every example, when the dataset names them."""

    mean: tuple[float, ...]
    """Per channel, of pixel / 255."""

    std: tuple[float, ...]
    """Per channel, of pixel / 255; > 0."""

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Images and their split over clients."""

    dataset: str = "digits"
    """Name of a dataset, or dotted path of a callable f(root=, train=) that returns one."""

    root: str = "data"
    """Folder with the dataset's files."""

    download: bool = False
    """Download a missing dataset into `root` (those of torchvision)."""

    clients: int = 20
    """The population: clients that the training examples are split over, >= 1."""

    partition: Partition = field(default_factory=IID)
    """How the training examples are split."""

    holdout: float = 0.0
    """Part of each client's examples that it does not train on but is evaluated on, 0 <= x < 1."""

    skew: FeatureSkew | None = None
    """What makes one client's images look unlike another's."""

    augment: Augment = "none"
    """Random changes of training images: mirrored, or moved by up to an eighth of their size."""

    image_size: int | None = None
    """Height and width that images are resized and cropped to; needed where they differ in size."""

    memory: Memory = "auto"
    """Hold all pixels on each rank's device, or stream them; `auto` holds up to 2 GiB."""

    workers: int = 2
    """Processes per rank that read and decode streamed images, >= 0."""

    examples: int | None = None
    """Use only so many training and so many test examples, drawn at random, >= 1; for trials."""

    def __post_init__(self) -> None:
        _find(self.dataset)
        if self.clients < 1:
            raise ValueError(f"clients must be >= 1, got {self.clients}")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be >= 0 and < 1, got {self.holdout}; 0.2 keeps a fifth")
        for name in ("image_size", "examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}; leave it out for no limit")
        if self.workers < 0:
            raise ValueError(f"workers must be >= 0, got {self.workers}")
        if self.augment not in ("none", "flip", "crop", "crop-flip"):
            raise ValueError(f"augment must be none, flip, crop or crop-flip, got {self.augment!r}")
        if self.memory not in ("auto", "device", "stream"):
            raise ValueError(f"memory must be auto, device or stream, got {self.memory!r}")

    def split(self, images: Images, seed: int) -> tuple[Split, Indices]:
        """Return who holds which of `images`, and n_k, how many of them each client trains on.

        Those held out are in the split, and not among the n_k, (clients,).

        Raises:
            ValueError: the images cannot be split so.
        """
        split = self.partition.split(images.labels, self.clients, seed, images.ids)
        return split, split.sizes - holdout_sizes(split.sizes, self.holdout)


def load(data: Data) -> tuple[Images, Images]:
    """Return the training and the test set.

    Raises:
        ValueError: files are missing or damaged, or labels out of range.
    """
    name = _find(data.dataset)
    train, test = _open(name, data)
    # A user's callable may decode the same files in its own way.
    cache = None if "." in name else Path(data.root).expanduser() / ".fedddp"
    how = (data.image_size, data.memory, cache)
    images = _images(_some(train, data.examples), f"{name} (train)", None, *how)
    return images, _images(_some(test, data.examples), f"{name} (test)", images, *how)


def from_dataset(
    dataset: Dataset[Any],
    *,
    like: Images | None = None,
    image_size: int | None = None,
    memory: Memory = "auto",
    examples: int | None = None,
) -> Images:
    """Turn a map-style torch dataset of (image, label) into `Images`.

    Images are PIL images, or tensors or arrays with values 0..255 (uint8) or 0..1 (floating);
    do not normalise them. Random transforms are drawn once, unless `memory` is "stream". Labels
    are taken from an attribute `targets` or `labels` if there is one, natural owners from `ids`.

    Args:
        dataset: has `__len__` and `__getitem__`.
        like: for a test set, the training set whose shape, classes and normalisation it takes.
        image_size: height and width that images are resized and cropped to; None: as they are.
        memory: "device" holds the pixels in memory, "stream" reads them when needed, "auto" holds
            up to 2 GiB.
        examples: use only so many, drawn at random.

    Raises:
        ValueError: no examples, images of different shapes, or labels out of range.
    """
    some, name = _some(dataset, examples), type(dataset).__name__
    return _images(some, name, like, image_size, memory, cache=None)


def _some(dataset: Dataset[Any], examples: int | None) -> Dataset[Any]:
    """Return `examples` of the dataset, the same on every call; None: all."""
    total = len(dataset)  # type: ignore[arg-type]
    if examples is None or examples >= total:
        return dataset
    return Subset(dataset, np.sort(stream("examples").permutation(total)[:examples]).tolist())


def _images(
    dataset: Dataset[Any],
    name: str,
    like: Images | None,
    size: int | None,
    memory: Memory,
    cache: Path | None,
) -> Images:
    if not len(dataset):  # type: ignore[arg-type]
        raise ValueError(f"{name} has no examples; check data.dataset and data.root")
    labels = decode.labels(dataset, name)
    classes = like.classes if like else decode.classes(dataset, labels)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise ValueError(
            f"{name}: label of example {wrong[0]} is {labels[wrong[0]]}, but must be between 0 and "
            f"{classes - 1}; correct the labels, or the dataset's list `classes`"
        )
    source = decode.Decoded(dataset, labels, name, size)
    if like and source.shape != like.shape:
        raise ValueError(
            f"{name} has images of shape {source.shape}, the training set of {like.shape}; set "
            "data.image_size, or give all images the same number of channels"
        )
    fits = len(labels) * int(np.prod(source.shape)) <= FITS_BYTES
    in_memory = memory == "device" or (memory == "auto" and fits)
    pixels = source.read_all(cache) if in_memory else None
    mean, std = (like.mean, like.std) if like else source.statistics(pixels)
    return Images(
        labels=labels,
        classes=classes,
        shape=source.shape,
        pixels=pixels,
        source=None if in_memory else source,
        ids=decode.ids(dataset, name),
        mean=mean,
        std=std,
    )


def _find(name: str) -> str:
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


def _open(name: str, data: Data) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return the training and the test set as torch datasets."""
    root = Path(data.root).expanduser()
    if name == "digits":
        return _fifth(_digits())
    if name == "shapes":
        count = data.examples or 10_000
        return _shapes("train", count, data), _shapes("test", max(1, count // 5), data)
    if name == "image_folder":
        return _image_folder(root)
    if "." in name:
        return _call(name, data, train=True), _call(name, data, train=False)
    class_name, parts = TORCHVISION[name]
    train, test = (_torchvision(class_name, name, data, part) for part in parts)
    return _fifth(train) if parts is _WHOLE else (train, test)


def _digits() -> decode.Arrays:
    """Read scikit-learn's `load_digits` from its file: importing the package would take most of a second."""
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",")
    pixels = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    labels = table[:, -1].astype(np.int64)
    return decode.Arrays(torch.from_numpy(pixels), torch.from_numpy(labels), [str(d) for d in range(10)])


def _shapes(part: str, count: int, data: Data) -> decode.Arrays:
    pixels, labels, cameras = render(part, count, data.image_size or 32)
    return decode.Arrays(pixels, labels, list(SHAPES), ids=cameras)


def _fifth(dataset: Dataset[Any]) -> tuple[Dataset[Any], Dataset[Any]]:
    """Split off a fifth of every class, always the same, as the test set."""
    labels = decode.labels(dataset, type(dataset).__name__)
    shuffled = stream("test set").permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return (
        Subset(dataset, np.sort(by_class[np.arange(len(labels)) % 5 != 0]).tolist()),
        Subset(dataset, np.sort(by_class[::5]).tolist()),
    )


def _image_folder(root: Path) -> tuple[Dataset[Any], Dataset[Any]]:
    held_out = "val" if (root / "val").is_dir() else "test"
    folders = [root / "train", root / held_out]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(
                f"data.root={root} has no folder {folder.name!r}; image_folder reads "
                "train/CLASS/IMAGE and val/CLASS/IMAGE (or test/...) in it"
            )
    try:
        train, test = (torchvision_datasets.ImageFolder(str(folder)) for folder in folders)
    except FileNotFoundError as error:
        raise ValueError(f"data.root={root}: {_line(error)}") from error
    differing = sorted(set(train.classes) ^ set(test.classes))
    if differing:
        raise ValueError(
            f"data.root={root}: class {differing[0]!r} is only in one of train and {held_out}; "
            "both need the same class folders"
        )
    return train, test


def _call(path: str, data: Data, *, train: bool) -> Dataset[Any]:
    """Return what the user's callable makes."""
    try:
        make = pkgutil.resolve_name(path)
        inspect.signature(make).bind(root=data.root, train=train)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"data.dataset={path}: {_line(error)}; give the dotted path of a callable "
            "f(root: str, train: bool) that returns a dataset"
        ) from error
    dataset: Dataset[Any] = make(root=data.root, train=train)
    return dataset


def _torchvision(class_name: str, name: str, data: Data, part: dict[str, Any]) -> Dataset[Any]:
    root = Path(data.root).expanduser()
    arguments = {"root": str(root), **part}
    can_download = name not in ("fer2013", "imagenet")
    if can_download:
        arguments["download"] = data.download
    try:
        with _one_at_a_time(root) if data.download else contextlib.nullcontext():
            dataset: Any = getattr(torchvision_datasets, class_name)(**arguments)
    except (OSError, RuntimeError, AssertionError, ValueError) as error:
        way_out = f"point data.root at the folder that holds {class_name}"
        if can_download and not data.download:
            way_out = f"pass --data.download true, or {way_out}"
        # Torchvision's own advice here is an argument of its constructor.
        reason = _line(error).replace(". You can use download=True to download it", "")
        raise ValueError(f"data.root={data.root} has no intact {class_name} ({reason}); {way_out}") from error
    if name == "qmnist":  # its targets say more than the class: column 2 is the writer
        facts = dataset.targets
        return decode.Arrays(dataset.data, facts[:, 0], dataset.classes, ids=facts[:, 2])
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
