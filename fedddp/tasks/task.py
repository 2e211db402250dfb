"""What a model is trained for: the loss, and the metrics as sums and counts that add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedddp.data.loader import Batch
from fedddp.data.targets import Target
from fedddp.section import Section

Summary = dict[str, float | list[float | None] | None]
"""Metrics by name: a number, or one for each class; None where nothing was counted."""


@dataclass(frozen=True, kw_only=True)
class Task(Section, ABC):
    """A loss to train with and metrics to evaluate with; subclass it for a task of your own."""

    key: ClassVar[str] = "task"
    chosen_by_name: ClassVar[bool] = True

    target: ClassVar[Target] = "class"
    """What the data must give for each image: `class`, `multilabel`, `mask` or `boxes`."""

    def forward(self, module: Callable[[Tensor], Any], batch: Batch) -> Any:
        """Return the outputs of `module` for a batch, which the others take.

        Args:
            module: the network, in training or evaluation mode; call it once.
            batch: its images are (b, C, H, W) float32, normalised.
        """
        return module(batch.images)

    def check_outputs(self, outputs: Any, classes: int, shape: tuple[int, int, int]) -> None:
        """Refuse a model whose `outputs` for a batch of 2 images the task cannot use.

        Args:
            outputs: what the module returns for zeros, in either mode.
            classes: the number of classes of the data.
            shape: of an image, (C, H, W).

        Raises:
            ValueError: what the model must return.
        """

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss to differentiate: a scalar, summed (not averaged) over the images of the batch.

        The value of an image must not depend on the others: then R ranks train what one rank trains.

        Args:
            outputs: of `forward`; floating tensors are float32.
            targets: of the batch: classes (b,) int64, labels (b, K) float32 of 0 and 1, masks (b, H, W) int64
                with 255 for pixels that do not count, or `Boxes`.
        """

    def losses(self, outputs: Any, targets: Any) -> Tensor | None:
        """Return the loss of every image, (b,), or None; their sum is `loss`.

        A class that overrides `loss` overrides this too.
        """
        return None

    def loss_and_gradient(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return `loss`, and its gradient by `outputs`, in their shape; arguments as for `loss`."""
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            loss = self.loss(outputs, targets)
        (gradient,) = torch.autograd.grad(loss, outputs)
        return loss.detach(), gradient

    @abstractmethod
    def measure(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Return each metric as its sum and its count: float64, shape (2,) or (2, n).

        Adding these over batches and ranks gives the totals of all of them. A task that overrides `summarize`
        may return any float64 or int64 tensors that add up. `total_loss` is the entry "loss".
        """

    def total_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss that is trained, summed over the images, and their number: float64, (2,).

        Arguments as for `loss`. So `eval/loss` and `train/loss` are the same quantity, a subclass's own too.
        """
        losses = self.losses(outputs, targets) if _has_losses_of_loss(type(self)) else None
        # Image by image where that is known: then the batches of ranks change the sum's last bits only.
        total = self.loss(outputs, targets) if losses is None else losses.double().sum()
        return torch.stack([total.detach().double(), total.new_tensor(len(targets), dtype=torch.float64)])

    def constant(self, totals: Mapping[str, Tensor], gathered: Mapping[str, Tensor]) -> Summary:
        """Return the main metric of the best prediction that is the same for every image; empty without one.

        Args:
            totals: what `measure` returned, as for `summarize`; only its counts of the truth are used.
            gathered: what `gather` returned, likewise.
        """
        return {}

    def gather(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Return what a metric needs of all images together, such as scores to rank: tensors (rows, ...).

        The rows of all batches and ranks are concatenated, and given to `summarize`.
        """
        return {}

    def predict(self, outputs: Any) -> Any:
        """Return what the model predicts; None: nothing that could be shown.

        The probability of every class or label, (b, K) float32; a class per pixel, (b, H, W) uint8; or
        `Detections`.
        """
        return None

    def summarize(self, totals: Mapping[str, Tensor], gathered: Mapping[str, Tensor]) -> Summary:
        """Return the metrics: sums divided by counts; None where nothing was counted.

        Args:
            totals: what `measure` returned, added over batches and ranks.
            gathered: what `gather` returned, concatenated over batches and ranks.

        Returns:
            A number for each (2,) metric, a list of n for each (2, n) metric; in the order of the history.
        """
        return {name: ratio(total) for name, total in totals.items()}


def _has_losses_of_loss(task: type[Task]) -> bool:
    """Return whether `losses` are those of `loss`: no subclass has overridden `loss` alone."""
    losses, loss = (next(c for c in task.__mro__ if name in vars(c)) for name in ("losses", "loss"))
    return issubclass(losses, loss)


def ratio(total: Tensor) -> float | list[float | None] | None:
    """Return sums / counts of `total`, (2,) or (2, n); None where the count is 0."""
    sums, counts = total.tolist()
    if isinstance(sums, list):
        return [s / n if n else None for s, n in zip(sums, counts, strict=True)]
    return sums / counts if counts else None
