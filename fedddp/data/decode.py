"""Examples of a torch dataset as labels and uint8 pixels of one shape."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from fedddp.data.items import as_pair, naming, read_item
from fedddp.data.labelling import as_tv_tensors, boxes_of, mask_of
from fedddp.data.pixel_cache import mapped
from fedddp.data.pixels import channels_first, to_bytes, to_uint8
from fedddp.data.targets import Boxes, Target
from fedddp.data.transforms import resize, resize_boxes, resize_mask
from fedddp.rng import generators_kept, seed_global, stream_seed

_CHUNK = 1024
_SAMPLED = 4096
"""Examples, evenly spaced, that the normalisation is computed from."""


class Arrays(Dataset[tuple[Tensor, Any]]):
    """Images and what they are labelled with, in memory."""

    def __init__(self, data: Tensor, targets: Any, classes: list[str], ids: Tensor | None = None) -> None:
        """Take the examples.

        Args:
            data: uint8 images, (n, H, W) or (n, C, H, W).
            targets: (n,) classes, (n, K) labels, (n, H, W) masks, or n dicts of boxes and labels.
            classes: the names of the classes.
            ids: the owner of each example, (n,); None: they have none.
        """
        self.data, self.targets, self.classes, self.ids = data, targets, classes, ids

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """Return an image and its label."""
        target = self.targets[index]
        return self.data[index], target if isinstance(target, dict) or target.dim() else int(target)


OfImage = tuple[Tensor, Tensor]
"""The boxes of one image, (k, 4), and their labels, (k,)."""


@dataclass(frozen=True)
class Reading:
    """How the items of a dataset become examples."""

    target: Target = "class"
    """What the items are labelled with."""
    size: int | None = None
    """Height and width that images are resized and cropped to; None: as they are."""
    value_range: tuple[float, float] | None = None
    """Values of 16-bit and floating images that become black and white; None: their full range."""
    transform: Callable[[Any, Any], Any] | None = None
    """The user's own f(image, label), which draws at random; for training only."""


class Decoded:
    """The examples of `dataset` as uint8 planes of one shape: the channels of the image, then its mask."""

    def __init__(
        self, dataset: Dataset[Any], labels: NDArray[np.int64] | None, name: str, reading: Reading
    ) -> None:
        """Wrap `dataset`.

        Args:
            dataset: a map-style dataset of (image, label).
            labels: the class of every example, (examples,), which its items must have; None: any.
            name: names the dataset in errors.
            reading: how its items are read.
        """
        self.dataset, self.labels, self.name, self.reading = dataset, labels, name, reading
        self.files = _files(dataset)
        channels, height, width = self._read(0)[0].shape
        self.shape = (channels, height, width)
        """Planes, height and width: with masks one plane more than the images have channels."""

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def read(self, index: int, pass_seed: int = 0) -> Tensor:
        """Return the planes of one example; the dataset's own random draws follow from the arguments.

        Raises:
            ValueError: the image cannot be read or has another shape.
        """
        with generators_kept():
            return self.read_seeding(index, pass_seed)[0]

    def read_seeding(self, index: int, pass_seed: int = 0) -> tuple[Tensor, OfImage | None]:
        """Return the planes of one example and, of data with boxes, those; leave the generators seeded.

        Putting them back takes ten times as long as seeding them: who reads many examples does it once.

        Args:
            index: the example.
            pass_seed: of a pass of training; 0: it is read for something else, without the user's transform.
        """
        seed_global(stream_seed("item", pass_seed, index))
        planes, boxes = self._read(index, training=pass_seed != 0)
        masked = self.reading.target == "mask"
        if planes.shape[0] == 1 + masked < self.shape[0]:
            planes = torch.cat([planes[:1].expand(self.shape[0] - masked, -1, -1), planes[1:]])
        if planes.shape != self.shape:
            raise ValueError(
                f"{self._where(index)} has shape {_shape(planes, masked)}, but the first image "
                f"{(self.shape[0] - masked, *self.shape[1:])}; set data.image_size, or give all images the "
                "same channels"
            )
        return planes, boxes

    def _read(self, index: int, *, training: bool = False) -> tuple[Tensor, OfImage | None]:
        where, how = self._where(index), self.reading
        with naming(where):  # an image that is opened, but not read, is read here
            image, label = as_pair(self.dataset[index], where)
            image = to_uint8(image, where, how.value_range)
            if training and how.transform is not None:
                changed = how.transform(*as_tv_tensors(image, label, how.target, where))
                where = f"{where} after data.transform"
                image, label = as_pair(changed, where)
                image = to_uint8(image, where)
        if how.target == "class" and self.labels is not None and label_of(label, where) != self.labels[index]:
            raise ValueError(
                f"{where} has label {label}, but its list of labels has "
                f"{self.labels[index]}; correct the list or remove it"
            )
        height, width = image.shape[1:]
        if how.target == "mask":
            mask = mask_of(label, (height, width), where)
            return torch.cat([resize(image, how.size), resize_mask(mask, how.size)]), None
        boxes = boxes_of(label, where) if how.target == "boxes" else None
        if boxes is not None:
            boxes = resize_boxes(*boxes, (height, width), how.size)
        return resize(image, how.size), boxes

    def _where(self, index: int) -> str:
        return self.files[index] if self.files else f"{self.name}: example {index}"

    def read_all(self, cache: Path | None) -> Tensor:
        """Return all planes, uint8 (examples, C, H, W).

        Decoded image files are kept in a file in the folder `cache` (None: they are not) that the
        ranks of a node map into memory: one copy for all of them, and decoded only once.
        """
        stored = None if self.reading.target == "mask" or self.reading.value_range else _array(self.dataset)
        size = self.reading.size
        if stored is not None and size is None:
            return stored.contiguous()
        if stored is not None:
            return torch.cat([resize(part, size) for part in torch.split(stored, _CHUNK)])
        if cache is not None and self.files:
            try:
                return mapped(cache / self._fingerprint(), self._fill, (len(self), *self.shape))
            except OSError:  # a folder that cannot be written, or a full disk: do without
                pass
        pixels = np.empty((len(self), *self.shape), dtype=np.uint8)
        self._fill(pixels)
        return torch.from_numpy(pixels)

    def _fill(self, pixels: NDArray[np.uint8]) -> None:
        with generators_kept():
            for index in range(len(self)):
                pixels[index] = self.read_seeding(index)[0].numpy()

    def read_boxes(self) -> Boxes:
        """Return the boxes of all images, whose sizes decide where they lie.

        A dataset may offer them without its images: `label_and_size(index)` returns what an item is labelled
        with, and height and width of its image, or None. Other images are read.
        """
        with generators_kept():
            return Boxes.join(boxes for i in range(len(self)) if (boxes := self._boxes(i)) is not None)

    def _boxes(self, index: int) -> OfImage | None:
        dataset, item = _parent(self.dataset, index)
        offered = getattr(dataset, "label_and_size", None)
        where = self._where(index)
        with naming(where):
            found = None if offered is None else offered(item)
        if found is None:
            return self.read_seeding(index)[1]
        label, size = found
        return resize_boxes(*boxes_of(label, where), size, self.reading.size)

    def read_masks(self) -> Iterator[Tensor]:
        """Yield the mask of every image, uint8 (1, H, W)."""
        with generators_kept():
            for index in range(len(self)):
                yield self.read_seeding(index)[0][-1:]

    def _fingerprint(self) -> str:
        """Return a file name that changes when an image file, or how it is read, does.

        How a dataset reads its files it may describe in a text, `reading`.
        """
        how = f"{self.shape}{self.reading.size}"
        if self.reading.target == "mask" or self.reading.value_range:
            how += f"{self.reading.target}{self.reading.value_range}"
        how += str(getattr(_parent(self.dataset, 0)[0], "reading", ""))
        digest = hashlib.blake2b(how.encode(), digest_size=8)
        for file in self.files + _files(self.dataset, "masks"):
            stat = os.stat(file)
            digest.update(f"{file}/{stat.st_size}/{stat.st_mtime_ns}".encode())
        return f"pixels-{digest.hexdigest()}.npy"

    def statistics(self, pixels: Tensor | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel of pixel / 255, of `pixels` if given.

        They are taken from evenly spaced examples; streamed ones have to be read for it.
        """
        count = min(len(self), _SAMPLED)
        spaced = torch.arange(count) * len(self) // count
        with generators_kept():
            some = (
                torch.stack([self.read_seeding(i)[0] for i in spaced.tolist()])
                if pixels is None
                else pixels[spaced]
            )
        some = some[:, :-1] if self.reading.target == "mask" else some
        values = some.transpose(0, 1).flatten(1).double() / 255
        # A channel without contrast is centred, not blown up.
        std = values.std(dim=1, correction=0)
        std = torch.where(std > 1e-3, std, 1.0)
        return tuple(values.mean(dim=1).tolist()), tuple(std.tolist())


def _shape(planes: Tensor, masked: bool) -> tuple[int, ...]:
    return (planes.shape[0] - masked, *planes.shape[1:])


def _parent(dataset: Any, index: int) -> tuple[Any, int]:
    """Return the dataset that an item of a subset, or of a subset of it, comes from, and its index there."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    return dataset, index


def _array(dataset: Any) -> Tensor | None:
    """Return the images (n, C, H, W) of a dataset that has them all in one array, else None."""
    if isinstance(dataset, Subset):
        parent = _array(dataset.dataset)
        return None if parent is None else parent[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        images: Any = dataset.tensors[0]
    elif isinstance(dataset, Arrays) or (
        # A user's own class may do more in its `__getitem__` than return the image.
        type(dataset).__module__.startswith("torchvision.datasets")
        and getattr(dataset, "transforms", None) is None
    ):
        images = getattr(dataset, "data", None)
    else:
        return None
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images))
    fits = isinstance(images, Tensor) and images.dim() in (3, 4) and len(images) == len(dataset)
    if not fits or not (images.dtype == torch.uint8 or isinstance(dataset, TensorDataset)):
        return None
    name = type(dataset).__name__
    return to_bytes(channels_first(images, name), name)


def _files(dataset: Any, *names: str) -> list[str]:
    """Return the files of a dataset that reads one per example, of its images or by `names`; else []."""
    if isinstance(dataset, Subset):
        parent = _files(dataset.dataset, *names)
        return [parent[index] for index in dataset.indices] if parent else []
    for name in names or ("samples", "_samples", "_image_files", "_images", "images"):
        entries = getattr(dataset, name, None)
        if isinstance(entries, list) and entries and len(entries) == len(dataset):
            files = [entry[0] if isinstance(entry, tuple | list) else entry for entry in entries]
            return [str(file) for file in files] if isinstance(files[0], str | Path) else []
    return []


def labels(dataset: Any, name: str) -> NDArray[np.int64]:
    """Return the class of every example, (examples,), from the dataset's own list if it has one.

    Raises:
        ValueError: a label is not an integer.
    """
    listed = None if getattr(dataset, "target_transform", None) else _listed_labels(dataset)
    if listed is not None:
        return listed
    found = np.empty(len(dataset), dtype=np.int64)
    for index in range(len(dataset)):
        where = f"{name}: example {index}"
        found[index] = label_of(as_pair(read_item(dataset, index, where), where)[1], where)
    return found


def label_of(value: Any, where: str) -> int:
    """Return a label as an integer: an integer, a truth value, a whole float, or an array of one of these.

    Raises:
        ValueError: it is none of these.
    """
    array = np.asarray(value)
    if array.size == 1 and array.dtype.kind in "iubf" and np.isfinite(array).all():
        number = int(array.reshape(()))
        if number == array.reshape(()) and -(2**63) <= number < 2**63:
            return number
    raise ValueError(f"{where} has the label {value!r}; give integers 0, 1, ... per class")


def _listed_labels(dataset: Any) -> NDArray[np.int64] | None:
    if isinstance(dataset, Subset):
        parent = _listed_labels(dataset.dataset)
        return None if parent is None else parent[np.asarray(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        return _integers(dataset.tensors[1], len(dataset))
    for name in ("targets", "labels", "_labels"):
        found = _integers(getattr(dataset, name, None), len(dataset))
        if found is not None:
            return found
    for name in ("samples", "_samples"):
        pairs = getattr(dataset, name, None)
        if isinstance(pairs, list) and all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
            return _integers([label for _, label in pairs], len(dataset))
    return None


def _integers(values: Any, count: int) -> NDArray[np.int64] | None:
    """Return `values` as integers (count,) if that is what they are, else None."""
    if values is None or callable(values):
        return None
    try:
        array = np.asarray(values)
    except ValueError:  # a list of lists of different lengths
        return None
    if array.shape == (count, 1):
        array = array[:, 0]
    if array.shape != (count,) or array.dtype.kind not in "iub":
        return None
    return array.astype(np.int64)


def class_names(dataset: Any) -> tuple[str, ...]:
    """Return the names of the classes, of the dataset's list `classes`; empty where it has none."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    named = getattr(dataset, "classes", None)
    return tuple(map(str, named)) if isinstance(named, list | tuple) else ()


def ids(dataset: Any, name: str) -> NDArray[Any] | None:
    """Return the natural owner of every example, a number or a name, if the dataset has `ids`."""
    if isinstance(dataset, Subset):
        parent = ids(dataset.dataset, name)
        return None if parent is None else parent[np.asarray(dataset.indices)]
    found = getattr(dataset, "ids", None)
    if found is None:
        return None
    owners = np.asarray(found)
    if owners.shape != (len(dataset),):
        raise ValueError(
            f"{name}: ids have shape {owners.shape}; give one for each of {len(dataset)} examples"
        )
    return owners
