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


IDENTITY = ("client", "name", "examples", "constant")
"""Keys of a client's row that are no metrics of its model."""


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
        return task.summarize(self.sums, self._joined())

    def numbers(self, task: Task) -> Metrics:
        """Return the metrics of `task` but its lists, and "constant" where it has one, as `Task.constant`."""
        found = {name: value for name, value in self.summarize(task).items() if not isinstance(value, list)}
        for value in self.constant(task).values():  # of one metric at most
            found["constant"] = value
        return found

    def constant(self, task: Task) -> Metrics:
        """Return what the best constant prediction has on these examples, as `Task.constant` does."""
        return task.constant(self.sums, self._joined())

    def _joined(self) -> dict[str, Tensor]:
        return {name: torch.cat(rows) for name, rows in self.gathered.items()}


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
    return measure_all(world, module, task, loader, batch_size, observe).summarize(task)


def measure_all(
    world: World,
    module: nn.Module,
    task: Task,
    loader: ClientLoader,
    batch_size: int,
    observe: Observe | None,
) -> Totals:
    """Collective. Return what `task` measures over all examples of `loader`."""
    shard = shard_of(world, loader)
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
    return totals


def shard_of(world: World, loader: ClientLoader) -> NDArray[np.int64]:
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

    A metric that is not known of a client, such as the precision of one without a box, is None. "constant" is
    the main metric of the best constant prediction, where the task has one.

    `held_out` maps the clients that this rank evaluates (each on one rank) to their examples, and
    `personalise(client)` puts that client's model into `module` before it is measured.
    """
    rows = []
    for client, indices in held_out.items():
        if len(indices):
            personalise(client)
            totals = measure(module, task, loader, indices, batch_size, client)
            rows.append({"client": client, "examples": len(indices), **totals.numbers(task)})
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


CONFUSED_CLASSES = 1000
"""Classes up to which an `Examination` has a confusion matrix: it grows with their square."""


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
