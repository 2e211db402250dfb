"""Names to datasets: whatever a dataset is, it becomes `Images`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Interval
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset

from fedddp.data import decode
from fedddp.data.catalog import find, open_dataset
from fedddp.data.partition import IID, Indices, Partition, Split, holdout_sizes
from fedddp.data.transforms import Augment, FeatureShift
from fedddp.rng import stream
from fedddp.section import EXECUTION, Fraction, NonNegativeInt, PositiveInt, Section, local_path

Memory = Literal["auto", "device", "stream"]

DIGESTED = 256
"""Images that a digest covers."""

CACHE = ".fedddp"
"""Folder in `data.root` with decoded pixels; it may be deleted when no run is starting."""

FITS_BYTES = 2 * 2**30
"""Largest set of pixels that `memory=auto` holds on the device of every rank."""


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

    source: decode.Decoded | None
    """Where pixels come from otherwise: gives a uint8 image of `shape` and its label."""

    ids: NDArray[np.int64] | None
    """(examples,) the natural owner of every example, when the dataset names them."""

    mean: tuple[float, ...]
    """Per channel, of pixel / 255."""

    std: tuple[float, ...]
    """Per channel, of pixel / 255; > 0."""

    class_names: tuple[str, ...] = ()
    """Name of every class, by label; empty where it is not known."""

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.labels)

    def digest(self, *, pixels: bool = True) -> str:
        """Return a digest of labels, owners and shape, and of evenly spaced `pixels` that are in memory."""
        digest = hashlib.blake2b(repr((self.shape, self.class_names)).encode(), digest_size=8)
        digest.update(self.labels.tobytes())
        digest.update(b"" if self.ids is None else self.ids.tobytes())
        if pixels and self.pixels is not None:
            chosen = np.linspace(0, len(self) - 1, min(len(self), DIGESTED)).astype(np.int64)
            digest.update(self.pixels[torch.from_numpy(chosen)].numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Images and their partition over clients."""

    key = "data"

    dataset: str = "digits"
    """Name of a dataset, or dotted path of a callable f(root=, train=) that returns one."""

    root: str = field(default="data", metadata=EXECUTION)
    """Folder with the dataset's files."""

    download: bool = field(default=False, metadata=EXECUTION)
    """Download a missing dataset into `root` (those of torchvision)."""

    clients: PositiveInt = 20
    """The population: clients that the training examples are split over, >= 1."""

    partition: Partition = field(default_factory=IID)
    """How the training examples are split."""

    holdout: Annotated[float, Interval(ge=0, lt=1), "0.2 keeps a fifth"] = 0.0
    """Share of each client's examples that it is evaluated on and does not train on, in [0, 1)."""

    feature_shift: FeatureShift | None = None
    """Rotation, tint and noise that differ from client to client; none: no feature shift."""

    augment: Augment = "none"
    """Random changes of training images: mirrored, or moved by up to an eighth of their size."""

    image_size: Annotated[int, Interval(ge=1, le=16384)] | None = None
    """Height and width that images are resized and cropped to; needed where they differ in size."""

    memory: Memory = field(default="auto", metadata=EXECUTION)
    """Hold all pixels on each rank's device, or stream them; `auto` holds up to 2 GiB."""

    workers: NonNegativeInt = field(default=2, metadata=EXECUTION)
    """Processes per rank that read and decode streamed images, >= 0."""

    test_fraction: Fraction = 0.2
    """Share of every class that is tested, of datasets without a test set (`digits`, `eurosat`, `semeion`,
    an image folder without train/ and val/), in [0, 1)."""

    examples: PositiveInt | None = None
    """Use only so many training and so many test examples, drawn at random, >= 1; for trials."""

    def __post_init__(self) -> None:
        find(self.dataset)

    def split(self, images: Images, seed: int) -> tuple[Split, Indices]:
        """Return the split of `images` over the clients, and n_k, the examples that each trains on.

        Held-out examples are in the split, but do not count in n_k, (clients,).

        Raises:
            ValueError: the images cannot be split as configured.
        """
        split = self.partition.split(images.labels, self.clients, seed, images.ids)
        return split, split.sizes - holdout_sizes(split.sizes, self.holdout)


def load(data: DataConfig) -> tuple[Images, Images]:
    """Return the training and the test set.

    Raises:
        ValueError: files are missing or corrupt, or labels out of range.
    """
    name = find(data.dataset)
    train, test = open_dataset(
        name,
        data.root,
        download=data.download,
        image_size=data.image_size,
        examples=data.examples,
        test_fraction=data.test_fraction,
    )
    # A user's callable may decode the same files in its own way.
    cache = None if "." in name else local_path(data.root, "data.root") / CACHE
    options = (data.image_size, data.memory, cache)
    for dataset in (train, test):
        decode.check_map_style(dataset, name)
    images = _images(_some(train, data.examples), f"{name} (train)", None, *options)
    return images, _images(_some(test, data.examples), f"{name} (test)", images, *options)


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
    name = type(dataset).__name__
    decode.check_map_style(dataset, name)
    some = _some(dataset, examples)
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
    names = like.class_names if like is not None else decode.class_names(dataset, labels)
    classes = like.classes if like is not None else len(names)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise ValueError(
            f"{name}: label of example {wrong[0]} is {labels[wrong[0]]}, but must be between 0 and "
            f"{classes - 1}; correct the labels, or the dataset's list `classes`"
        )
    source = decode.Decoded(dataset, labels, name, size)
    if like is not None and source.shape != like.shape:
        raise ValueError(
            f"{name} has images of shape {source.shape}, the training set of {like.shape}; set "
            "data.image_size, or give all images the same number of channels"
        )
    fits = len(labels) * int(np.prod(source.shape)) <= FITS_BYTES
    in_memory = memory == "device" or (memory == "auto" and fits)
    pixels = source.read_all(cache) if in_memory else None
    mean, std = (like.mean, like.std) if like is not None else source.statistics(pixels)
    return Images(
        labels=labels,
        classes=classes,
        shape=source.shape,
        pixels=pixels,
        source=None if in_memory else source,
        ids=decode.ids(dataset, name),
        mean=mean,
        std=std,
        class_names=names,
    )
