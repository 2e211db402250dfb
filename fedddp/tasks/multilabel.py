"""Several labels per image, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn import functional as F

from fedddp.data.targets import Target
from fedddp.section import PositiveFloat
from fedddp.tasks.segmentation import mean
from fedddp.tasks.task import Summary, Task, ratio


@dataclass(frozen=True, kw_only=True)
class MultiLabel(Task):
    """Any number of labels per image: binary cross entropy of each; F1 and mean average precision."""

    target: ClassVar[Target] = "multilabel"

    pos_weight: PositiveFloat | None = None
    """Weight of the labels that an image has against those it has not, > 0; None is 1."""

    threshold: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    """A label with this probability or more is predicted, in (0, 1); F1 and label accuracy depend on it."""

    def check_outputs(self, outputs: Any, classes: int, shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless `outputs` are a logit for every label."""
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if got != (2, classes):
            raise ValueError(
                f"logits of shape (batch, labels); for a batch of 2 and {classes} labels it returned {got}, "
                "but lenet, resnet8-gn or resnet18 would do"
            )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the binary cross entropy, its mean over labels summed over images.

        Args:
            outputs: logits, (b, K), any float dtype.
            targets: (b, K), float32, 1 for the labels that an image has and 0 for others.
        """
        return self.losses(outputs, targets).sum()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every image, (b,); arguments as for `loss`."""
        weight = None if self.pos_weight is None else 1 + (self.pos_weight - 1) * targets
        return F.binary_cross_entropy_with_logits(outputs, targets, weight, reduction="none").mean(1)

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the probability of every label, (b, K) float32."""
        return outputs.float().sigmoid()

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return sums and counts of `f1` and `f1_per_class` at `threshold`, `label_accuracy` and `loss`.

        F1 is 2 TP / (2 TP + FP + FN). A logit that is no number is wrong.
        Arguments as for `loss`; b may be 0.
        """
        logits, true = outputs.detach().double(), targets > 0
        positive = logits.sigmoid() >= self.threshold
        correct = (positive == true) & ~logits.isnan()
        hits = 2.0 * (positive & true).sum(0)
        wrong = (~correct).sum(0)
        labels = logits.new_tensor(logits.numel())
        f1 = torch.stack([hits, hits + wrong]).double()
        return {
            "f1": f1.sum(1),
            "label_accuracy": torch.stack([correct.sum().double(), labels]),
            "loss": self.total_loss(outputs.detach().float(), targets),
            "f1_per_class": f1,
        }

    def gather(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the logits of all labels, (b, K) float32, and which are true, (b, K) uint8."""
        # Logits rank as probabilities do, and the large ones do not round to the same number.
        return {"scores": outputs.detach().float(), "targets": (targets > 0).to(torch.uint8)}

    def summarize(self, totals: Mapping[str, Tensor], gathered: Mapping[str, Tensor]) -> Summary:
        """Return F1, mean average precision, label accuracy and loss; the lists per class come last.

        `map` is the mean over classes that any image has, `f1_macro` that over classes with an F1.
        """
        columns = zip(gathered["scores"].T, gathered["targets"].T, strict=True)
        precisions = [average_precision(scores, targets) for scores, targets in columns]
        f1_per_class = ratio(totals["f1_per_class"])
        assert isinstance(f1_per_class, list)
        return {
            "f1": ratio(totals["f1"]),
            "map": mean(precisions),
            "f1_macro": mean(f1_per_class),
            "label_accuracy": ratio(totals["label_accuracy"]),
            "loss": ratio(totals["loss"]),
            "f1_per_class": f1_per_class,
            "ap_per_class": precisions,
        }

    def constant(self, totals: Mapping[str, Tensor], gathered: Mapping[str, Tensor]) -> Summary:
        """Return the F1 of the best set of labels for every image; empty where no image has a label.

        With n_k of N images that have label k, a set S has TP = Σ_S n_k and 2 TP + FP + FN = |S| N + Σ n_k.
        The best set of each size is that of the most frequent labels.
        """
        if "targets" not in gathered or not gathered["targets"].any():
            return {}
        counts = gathered["targets"].sum(0, dtype=torch.float64).sort(descending=True).values
        sizes = torch.arange(1, len(counts) + 1) * float(len(gathered["targets"]))
        return {"f1": float((2 * counts.cumsum(0) / (sizes + counts.sum())).max())}


def average_precision(scores: Tensor, targets: Tensor) -> float | None:
    """Return the average precision Σ (R_n − R_{n−1}) P_n over the thresholds n; None without a positive.

    Each different score is one threshold, so that the order of equal scores does not count. A positive whose
    score is no number is never found.

    Args:
        scores: (n,), any float dtype.
        targets: (n,), 1 or 0.
    """
    positives = int(targets.sum())
    if not positives:
        return None
    numbers = ~scores.isnan()
    ranked, order = scores[numbers].sort(descending=True)
    if not len(ranked):
        return 0.0
    last = torch.ones_like(order, dtype=torch.bool)  # of the examples with one score
    last[:-1] = ranked[1:] != ranked[:-1]
    found = targets[numbers][order].long().cumsum(0)[last]
    precision = found.double() / (last.nonzero().flatten() + 1)
    steps = found.diff(prepend=found.new_zeros(1))
    return float((steps * precision).sum()) / positives
