"""`TrainedModel`: a network with its classes and its preprocessing."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fedddp.data.image_files import read_bands
from fedddp.data.items import naming
from fedddp.data.loader import Batch, Normalizer
from fedddp.data.pixels import to_uint8
from fedddp.data.resizing import Resizing, Way
from fedddp.data.targets import Boxes, Detections, Target
from fedddp.section import ConfigError
from fedddp.tasks import Task

if TYPE_CHECKING:
    from fedddp.inference.export import Exported, Format, Preprocessing


BATCH_SIZES: dict[Target, int] = {"class": 500, "multilabel": 500, "mask": 16, "boxes": 16}
"""Images per forward pass of a prediction: outputs for every pixel take much memory."""


@dataclass(frozen=True)
class TrainedModel:
    """A trained module with all that is needed to use it on images."""

    module: nn.Module
    """The network, in evaluation mode; it takes normalised images (b, C, H, W) and returns what its task
    takes: logits (b, K), of masks (b, K, H, W), of boxes a dictionary."""
    classes: tuple[str, ...]
    """Names of the outputs, in order."""
    shape: tuple[int, int, int]
    """Channels, height and width of the images that it was trained on."""
    mean: tuple[float, ...]
    """Per channel, of pixel / 255."""
    std: tuple[float, ...]
    """Per channel, of pixel / 255."""
    task: Task
    """The task it was trained for."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The header of the file that it was read from."""
    value_range: tuple[float, float] | None = None
    """The run's `data.value_range`: values of 16-bit and floating images that are black and white."""
    resize: Way = "crop"
    """How images of other sizes were resized in training, and are here."""

    @property
    def resizing(self) -> Resizing:
        """How images of other sizes become those of the model; they do not where that is not square."""
        return Resizing(self.shape[1] if self.shape[1] == self.shape[2] else None, self.resize)

    @property
    def device(self) -> torch.device:
        """The device of the module."""
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def to(self, device: torch.device | str) -> TrainedModel:
        """Move the module to `device`, in place, and return this model."""
        self.module.to(device)
        return self

    def preprocess(self, images: Any) -> Tensor:
        """Return what the module takes: resized, normalised images; float32, (n, C, H, W), on its device.

        Args:
            images: one image or a sequence of them: paths of image files, PIL images, or arrays and tensors
                (H, W), (H, W, C) or (C, H, W) with values 0..255 (uint8) or 0..1 (floating). They are read
                and resized as in training, by `value_range` and `resize`. Grey images have equal channels for
                a model of several, colour images become grey for a model of one.

        Raises:
            ValueError: an image cannot be read, or has other channels than the model.
        """
        prepared = [self.pixels(image) for image in _listed(images)]
        stacked = torch.stack(prepared) if prepared else torch.empty(0, *self.shape, dtype=torch.uint8)
        return Normalizer(self.mean, self.std, self.device)(stacked.to(self.device))

    @torch.no_grad()
    def predict(self, images: Any, batch_size: int | None = None) -> Any:
        """Return what the task predicts for n images, on the CPU.

        Args:
            images: as for `preprocess`.
            batch_size: images per forward pass, >= 1; by default 500, of masks and boxes 16.

        Returns:
            For Classification and MultiLabel the probability of every class or label, (n, classes) float32.
            For Segmentation the class of every pixel of what `preprocess` returns, (n, H, W) uint8. For
            Detection `Detections`, in pixels of what `preprocess` returns.

        Raises:
            ValueError: an image cannot be read or has other channels than the model, or the task predicts
                nothing.
        """
        listed = _listed(images)
        batch_size = batch_size or BATCH_SIZES[self.task.target]
        found = []
        for start in range(0, len(listed), batch_size):
            prepared = self.preprocess(listed[start : start + batch_size])
            predicted = self.task.predict(self.outputs(prepared))
            if predicted is None:
                raise ConfigError(
                    f"task={type(self.task).__name__} has no predictions; give it `predict`, or call the "
                    "module on what `preprocess` returns"
                )
            found.append(predicted)
        if self.task.target == "boxes":
            return _joined(found)
        none = torch.empty(0, len(self.classes))
        if self.task.target == "mask":
            none = torch.empty(0, *self.shape[1:], dtype=torch.uint8)
        return torch.cat([none, *(predicted.cpu() for predicted in found)])

    def outputs(self, images: Tensor) -> Any:
        """Return the module's outputs for what `preprocess` returns, as the task takes them."""
        targets = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        return self.task.forward(self.module, Batch(images, targets, len(images), len(images)))

    def pixels(self, image: Any) -> Tensor:
        """Return one image as the network saw it in training, before normalisation; uint8, (C, H, W).

        Raises:
            ValueError: it is no image, or has other channels than the model.
        """
        return self.resized(self.unresized(image))

    def resized(self, pixels: Tensor) -> Tensor:
        """Return what `unresized` returned as the network saw it in training; uint8, (C, H, W).

        Raises:
            ValueError: it has other channels than the model, or cannot be resized to a model's oblong images.
        """
        if len(pixels) == self.shape[0]:
            pixels = self.resizing.image(pixels)
        if tuple(pixels.shape) != self.shape:
            raise ValueError(
                f"the image has shape {tuple(pixels.shape)}, but the model was trained on {self.shape}; "
                "resize or convert it"
            )
        return pixels

    def unresized(self, image: Any) -> Tensor:
        """Return one image with the model's channels, where it can, at its own size; uint8, (c, h, w).

        Raises:
            ValueError: it is no image.
        """
        if isinstance(image, str | os.PathLike):
            return self.channels(self.read(image))
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and tuple(image.shape) == self.shape:
            return image
        if not isinstance(image, Image.Image | np.ndarray | Tensor):
            raise ValueError(
                f"the image is {type(image).__name__}; give the path of an image file, a PIL image, or an "
                "array or tensor (H, W), (H, W, C) or (C, H, W)"
            )
        return self.channels(to_uint8(image, "the image", self.value_range))

    def read(self, file: str | os.PathLike[str]) -> Tensor:
        """Return the image in a file with its own channels and size, uint8 (c, h, w), as training reads it.

        Raises:
            ValueError: it cannot be read.
        """
        with naming(str(file)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL: large or sloppily written files
            return read_bands(str(file), self.value_range)

    def channels(self, pixels: Tensor) -> Tensor:
        """Return uint8 pixels (c, h, w) with the model's channels, where it can."""
        if pixels.shape[0] == 1:
            return pixels.expand(self.shape[0], -1, -1)
        return _grey(pixels) if pixels.shape[0] == 3 and self.shape[0] == 1 else pixels

    def export(
        self, path: str | Path, format: Format | None = None, preprocessing: Preprocessing = "inside"
    ) -> Exported:
        """Write the model to a file that needs no fedddp, and compare it with the module.

        Args:
            path: the file; an existing one is replaced.
            format: "pt2" (torch.export), "onnx" or "safetensors" (weights alone); by default that of the
                path's ending.
            preprocessing: "inside": the file takes uint8 images and normalises them; "beside": it takes
                normalised images, and PATH.json has mean and deviation.

        Returns:
            The path, and the largest difference of an output from the module's.

        Raises:
            ConfigError: a library is missing, or the module cannot be exported in that format.
            OSError: the file cannot be written.
        """
        from fedddp.inference.export import export

        return export(self, Path(path), format, preprocessing)


def _listed(images: Any) -> Sequence[Any]:
    """Return one image or several as a sequence of images."""
    several = isinstance(images, Sequence) and not isinstance(images, str | bytes)
    several = several or (hasattr(images, "ndim") and images.ndim == 4)
    listed: Sequence[Any] = images if several else [images]
    return listed


def _joined(found: Sequence[Detections]) -> Detections:
    """Return the detections of several batches as one, on the CPU."""
    cpu = torch.device("cpu")
    boxes = Boxes.join(one.boxes.to(cpu).of(image) for one in found for image in range(len(one.boxes)))
    return Detections(boxes, torch.cat([torch.empty(0), *(one.scores.cpu() for one in found)]))


def _grey(pixels: Tensor) -> Tensor:
    """Return the luma of uint8 RGB (3, H, W), ITU-R 601-2 in 16 bits as PIL rounds it; uint8, (1, H, W)."""
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32).view(3, 1, 1)
    return ((pixels.to(torch.int32) * weights).sum(0, keepdim=True) + 2**15 >> 16).to(torch.uint8)
