"""What a model is trained for: the loss, and the metrics as sums and counts that add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A loss to train with and metrics to evaluate with; subclass it for a task of your own."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss to differentiate: a scalar, summed (not averaged) over the batch."""

    @abstractmethod
    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return each metric as its sum and its count: float64, shape (2,) or (2, n).

        Adding these over batches and ranks gives the totals of all of them.
        """

    def summarise(self, totals: dict[str, Tensor]) -> dict[str, float | list[float | None] | None]:
        """Divide sums by counts; None where nothing was counted.

        Args:
            totals: what `measure` returned, added over batches and ranks.

        Returns:
            A number for each (2,) metric, a list of n for each (2, n) metric.
        """
        return {name: _ratio(total.tolist()) for name, total in totals.items()}


def _ratio(total: list[float] | list[list[float]]) -> float | list[float | None] | None:
    sums, counts = total
    if isinstance(sums, list) and isinstance(counts, list):
        return [s / n if n else None for s, n in zip(sums, counts, strict=True)]
    assert isinstance(sums, float)
    assert isinstance(counts, float)
    return sums / counts if counts else None


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """One class per image: cross entropy; accuracy, top-5 accuracy and recall per class."""

    label_smoothing: float = 0.0
    """Share of each training target that is spread evenly over all classes, in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}; 0.1 is usual")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy summed over the batch, with label smoothing.

        Args:
            outputs: logits, (b, classes), any float dtype.
            targets: (b,), int64, in range(classes).
        """
        return F.cross_entropy(outputs, targets, reduction="sum", label_smoothing=self.label_smoothing)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return sums and counts of `loss` (no smoothing), `accuracy`, `recall` per class.

        With more than 5 classes also `accuracy_top5`. Arguments as for `loss`; b may be 0.
        """
        logits = outputs.detach().double()
        examples, classes = logits.shape
        correct = (logits.argmax(1) == targets).double()
        sums = {
            "loss": F.cross_entropy(logits, targets, reduction="sum"),
            "accuracy": correct.sum(),
        }
        if classes > 5:
            sums["accuracy_top5"] = (logits.topk(5).indices == targets[:, None]).sum().double()
        count = torch.full_like(sums["loss"], examples)
        metrics = {name: torch.stack([total, count]) for name, total in sums.items()}
        recall = logits.new_zeros(2, classes)
        recall.index_add_(1, targets, torch.stack([correct, torch.ones_like(correct)]))
        metrics["recall"] = recall
        return metrics
