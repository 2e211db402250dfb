"""Central and per-client metrics, exact over ranks: (sum, count) until the last line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedddp.data.loader import Batch, ClientLoader
from fedddp.distributed.world import World
from fedddp.rng import stream
from fedddp.section import NonNegativeInt, PositiveInt, Section
from fedddp.tasks.task import Task

Metrics = dict[str, Any]

Observe = Callable[[Batch, Tensor], None]
"""Takes a batch and the module's outputs for it."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """When and on what the global model is evaluated."""

    key = "evaluation"

    every: PositiveInt = 1
    """Rounds between evaluations, >= 1; the last round is always evaluated."""

    batch_size: PositiveInt = 500
    """Examples per forward pass on each rank, >= 1."""

    clients: NonNegativeInt = 0
    """Clients whose held-out local data are evaluated too (needs data.holdout > 0), >= 0."""

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


class NoMemoryError(ValueError):
    """A batch does not fit into memory: one line that names the settings to change."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether `error` is torch's, of a GPU or of a CPU, for want of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@torch.no_grad()
def measure(
    module: nn.Module,
    task: Task,
    loader: ClientLoader,
    indices: NDArray[np.int64],
    batch_size: int,
    client: int | None = None,
    observe: Observe | None = None,
) -> dict[str, Tensor]:
    """Return the (sum, count) pairs of `task` over the examples `indices`, on this rank alone.

    `observe` is called with each batch, in the order of `indices`, and the module's outputs for it.
    """
    module.eval()
    totals: dict[str, Tensor] = {}
    try:
        for batch in loader.batches(indices, batch_size, client=client):
            outputs = module(batch.images)
            for name, pair in task.measure(outputs, batch.targets).items():
                totals[name] = totals[name] + pair if name in totals else pair
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
        totals = {name: torch.zeros_like(pair) for name, pair in totals.items()}
    world.sum_numbers(*totals.values())
    return task.summarize(totals)


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

    `held_out` maps the clients that this rank evaluates (each on one rank) to their examples, and
    `personalise(client)` puts that client's model into `module` before it is measured.
    """
    rows = []
    for client, indices in held_out.items():
        if len(indices):
            personalise(client)
            totals = measure(module, task, loader, indices, batch_size, client)
            metrics = {n: v for n, v in task.summarize(totals).items() if isinstance(v, float)}
            rows.append({"client": client, "examples": len(indices), **metrics})
    everyone = [row for part in world.gather(rows) for row in part]
    return sorted(everyone, key=lambda row: int(row["client"]))


def spread(rows: list[Metrics], name: str = "accuracy") -> Metrics:
    """Return mean, worst 10 %, best 10 % and standard deviation of metric `name` over clients."""
    values = np.sort([row[name] for row in rows])
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

    metrics: Metrics
    """Of the task, without a prefix."""
    confusion: Tensor | None
    """Examples by true class (row) and predicted class (column); int64, (K, K); None without classes, or with
    more than 1,000."""
    wrong: list[dict[str, Any]]
    """The examples that are wrong with the highest probability, that first: "index" in the test set, "label",
    "predicted", and "probability" of the predicted class."""
    images: Tensor
    """Those examples; uint8, (n, C, H, W)."""


CONFUSED_CLASSES = 1000
"""Classes up to which an `Examination` has a confusion matrix: it grows with their square."""

WRONG = 24
"""Wrongly classified examples of an `Examination`, at most."""


def examine(
    world: World, module: nn.Module, task: Task, loader: ClientLoader, batch_size: int
) -> Examination:
    """Collective. Return what `module` does on `loader`: metrics, confusion matrix, wrong examples."""
    own = _Examiner(task, loader, _shard(world, loader))
    metrics = evaluate(world, module, task, loader, batch_size, own.observe)
    world.sum_numbers(own.confusion.counts)
    wrong = sorted((one for some in world.gather(own.wrong) for one in some), key=lambda one: one[:2])[:WRONG]
    return Examination(
        metrics=metrics,
        confusion=own.confusion.result(),
        wrong=[
            {"index": index, "label": label, "predicted": predicted, "probability": -negative}
            for negative, index, label, predicted, _ in wrong
        ],
        images=torch.stack([one[-1] for one in wrong]) if wrong else torch.empty(0, 0, 0, 0).byte(),
    )


class ConfusionMatrix:
    """Counts examples by true and by predicted class, of at most `CONFUSED_CLASSES` classes."""

    def __init__(self, classes: int) -> None:
        """Begin with no example of `classes` classes."""
        classes = classes if classes <= CONFUSED_CLASSES else 0
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, labels: Tensor, predicted: Tensor) -> None:
        """Count examples by their `labels` and `predicted` classes; both (b,), int64, on the CPU."""
        if self.counts.numel():
            self.counts.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)

    def result(self) -> Tensor | None:
        """Return the counts, true class (row) by predicted class (column); None where nothing was counted."""
        return self.counts if self.counts.any() else None


class _Examiner:
    """Counts the predictions on this rank's examples, and collects the wrong ones."""

    def __init__(self, task: Task, loader: ClientLoader, indices: NDArray[np.int64]) -> None:
        self.task, self.loader, self.indices = task, loader, indices
        self.confusion = ConfusionMatrix(loader.images.classes)
        self.wrong: list[tuple[float, int, int, int, Tensor]] = []
        """Minus the probability, index, label, predicted class, pixels; sorted."""
        self._seen = 0

    def observe(self, batch: Batch, outputs: Tensor) -> None:
        """Take the next batch and the outputs for it."""
        start = self._seen
        self._seen += len(batch.images)
        probabilities = self.task.probabilities(outputs)
        if probabilities is None:
            return
        (highest, predicted), labels = probabilities.cpu().max(1), batch.targets.cpu()
        self.confusion.add(labels, predicted)
        rows = torch.nonzero((predicted != labels) & torch.isfinite(highest))[:, 0]
        rows = rows[highest[rows].argsort(descending=True, stable=True)[:WRONG]]
        pixels = self.loader.normalize.pixels(batch.images[rows.to(batch.images.device)]).cpu()
        for row, image in zip(rows.tolist(), pixels, strict=True):
            index = int(self.indices[start + row])
            self.wrong.append((-float(highest[row]), index, int(labels[row]), int(predicted[row]), image))
        self.wrong.sort(key=lambda one: one[:2])
        del self.wrong[WRONG:]
