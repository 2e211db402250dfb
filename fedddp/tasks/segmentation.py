"""One class per pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedddp.data.labelling import MOST_MASK_CLASSES
from fedddp.data.loader import Batch
from fedddp.data.targets import IGNORED, Target
from fedddp.section import NonNegativeFloat
from fedddp.tasks.task import Summary, Task, ratio

_BACKGROUND = ("", "0", "background", "bg", "nothing", "none", "void", "other", "unlabelled", "unlabeled")


@dataclass(frozen=True, kw_only=True)
class Segmentation(Task):
    """One class per pixel: cross entropy per image, with soft Dice loss if wanted; IoU and Dice.

    A model returns logits (b, K, H, W), or a dictionary with these under "out" as torchvision's do. A pixel
    of class 255 counts neither in the loss nor in a metric.
    """

    target: ClassVar[Target] = "mask"

    dice: NonNegativeFloat = 0.0
    """Weight, >= 0, of the soft Dice loss (Milletari et al., 2016, arXiv:1606.04797) beside cross entropy."""

    background: bool = True
    """Whether class 0 is background, which the mean Dice of an evaluation leaves out."""

    def forward(self, module: Callable[[Tensor], Any], batch: Batch) -> Any:
        """Return the logits, (b, K, H, W)."""
        outputs = module(batch.images)
        return outputs["out"] if isinstance(outputs, Mapping) and "out" in outputs else outputs

    def check_outputs(self, outputs: Any, classes: int, shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless `outputs` are logits of every class for every pixel."""
        if classes > MOST_MASK_CLASSES:
            raise ValueError(f"logits of {MOST_MASK_CLASSES} classes at most; the data have {classes}")
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if got != (2, classes, *shape[1:]):
            raise ValueError(
                f"logits of shape (batch, classes, height, width); for a batch of 2, {classes} classes and "
                f"images of {shape[1]}x{shape[2]} it returned {got}, but unet, lraspp_mobilenet_v3_large or "
                "fcn_resnet50 would do"
            )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss summed over images: the mean cross entropy of an image's pixels, and Dice loss.

        An image whose pixels are all ignored has loss 0.

        Args:
            outputs: logits, (b, K, H, W), any float dtype and memory format.
            targets: (b, H, W), int64, in range(K) or 255.
        """
        return self.losses(outputs, targets).sum()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every image, (b,); arguments as for `loss`."""
        losses = _cross_entropies(outputs, targets)
        return losses + self.dice * _dice_losses(outputs, targets) if self.dice else losses

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the likeliest class of each pixel, (b, H, W) uint8."""
        return outputs.argmax(1).to(torch.uint8)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the confusion matrix of all valid pixels, and sum and count of `loss` per image.

        `confusion` is (K, K) int64, true classes by predicted ones. Arguments as for `loss`; b may be 0.
        """
        logits = outputs.detach()
        classes, valid = logits.shape[1], targets != IGNORED
        pairs = targets[valid] * classes + logits.argmax(1)[valid]
        confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        return {"confusion": confusion, "loss": self.total_loss(logits.float(), targets)}

    def summarize(self, totals: Mapping[str, Tensor], gathered: Mapping[str, Tensor]) -> Summary:
        """Return IoU, Dice and pixel accuracy from the confusion matrix, and the loss.

        A class has an IoU, |A ∩ B| / |A ∪ B|, and a Dice, 2 |A ∩ B| / (|A| + |B|), if it is true or predicted
        anywhere; otherwise None, and the means leave it out.
        """
        confusion = totals["confusion"]
        both = confusion.diagonal()
        sizes = confusion.sum(0) + confusion.sum(1)
        iou = ratio(torch.stack([both, sizes - both]))
        dice = ratio(torch.stack([2 * both, sizes]))
        assert isinstance(iou, list)
        assert isinstance(dice, list)
        return {
            "iou": mean(iou),
            "dice": mean(dice[1:] if self.background else dice),
            "pixel_accuracy": ratio(torch.stack([both.sum(), confusion.sum()])),
            "loss": ratio(totals["loss"]) if len(confusion) and confusion.any() else None,
            "iou_per_class": iou,
            "dice_per_class": dice,
        }

    def constant(self, totals: Mapping[str, Tensor], gathered: Mapping[str, Tensor]) -> Summary:
        """Return the mean IoU of the most frequent class for every pixel; empty without pixels.

        Its IoU is its share of the pixels, and that of the other classes in the truth is 0.
        """
        sizes = totals["confusion"].sum(1) if "confusion" in totals else torch.zeros(1)
        classes = int((sizes > 0).sum())
        return {"iou": float(sizes.max() / sizes.sum()) / classes} if classes else {}


def background_warning(task: Task, class_names: Sequence[str]) -> str | None:
    """Return a line for data whose class 0 is left out of the mean Dice, but has no name of a background.

    Args:
        task: any; None is returned unless it is a `Segmentation` with `background`.
        class_names: by class; may be empty.
    """
    if not isinstance(task, Segmentation) or not task.background or not class_names:
        return None
    if is_background(class_names[0]):
        return None
    return (
        f"task.background=true leaves class 0, {class_names[0]!r}, out of the mean Dice; set task.background "
        "to false unless it is background"
    )


def is_background(class_name: str) -> bool:
    """Return whether a class has a name of a background."""
    return class_name.strip(" _").lower() in _BACKGROUND


def mean(values: list[float | None]) -> float | None:
    """Return the mean of those that are not None; None if there are none."""
    counted = [value for value in values if value is not None]
    return sum(counted) / len(counted) if counted else None


def _cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy over the valid pixels of each image, (b,)."""
    # As rows of classes: the loss for maps is not deterministic on a GPU.
    rows = outputs.movedim(1, -1).flatten(0, 2)
    pixels = F.cross_entropy(rows, targets.flatten(), reduction="none", ignore_index=IGNORED)
    count = (targets != IGNORED).flatten(1).sum(1)
    return pixels.view_as(targets).flatten(1).sum(1) / count.clamp_min(1)


def _dice_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - the mean soft Dice over the classes in each image's mask, (b,); 0 for a mask without any."""
    valid = (targets != IGNORED)[:, None]
    classes = torch.arange(outputs.shape[1], device=outputs.device)
    truth = targets[:, None] == classes[:, None, None]  # not `one_hot`, which `vmap` does not know
    chances = outputs.softmax(1) * valid
    true_sizes = truth.flatten(2).sum(2)
    sizes = chances.flatten(2).sum(2) + true_sizes
    present = true_sizes > 0
    both = (chances * truth).flatten(2).sum(2)
    lost = torch.where(present, 1 - 2 * both / sizes.where(present, torch.ones_like(sizes)), 0)
    return lost.sum(1) / present.sum(1).clamp_min(1)
