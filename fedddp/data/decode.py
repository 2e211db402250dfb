"""Examples of a torch dataset as labels and uint8 pixels of one shape."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from fedddp.data.pixel_cache import mapped
from fedddp.data.pixels import channels_first, to_bytes, to_uint8
from fedddp.data.transforms import resize
from fedddp.rng import generators_kept, seed_global, stream_seed

_CHUNK = 1024
_SAMPLED = 4096
"""Examples, evenly spaced, that the normalisation is computed from."""


class Arrays(Dataset[tuple[Tensor, int]]):
    """Images and labels that lie in memory."""

    def __init__(self, data: Tensor, targets: Tensor, classes: list[str], ids: Tensor | None = None) -> None:
        """Take uint8 images (n, H, W) or (n, C, H, W), labels (n,) and perhaps owners (n,)."""
        self.data, self.targets, self.classes, self.ids = data, targets, classes, ids

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image and its label."""
        return self.data[index], int(self.targets[index])


class Decoded(Dataset[tuple[Tensor, int]]):
    """The examples of `dataset` as (uint8 image of `shape`, label)."""

    def __init__(self, dataset: Dataset[Any], labels: NDArray[np.int64], name: str, size: int | None) -> None:
        """Wrap `dataset`, whose images are resized and cropped to `size` unless it is None."""
        self.dataset, self.labels, self.name, self.size = dataset, labels, name, size
        self.files = _files(dataset)
        channels, height, width = self._read(0).shape
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Read one example; raises as `read`."""
        return self.read(index), int(self.labels[index])

    def read(self, index: int, pass_seed: int = 0) -> Tensor:
        """Return the pixels of one example; the dataset's own random draws follow from the arguments.

        Raises:
            ValueError: the image cannot be read or has another shape.
        """
        with generators_kept():
            return self.read_seeding(index, pass_seed)

    def read_seeding(self, index: int, pass_seed: int = 0) -> Tensor:
        """As `read`, but leave the global generators seeded.

        Putting them back takes ten times as long as seeding them: who reads many examples does it once.
        """
        seed_global(stream_seed("item", pass_seed, index))
        image = self._read(index)
        if image.shape[0] == 1:
            image = image.expand(self.shape[0], -1, -1)
        if image.shape != self.shape:
            raise ValueError(
                f"{self._where(index)} has shape {tuple(image.shape)}, but the first image "
                f"{self.shape}; set data.image_size, or give all images the same channels"
            )
        return image

    def _read(self, index: int) -> Tensor:
        where = self._where(index)
        with naming(where):  # an image that is opened, but not read, is read here
            image, label = as_pair(self.dataset[index], where)
            image = to_uint8(image, where)
        if label_of(label, where) != self.labels[index]:
            raise ValueError(
                f"{where} has label {label}, but its list of labels has "
                f"{self.labels[index]}; correct the list or remove it"
            )
        return resize(image, self.size)

    def _where(self, index: int) -> str:
        return self.files[index] if self.files else f"{self.name}: example {index}"

    def read_all(self, cache: Path | None) -> Tensor:
        """Return all images, uint8 (examples, C, H, W).

        Decoded image files are kept in a file in the folder `cache` (None: they are not) that the
        ranks of a node map into memory: one copy for all of them, and decoded only once.
        """
        stored = _array(self.dataset)
        if stored is not None and self.size is None:
            return stored.contiguous()
        if stored is not None:
            return torch.cat([resize(part, self.size) for part in torch.split(stored, _CHUNK)])
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
                pixels[index] = self.read_seeding(index).numpy()

    def _fingerprint(self) -> str:
        """Return a file name that changes when an image file, or the shape, does."""
        digest = hashlib.blake2b(f"{self.shape}{self.size}".encode(), digest_size=8)
        for file in self.files:
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
                torch.stack([self.read_seeding(i) for i in spaced.tolist()])
                if pixels is None
                else pixels[spaced]
            )
        values = some.transpose(0, 1).flatten(1).double() / 255
        # A channel without contrast is centred, not blown up.
        std = values.std(dim=1, correction=0)
        std = torch.where(std > 1e-3, std, 1.0)
        return tuple(values.mean(dim=1).tolist()), tuple(std.tolist())


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


def _files(dataset: Any) -> list[str]:
    """Return the image files of a dataset that reads one per example, else []."""
    if isinstance(dataset, Subset):
        parent = _files(dataset.dataset)
        return [parent[index] for index in dataset.indices] if parent else []
    for name in ("samples", "_samples", "_image_files", "_images"):
        entries = getattr(dataset, name, None)
        if isinstance(entries, list) and entries and len(entries) == len(dataset):
            files = [entry[0] if isinstance(entry, tuple | list) else entry for entry in entries]
            return [str(file) for file in files] if isinstance(files[0], str | Path) else []
    return []


def read_item(dataset: Any, index: int, where: str) -> Any:
    """Return an item of a dataset; errors as for `naming`."""
    with naming(where):
        return dataset[index]


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Turn any error of a decoder, or of the user's own code, in the block into one line.

    Raises:
        ValueError: an item cannot be read; the message names it.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and where in str(error):  # a line of ours already
            raise
        text = " ".join(str(error).split())
        problem = text if isinstance(error, OSError | SyntaxError) else f"{type(error).__name__}: {text}"
        gone = isinstance(error, OSError) and error.errno
        fix = "bring its disk back and resume with --resume auto" if gone else "replace or delete it"
        raise ValueError(f"{where} cannot be read as an image ({problem}); {fix}") from error


def as_pair(item: Any, where: str) -> tuple[Any, Any]:
    """Return the image and the label in an item of a dataset.

    Raises:
        ValueError: it is no pair.
    """
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    kind = type(item).__name__
    if isinstance(item, dict):
        kind = f"a dict with {', '.join(map(str, item))}"
    elif isinstance(item, tuple | list):
        kind = f"a {kind} of {len(item)}"
    raise ValueError(f"{where} is {kind}; a dataset must return (image, label) pairs")


def check_map_style(dataset: Any, name: str) -> None:
    """Refuse a dataset without a length and items by index.

    Raises:
        ValueError: it is iterable only, or no dataset at all.
    """
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not indexed or isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name} is not a map-style dataset; it needs __len__, and __getitem__ that"
            " returns (image, label) pairs"
        )


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


def class_names(dataset: Any, labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Return the names of the classes: of the dataset's list `classes`, or the labels themselves."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    named = getattr(dataset, "classes", None)
    if isinstance(named, list | tuple) and named:
        return tuple(map(str, named))
    return tuple(map(str, range(int(labels.max()) + 1)))


def ids(dataset: Any, name: str) -> NDArray[np.int64] | None:
    """Return the natural owner of every example, numbered from 0, if the dataset has `ids`."""
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
    return np.unique(owners, return_inverse=True)[1].astype(np.int64)
