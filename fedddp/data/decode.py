"""Examples of a torch dataset as labels and uint8 pixels of one shape."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms.v2 import functional

from fedddp.data.transforms import resize

v2: Any = functional  # its functions are not typed as exported

_CHUNK = 1024
ZEROS = bytes(1 << 20)
_SAMPLED = 4096
"""Examples, evenly spaced, that the normalisation is computed from; 256 if they are streamed."""


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
        """Read one example.

        Raises:
            ValueError: the image cannot be read or has another shape.
        """
        image = self._read(index)
        if image.shape[0] == 1:
            image = image.expand(self.shape[0], -1, -1)
        if image.shape != self.shape:
            raise ValueError(
                f"{self._where(index)} has shape {tuple(image.shape)}, but the first image "
                f"{self.shape}; set data.image_size, or give all images the same channels"
            )
        return image, int(self.labels[index])

    def _read(self, index: int) -> Tensor:
        try:
            image, label = self.dataset[index]
            image = to_uint8(image, self._where(index))
        except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for a broken PNG
            problem, gone = " ".join(str(error).split()), getattr(error, "errno", None)
            fix = "bring its disk back and resume with --resume auto" if gone else "replace or delete it"
            raise ValueError(f"{self._where(index)} cannot be read as an image ({problem}); {fix}") from error
        if int(label) != self.labels[index]:
            raise ValueError(
                f"{self._where(index)} has label {int(label)}, but its list of labels has "
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
                return _mapped(cache / self._fingerprint(), self._fill, (len(self), *self.shape))
            except OSError:  # a folder that cannot be written, or a full disk: do without
                pass
        pixels = np.empty((len(self), *self.shape), dtype=np.uint8)
        self._fill(pixels)
        return torch.from_numpy(pixels)

    def _fill(self, pixels: NDArray[np.uint8]) -> None:
        for index in range(len(self)):
            pixels[index] = self[index][0].numpy()

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
        count = min(len(self), _SAMPLED if pixels is not None else 256)
        spaced = torch.arange(count) * len(self) // count
        some = torch.stack([self[i][0] for i in spaced.tolist()]) if pixels is None else pixels[spaced]
        values = some.transpose(0, 1).flatten(1).double() / 255
        # A channel without contrast is centred, not blown up.
        std = values.std(dim=1, correction=0)
        std = torch.where(std > 1e-3, std, 1.0)
        return tuple(values.mean(dim=1).tolist()), tuple(std.tolist())


def to_uint8(image: Any, where: str) -> Tensor:
    """Return one image as uint8 (C, H, W)."""
    if isinstance(image, Image.Image):
        image = v2.pil_to_tensor(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image))  # a copy: torch wants writable memory
    if not isinstance(image, Tensor) or image.dim() not in (2, 3):
        kind = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{where} is {kind}; expected a PIL image or a tensor (C, H, W)")
    return _bytes(_channels_first(image[None]), where)[0]


def _bytes(images: Tensor, where: str) -> Tensor:
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point() or images.min() < 0 or images.max() > 1:
        low, high = images.min().item(), images.max().item()
        raise ValueError(
            f"{where} has {str(images.dtype).removeprefix('torch.')} values from {low:g} to "
            f"{high:g}; give uint8, or floating values 0..1 without Normalize (fedddp normalises)"
        )
    return (images * 255).round().to(torch.uint8)


def _channels_first(images: Tensor) -> Tensor:
    """Return a stack of images (n, H, W), (n, H, W, C) or (n, C, H, W) as (n, C, H, W)."""
    if images.dim() == 3:
        return images[:, None]
    channels_last = images.shape[1] not in (1, 3) and images.shape[3] in (1, 3)
    return images.permute(0, 3, 1, 2).contiguous() if channels_last else images


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
    return _bytes(_channels_first(images), type(dataset).__name__)


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


def labels(dataset: Any, name: str) -> NDArray[np.int64]:
    """Return the class of every example, (examples,), from the dataset's own list if it has one.

    Raises:
        ValueError: a label is not an integer.
    """
    listed = None if getattr(dataset, "target_transform", None) else _listed_labels(dataset)
    if listed is not None:
        return listed
    values = [dataset[index][1] for index in range(len(dataset))]
    for index, value in enumerate(values):
        integer = isinstance(value, int | np.integer) or (
            isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point()
        )
        if not integer:
            raise ValueError(
                f"{name}: label of example {index} is {value!r}; give integers 0, 1, ... per class"
            )
    return np.array([int(value) for value in values], dtype=np.int64)


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
    array = np.asarray(values)
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
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


def _mapped(file: Path, fill: Callable[[NDArray[np.uint8]], None], shape: tuple[int, ...]) -> Tensor:
    """Return the array in `file`, mapped into memory; if there is none, `fill` it first."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        try:
            pixels = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
            with part.open("r+b") as allocated:
                _reserve(allocated, pixels.offset, part.stat().st_size)
            fill(pixels)
            pixels.flush()
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    # Copy-on-write, because torch wants writable memory; without a write the pages stay shared.
    return torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))


def _reserve(file: BinaryIO, start: int, end: int) -> None:
    """Allocate the bytes from `start` to `end`: a mapped page that finds the disk full kills the process."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(file.fileno(), 0, end)
        return
    file.seek(start)
    for offset in range(start, end, len(ZEROS)):
        file.write(ZEROS[: end - offset])
