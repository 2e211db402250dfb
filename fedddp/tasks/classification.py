"""One class per image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedddp.models.registry import check_logits
from fedddp.section import Fraction
from fedddp.tasks.task import Summary, Task


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """One class per image: cross entropy; accuracy, top-5 accuracy and recall per class."""

    label_smoothing: Fraction = 0.0
    """Share of each training target that is spread evenly over all classes, in [0, 1)."""

    def check_outputs(self, outputs: Any, classes: int, shape: tuple[int, int, int]) -> None:
        """Refuse outputs that are no logits (2, classes)."""
        check_logits(classes, outputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy summed over the batch, with label smoothing.

        Args:
            outputs: logits, (b, classes), any float dtype.
            targets: (b,), int64, in range(classes).
        """
        return F.cross_entropy(outputs, targets, reduction="sum", label_smoothing=self.label_smoothing)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy of every example, with label smoothing; arguments as for `loss`."""
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=self.label_smoothing)

    def loss_and_gradient(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return `loss`, and its gradient: the softmax less the smoothed targets; arguments as for `loss`."""
        logs, smoothing = outputs.log_softmax(1), self.label_smoothing
        loss = F.nll_loss(logs, targets, reduction="sum")
        if smoothing:
            loss = loss * (1 - smoothing) - logs.mean(1).sum() * smoothing
        gradient = logs.exp_()
        if smoothing:
            gradient -= smoothing / outputs.shape[1]
        return loss, gradient.scatter_(1, targets.unsqueeze(1), smoothing - 1, reduce="add")

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the softmax of the logits `outputs`, (b, classes), as float32."""
        return outputs.float().softmax(1)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return sums and counts of `loss`, `accuracy`, and `recall` per class.

        With more than 5 classes also `accuracy_top5`. Arguments as for `loss`; b may be 0.
        """
        logits = outputs.detach().double()
        examples, classes = logits.shape
        correct = (logits.argmax(1) == targets).double()
        sums = {"accuracy": correct.sum()}
        if classes > 5:
            sums["accuracy_top5"] = (logits.topk(5).indices == targets[:, None]).sum().double()
        count = torch.full_like(sums["accuracy"], examples)
        metrics = {"loss": self.total_loss(outputs.detach().float(), targets)}
        metrics |= {name: torch.stack([total, count]) for name, total in sums.items()}
        recall = logits.new_zeros(2, classes)
        recall.index_add_(1, targets, torch.stack([correct, torch.ones_like(correct)]))
        metrics["recall"] = recall
        return metrics

    def constant(self, totals: Mapping[str, Tensor], gathered: Mapping[str, Tensor]) -> Summary:
        """Return the accuracy of the most frequent class for every image; empty without images."""
        counts = totals["recall"][1] if "recall" in totals else torch.zeros(1)
        return {"accuracy": float(counts.max() / counts.sum())} if counts.sum() else {}
