"""Boxes: RetinaNet's loss per image, what is found, and COCO's average precision."""

from __future__ import annotations

import importlib
import io
import math
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from fedddp.data.loader import Batch
from fedddp.data.targets import Boxes
from fedddp.models.registry import ModelConfig
from fedddp.models.retinanet import RetinaNet, retinanet_tiny
from fedddp.tasks import Detection

CLASSES, SIZE = 3, (48, 56)
SHAPE = (2, *SIZE)


def truth() -> Boxes:
    """Return the boxes of four images, of which the second has none and the last one is unlike any anchor."""
    boxes = [
        [[4.0, 5.0, 20.0, 24.0], [30.0, 10.0, 44.0, 40.0], [6.0, 5.0, 18.0, 20.0]],
        [],
        [[0.0, 0.0, 56.0, 48.0]],
        [[50.0, 1.0, 52.0, 3.0]],
    ]
    labels = [[0, 2, 1], [], [1], [2]]
    return Boxes.join(
        (torch.tensor(some).reshape(-1, 4), torch.tensor(which, dtype=torch.int64))
        for some, which in zip(boxes, labels, strict=True)
    )


def outputs(images: int = 4, spread: float = 1.0) -> dict[str, Tensor]:
    """Return what a network with random weights gives for random images."""
    with torch.random.fork_rng():
        torch.manual_seed(images)
        module = retinanet_tiny(CLASSES, SHAPE)
        task = Detection()
        batch = Batch(torch.randn(images, *SHAPE), truth(), images, images)
        result: dict[str, Tensor] = task.forward(module, batch)
        result["cls_logits"] = result["cls_logits"] + spread * torch.randn(result["cls_logits"].shape)
        result["bbox_regression"] = torch.randn(result["bbox_regression"].shape) * 0.1
    return {name: tensor.detach() for name, tensor in result.items()}


def part(given: dict[str, Tensor], some: slice) -> dict[str, Tensor]:
    """Return the outputs for some of the images."""
    return {name: t[some] if name in ("cls_logits", "bbox_regression") else t for name, t in given.items()}


def torchvision_loss(given: dict[str, Tensor], boxes: Boxes) -> float:
    """Return the loss of the batch that torchvision computes from the same outputs: a mean over images."""
    retinanet = importlib.import_module("torchvision.models.detection.retinanet")
    anchor_utils = importlib.import_module("torchvision.models.detection.anchor_utils")
    backbone = torch.nn.Identity()
    backbone.out_channels = 8  # type: ignore[assignment]
    sizes = anchor_utils.AnchorGenerator(((8,),), ((1.0,),))
    library = retinanet.RetinaNet(backbone, CLASSES, anchor_generator=sizes)
    targets = [dict(zip(("boxes", "labels"), boxes.of(i), strict=True)) for i in range(len(boxes))]
    losses = library.compute_loss(targets, given, [given["anchors"]] * len(boxes))
    return float(losses["classification"] + losses["bbox_regression"])


def test_the_loss_is_torchvisions_summed_over_images() -> None:
    task, given, boxes = Detection(), outputs(), truth()
    losses = task.losses(given, boxes)
    singles = [part(given, slice(i, i + 1)) for i in range(4)]
    expected = [torchvision_loss(one, boxes[i : i + 1]) for i, one in enumerate(singles)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert float(task.loss(given, boxes)) == pytest.approx(4 * torchvision_loss(given, boxes), rel=1e-6)
    own = [float(task.loss(one, boxes[i : i + 1])) for i, one in enumerate(singles)]
    assert own == pytest.approx(losses.tolist(), rel=1e-6)


def overlap(a: list[float], b: list[float]) -> float:
    """Return the IoU of two boxes."""
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def focal(logit: float, true: bool) -> float:
    """Return one term of the focal loss, α 0.25 and γ 2."""
    p = 1 / (1 + math.exp(-logit))
    return -0.25 * (1 - p) ** 2 * math.log(p) if true else -0.75 * p**2 * math.log(1 - p)


def test_the_loss_is_that_of_loops_over_anchors() -> None:
    given, boxes = outputs(), truth()
    anchors = given["anchors"].tolist()
    for image, loss in enumerate(Detection().losses(given, boxes).tolist()):
        true, labels = (part.tolist() for part in boxes.of(image))
        best = [max((overlap(box, a) for a in anchors), default=0) for box in true]
        terms, distance, foreground = 0.0, 0.0, 0
        for a, anchor in enumerate(anchors):
            overlaps = [overlap(box, anchor) for box in true]
            highest = max(overlaps, default=0.0)
            match = overlaps.index(highest) if true else -1
            is_best = any(math.isclose(o, b) for o, b in zip(overlaps, best, strict=True))
            if 0.4 <= highest < 0.5 and not is_best:
                continue
            found = highest >= 0.5 or (is_best and highest > 0)
            for label, logit in enumerate(given["cls_logits"][image, a].tolist()):
                terms += focal(logit, found and label == labels[match])
            if found:
                foreground += 1
                (x1, y1, x2, y2), (u1, v1, u2, v2) = anchor, true[match]
                w, h, bw, bh = x2 - x1, y2 - y1, u2 - u1, v2 - v1
                code = [
                    *((u1 + u2 - x1 - x2) / 2 / w, (v1 + v2 - y1 - y2) / 2 / h),
                    *(math.log(bw / w), math.log(bh / h)),
                ]
                got = given["bbox_regression"][image, a].tolist()
                distance += sum(abs(x - y) for x, y in zip(got, code, strict=True))
        assert loss == pytest.approx((terms + distance) / max(1, foreground), rel=1e-5)
        assert bool(foreground) == bool(true)


def test_every_output_has_a_gradient_with_and_without_boxes() -> None:
    for image in range(4):
        given = part(outputs(), slice(image, image + 1))
        given = {**given, **{k: given[k].requires_grad_() for k in ("cls_logits", "bbox_regression")}}
        Detection().loss(given, truth()[image : image + 1]).backward()  # type: ignore[no-untyped-call]
        for name in ("cls_logits", "bbox_regression"):
            grad = given[name].grad
            assert grad is not None
            assert grad.isfinite().all()
            assert grad.any() or (name == "bbox_regression" and image == 1)


# ---- what is found ----


def test_what_is_found_is_what_torchvision_finds() -> None:
    given = outputs(spread=3.0)
    retinanet = importlib.import_module("torchvision.models.detection.retinanet")
    anchor_utils = importlib.import_module("torchvision.models.detection.anchor_utils")
    backbone = torch.nn.Identity()
    backbone.out_channels = 8  # type: ignore[assignment]
    sizes = anchor_utils.AnchorGenerator(((8,),), ((1.0,),))
    library = retinanet.RetinaNet(backbone, CLASSES, anchor_generator=sizes, detections_per_img=100)
    heads = {name: [given[name]] for name in ("cls_logits", "bbox_regression")}  # as one level
    expected = library.postprocess_detections(heads, [[given["anchors"]]] * 4, [SIZE] * 4)
    found = Detection().predict(given)
    assert len(found.boxes) == 4
    start = 0
    for image, wanted in enumerate(expected):
        boxes, labels = found.boxes.of(image)
        scores = found.scores[start : start + len(labels)]
        start += len(labels)
        assert len(labels) == 100
        assert torch.equal(labels, wanted["labels"])
        torch.testing.assert_close(boxes, wanted["boxes"])
        torch.testing.assert_close(scores, wanted["scores"])
        assert (scores.diff() <= 0).all()
        assert (boxes[:, 2] <= SIZE[1]).all()
        assert (boxes[:, 3] <= SIZE[0]).all()


def hand(
    logits: list[list[float]], codes: list[list[float]], anchors: list[list[float]]
) -> dict[str, Tensor]:
    """Return outputs for one image of 48 x 56 pixels."""
    given = {"cls_logits": [logits], "bbox_regression": [codes], "anchors": anchors, "image_size": SIZE}
    return {name: torch.tensor(value) for name, value in given.items()}


def test_boxes_are_decoded_clipped_and_thinned_out_class_by_class() -> None:
    given = hand(
        logits=[
            [2.0, -9.0],
            [1.0, -9.0],
            [0.5, 0.0],
            [-9.0, -2.9],
            [-9.0, -3.0],
            [math.nan, 9.0],
            [9.0, -9.0],
        ],
        codes=[
            *([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
            *([0.5, -0.25, math.log(2.0), 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
            *([math.nan, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
        ],
        anchors=[
            *([10.0, 10.0, 20.0, 20.0], [10.0, 10.0, 20.0, 21.0]),  # the second is the first one again
            *([40.0, 30.0, 50.0, 40.0], [40.0, 0.0, 70.0, 9.0], [0.0, 0.0, 9.0, 9.0]),
            *([0.0, 0.0, 9.0, 9.0], [60.0, 0.0, 70.0, 9.0]),  # no number; beside the image
        ],
    )
    found = Detection().predict(given)
    boxes, labels = found.boxes.of(0)
    # Centre (45, 35) + (0.5, -0.25) * 10, twice as wide; clipped at 56.
    assert boxes.tolist() == [[10, 10, 20, 20], [40, 27.5, 56, 37.5], [40, 27.5, 56, 37.5], [40, 0, 56, 9]]
    assert labels.tolist() == [0, 0, 1, 1]
    expected = [1 / (1 + math.exp(-x)) for x in (2.0, 0.5, 0.0, -2.9)]  # -3.0 is below 0.05
    assert found.scores.tolist() == pytest.approx(expected)
    assert len(Detection(score_threshold=0.7).predict(given).scores) == 1
    assert len(Detection(nms_threshold=0.95).predict(given).scores) == 5
    nothing = Detection(score_threshold=0.99).predict(given)
    assert len(nothing.boxes) == 1
    assert nothing.scores.shape == (0,)


# ---- average precision ----


def gathered(
    true: list[list[list[float]]], found: list[list[list[float]]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return totals and rows of images with boxes (x1, y1, x2, y2, class[, kind]) and (..., class, score)."""
    rows = {
        "true": torch.tensor([[*row, 0.0][:6] for image in true for row in image]).reshape(-1, 6),
        "found": torch.tensor([row for image in found for row in image]).reshape(-1, 6),
        "images": torch.tensor([[len(f), len(t)] for f, t in zip(found, true, strict=True)]),
    }
    boxes = torch.bincount(rows["true"][:, 4].long(), minlength=CLASSES)
    return {"loss": torch.tensor([1.0, 2.0]), "boxes": boxes}, rows


def by_loops(true: list[Any], found: list[Any], label: int, threshold: float) -> float | None:
    """Return the average precision of a class at one IoU: the mean over the recalls 0, 0.01, ... 1."""
    positives = sum(box[4] == label for image in true for box in image)
    if not positives:
        return None
    ranking = sorted((-box[5], i, box) for i, image in enumerate(found) for box in image if box[4] == label)
    taken: set[tuple[int, int]] = set()
    hits, curve = 0, []
    for rank, (_, image, box) in enumerate(ranking, 1):
        free = [
            (overlap(box, other), n)
            for n, other in enumerate(true[image])
            if other[4] == label and (image, n) not in taken and overlap(box, other) >= threshold
        ]
        if free:
            taken.add((image, max(free)[1]))
            hits += 1
        curve.append((hits / positives, hits / rank))
    recalls = [i / 100 for i in range(101)]
    return sum(max((p for r, p in curve if r >= recall), default=0.0) for recall in recalls) / 101


TRUE = [
    [[0.0, 0.0, 10.0, 10.0, 0.0], [20.0, 20.0, 30.0, 32.0, 1.0]],
    [[5.0, 5.0, 15.0, 15.0, 0.0]],
    [],
    [[1.0, 2.0, 21.0, 22.0, 0.0], [30.0, 5.0, 40.0, 9.0, 1.0]],
]
FOUND = [
    [[0.0, 0.0, 10.0, 8.0, 0.0, 0.9], [1.0, 0.0, 10.0, 10.0, 0.0, 0.6], [20.0, 21.0, 30.0, 32.0, 1.0, 0.8]],
    [[5.0, 8.0, 15.0, 15.0, 0.0, 0.7], [5.0, 5.0, 15.0, 15.0, 2.0, 0.95]],
    [[0.0, 0.0, 4.0, 4.0, 0.0, 0.85]],
    [[3.0, 3.0, 21.0, 22.0, 0.0, 0.5], [30.0, 5.0, 38.0, 9.0, 0.0, 0.4]],
]


def test_average_precision_is_that_of_loops_over_thresholds() -> None:
    totals, rows = gathered(TRUE, FOUND)
    summary = Detection().summarize(totals, rows)
    assert list(summary) == ["ap", "ap50", "ap75", "loss", "ap_per_class"]
    thresholds = [0.5 + 0.05 * i for i in range(10)]
    table = [[by_loops(TRUE, FOUND, label, t) for t in thresholds] for label in range(CLASSES)]
    assert table[2][0] is None
    per_class = [sum(row) / 10 for row in table[:2]]  # type: ignore[arg-type]
    assert summary["ap_per_class"] == [pytest.approx(per_class[0]), pytest.approx(per_class[1]), None]
    assert summary["ap"] == pytest.approx(sum(per_class) / 2)
    assert summary["ap50"] == pytest.approx((table[0][0] + table[1][0]) / 2)  # type: ignore[operator]
    assert summary["ap75"] == pytest.approx((table[0][5] + table[1][5]) / 2)  # type: ignore[operator]
    assert summary["loss"] == 0.5
    # Class 1 by hand: of two boxes one is found, with an IoU of 11/12, at full precision up to recall 0.5.
    assert per_class[1] == pytest.approx(51 / 101 * 9 / 10)


def test_average_precision_is_that_of_pycocotools_used_directly() -> None:
    generator = torch.Generator().manual_seed(0)
    true, found = [], []
    for _ in range(12):
        corners = torch.rand(5, 2, generator=generator) * 30
        boxes = torch.cat([corners, corners + 5 + torch.rand(5, 2, generator=generator) * 12], 1)
        labels = torch.randint(0, CLASSES, (5, 1), generator=generator).float()
        true.append(torch.cat([boxes, labels], 1).tolist())
        near = boxes + torch.randn(5, 4, generator=generator)
        scores = torch.rand(5, 1, generator=generator)
        found.append(torch.cat([near, labels, scores], 1).tolist())
    totals, rows = gathered(true, found)
    summary = Detection().summarize(totals, rows)

    coco, cocoeval = (importlib.import_module(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
    library = coco.COCO()
    library.dataset = {
        "images": [{"id": i} for i in range(12)],
        "categories": [{"id": k} for k in range(CLASSES)],
        "annotations": [
            {
                **{"id": 1 + 5 * i + n, "image_id": i, "category_id": int(b[4]), "iscrowd": 0},
                **{"bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]], "area": (b[2] - b[0]) * (b[3] - b[1])},
            }
            for i, image in enumerate(true)
            for n, b in enumerate(image)
        ],
    }
    with redirect_stdout(io.StringIO()):
        library.createIndex()
        results = library.loadRes(
            [
                {
                    **{"image_id": i, "category_id": int(b[4]), "score": b[5]},
                    **{"bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]},
                }
                for i, image in enumerate(found)
                for b in image
            ]
        )
        evaluation = cocoeval.COCOeval(library, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert summary["ap"] == pytest.approx(evaluation.stats[0], rel=1e-6)
    assert summary["ap50"] == pytest.approx(evaluation.stats[1], rel=1e-6)
    assert summary["ap75"] == pytest.approx(evaluation.stats[2], rel=1e-6)
    assert 0.05 < evaluation.stats[0] < 0.95


def test_average_precision_does_not_depend_on_the_order_of_images(capsys: pytest.CaptureFixture[str]) -> None:
    found = [[[*row[:5], 0.5] for row in image] for image in FOUND]  # all scores equal
    summaries = [
        Detection().summarize(*gathered([TRUE[i] for i in order], [found[i] for i in order]))
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1])
    ]
    assert summaries[0] == summaries[1] == summaries[2]
    assert capsys.readouterr() == ("", "")


def test_batches_and_ranks_that_are_joined_give_the_metrics_of_all() -> None:
    task, given, boxes = Detection(), outputs(spread=3.0), truth()
    given["cls_logits"] += 4  # so that something is right
    totals, rows = task.measure(given, boxes), task.gather(given, boxes)
    cuts = (slice(0, 1), slice(1, 3), slice(3, 4))
    measured = [task.measure(part(given, cut), boxes[cut]) for cut in cuts]
    gatherings = [task.gather(part(given, cut), boxes[cut]) for cut in cuts]
    for name, total in totals.items():
        torch.testing.assert_close(torch.stack([m[name] for m in measured]).sum(0), total)
    for name, joined in rows.items():
        torch.testing.assert_close(torch.cat([g[name] for g in gatherings]), joined)
    assert totals["boxes"].tolist() == [1, 2, 2]
    assert rows["images"].tolist() == [[100, 3], [100, 0], [100, 1], [100, 1]]
    assert float(totals["loss"][1]) == 4
    assert float(totals["loss"][0]) == pytest.approx(float(task.loss(given, boxes)))
    summary = task.summarize(totals, rows)
    assert summary["ap50"] is not None


def test_without_boxes_there_is_no_precision() -> None:
    task, given = Detection(), part(outputs(), slice(1, 2))
    for some in (slice(1, 2), slice(0, 0)):
        boxes = truth()[some]
        one = part(given, slice(0, len(boxes)))
        summary = task.summarize(task.measure(one, boxes), task.gather(one, boxes))
        assert (summary["ap"], summary["ap50"], summary["ap_per_class"]) == (None, None, [None] * CLASSES)
        assert (summary["loss"] is None) == (len(boxes) == 0)
    totals, rows = gathered(TRUE, [[]] * 4)
    assert Detection().summarize(totals, rows)["ap_per_class"] == [0.0, 0.0, None]


# ---- networks ----


def check(outputs: Any) -> None:
    batch = Batch(torch.zeros(2, *SHAPE), truth()[:2], 2, 2)
    task = Detection()
    task.check_outputs(task.forward(lambda _: outputs, batch), CLASSES, SHAPE)


@pytest.mark.parametrize("name", ["retinanet-tiny", "retinanet_resnet50_fpn"])
def test_anchors_are_those_of_torchvision(name: str) -> None:
    module = ModelConfig(name=name).build(classes=CLASSES, shape=SHAPE, seed=0, check=check)
    assert isinstance(module, RetinaNet)
    images = torch.randn(1, *SHAPE)
    with torch.no_grad():
        got = module.eval()(images)
        features = list(module.backbone(images).values())
    utils = importlib.import_module("torchvision.models.detection.anchor_utils")
    lists = importlib.import_module("torchvision.models.detection.image_list")
    if name == "retinanet-tiny":
        from fedddp.models import retinanet as own

        generator = utils.AnchorGenerator(own.TINY_SIZES, (own.TINY_RATIOS,) * len(own.TINY_SIZES))
    else:
        generator = importlib.import_module("torchvision.models.detection.retinanet")._default_anchorgen()
    expected = generator(lists.ImageList(images, [SIZE]), features)[0]
    assert torch.equal(got["anchors"], expected)
    assert got["cls_logits"].shape == (1, len(expected), CLASSES)
    assert not any("anchor" in key for key in module.state_dict())


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 47, 61)])
def test_the_tiny_retinanet_takes_images_of_any_size(shape: tuple[int, int, int]) -> None:
    module = retinanet_tiny(CLASSES, shape)
    task = Detection()
    boxes = Boxes.join([(torch.tensor([[2.0, 2.0, 12.0, 14.0]]), torch.tensor([1]))])
    for layout in (torch.contiguous_format, torch.channels_last):
        images = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
        given = task.forward(module.to(memory_format=layout), Batch(images, boxes, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            halved = task.forward(module, Batch(images, boxes, 1, 1))
        assert halved["anchors"].dtype == torch.float32
        assert torch.equal(halved["anchors"], given["anchors"])
        module.zero_grad()
        task.loss(given, boxes).backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    with pytest.raises(ValueError, match=r"cannot take images of 3x8x8 \(16x16 is the least\)"):
        ModelConfig(name="retinanet-tiny").build(classes=2, shape=(3, 8, 8), seed=0, check=check)


def test_models_without_boxes_are_refused_with_models_that_would_do() -> None:
    for name, got in (("lenet", r"\(2, 3\)"), ("fcn_resnet50", r"\{\}")):
        with pytest.raises(
            ValueError, match=rf"^model {name} must return a dictionary .*returned {got}, .*-tiny"
        ):
            ModelConfig(name=name).build(classes=CLASSES, shape=SHAPE, seed=0, check=check)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ssd300_vgg16", "divides its loss by the number of foreground anchors in a batch"),
        ("ssdlite320_mobilenet_v3_large", "divides its loss"),
        ("fcos_resnet50_fpn", "divides its loss by the number of foreground points"),
        ("fasterrcnn_resnet50_fpn_v2", "draws examples from torch's global generator"),
        ("maskrcnn_resnet50_fpn", "draws examples"),
    ],
)
def test_detectors_whose_loss_depends_on_the_batch_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^model.name: {name} {reason}.*use retinanet-tiny, retinanet_.*$"):
        ModelConfig(name=name)


def test_pycocotools_is_asked_for_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fedddp.tasks.detection.find_spec", lambda name: None if name == "pycocotools" else find_spec(name)
    )
    with pytest.raises(
        ValueError, match=r'^task=Detection needs pycocotools: pip install "fedddp\[detection\]"$'
    ):
        Detection()
