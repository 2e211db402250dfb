"""Names to datasets: whatever a dataset is, it becomes `Images`."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Interval
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset

from fedddp.data import decode, labelling, listed
from fedddp.data.catalog import find, open_dataset
from fedddp.data.items import check_map_style
from fedddp.data.partition import IID, Indices, Partition, Split, holdout_sizes
from fedddp.data.resizing import Resize, Resizing, Way, cropping, usual
from fedddp.data.targets import Boxes, Target
from fedddp.data.transforms import Augment, FeatureShift
from fedddp.rng import stream
from fedddp.section import (
    EXECUTION,
    Fraction,
    NonNegativeInt,
    PositiveInt,
    Section,
    find_function,
    local_path,
)

logger = logging.getLogger(__name__)

Memory = Literal["auto", "device", "stream"]

TRANSFORM = "f(image, label)"
"""The form of a user's own transform."""

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
    """(examples,) in range(classes): the class; of other targets one of the classes, to split them by."""

    classes: int

    shape: tuple[int, int, int]
    """Channels, height and width."""

    pixels: Tensor | None
    """uint8 (examples, C, H, W) when they are held in memory, with masks as one channel more; else None."""

    source: decode.Decoded | None
    """Where pixels come from otherwise, with masks as one channel more."""

    ids: NDArray[np.int64] | None
    """(examples,) the natural owner of every example, when the dataset names them."""

    mean: tuple[float, ...]
    """Per channel, of pixel / 255."""

    std: tuple[float, ...]
    """Per channel, of pixel / 255; > 0."""

    class_names: tuple[str, ...] = ()
    """Name of every class, by label; empty where it is not known."""

    target: Target = "class"
    """What the images are labelled with."""

    multilabels: Tensor | None = None
    """(examples, classes) float32 of 0 and 1, where the target is `multilabel`."""

    boxes: Boxes | None = None
    """Those of all images, where the target is `boxes`."""

    owners: tuple[str, ...] = ()
    """The name of every natural owner, by its number in `ids`."""

    @property
    def targets(self) -> Tensor | Boxes:
        """What is known of each example without its pixels: class, labels, or boxes."""
        known = self.multilabels if self.boxes is None else self.boxes
        return torch.from_numpy(self.labels) if known is None else known

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.labels)

    def digest(self, *, pixels: bool = True) -> str:
        """Return a digest of labels, owners and shape, and of evenly spaced `pixels` that are in memory."""
        digest = hashlib.blake2b(repr((self.shape, self.class_names)).encode(), digest_size=8)
        if self.target != "class":
            digest.update(self.target.encode())
        tables = () if self.boxes is None else (self.boxes.boxes, self.boxes.labels, self.boxes.offsets)
        if self.boxes is not None and self.boxes.ignored is not None:
            tables = (*tables, self.boxes.ignored)
        for table in (self.multilabels, *tables):
            digest.update(b"" if table is None else table.numpy().tobytes())
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
    """Random changes of training images: mirrored (`flip`), moved by up to an eighth of their size (`crop`),
    another brightness, contrast and saturation (`color`). Masks and boxes change alike."""

    image_size: Annotated[int, Interval(ge=1, le=16384)] | None = None
    """Height and width that images are resized to; needed where they differ in size."""

    resize: Resize = "auto"
    """How images of other proportions are resized: `crop` takes the centre, `pad` adds black margins, which
    count in no loss of masks and no metric, `stretch` changes the proportions. `auto` crops for classes and
    labels, and pads for masks and boxes."""

    transform: str | None = None
    """Dotted path of your own f(image, label) for training images, such as a pipeline of
    torchvision.transforms.v2: it gets tensors or tv_tensors and may draw from torch's global generator, which
    is seeded for each example of each pass. Images are then streamed."""

    value_range: list[float] | None = None
    """Values of 16-bit and floating images that become black and white, such as [0, 4095] of 12-bit X-ray
    pictures; values beyond are cut off. none: their full range."""

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
        if self.transform is not None:
            find_function(self.transform, "transform", ("none",), TRANSFORM)
            if self.memory == "device":
                raise ValueError(
                    f"transform={self.transform} is applied to images as they are read, but memory=device "
                    "reads them once; leave memory out"
                )
        limits = self.value_range
        if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
            raise ValueError(
                f"value_range={limits} must be the lowest and the highest value, such as [0, 4095]"
            )

    def reading(self, target: Target, *, training: bool) -> decode.Reading:
        """Return how items of a dataset that is labelled with `target` become examples."""
        transform = None
        if training and self.transform is not None:
            transform = find_function(self.transform, "data.transform", ("none",), TRANSFORM)
        limits = None if self.value_range is None else (self.value_range[0], self.value_range[1])
        resizing = Resizing(self.image_size, self.resizing(target))
        return decode.Reading(target, resizing, limits, transform)

    def resizing(self, target: Target) -> Way:
        """Return how images that are labelled with `target` are resized."""
        return usual(target) if self.resize == "auto" else self.resize

    def split(self, images: Images, seed: int) -> tuple[Split, Indices]:
        """Return the split of `images` over the clients, and n_k, the examples that each trains on.

        Held-out examples are in the split, but do not count in n_k, (clients,).

        Raises:
            ValueError: the images cannot be split as configured.
        """
        split = self.partition.split(images.labels, self.clients, seed, images.ids)
        return split, split.sizes - holdout_sizes(split.sizes, self.holdout)


def load(data: DataConfig, target: Target = "class") -> tuple[Images, Images]:
    """Return the training and the test set of images that are labelled with `target`.

    Raises:
        ValueError: files are missing or corrupt, labels out of range, or the dataset has no such labels.
    """
    name = find(data.dataset)
    train, test = open_dataset(
        name,
        data.root,
        target=target,
        download=data.download,
        image_size=data.image_size,
        examples=data.examples,
        test_fraction=data.test_fraction,
        value_range=data.value_range,
    )
    # A user's callable may decode the same files in its own way.
    cache = None if "." in name else local_path(data.root, "data.root") / CACHE
    images = from_dataset(train, data, target, name=f"{name} (train)", cache=cache)
    return images, from_dataset(test, data, target, like=images, name=f"{name} (test)", cache=cache)


def from_dataset(
    dataset: Dataset[Any],
    data: DataConfig | None = None,
    target: Target = "class",
    *,
    like: Images | None = None,
    name: str | None = None,
    cache: Path | None = None,
) -> Images:
    """Turn a map-style torch dataset of (image, label) into `Images`.

    Images are PIL images, or tensors or arrays with values 0..255 (uint8) or 0..1 (floating);
    do not normalise them. Random transforms are drawn once, unless `data.memory` is "stream". Labels of
    classes are taken from an attribute `targets` or `labels` if there is one, natural owners from `ids`.

    Args:
        dataset: has `__len__` and `__getitem__`.
        data: how images are read: `image_size`, `resize`, `memory`, `examples`, `value_range`, `transform`.
        target: what the labels are: a class; labels (K,) of 0 and 1; a mask (H, W) of classes, 255 for pixels
            that do not count; or a dict of "boxes" (k, 4) and "labels" (k,), as for `labelling.boxes_of`.
        like: for a test set, the training set whose shape, classes and normalisation it takes.
        name: names the dataset in errors; by default its class.
        cache: folder of decoded pixels; None: they are not kept.

    Raises:
        ValueError: no examples, images of different shapes, or labels out of range.
    """
    data, name = data or DataConfig(), name or type(dataset).__name__
    check_map_style(dataset, name)
    some = _some(dataset, data.examples)
    if not len(some):  # type: ignore[arg-type]
        raise ValueError(f"{name} has no examples; check data.dataset and data.root")
    known = listed.labels(some, name) if target == "class" else None
    source = decode.Decoded(some, known, name, data.reading(target, training=like is None))
    shape = (source.shape[0] - (target == "mask"), *source.shape[1:])
    if like is not None and shape != like.shape:
        raise ValueError(
            f"{name} has images of shape {shape}, the training set of {like.shape}; set "
            "data.image_size, or give all images the same number of channels"
        )
    fits = len(source) * int(np.prod(source.shape)) <= FITS_BYTES
    draws = source.reading.transform is not None
    in_memory = data.memory == "device" or (data.memory == "auto" and fits and not draws)
    pixels = source.read_all(cache) if in_memory else None
    mean, std = (like.mean, like.std) if like is not None else source.statistics(pixels)
    labelled = _labelled(source, pixels, like)  # reads masks and boxes, and so the sizes of images
    _warn_of_cropping(source)
    owners, ids = _owners(listed.ids(some, name), like)
    return Images(
        shape=shape,
        pixels=pixels,
        source=None if in_memory else source,
        ids=ids,
        mean=mean,
        std=std,
        target=target,
        owners=owners,
        **labelled,
    )


def _warn_of_cropping(source: decode.Decoded) -> None:
    lost = cropping(source.sizes(), source.reading.resizing) if source.cuts else None
    if lost is not None:
        logger.warning("%s: data.resize=crop: %s", source.name, lost)


def _some(dataset: Dataset[Any], examples: int | None) -> Dataset[Any]:
    """Return `examples` of the dataset, the same on every call; None: all."""
    total = len(dataset)  # type: ignore[arg-type]
    if examples is None or examples >= total:
        return dataset
    return Subset(dataset, np.sort(stream("examples").permutation(total)[:examples]).tolist())


def _owners(
    named: NDArray[Any] | None, like: Images | None
) -> tuple[tuple[str, ...], NDArray[np.int64] | None]:
    """Return the names of the natural owners, and each example's owner by number.

    A test set has the numbers of the training set; an owner that is not in it has a number of its own.
    """
    if named is None:
        return (), None
    names, numbers = np.unique(named, return_inverse=True)
    texts = tuple(map(str, names.tolist()))
    known = texts if like is None else like.owners
    every = (*known, *(text for text in texts if text not in set(known)))
    by_name = {text: number for number, text in enumerate(every)}
    return every, np.array([by_name[text] for text in texts], dtype=np.int64)[numbers.reshape(-1)]


def _labelled(source: decode.Decoded, pixels: Tensor | None, like: Images | None) -> dict[str, Any]:
    """Return the fields of `Images` about the labels of `source`'s target.

    Raises:
        ValueError: a label that is no class.
    """
    target, name = source.reading.target, source.name
    multilabels = boxes = None
    if target == "mask":
        masks = source.read_masks() if pixels is None else iter(pixels[:, -1:])
        labels, highest = labelling.classes_of_masks(masks)
    elif target == "boxes":
        boxes = source.read_boxes()
        labels, highest = labelling.classes_of_boxes(boxes)
    elif target == "multilabel":
        table = labelling.multilabels(source.dataset, name)
        multilabels = torch.from_numpy(table).float()
        labels, highest = labelling.classes_of_labels(table)
    else:
        assert source.labels is not None
        labels = highest = source.labels
    own = listed.class_names(source.dataset)
    if like is not None and own and like.class_names and own != like.class_names:
        raise ValueError(
            f"{name} has the classes {', '.join(own[:10])}, but the training set has "
            f"{', '.join(like.class_names[:10])}; give both the same list `classes`, in one sequence"
        )
    names = like.class_names if like is not None else own
    names = names or tuple(map(str, range(int(highest.max()) + 1)))
    classes = like.classes if like is not None else len(names)
    wrong = np.flatnonzero((labels < 0) | (highest >= classes))
    if len(wrong):
        worst = labels[wrong[0]] if labels[wrong[0]] < 0 else highest[wrong[0]]
        raise ValueError(
            f"{name}: label of example {wrong[0]} is {worst}, but must be between 0 and "
            f"{classes - 1}; correct the labels, or the dataset's list `classes`"
        )
    if multilabels is not None and multilabels.shape[1] != classes:
        raise ValueError(
            f"{name} has {multilabels.shape[1]} labels per image, but {classes} classes; correct the "
            "dataset's list `classes`"
        )
    return {
        "labels": labels,
        "classes": classes,
        "class_names": names,
        "multilabels": multilabels,
        "boxes": boxes,
    }
