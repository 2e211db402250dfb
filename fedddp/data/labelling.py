"""The labels, the mask or the boxes of an image, in any form that a dataset may have, as tensors."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from fedddp.data.items import as_pair, read_item
from fedddp.data.targets import CROWD, DIFFICULT, IGNORED, Boxes, Target

MOST_MASK_CLASSES = IGNORED
"""Classes of masks, at most: their values are bytes, and one of them marks pixels that do not count."""


def mask_of(label: Any, size: tuple[int, int], where: str) -> Tensor:
    """Return a mask as uint8 (1, H, W): a class per pixel, 255 where it does not count.

    Args:
        label: a PIL image of integers or of a palette, or an integer array or tensor (H, W) or (1, H, W).
        size: height and width of its image.
        where: names the image in errors.

    Raises:
        ValueError: it is none of these, is of another size than its image, or has values beyond 0..255.
    """
    if isinstance(label, Image.Image):
        if label.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(
                f"{where} has a mask of colours (mode {label.mode}); give one whose pixels are numbers of "
                "classes, 0, 1, ... and 255 for what does not count (mode L or P)"
            )
        label = np.array(label)
    values = torch.as_tensor(np.asarray(label) if not isinstance(label, Tensor) else label)
    values = values[0] if values.dim() == 3 and len(values) == 1 else values
    if values.dim() != 2 or values.is_floating_point() or values.is_complex():
        kind = str(values.dtype).removeprefix("torch.")
        raise ValueError(
            f"{where} has a mask of {kind} values of shape {tuple(values.shape)}; give integers (H, W)"
        )
    if tuple(values.shape) != size:
        raise ValueError(
            f"{where} is {size[0]}x{size[1]} pixels, but its mask {values.shape[0]}x{values.shape[1]}; give "
            "both one size"
        )
    values = values.to(torch.int64)
    if values.numel() and not (values.min() >= 0 and values.max() <= IGNORED):
        worst = values.min() if values.min() < 0 else values.max()
        raise ValueError(
            f"{where} has the value {int(worst)} in its mask; classes are 0 to {MOST_MASK_CLASSES - 1}, and "
            f"{IGNORED} marks pixels that do not count"
        )
    return values.to(torch.uint8)[None]


def boxes_of(label: Any, where: str) -> Boxes:
    """Return the boxes of one image.

    Args:
        label: a dict as torchvision's detectors take it: "boxes" (k, 4) and "labels" (k,); and with (k,) of 0
            and 1 "iscrowd", as COCO has it, or "difficult", as VOC, for boxes that do not count.
        where: names the image in errors.

    Raises:
        ValueError: `label` is no dict with both, a box has no area, or marks are no 0 and 1 for each box.
    """
    if not isinstance(label, dict) or not {"boxes", "labels"} <= label.keys():
        kind = (
            f"a dict with {', '.join(map(str, label))}" if isinstance(label, dict) else type(label).__name__
        )
        raise ValueError(
            f'{where} has {kind} for boxes; give {{"boxes": (n, 4) left, top, right, bottom in pixels, '
            '"labels": (n,)}'
        )
    boxes = torch.as_tensor(np.asarray(label["boxes"]), dtype=torch.float32).reshape(-1, 4)
    labels = torch.as_tensor(np.asarray(label["labels"])).reshape(-1)
    if len(boxes) != len(labels) or labels.is_floating_point():
        raise ValueError(f"{where} has {len(boxes)} boxes and {len(labels)} labels; give an integer for each")
    good = torch.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    if not good.all():
        worst = [round(value, 2) for value in boxes[~good][0].tolist()]
        raise ValueError(
            f"{where} has the box {worst}; give left, top, right, bottom in pixels, left < right and "
            "top < bottom"
        )
    offsets = torch.tensor([0, len(labels)], dtype=torch.int64)
    return Boxes(boxes, labels.to(torch.int64), offsets, _ignored(label, len(labels), where))


def _ignored(label: dict[str, Any], count: int, where: str) -> Tensor | None:
    """Return which kind of box, `DIFFICULT` or `CROWD`, each is that does not count; None: all count."""
    ignored = torch.zeros(count, dtype=torch.uint8)
    for name, kind in (("difficult", DIFFICULT), ("iscrowd", CROWD)):
        marks = torch.as_tensor(np.asarray(label.get(name, [0] * count))).reshape(-1)
        if len(marks) != count or not ((marks == 0) | (marks == 1)).all():
            raise ValueError(f'{where} has "{name}" of {marks.tolist()[:9]}; give 0 or 1 for each box')
        ignored[marks != 0] = kind
    return ignored if ignored.any() else None


def as_tv_tensors(image: Tensor, label: Any, target: Target, where: str) -> tuple[Any, Any]:
    """Return an image, uint8 (C, H, W), and its label as torchvision.transforms.v2 takes them.

    Raises:
        ValueError: the label is no mask, or no boxes.
    """
    tv_tensors: Any = importlib.import_module("torchvision.tv_tensors")
    size = (image.shape[1], image.shape[2])
    if target == "mask":
        label = tv_tensors.Mask(mask_of(label, size, where)[0])
    elif target == "boxes":
        boxes = boxes_of(label, where).counted()
        corners = tv_tensors.BoundingBoxes(boxes.boxes, format="XYXY", canvas_size=size)
        label = {"boxes": corners, "labels": boxes.labels}
    return tv_tensors.Image(image), label


def multilabels(dataset: Any, name: str) -> NDArray[np.uint8]:
    """Return the labels of every example, (n, K) of 0 and 1; from the dataset's own table if it has one.

    Raises:
        ValueError: values other than 0 and 1, or examples with other numbers of labels.
    """
    listed = _listed(dataset)
    if listed is None:
        rows = []
        for index in range(len(dataset)):
            where = f"{name}: example {index}"
            rows.append(np.asarray(as_pair(read_item(dataset, index, where), where)[1]))
            if rows[-1].ndim != 1 or rows[-1].shape != rows[0].shape:
                raise ValueError(
                    f"{where} has labels of shape {rows[-1].shape}, the first {rows[0].shape}; give 0 or 1 "
                    "for each label, in one list per image"
                )
        listed = np.stack(rows)
    wrong = np.argwhere((listed != 0) & (listed != 1))
    if len(wrong):
        example, label = wrong[0]
        raise ValueError(
            f"{name}: example {example} has {listed[example, label]:g} for label {label}; give 0 or 1 for "
            "each label, in one list per image"
        )
    return listed.astype(np.uint8)


def _listed(dataset: Any) -> NDArray[Any] | None:
    """Return a dataset's own table of labels, (examples, K), else None."""
    if getattr(dataset, "target_transform", None) or getattr(dataset, "transforms", None):
        return None
    if isinstance(dataset, Subset):
        parent = _listed(dataset.dataset)
        return None if parent is None else parent[np.asarray(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        found: Any = dataset.tensors[1]
    else:
        found = next(
            (t for n in ("targets", "labels", "attr") if (t := getattr(dataset, n, None)) is not None), None
        )
    if found is None or callable(found):
        return None
    try:
        table = np.asarray(found)
    except ValueError:  # rows of different lengths
        return None
    return table if table.ndim == 2 and len(table) == len(dataset) and table.dtype.kind in "iubf" else None


# ---- one class per image, by which partitions split, and the highest class of each ----

Classes = tuple[NDArray[np.int64], NDArray[np.int64]]


def classes_of_masks(masks: Iterable[Tensor]) -> Classes:
    """Return the class with most pixels of each mask, (n,), and its highest class, (n,).

    Class 0, which is often the background, counts only where there is no other; 255 does not count.

    Args:
        masks: n of uint8 (..., H, W).
    """
    most, highest = [], []
    for mask in masks:
        counts = torch.bincount(mask.flatten(), minlength=IGNORED + 1)[:IGNORED]
        highest.append(int(counts.nonzero().max()) if counts.any() else 0)
        counts[0] = 0
        most.append(int(counts.argmax()))
    return np.array(most, dtype=np.int64), np.array(highest, dtype=np.int64)


def classes_of_labels(labels: NDArray[np.uint8]) -> Classes:
    """Return the first label that each example has, (n,), or 0, and the number of the last label, (n,)."""
    return labels.argmax(1).astype(np.int64), np.full(len(labels), labels.shape[1] - 1, dtype=np.int64)


def classes_of_boxes(boxes: Boxes) -> Classes:
    """Return the class of the largest box of each image, (n,), or 0, and its highest class, (n,).

    Boxes that do not count take no part. A negative class is returned as the first of both.
    """
    boxes = boxes.counted()
    most, highest = np.zeros((2, len(boxes)), dtype=np.int64)
    for index in range(len(boxes)):
        corners, labels = boxes.of(index)
        if len(labels):
            largest = labels[(corners[:, 2:] - corners[:, :2]).prod(1).argmax()]
            most[index], highest[index] = (
                min(int(largest), int(labels.min())) if labels.min() < 0 else largest,
                labels.max(),
            )
    return most, highest
