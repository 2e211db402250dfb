"""Central and per-client metrics, exact over ranks: (sum, count) until the last line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedddp.data.datasets import Images
from fedddp.data.loader import Batch, ClientLoader
from fedddp.data.targets import Boxes, Target
from fedddp.distributed.world import World
from fedddp.rng import stream
from fedddp.section import NonNegativeInt, PositiveInt, Section
from fedddp.storage.history import direction, main_metric
from fedddp.tasks.task import Task

Metrics = dict[str, Any]

Observe = Callable[[Batch, Any], None]
"""Takes a batch and the outputs for it."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """When and on what the global model is evaluated."""

    key = "evaluation"

    every: PositiveInt = 1
    """Rounds between evaluations, >= 1; the last round is always evaluated."""

    batch_size: PositiveInt = 500
    """Examples per forward pass on each rank, >= 1; fewer where masks or boxes would take much memory."""

    clients: NonNegativeInt = 0
    """Clients that are evaluated on local data too, >= 0: on their own examples of the test set, where
    clients are natural and the test set names its owners; else on those that data.holdout keeps. 0: none, but
    50 at most where there is no global model (FedBN, FedPer, baseline=local)."""

    stop_after: NonNegativeInt = 0
    """Rounds without a better value of `checkpoint.best` (eval/accuracy where that is not set) after which
    the run ends, at an evaluation; 0: it trains all rounds."""

    def due(self, round_number: int, rounds: int) -> bool:
        """Return whether the model is evaluated after round `round_number` (from 1)."""
        return round_number % self.every == 0 or round_number == rounds

    def sample(self, population: int, seed: int) -> NDArray[np.int64]:
        """Return the clients that are evaluated locally, the same in every round."""
        rng = stream("evaluated clients", seed)
        size = min(self.clients, population)
        return np.sort(rng.choice(population, size, replace=False)).astype(np.int64)


IDENTITY = ("client", "name", "examples")
"""Keys of a client's row that are no metrics."""


EVALUATED = 50
"""Clients that are evaluated, at most, where nothing else can be and `evaluation.clients` is not set."""

EVALUATED_ELEMENTS = 2**24
"""Elements of outputs for masks that are evaluated together, at most: 64 MiB in float32."""

BOX_ELEMENTS = 64
"""Elements per pixel that a detector is taken to need."""


class NoMemoryError(ValueError):
    """A batch does not fit into memory: one line that names the settings to change."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether `error` is torch's, of a GPU or of a CPU, for want of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@dataclass
class Totals:
    """What a task has measured over several batches, before any division."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    """What `Task.measure` returned, added."""
    gathered: dict[str, list[Tensor]] = field(default_factory=dict)
    """What `Task.gather` returned, batch by batch."""

    def add(self, task: Task, outputs: Any, targets: Any) -> None:
        """Measure one batch more."""
        for name, value in task.measure(outputs, targets).items():
            if value.dtype not in (torch.float64, torch.int64):
                kind = str(value.dtype).removeprefix("torch.")
                raise TypeError(
                    f"{type(task).__name__}.measure returns {name} as {kind}; return float64 or int64, which "
                    "add up exactly"
                )
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        for name, rows in task.gather(outputs, targets).items():
            self.gathered.setdefault(name, []).append(rows.cpu())

    def clear(self) -> None:
        """Forget what was measured, but for names and shapes."""
        self.sums = {name: torch.zeros_like(value) for name, value in self.sums.items()}
        self.gathered = {name: [rows[0][:0]] for name, rows in self.gathered.items()}

    def summarize(self, task: Task) -> Metrics:
        """Return the metrics of `task`."""
        return task.summarize(self.sums, {name: torch.cat(rows) for name, rows in self.gathered.items()})


@torch.no_grad()
def measure(
    module: nn.Module,
    task: Task,
    loader: ClientLoader,
    indices: NDArray[np.int64],
    batch_size: int,
    client: int | None = None,
    observe: Observe | None = None,
) -> Totals:
    """Return what `task` measures over the examples `indices`, on this rank alone.

    Batches are smaller than `batch_size` where images with masks or boxes are large.

    `observe` is called with each batch, in the order of `indices`, and the outputs for it.
    """
    module.eval()
    totals = Totals()
    try:
        for batch in loader.batches(indices, min(batch_size, _affordable(loader.images)), client=client):
            outputs = task.forward(module, batch)
            totals.add(task, outputs, batch.targets)
            if observe is not None:
                observe(batch, outputs)
    except Exception as error:
        if is_out_of_memory(error):
            device = "GPU" if loader.device.type == "cuda" else "CPU"
            raise NoMemoryError(
                f"out of {device} memory while evaluating with evaluation.batch_size={batch_size}; lower it"
            ) from error
        raise
    return totals


def _affordable(images: Images) -> int:
    """Return how many images are evaluated together at most: outputs per pixel take memory, several times."""
    if images.target in ("class", "multilabel"):
        return len(images) or 1
    per_pixel = images.classes if images.target == "mask" else BOX_ELEMENTS
    return max(1, EVALUATED_ELEMENTS // (per_pixel * images.shape[1] * images.shape[2]))


def evaluate(
    world: World,
    module: nn.Module,
    task: Task,
    loader: ClientLoader,
    batch_size: int,
    observe: Observe | None = None,
) -> Metrics:
    """Collective. Return the metrics of `module` over all examples of `loader`, shared out over ranks.

    `observe` is called as by `measure`, with the batches of this rank's examples.
    """
    shard = _shard(world, loader)
    # Every rank evaluates at least one example, so that all know the names and shapes; it is
    # subtracted again on ranks without examples.
    if len(shard):
        totals = measure(module, task, loader, shard, batch_size, observe=observe)
    else:
        totals = measure(module, task, loader, np.arange(1), batch_size)
        totals.clear()
    world.sum_numbers(*totals.sums.values())
    if totals.gathered:  # by every rank or none: all have measured an example
        of_ranks = world.gather(totals.gathered)
        totals.gathered = {name: [r for ranks in of_ranks for r in ranks[name]] for name in totals.gathered}
    return totals.summarize(task)


def _shard(world: World, loader: ClientLoader) -> NDArray[np.int64]:
    """Return the examples of `loader` that this rank evaluates."""
    bounds = np.linspace(0, len(loader.images.labels), world.size + 1).astype(np.int64)
    return np.arange(bounds[world.rank], bounds[world.rank + 1])


def evaluate_clients(
    world: World,
    module: nn.Module,
    task: Task,
    loader: ClientLoader,
    held_out: dict[int, NDArray[np.int64]],
    batch_size: int,
    personalise: Callable[[int], None],
) -> list[Metrics]:
    """Collective. Return one row of metrics for every client with held-out examples, by client.

    A metric that is not known of a client, such as the precision of one without a box, is None.

    `held_out` maps the clients that this rank evaluates (each on one rank) to their examples, and
    `personalise(client)` puts that client's model into `module` before it is measured.
    """
    rows = []
    for client, indices in held_out.items():
        if len(indices):
            personalise(client)
            totals = measure(module, task, loader, indices, batch_size, client)
            metrics = {n: v for n, v in totals.summarize(task).items() if not isinstance(v, list)}
            rows.append({"client": client, "examples": len(indices), **metrics})
    everyone = [row for part in world.gather(rows) for row in part]
    return sorted(everyone, key=lambda row: int(row["client"]))


def spread(rows: list[Metrics]) -> Metrics:
    """Return mean, worst 10 %, best 10 % and standard deviation over clients of their main metric.

    Clients of which it is not known are left out. The worst have the lowest values, of a loss the highest.
    """
    # Not by what is known: the metric must not depend on which clients are evaluated.
    judged = main_metric({f"eval/{name}": 0.0 for name in rows[0] if name not in IDENTITY})
    name = (judged or "eval/loss").removeprefix("eval/")
    values = np.array([row[name] for row in rows if row.get(name) is not None])
    if not len(values):
        return {}
    values = values[np.argsort(direction(name) * values, kind="stable")]
    tenth = max(1, round(len(values) / 10))
    return {
        f"clients/{name}_mean": float(values.mean()),
        f"clients/{name}_worst10": float(values[:tenth].mean()),
        f"clients/{name}_best10": float(values[-tenth:].mean()),
        f"clients/{name}_std": float(values.std()),
    }


@dataclass(frozen=True)
class Examination:
    """What a model does on a test set, beyond its metrics."""

    target: Target
    """What its task predicts."""
    metrics: Metrics
    """Of the task, without a prefix."""
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


CONFUSED_CLASSES = 1000
"""Classes up to which an `Examination` has a confusion matrix: it grows with their square."""

WORST = 24
"""Worst examples of an `Examination`, at most."""


def examine(
    world: World, module: nn.Module, task: Task, loader: ClientLoader, batch_size: int
) -> Examination:
    """Collective. Return what `module` does on `loader`: metrics, confusion matrix, worst examples."""
    own = _Examiner(task, loader, _shard(world, loader))
    metrics = evaluate(world, module, task, loader, batch_size, own.observe)
    world.sum_numbers(own.confusion.counts)
    everyone = (one for some in world.gather(own.worst) for one in some)
    worst = sorted(everyone, key=lambda one: one.rank)[:WORST]
    return Examination(
        target=task.target,
        metrics=metrics,
        confusion=own.confusion.result(),
        worst=[one.row for one in worst],
        tensors=_tensors(task.target, worst),
    )


class ConfusionMatrix:
    """Counts examples (or pixels) by true and by predicted class, of at most `CONFUSED_CLASSES` classes."""

    def __init__(self, classes: int) -> None:
        """Begin with no example of `classes` classes."""
        self.classes = classes if classes <= CONFUSED_CLASSES else 0
        self.counts = torch.zeros(self.classes, self.classes, dtype=torch.int64)

    def add(self, labels: Tensor, predicted: Tensor) -> None:
        """Count examples by their `labels` and `predicted` classes, any shape, on the CPU.

        Those whose label is no class, such as 255 in a mask, do not count.
        """
        if self.classes:
            valid = labels < self.classes
            pairs = labels[valid].long() * self.classes + predicted[valid].long()
            self.counts += torch.bincount(pairs, minlength=self.classes**2).view_as(self.counts)

    def result(self) -> Tensor | None:
        """Return the counts, true class (row) by predicted class (column); None where nothing was counted."""
        return self.counts if self.counts.any() else None


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
            return targets.of(row), predicted.of(row)
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
