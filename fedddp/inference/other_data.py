"""The data that a model is evaluated on: its run's own, or others of the same classes."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fedddp.data import items, labelling, listed
from fedddp.data.catalog import open_dataset
from fedddp.data.datasets import DataConfig, Images, from_dataset, load
from fedddp.data.targets import IGNORED
from fedddp.inference.loading import no_images
from fedddp.inference.model import TrainedModel
from fedddp.section import ConfigError, local_path, nearest

logger = logging.getLogger(__name__)

SAME = 1e-6
"""Largest difference of mean and deviation between training images and those that a run was trained on."""


def trained_on(model: TrainedModel) -> Images:
    """Return no images, of the shape, the classes and the normalisation that `model` was trained with."""
    return no_images(model.classes, model.shape, model.mean, model.std, model.task.target)


def without_place(data: DataConfig) -> DataConfig:
    """Return the settings that decide which examples there are."""
    plain = DataConfig()
    return dataclasses.replace(
        data, root=plain.root, download=plain.download, memory=plain.memory, workers=plain.workers
    )


def own_data(model: TrainedModel, data: DataConfig, *, moved: bool) -> tuple[Images, Images] | None:
    """Return the training and the test images of the model's run; None if `data` names others.

    They are the same if the training images have the mean and the deviation that the model's file has.
    """
    try:
        train, test = load(dataclasses.replace(data, resize=model.resize), model.task.target)
    except ValueError:
        if moved:
            return None
        raise
    names = train.class_names or tuple(map(str, range(train.classes)))
    same = train.shape == model.shape and names == model.classes
    if same and np.allclose([train.mean, train.std], [model.mean, model.std], rtol=0, atol=SAME):
        return train, test
    if not moved:
        logger.warning(
            "data.root=%s: the training images are not those of the run any more; its test set is evaluated, "
            "and no client",
            data.root,
        )
    return None


def other_data(model: TrainedModel, data: DataConfig) -> Images:
    """Return other images of the model's classes: the test set; all of a folder of images without one.

    They are read by the settings of `data` that decide their pixels, and resized as those of the model were.
    """
    limits = None if data.value_range is None else (data.value_range[0], data.value_range[1])
    target = model.task.target
    if data.dataset in ("image_folder", "mask_folder"):
        root, share = local_path(data.root, "data.root"), data.test_fraction or 0.5
        if data.dataset == "image_folder":
            from fedddp.data.image_folder import image_folder  # here: torchvision takes seconds to import

            found: Any = image_folder(root, share, limits)
        else:
            from fedddp.data.mask_folder import mask_folder

            found = mask_folder(root, share, limits)
        dataset = found[1] if isinstance(found, tuple) else found
    else:
        dataset = open_dataset(
            data.dataset,
            data.root,
            target=target,
            download=data.download,
            image_size=model.shape[1],
            examples=data.examples,
            test_fraction=data.test_fraction,
            value_range=limits,
        )[1]
    items.check_map_style(dataset, data.dataset)
    model = dataclasses.replace(model, value_range=limits)
    prepared = (_Classes if target == "class" else _Annotated)(dataset, model, data)
    size = model.resizing.size
    read = DataConfig(memory=data.memory, workers=data.workers, image_size=size, resize=model.resize)
    return from_dataset(prepared, read, target, like=trained_on(model), name=data.dataset)


class _Classes(Dataset[tuple[Tensor, int]]):
    """A dataset whose images have the channels of a model, and whose labels are matched by name."""

    def __init__(self, dataset: Any, model: TrainedModel, data: DataConfig) -> None:
        self.dataset, self.model = dataset, model
        labels = listed.labels(dataset, data.dataset)
        names = listed.class_names(dataset) or tuple(map(str, range(int(labels.max(initial=0)) + 1)))
        nameless = sorted(set(labels.tolist()) - set(range(len(names))))
        if nameless:
            raise ConfigError(
                f"data.dataset={data.dataset}: label {nameless[0]} has no name among its {len(names)} "
                "classes; correct the labels or the list of classes"
            )
        self.samples = getattr(dataset, "samples", None)  # the files, for errors
        known = _by_name(names, sorted(set(labels.tolist())), model, data)
        self.targets = [known[label] for label in labels.tolist()]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image and its label among the model's classes."""
        image, _ = items.as_pair(self.dataset[index], f"example {index}")
        return self.model.unresized(image), self.targets[index]


class _Annotated(Dataset[tuple[Tensor, Any]]):
    """The same of a dataset with several labels, a mask or boxes per image."""

    def __init__(self, dataset: Any, model: TrainedModel, data: DataConfig) -> None:
        self.dataset, self.model = dataset, model
        names = listed.class_names(dataset) or model.classes
        self.labels = _by_name(names, range(len(names)), model, data)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """Return an image, and its annotation with the model's classes."""
        where = f"example {index}"
        image, label = items.as_pair(self.dataset[index], where)
        pixels, target = self.model.unresized(image), self.model.task.target
        if target == "multilabel":
            row = np.zeros(len(self.model.classes), dtype=np.int64)
            for place, value in enumerate(np.asarray(label).tolist()):
                row[self._of(place, where)] = value
            return pixels, row
        if target == "mask":
            mask = labelling.mask_of(label, (pixels.shape[1], pixels.shape[2]), where)
            table = torch.full((IGNORED + 1,), IGNORED, dtype=torch.uint8)
            for value in torch.unique(mask).tolist():
                table[value] = IGNORED if value == IGNORED else self._of(value, where)
            return pixels, table[mask.long()][0]
        labels = labelling.boxes_of(label, where).labels.tolist()
        return pixels, {**label, "labels": torch.tensor([self._of(one, where) for one in labels]).long()}

    def _of(self, label: int, where: str) -> int:
        """Return the model's number of a class."""
        if label not in self.labels:
            raise ValueError(f"{where} has the class {label}, which has no name; correct the list of classes")
        return self.labels[label]


def _by_name(
    names: tuple[str, ...], present: Sequence[int], model: TrainedModel, data: DataConfig
) -> dict[int, int]:
    """Return the model's number of each class that is `present`, by the `names` of the data's classes."""
    if names == model.classes:
        return {label: label for label in range(len(names))}
    for whose, known_names in (("the model", model.classes), (f"data.dataset={data.dataset}", names)):
        twice = [name for name, count in Counter(known_names).items() if count > 1]
        if twice:
            raise ConfigError(
                f"{whose} has several classes named {twice[0]!r}, so that classes cannot be matched by "
                "name; give data with the model's list of classes"
            )
    known = {name: label for label, name in enumerate(model.classes)}
    found = {names[label] for label in present}
    unknown = sorted(found - known.keys())
    if unknown:
        near = nearest(unknown[0], model.classes)
        several = ", ".join(model.classes[:10]) + (", ..." if len(model.classes) > 10 else "")
        raise ConfigError(
            f"data.root={data.root}: class {unknown[0]!r} is not one of the model's ({several}){near}; "
            "rename or remove it"
        )
    missing = sorted(known.keys() - found)
    if missing:
        logger.warning("data.root=%s has no images of these classes: %s", data.root, ", ".join(missing))
    return {label: known[names[label]] for label in present}
