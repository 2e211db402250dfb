"""What a finished run records of its final model on test data: evaluation.json, wrong.safetensors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedddp.storage.history import Metric, Row, number
from fedddp.storage.run_record import WRONG

IGNORED = 255
"""Class of a mask's pixel that does not count, or that the model has not seen."""

TARGETS = ("class", "multilabel", "mask", "boxes")

CONSTANT = {
    "class": "one class for every image",
    "multilabel": "the same labels for every image",
    "mask": "one class for every pixel",
}
"""What a prediction is that does not depend on the image, by what a task predicts."""


@dataclass(frozen=True)
class BoxesOfImage:
    """The boxes of one image."""

    boxes: NDArray[np.float32]
    """(n, 4): left, top, right and bottom edge in pixels."""
    labels: NDArray[np.int64]
    """(n,)."""
    scores: NDArray[np.float32] | None = None
    """(n,), in [0, 1]; None for true boxes."""


@dataclass(frozen=True)
class Examined:
    """What the final model does on the test data."""

    target: str
    """What its task predicts: class, multilabel, mask or boxes."""
    confusion: NDArray[np.int64] | None
    """Examples, or pixels of masks, by true class (row) and predicted class (column), (K, K)."""
    wrong: list[Row]
    """The n worst examples, the worst first. Of classes each has "label", "predicted" and "probability"; of
    others "index" and "loss", and of several labels "labels" and "predicted"."""
    images: NDArray[np.uint8] | None
    """Those examples, (n, C, H, W)."""
    masks: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None
    """The true and the predicted class of each pixel, (n, H, W) each; 255 in both: it does not count."""
    boxes: list[tuple[BoxesOfImage, BoxesOfImage]] = field(default_factory=list)
    """The true and the predicted boxes of each of those examples."""
    constant: Mapping[str, float] = field(default_factory=dict)
    """The main metric of the best prediction that is the same for every image, by its name."""


def constant_line(target: str, scores: Mapping[str, Any], metric: Metric | None = None) -> str | None:
    """Return what the best constant prediction scores, as a sentence; None where that is not known.

    Args:
        target: what the task predicts.
        scores: its values by the names of metrics, as in evaluation.json.
        metric: the one that is reported; by default the first.
    """
    metric = Metric(f"eval/{next(iter(scores), '')}") if metric is None else metric
    value = number(scores, metric.bare)
    if value is None or target not in CONSTANT:
        return None
    words = f"The best constant prediction ({CONSTANT[target]}) scores"
    return f"{words} {metric.text(value)} in {metric.title}."


def parse_examined(folder: Path, content: Any) -> Examined:
    """Return the content of the evaluation.json in `folder`, with the tensors beside it.

    Raises:
        KeyError, TypeError, ValueError: it is corrupt.
    """
    target = str(content.get("target", "class"))
    if target not in TARGETS:
        raise ValueError(f"its target is {target}")
    confusion = None if content["confusion"] is None else np.array(content["confusion"], dtype=np.int64)
    if confusion is not None and (confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]):
        raise ValueError("its confusion matrix is not square")
    wrong = [_row(target, one) for one in content["wrong"]]
    tensors = _tensors(folder / WRONG) if wrong else {}
    images = tensors.get("images")
    if images is not None and (images.ndim != 4 or images.dtype != np.uint8 or len(images) != len(wrong)):
        raise ValueError(f"{WRONG} does not hold one image for each of its {len(wrong)} wrong examples")
    masks, boxes = None, []
    if images is not None and target == "mask":
        masks = tensors["truth"], tensors["predicted"]
        if any(mask.shape != (len(images), *images.shape[2:]) or mask.dtype != np.uint8 for mask in masks):
            raise ValueError(f"{WRONG} does not hold two masks for each of its {len(wrong)} examples")
        truth, predicted = masks
        masks = truth, np.where(truth == IGNORED, truth, predicted)  # a model predicts in the margins too
    if images is not None and target == "boxes":
        sides = [_boxes(tensors, side, len(images)) for side in ("truth", "predicted")]
        boxes = list(zip(*sides, strict=True))
    constant = {str(name): float(value) for name, value in content.get("constant", {}).items()}
    return Examined(target, confusion, wrong, images, masks, boxes, constant)


def _row(target: str, one: Row) -> Row:
    """Return what is known of one example, checked."""
    if target == "class":
        return {
            "label": int(one["label"]),
            "predicted": int(one["predicted"]),
            "probability": float(one["probability"]),
        }
    row: Row = {"index": int(one["index"]), "loss": float(one["loss"])}
    if target == "multilabel":
        row |= {side: [int(label) for label in one[side]] for side in ("labels", "predicted")}
    return row


def _tensors(path: Path) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path) if path.exists() else {}
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _boxes(tensors: Mapping[str, NDArray[Any]], side: str, images: int) -> list[BoxesOfImage]:
    boxes, labels, offsets = (tensors[f"{side}.{name}"] for name in ("boxes", "labels", "offsets"))
    scores = tensors.get(f"{side}.scores")
    lengths = {len(values) for values in (boxes, labels, scores) if values is not None}
    sound = len(offsets) == images + 1 and boxes.ndim == 2 and boxes.shape[1:] == (4,)
    if not sound or lengths != {int(offsets[-1])} or (np.diff(offsets) < 0).any():
        raise ValueError(f"{WRONG} does not hold the {side} boxes of each of its {images} examples")
    return [
        BoxesOfImage(boxes[a:b], labels[a:b], None if scores is None else scores[a:b])
        for a, b in itertools.pairwise(offsets.tolist())
    ]
