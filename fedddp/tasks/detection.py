"""Boxes around objects, each with a class."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor

from fedddp.data.loader import Batch
from fedddp.data.targets import CROWD, DIFFICULT, Boxes, Detections, Target
from fedddp.section import ConfigError, Fraction
from fedddp.tasks.task import Summary, Task, ratio

CANDIDATES, MOST = 1000, 100
"""Boxes of an image, over all levels of the pyramid, before and after non-maximum suppression, at most."""

OUT_OF_RANGE = -1.0
"""An area below all that are evaluated."""

FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.4
"""An anchor learns a box from this overlap on, and that there is none below this overlap."""


@dataclass(frozen=True, kw_only=True)
class Detection(Task):
    """Boxes around objects, by RetinaNet (Lin et al., 2017, arXiv:1708.02002); COCO's average precision.

    A model returns a dictionary for its images (b, C, H, W): "cls_logits" (b, A, K), "bbox_regression"
    (b, A, 4) and "anchors" (A, 4), as `retinanet-tiny` and torchvision's RetinaNets by name do. Needs the
    extra `detection`.
    """

    target: ClassVar[Target] = "boxes"

    score_threshold: Fraction = 0.05
    """A box is found if the probability of its class is larger, in [0, 1)."""

    nms_threshold: Annotated[float, Interval(gt=0, le=1)] = 0.5
    """Of two boxes of one class that overlap by more than this IoU the likelier one is kept, in (0, 1]."""

    def __post_init__(self) -> None:
        if find_spec("pycocotools") is None:
            raise ConfigError('task=Detection needs pycocotools: pip install "fedddp[detection]"')

    def forward(self, module: Callable[[Tensor], Any], batch: Batch) -> Any:
        """Return the module's outputs, and "image_size": (2,) int64, height and width."""
        outputs = module(batch.images)
        if not isinstance(outputs, Mapping):
            return outputs
        # Filled, not copied: a copy to a GPU would wait for it.
        sides = [batch.images.new_full((), side, dtype=torch.int64) for side in batch.images.shape[2:]]
        return {**outputs, "image_size": torch.stack(sides)}

    def check_outputs(self, outputs: Any, classes: int, shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless `outputs` are the dictionary that the class describes."""
        names = ("cls_logits", "bbox_regression", "anchors")
        got: Any = type(outputs).__name__
        if isinstance(outputs, Mapping):
            got = {
                name: tuple(outputs[name].shape) for name in names if isinstance(outputs.get(name), Tensor)
            }
            anchors = (*got.get("anchors", ()), 0)[0]
            if got == dict(zip(names, ((2, anchors, classes), (2, anchors, 4), (anchors, 4)), strict=True)):
                return
        elif isinstance(outputs, Tensor):
            got = tuple(outputs.shape)
        raise ValueError(
            "a dictionary of cls_logits (batch, anchors, classes), bbox_regression (batch, anchors, 4) and "
            f"anchors (anchors, 4); for a batch of 2 and {classes} classes it returned {got}, but "
            "retinanet-tiny, retinanet_resnet50_fpn or retinanet_resnet50_fpn_v2 would do"
        )

    def loss(self, outputs: Mapping[str, Tensor], targets: Boxes) -> Tensor:
        """Return the loss of RetinaNet, summed over images.

        That of an image is its focal loss (α 0.25, γ 2), plus the L1 distance of the boxes' codes over the
        foreground, both divided by the image's number of foreground anchors. Anchors that overlap a box
        neither much nor little are left out.

        Args:
            outputs: what `forward` returns.
            targets: the boxes of these b images. Those that are ignored are as if they were not there.
        """
        return self.losses(outputs, targets).sum()

    def losses(self, outputs: Mapping[str, Tensor], targets: Boxes) -> Tensor:
        """Return the loss of every image, (b,); arguments as for `loss`."""
        logits, codes, anchors = (outputs[name] for name in ("cls_logits", "bbox_regression", "anchors"))
        targets = targets.counted()
        losses = [_image_loss(logits[i], codes[i], anchors, *targets.of(i)) for i in range(len(targets))]
        return torch.stack(losses) if losses else logits.sum((1, 2))

    def predict(self, outputs: Mapping[str, Tensor]) -> Detections:
        """Return at most 100 boxes per image, by falling score.

        Of all anchors and classes, over all levels of the pyramid, the 1000 likeliest above `score_threshold`
        are decoded, clipped to the image, and thinned out class by class at `nms_threshold`.
        """
        height, width = outputs["image_size"].tolist()
        anchors = outputs["anchors"].float()
        found = [
            self._found(logits.detach().float(), codes.detach().float(), anchors, (height, width))
            for logits, codes in zip(outputs["cls_logits"], outputs["bbox_regression"], strict=True)
        ]
        scores = [scores for _, _, scores in found]
        boxes = Boxes.join((boxes, labels) for boxes, labels, _ in found)
        return Detections(boxes, torch.cat(scores) if scores else torch.empty(0))

    def _found(
        self, logits: Tensor, codes: Tensor, anchors: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, labels and scores of one image."""
        parts = _parts()
        scores = logits.sigmoid().flatten()
        candidates = (scores > self.score_threshold).nonzero().flatten()
        # A stable sort: which of equal scores are kept must not depend on the device.
        order = scores[candidates].sort(descending=True, stable=True).indices[:CANDIDATES]
        candidates = candidates[order]
        places, labels = candidates // logits.shape[1], candidates % logits.shape[1]
        boxes = parts.coder.decode_single(codes[places], anchors[places])
        boxes = parts.ops.clip_boxes_to_image(boxes, size)
        proper = (boxes[:, :2] < boxes[:, 2:]).all(1)  # not without area, and no NaN
        boxes, labels, scores = boxes[proper], labels[proper], scores[candidates][proper]
        kept = parts.ops.batched_nms(boxes, scores, labels, self.nms_threshold)[:MOST]
        return boxes[kept], labels[kept], scores[kept]

    def measure(self, outputs: Mapping[str, Tensor], targets: Boxes) -> dict[str, Tensor]:
        """Return sum and count of `loss`, and how many true `boxes` of each class count, (K,) int64."""
        classes = outputs["cls_logits"].shape[2]
        return {
            "loss": self.total_loss(outputs, targets),
            "boxes": torch.bincount(targets.counted().labels, minlength=classes),
        }

    def gather(self, outputs: Mapping[str, Tensor], targets: Boxes) -> dict[str, Tensor]:
        """Return the boxes that were found and the true ones, image after image.

        `found` (m, 6) float32 has rows of left, top, right, bottom, class and score, `true` (n, 6) float32
        has 0 for the score, or `DIFFICULT` or `CROWD` of boxes that are ignored. `images` (b, 2) int64 counts
        the rows of both of each image. So images stay apart however batches and ranks are joined, if all
        three tensors are joined in the same order.
        """
        found = self.predict(outputs)
        ignored = torch.zeros_like(targets.labels) if targets.ignored is None else targets.ignored
        true = [targets.boxes, targets.labels[:, None], ignored[:, None]]
        rows = [found.boxes.boxes, found.boxes.labels[:, None], found.scores[:, None]]
        counts = torch.stack([found.boxes.offsets.diff(), targets.offsets.diff()], 1)
        device = targets.boxes.device
        return {
            "found": torch.cat([row.float() for row in rows], 1).to(device),
            "true": torch.cat([row.float() for row in true], 1),
            "images": counts.to(device),
        }

    def summarize(self, totals: Mapping[str, Tensor], gathered: Mapping[str, Tensor]) -> Summary:
        """Return COCO's average precision, that at an IoU of 0.5 and of 0.75, and the loss; by class last.

        A box that is found is neither right nor wrong where it matches an ignored one: a difficult object as
        any other, a crowd by the share of the found box that lies in it. Classes without a true box that
        counts have none, and the means leave them out.
        """
        precisions = coco_precisions(gathered, len(totals["boxes"]))
        return {
            "ap": _mean(precisions),
            "ap50": _mean(precisions[0]),
            "ap75": _mean(precisions[5]),
            "loss": ratio(totals["loss"]),
            "ap_per_class": [_mean(precisions[:, :, label]) for label in range(precisions.shape[2])],
        }


def coco_precisions(gathered: Mapping[str, Tensor], classes: int) -> Any:
    """Return COCO's precision by IoU (0.5, 0.55, ... 0.95), recall (0, 0.01, ... 1) and class.

    Args:
        gathered: what `Detection.gather` returns, of any number of images.
        classes: K.

    Returns:
        (10, 101, K) float64, in [0, 1]; -1 for classes without a true box.
    """
    if not len(gathered["true"]):
        return np.full((10, 101, classes), -1.0)
    counts = gathered["images"].T.tolist()
    parts = [
        torch.split(gathered[name], count) for name, count in zip(("found", "true"), counts, strict=True)
    ]
    # In an order of their own: equal scores count by the order of images, which depends on the ranks.
    images = sorted(zip(*parts, strict=True), key=lambda pair: [part.numpy().tobytes() for part in pair])
    # It prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        found, true = (_coco([pair[i] for pair in images], classes, true=i == 1) for i in range(2))
        evaluation = importlib.import_module("pycocotools.cocoeval").COCOeval(true, found, "bbox")
        everything = evaluation.params  # boxes of any size, 100 per image; not COCO's further selections
        everything.areaRng, everything.areaRngLbl, everything.maxDets = [[0, 1e10]], ["all"], [MOST]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0, 0]


def _coco(images: list[Tensor], classes: int, *, true: bool) -> Any:
    """Return pycocotools' index of boxes, (n, 6) for each image as in `found` or in `true`."""
    index = importlib.import_module("pycocotools.coco").COCO()
    index.dataset = {
        "images": [{"id": image} for image in range(len(images))],
        "categories": [{"id": label} for label in range(classes)],
        "annotations": [
            {
                "id": 0,
                "image_id": image,
                "category_id": int(label),
                "bbox": [left, top, right - left, bottom - top],
                # It ignores true boxes whose area is out of range, and finds them by the usual overlap.
                "area": OUT_OF_RANGE if true and last == DIFFICULT else (right - left) * (bottom - top),
                "iscrowd": int(true and last == CROWD),
                "score": last,
            }
            for image, rows in enumerate(images)
            for left, top, right, bottom, label, last in rows.tolist()
        ],
    }
    for number, annotation in enumerate(index.dataset["annotations"], start=1):  # 0 would be no match
        annotation["id"] = number
    index.createIndex()
    return index


def _mean(precisions: Any) -> float | None:
    counted = precisions[precisions > -1]
    return float(counted.mean()) if counted.size else None


@dataclass(frozen=True)
class _Parts:
    """torchvision's parts of a detector, which take seconds to import."""

    ops: Any
    coder: Any
    matcher: Any


@functools.cache
def _parts() -> _Parts:
    ops = importlib.import_module("torchvision.ops")
    utils = importlib.import_module("torchvision.models.detection._utils")
    matcher = utils.Matcher(FOREGROUND_IOU, BACKGROUND_IOU, allow_low_quality_matches=True)
    return _Parts(ops, utils.BoxCoder((1.0, 1.0, 1.0, 1.0)), matcher)


def _image_loss(logits: Tensor, codes: Tensor, anchors: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of one image with `logits` (A, K) and `codes` (A, 4), whose boxes are (n, 4)."""
    parts = _parts()
    truth = torch.zeros_like(logits)
    if not len(boxes):
        focal: Tensor = parts.ops.sigmoid_focal_loss(logits, truth, reduction="sum")
        return focal + 0 * codes.sum()  # every output takes part, as DDP wants
    matches = parts.matcher(parts.ops.box_iou(boxes.to(anchors), anchors))
    foreground = (matches >= 0).nonzero().flatten()
    matched = matches[foreground]
    truth[foreground, labels[matched]] = 1.0
    certain = matches != parts.matcher.BETWEEN_THRESHOLDS
    focal = parts.ops.sigmoid_focal_loss(logits[certain], truth[certain], reduction="sum")
    wanted = parts.coder.encode_single(boxes[matched].to(anchors), anchors[foreground])
    distance = (codes[foreground] - wanted).abs().sum()
    loss: Tensor = (focal + distance) / max(1, len(foreground))
    return loss
