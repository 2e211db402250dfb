"""What a model is trained for: the loss, and the metrics as sums and counts that add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedddp.section import Section


@dataclass(frozen=True, kw_only=True)
class Task(Section, ABC):
    """A loss to train with and metrics to evaluate with; subclass it for a task of your own."""

    key: ClassVar[str] = "task"
    chosen_by_name: ClassVar[bool] = True

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss to differentiate: a scalar, summed (not averaged) over the batch."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Return the loss of every example, (b,), or None; their sum is `loss`.

        A class that overrides `loss` overrides this too, or its clients are not trained as fast as they could
        be side by side (`local.engine`). The value of an example must not depend on its place in the batch.
        """
        return None

    @abstractmethod
    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return each metric as its sum and its count: float64, shape (2,) or (2, n).

        Adding these over batches and ranks gives the totals of all of them.
        """

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        """Return the probability of every class for each example, float32 (b, K); None: it has no classes."""
        return None

    def summarize(self, totals: dict[str, Tensor]) -> dict[str, float | list[float | None] | None]:
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
