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

from fedddp.data.decode import naming
from fedddp.data.loader import Normalizer
from fedddp.data.pixels import to_uint8
from fedddp.data.transforms import resize
from fedddp.section import ConfigError
from fedddp.tasks import Task

if TYPE_CHECKING:
    from fedddp.inference.export import Exported, Format, Preprocessing


@dataclass(frozen=True)
class TrainedModel:
    """A trained module with all that is needed to use it on images."""

    module: nn.Module
    """The network, in evaluation mode; it takes normalised images (b, C, H, W) and returns logits (b, K)."""
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
                (H, W), (H, W, C) or (C, H, W) with values 0..255 (uint8) or 0..1 (floating). They are resized
                as in training: the shorter side to the model's, then cropped at the centre. Grey images have
                equal channels for a model of several, colour images become grey for a model of one.

        Raises:
            ValueError: an image cannot be read, or has other channels than the model.
        """
        prepared = [self.pixels(image) for image in _listed(images)]
        stacked = torch.stack(prepared) if prepared else torch.empty(0, *self.shape, dtype=torch.uint8)
        return Normalizer(self.mean, self.std, self.device)(stacked.to(self.device))

    @torch.no_grad()
    def predict(self, images: Any, batch_size: int = 500) -> Tensor:
        """Return the probability of every class for each image; float32, (n, classes), on the CPU.

        Args:
            images: as for `preprocess`.
            batch_size: images per forward pass, >= 1.

        Raises:
            ValueError: an image cannot be read or has other channels than the model, or the task has no
                classes.
        """
        listed = _listed(images)
        found = [torch.empty(0, len(self.classes))]
        for start in range(0, len(listed), batch_size):
            outputs = self.module(self.preprocess(listed[start : start + batch_size]))
            probabilities = self.task.probabilities(outputs)
            if probabilities is None:
                raise ConfigError(
                    f"task={type(self.task).__name__} has no probabilities; give it `probabilities`, or call "
                    "the module on what `preprocess` returns"
                )
            found.append(probabilities.cpu())
        return torch.cat(found)

    def pixels(self, image: Any) -> Tensor:
        """Return one image as the network saw it in training, before normalisation; uint8, (C, H, W).

        Raises:
            ValueError: it is no image, or has other channels than the model.
        """
        if isinstance(image, str | os.PathLike):
            with naming(str(image)), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PIL: large or sloppily written files
                with Image.open(image) as opened:
                    opened.load()
                    return self.pixels(opened)
        if not isinstance(image, Image.Image | np.ndarray | Tensor):
            raise ValueError(
                f"the image is {type(image).__name__}; give the path of an image file, a PIL image, or an "
                "array or tensor (H, W), (H, W, C) or (C, H, W)"
            )
        pixels = to_uint8(image, "the image")
        channels, height, width = self.shape
        if pixels.shape[0] == 1:
            pixels = pixels.expand(channels, -1, -1)
        elif pixels.shape[0] == 3 and channels == 1:
            pixels = _grey(pixels)
        if height == width and pixels.shape[0] == channels:
            pixels = resize(pixels, height)
        if tuple(pixels.shape) != self.shape:
            raise ValueError(
                f"the image has shape {tuple(pixels.shape)}, but the model was trained on {self.shape}; "
                "resize or convert it"
            )
        return pixels

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
            The path, and the largest difference of a logit from the module's.

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


def _grey(pixels: Tensor) -> Tensor:
    """Return the luma of uint8 RGB (3, H, W), ITU-R 601-2 in 16 bits as PIL rounds it; uint8, (1, H, W)."""
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32).view(3, 1, 1)
    return ((pixels.to(torch.int32) * weights).sum(0, keepdim=True) + 2**15 >> 16).to(torch.uint8)
