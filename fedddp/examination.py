"""What a model does on a test set beyond its metrics: the confusion matrix, the worst examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedddp.data.loader import Batch, ClientLoader
from fedddp.data.targets import Boxes, Target
from fedddp.distributed.world import World
from fedddp.evaluation import ConfusionMatrix, Metrics, measure_all, shard_of
from fedddp.tasks.task import Task


@dataclass(frozen=True)
class Examination:
    """What a model does on a test set, beyond its metrics."""

    target: Target
    """What its task predicts."""
    metrics: Metrics
    """Of the task, without a prefix."""
    constant: Metrics
    """Its main metric for the best prediction that is the same for every image; empty where there is none."""
    confusion: Tensor | None
    """Examples, or pixels of masks, by true class (row) and predicted class (column); int64, (K, K). None for
    tasks without, or more than 1,000 classes."""
    worst: list[dict[str, Any]]
    """Examples with their "index" in the test set. Of classes: those that are wrong with the highest
    probability, with "label", "predicted", and "probability" of the predicted class; of other targets those
    with the highest "loss", labels with "labels" and "predicted", numbers of classes."""
    tensors: dict[str, Tensor]
    """"images" of those examples, uint8 (n, C, H, W). Of masks "truth" and "predicted", uint8 (n, H, W); of
    boxes the fields of `Boxes` as "truth.boxes", ..., "predicted.boxes", ..., and "predicted.scores"."""


WORST = 24
"""Worst examples of an `Examination`, at most."""


def examine(
    world: World, module: nn.Module, task: Task, loader: ClientLoader, batch_size: int
) -> Examination:
    """Collective. Return what `module` does on `loader`: metrics, confusion matrix, worst examples."""
    own = _Examiner(task, loader, shard_of(world, loader))
    totals = measure_all(world, module, task, loader, batch_size, own.observe)
    world.sum_numbers(own.confusion.counts)
    everyone = (one for some in world.gather(own.worst) for one in some)
    worst = sorted(everyone, key=lambda one: one.rank)[:WORST]
    return Examination(
        target=task.target,
        metrics=totals.summarize(task),
        constant=totals.constant(task),
        confusion=own.confusion.result(),
        worst=[one.row for one in worst],
        tensors=_tensors(task.target, worst),
    )


@dataclass(frozen=True)
class _Worst:
    """One example of an `Examination`."""

    rank: tuple[float, int]
    """Sorts the worst first."""
    row: dict[str, Any]
    image: Tensor
    """uint8, (C, H, W)."""
    truth: Any
    predicted: Any
    """Of masks (H, W) uint8 each; of boxes `Boxes` and `Detections` of one image; else None."""


class _Examiner:
    """Counts the predictions on this rank's examples, and collects the worst ones."""

    def __init__(self, task: Task, loader: ClientLoader, indices: NDArray[np.int64]) -> None:
        self.task, self.loader, self.indices = task, loader, indices
        self.confusion = ConfusionMatrix(loader.images.classes)
        self.worst: list[_Worst] = []
        """The worst first."""
        self._seen = 0

    def observe(self, batch: Batch, outputs: Any) -> None:
        """Take the next batch and the outputs for it."""
        start = self._seen
        self._seen += len(batch.images)
        predicted = self.task.predict(outputs)
        if predicted is None:
            return
        if self.task.target == "class":
            highest, predicted = predicted.cpu().max(1)
        targets = batch.targets.to(torch.device("cpu"))
        if isinstance(targets, Tensor) and self.task.target != "multilabel":
            predicted = predicted.cpu()
            self.confusion.add(targets, predicted)
        if self.task.target == "class":
            badness = torch.where(predicted != targets, highest, -torch.inf)
        else:
            losses = self.task.losses(outputs, batch.targets)
            badness = (
                torch.full((len(batch.images),), -torch.inf) if losses is None else losses.detach().cpu()
            )
        rows = torch.nonzero(torch.isfinite(badness))[:, 0]
        rows = rows[badness[rows].argsort(descending=True, stable=True)[:WORST]]
        pixels = self.loader.normalize.pixels(batch.images[rows.to(batch.images.device)]).cpu()
        for row, image in zip(rows.tolist(), pixels, strict=True):
            index, value = int(self.indices[start + row]), float(badness[row])
            shown = self._row(value, row, targets, predicted)
            truth, found = self._shown(row, targets, predicted)
            self.worst.append(_Worst((-value, index), {"index": index, **shown}, image, truth, found))
        self.worst.sort(key=lambda one: one.rank)
        del self.worst[WORST:]

    def _row(self, value: float, row: int, targets: Any, predicted: Any) -> dict[str, Any]:
        """Return what is recorded of an example."""
        if self.task.target == "class":
            return {"label": int(targets[row]), "predicted": int(predicted[row]), "probability": value}
        if self.task.target == "multilabel":
            threshold = getattr(self.task, "threshold", 0.5)
            labels = (
                torch.nonzero(r)[:, 0].tolist() for r in (targets[row] > 0, predicted[row] >= threshold)
            )
            return {"loss": value, **dict(zip(("labels", "predicted"), labels, strict=True))}
        return {"loss": value}

    def _shown(self, row: int, targets: Any, predicted: Any) -> tuple[Any, Any]:
        """Return truth and prediction of an example as they are drawn."""
        if self.task.target == "mask":
            return targets[row].to(torch.uint8), predicted[row].to(torch.uint8)
        if self.task.target == "boxes":
            return targets.counted().of(row), predicted.of(row)
        return None, None


def _tensors(target: Target, worst: list[_Worst]) -> dict[str, Tensor]:
    """Return the tensors of the worst examples, as `Examination.tensors` describes them."""
    if not worst:
        return {"images": torch.empty(0, 0, 0, 0).byte()}
    tensors = {"images": torch.stack([one.image for one in worst])}
    for side in ("truth", "predicted"):
        values = [getattr(one, side) for one in worst]
        if target == "mask":
            tensors[side] = torch.stack(values)
        if target == "boxes":
            joined = Boxes.join((value[0], value[1]) for value in values)
            tensors |= {f"{side}.{name}": getattr(joined, name) for name in ("boxes", "labels", "offsets")}
    if target == "boxes":
        tensors["predicted.scores"] = torch.cat([one.predicted[2] for one in worst])
    return tensors
