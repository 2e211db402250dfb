"""Examples of a torch dataset as labels and uint8 pixels of one shape."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from fedddp.data.image_files import size_of
from fedddp.data.items import as_pair, naming
from fedddp.data.labelling import as_tv_tensors, boxes_of, mask_of
from fedddp.data.listed import label_of
from fedddp.data.pixel_cache import PIXELS, SIZES, mapped
from fedddp.data.pixels import channels_first, to_bytes, to_uint8
from fedddp.data.resizing import Resizing, Sizes, not_padding
from fedddp.data.targets import Boxes, Target
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


@dataclass(frozen=True)
class Reading:
    """How the items of a dataset become examples."""

    target: Target = "class"
    """What the items are labelled with."""
    resizing: Resizing = field(default_factory=Resizing)
    """How images become those of the model."""
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
        self._sizes = np.zeros((len(self), 2), dtype=np.int64)  # of images before they are resized; 0: unread
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

    def read_seeding(self, index: int, pass_seed: int = 0) -> tuple[Tensor, Boxes | None]:
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

    def _read(self, index: int, *, training: bool = False) -> tuple[Tensor, Boxes | None]:
        where, how = self._where(index), self.reading
        with naming(where):  # an image that is opened, but not read, is read here
            image, label = as_pair(self.dataset[index], where)
            image = to_uint8(image, where, how.value_range)
            self._sizes[index] = image.shape[1:]
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
            return torch.cat([how.resizing.image(image), how.resizing.mask(mask)]), None
        boxes = boxes_of(label, where) if how.target == "boxes" else None
        if boxes is not None:
            boxes = how.resizing.boxes(boxes, (height, width))
        return how.resizing.image(image), boxes

    def _where(self, index: int) -> str:
        return self.files[index] if self.files else f"{self.name}: example {index}"

    def read_all(self, cache: Path | None) -> Tensor:
        """Return all planes, uint8 (examples, C, H, W).

        Decoded image files are kept in a file in the folder `cache` (None: they are not) that the
        ranks of a node map into memory: one copy for all of them, and decoded only once.
        """
        stored = None if self.reading.target == "mask" or self.reading.value_range else _array(self.dataset)
        resizing = self.reading.resizing
        if stored is not None:
            self._sizes[:] = stored.shape[-2:]
            if resizing.size is None:
                return stored.contiguous()
            return torch.cat([resizing.image(part) for part in torch.split(stored, _CHUNK)])
        if cache is not None and self.files:
            try:
                return self._mapped(cache)
            except OSError:  # a folder that cannot be written, or a full disk: do without
                pass
        pixels = np.empty((len(self), *self.shape), dtype=np.uint8)
        self._fill(pixels)
        return torch.from_numpy(pixels)

    def _mapped(self, cache: Path) -> Tensor:
        """Return all planes from a file in `cache`, where another has the sizes of the images if they matter.

        Raises:
            OSError: a file cannot be written.
        """
        name = self._fingerprint()
        pixels = mapped(cache / f"{PIXELS}{name}.npy", self._fill, (len(self), *self.shape))
        if self.sizes_matter:
            bytes_of_sizes = (len(self), self._sizes.itemsize * 2)
            found = mapped(cache / f"{SIZES}{name}.npy", self._fill_sizes, bytes_of_sizes)
            self._sizes = found.numpy().view(np.int64).copy()
        return pixels

    def _fill_sizes(self, sizes: NDArray[np.uint8]) -> None:
        sizes[:] = self.sizes().view(np.uint8)

    @property
    def sizes_matter(self) -> bool:
        """Whether images are cut, or have margins that no statistic counts, so that sizes must be known."""
        resizing = self.reading.resizing
        return self.cuts or (resizing.size is not None and resizing.how == "pad")

    @property
    def cuts(self) -> bool:
        """Whether resizing cuts off parts of masks, or boxes."""
        resizing, annotated = self.reading.resizing, self.reading.target in ("mask", "boxes")
        return annotated and resizing.size is not None and resizing.how == "crop"

    def sizes(self, examples: Sequence[int] | None = None) -> Sizes:
        """Return height and width of images before they are resized; those that are not known are read.

        Raises:
            ValueError: one cannot be read.
        """
        wanted = np.arange(len(self)) if examples is None else np.asarray(examples)
        with generators_kept():
            for index in wanted[self._sizes[wanted, 0] == 0].tolist():
                with naming(self._where(index)):
                    size = size_of(self.files[index]) if self.files else None
                if size is None:
                    self.read_seeding(index)
                else:
                    self._sizes[index] = size
        return self._sizes[wanted]

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
            return Boxes.cat(boxes for i in range(len(self)) if (boxes := self._boxes(i)) is not None)

    def _boxes(self, index: int) -> Boxes | None:
        dataset, item = _parent(self.dataset, index)
        offered = getattr(dataset, "label_and_size", None)
        where = self._where(index)
        with naming(where):
            found = None if offered is None else offered(item)
        if found is None:
            return self.read_seeding(index)[1]
        label, size = found
        self._sizes[index] = size
        return self.reading.resizing.boxes(boxes_of(label, where), size)

    def read_masks(self) -> Iterator[Tensor]:
        """Yield the mask of every image, uint8 (1, H, W)."""
        with generators_kept():
            for index in range(len(self)):
                yield self.read_seeding(index)[0][-1:]

    def _fingerprint(self) -> str:
        """Return a name that changes when an image file, or how it is read, does.

        How a dataset reads its files it may describe in a text, `reading`.
        """
        resizing = self.reading.resizing
        how = f"{self.shape}{resizing.size}" + ("" if resizing.how == "crop" else resizing.how)
        if self.reading.target == "mask" or self.reading.value_range:
            how += f"{self.reading.target}{self.reading.value_range}"
        how += str(getattr(_parent(self.dataset, 0)[0], "reading", ""))
        digest = hashlib.blake2b(how.encode(), digest_size=8)
        for file in self.files + _files(self.dataset, "masks"):
            stat = os.stat(file)
            digest.update(f"{file}/{stat.st_size}/{stat.st_mtime_ns}".encode())
        return digest.hexdigest()

    def statistics(self, pixels: Tensor | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel of pixel / 255, of `pixels` if given.

        They are taken from evenly spaced examples; streamed ones have to be read for it. Margins of padded
        ones do not count.
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
        values = some.transpose(0, 1).flatten(1)
        if self.reading.resizing.how == "pad" and self.sizes_matter:
            inside = not_padding(self.sizes(spaced.tolist()), self.reading.resizing)
            values = values[:, inside.flatten()]
        values = values.double() / 255
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
