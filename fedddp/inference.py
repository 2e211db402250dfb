"""Use a trained model: load it from its run directory, evaluate it, predict with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedddp.config.loader import OBJECTS, build, read_sections
from fedddp.data.datasets import DataConfig, Images, from_dataset
from fedddp.data.loader import ClientLoader, Normalizer
from fedddp.data.pixels import to_uint8
from fedddp.data.transforms import resize
from fedddp.evaluation import Metrics, measure
from fedddp.section import ConfigError, local_path
from fedddp.storage.checkpoint import load_into
from fedddp.tasks import Task

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class TrainedModel:
    """A trained module with all that is needed to use it on images."""

    module: nn.Module
    """The network, in evaluation mode, on the CPU; it takes normalised images (b, C, H, W)."""
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

    @torch.no_grad()
    def predict(self, images: Any, batch_size: int = 500) -> Tensor:
        """Return the probability of every class for each image; float32, (n, classes).

        Args:
            images: one image or a sequence of them: PIL images, or arrays and tensors (H, W), (H, W, C) or
                (C, H, W) with values 0..255 (uint8) or 0..1 (floating). They are resized as in training.
            batch_size: images per forward pass, >= 1.

        Raises:
            ValueError: an image has other channels than the model.
        """
        several = isinstance(images, Sequence) or (hasattr(images, "ndim") and images.ndim == 4)
        prepared = [self._prepared(image) for image in (images if several else [images])]
        if not prepared:
            return torch.empty(0, len(self.classes))
        pixels = torch.stack(prepared)
        batches = torch.split(Normalizer(self.mean, self.std, pixels.device)(pixels), batch_size)
        return torch.cat([self.module(batch).float().softmax(1) for batch in batches])

    def _prepared(self, image: Any) -> Tensor:
        pixels = to_uint8(image, "the image")
        channels, height, width = self.shape
        if pixels.shape[0] == 1:
            pixels = pixels.expand(channels, -1, -1)
        if tuple(pixels.shape[1:]) != (height, width):
            pixels = resize(pixels, height) if height == width else pixels
        if tuple(pixels.shape) != self.shape:
            raise ValueError(
                f"the image has shape {tuple(pixels.shape)}, but the model was trained on {self.shape}; "
                "resize or convert it"
            )
        return pixels


def load_model(run: str | Path, module: nn.Module | None = None) -> TrainedModel:
    """Return the final model of a finished run.

    Args:
        run: the run directory.
        module: for a run of your own module: one of the same architecture; its weights are replaced.

    Raises:
        ConfigError: there is no final model, or it needs `module`.
    """
    directory = local_path(str(run), "run")
    file = directory / WEIGHTS
    if not file.is_file():
        raise ConfigError(f"{directory} has no {WEIGHTS}; give the directory of a finished run")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        preprocessing, classes = json.loads(metadata["preprocessing"]), json.loads(metadata["classes"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{file} is not a model of fedddp 0.1.0 or newer ({error!r}); train the run again"
        ) from None
    sections = read_sections(str(directory / "config.yaml"))
    objects = sections.pop(OBJECTS, {})
    # Only what describes the model: an algorithm of the program that trained it need not be importable here.
    config = build({name: sections[name] for name in ("model", "task", "seed")})
    shape = (preprocessing["channels"], *preprocessing["size"])
    if module is None and "module" in objects:
        raise ConfigError(
            f"{directory} is a run of the module {objects['module']['class']}; pass one as module= to load it"
        )
    described = dataclasses.replace(config.model, weights=None)
    if module is None:
        module = described.build(classes=len(classes), shape=shape, seed=config.seed)
    else:
        module = described.adapt(module, classes=len(classes), shape=shape, seed=config.seed)
    try:
        load_into(module, weights)
    except ValueError as error:
        raise ConfigError(f"{file} does not fit the module: {error}") from None
    mean, std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
    return TrainedModel(module.eval(), tuple(classes), shape, mean, std, config.task)


def evaluate(model: TrainedModel, dataset: Dataset[Any], batch_size: int = 500) -> Metrics:
    """Return the metrics of a model on a labelled dataset, as the run's history has them below `eval/`.

    Args:
        model: from `load_model`.
        dataset: map-style, of (image, label); images as for `predict`, labels by `model.classes`.
        batch_size: examples per forward pass, >= 1.

    Raises:
        ValueError: an image or a label does not fit the model.
    """
    trained_on = Images(
        labels=np.empty(0, dtype=np.int64),
        classes=len(model.classes),
        shape=model.shape,
        pixels=None,
        source=None,
        ids=None,
        mean=model.mean,
        std=model.std,
        class_names=model.classes,
    )
    size = model.shape[1] if model.shape[1] == model.shape[2] else None
    images = from_dataset(dataset, like=trained_on, image_size=size, memory="device")
    assert images.pixels is not None
    loader = ClientLoader(images, DataConfig(), images.pixels.device, seed=0)
    everything = np.arange(len(images))
    return model.task.summarize(measure(model.module, model.task, loader, everything, batch_size))
