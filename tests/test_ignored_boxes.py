"""Crowds and difficult objects: not trained, neither right nor wrong where they are found."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fedddp.data.datasets import DataConfig, Images, from_dataset, load
from fedddp.data.labelling import boxes_of
from fedddp.data.loader import ClientLoader
from fedddp.data.targets import CROWD, DIFFICULT, Boxes, Detections
from fedddp.tasks import Detection
from fedddp.tasks.detection import coco_precisions

SIDE = 64


class Given(Detection):
    """Finds the detections that are its outputs."""

    def predict(self, outputs: Any) -> Detections:
        found: Detections = outputs
        return found


def precisions(true: Boxes, found: Detections, classes: int) -> Any:
    """Return COCO's precisions by the task."""
    return coco_precisions(Given().gather(found, true), classes)  # type: ignore[arg-type]


def detections(rows: list[list[list[float]]]) -> Detections:
    """Return what was found in images: rows of left, top, right, bottom, class, score."""
    tables = [torch.tensor(of).reshape(-1, 6) for of in rows]
    boxes = Boxes.join((table[:, :4], table[:, 4].long()) for table in tables)
    return Detections(boxes, torch.cat(tables)[:, 5])


# ---- by hand ----

TRUE = {"boxes": [[0, 0, 10, 10], [20, 0, 30, 10], [32, 32, 64, 64]], "labels": [0, 0, 0]}


def test_three_boxes_of_which_one_is_ignored() -> None:
    """Found: object 0, nothing, twice object 2 (once as a part of it), and, last, object 1."""
    on_object = [32, 32, 64, 64, 0, 0.7]
    inside = [40, 40, 56, 56, 0, 0.6]  # a quarter of its area: an IoU of 0.25
    found = detections(
        [[[0, 0, 10, 10, 0, 0.9], [0, 50, 9, 59, 0, 0.8], on_object, inside, [20, 0, 30, 10, 0, 0.5]]]
    )

    def ap(**marks: list[int]) -> float:
        true = boxes_of({**TRUE, **marks}, "")
        return float(precisions(true, found, 1)[0, :, 0].mean())  # at an IoU of 0.5

    # Right, wrong, right, wrong, right: precisions 1, 2/3, 3/5 up to recalls 1/3, 2/3, 1: of 101, 34, 33, 34.
    assert ap() == pytest.approx((34 + 33 * 2 / 3 + 34 * 3 / 5) / 101)
    # Right, wrong, -, wrong, right: up to recall 1/2, and to 1: the part of object 2 does not match it.
    assert ap(difficult=[0, 0, 1]) == pytest.approx((51 + 50 * 2 / 4) / 101)
    # Right, wrong, -, -, right: all of the part lies in the crowd.
    assert ap(iscrowd=[0, 0, 1]) == pytest.approx((51 + 50 * 2 / 3) / 101)
    nothing = precisions(boxes_of({**TRUE, "iscrowd": [1, 1, 1]}, ""), found, 1)
    assert (nothing == -1).all(), "no object counts, so there is no precision"


def test_marks_become_kinds() -> None:
    plain = boxes_of({**TRUE, "iscrowd": torch.zeros(3, dtype=torch.int64)}, "")
    assert plain.ignored is None
    assert plain.counted() is plain
    both = boxes_of({**TRUE, "iscrowd": [0, 1, 0], "difficult": [True, False, False]}, "")
    assert both.ignored is not None
    assert both.ignored.tolist() == [DIFFICULT, CROWD, 0]
    joined = Boxes.cat([plain, both, Boxes.join([])])
    assert joined.ignored is not None
    assert joined.ignored.tolist() == [0, 0, 0, DIFFICULT, CROWD, 0]
    assert joined.index_select(torch.tensor([1])).counted().boxes.tolist() == [[32, 32, 64, 64]]
    assert joined[1:].counted().offsets.tolist() == [0, 1]
    assert joined.counted().offsets.tolist() == [0, 3, 4]
    for marks in ([0, 1], [0, 1, 2]):
        with pytest.raises(
            ValueError, match=r'^a.png has "difficult" of \[0, 1.*\]; give 0 or 1 for each box'
        ):
            boxes_of({**TRUE, "difficult": marks}, "a.png")


# ---- from the file of annotations to the average precision ----


def write_coco(root: Path, rng: np.random.Generator, images: int) -> None:
    """Write COCO-style data with random boxes, of which some are crowds."""
    for part in ("train", "val"):
        annotations: list[dict[str, Any]] = []
        for image in range(images):
            Image.new("RGB", (SIDE, SIDE)).save(root / f"{part}{image}.png")
            for _ in range(rng.integers(0, 7)):
                left, top = rng.integers(0, 40, 2).tolist()
                width, height = rng.integers(8, 25, 2).tolist()
                crowd = int(rng.random() < 0.35)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": int(rng.integers(0, 2)),
                        "bbox": [left, top, width, height],
                        "area": width * height,
                        "iscrowd": crowd,
                    }
                )
        names = [
            {"id": i, "file_name": f"{part}{i}.png", "width": SIDE, "height": SIDE} for i in range(images)
        ]
        content = {
            "images": names,
            "categories": [{"id": 0, "name": "car"}, {"id": 1, "name": "van"}],
            "annotations": annotations,
        }
        (root / f"{part}.json").write_text(json.dumps(content))


def guesses(file: Path, rng: np.random.Generator, images: int) -> list[list[list[float]]]:
    """Return boxes near the annotated ones, with ones inside of crowds and others."""
    rows: list[list[list[float]]] = [[] for _ in range(images)]
    for one in json.loads(file.read_text())["annotations"]:
        left, top, width, height = one["bbox"]
        for scale in (1.0, 0.5):
            moved = rng.normal(0, 1.5, 4)
            corners = moved + np.array([left, top, left + scale * width, top + scale * height])
            rows[one["image_id"]].append([*corners.tolist(), float(one["category_id"]), float(rng.random())])
    for of in rows:
        left, top = rng.random(2) * 40
        of.append([left, top, left + 12, top + 12, 0.0, float(rng.random())])
    return rows


def by_pycocotools(file: Path, rows: list[list[list[float]]]) -> Any:
    """Return the precisions of the boxes by pycocotools alone, from the file of annotations."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = importlib.import_module("pycocotools.coco").COCO(str(file))
        results = [
            {
                "image_id": image,
                "category_id": int(label),
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
            }
            for image, of in enumerate(rows)
            for left, top, right, bottom, label, score in torch.tensor(of).tolist()
        ]
        evaluation = importlib.import_module("pycocotools.cocoeval").COCOeval(
            truth, truth.loadRes(results), "bbox"
        )
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0, 2]  # of all areas, 100 boxes


@pytest.mark.parametrize("memory", ["device", "stream"])
def test_average_precision_with_crowds_is_that_of_pycocotools(memory: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    write_coco(tmp_path, rng, 12)
    data = DataConfig(dataset="coco", root=str(tmp_path), memory=memory, workers=0)
    _, test = load(data, "boxes")
    rows = guesses(tmp_path / "val.json", rng, 12)
    batches = list(ClientLoader(test, data, torch.device("cpu"), seed=0).batches(np.arange(12), 5))
    true = Boxes.cat(batch.targets for batch in batches if isinstance(batch.targets, Boxes))
    found = precisions(true, detections(rows), 2)
    expected = by_pycocotools(tmp_path / "val.json", rows)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert 0.2 < expected.mean() < 0.95
    without = precisions(true.counted(), detections(rows), 2)
    assert expected.mean() > without.mean() + 0.02, "crowds make a difference"


# ---- training ----


class Crowded(torch.utils.data.Dataset[tuple[Any, Any]]):
    """An image with an object and a crowd that is larger, and one with a crowd alone."""

    classes = ("car", "van")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        crowd, car = [0.0, 0, 14, 14], [4.0, 4, 12, 12]
        image = torch.full((3, 16, 16), 90, dtype=torch.uint8)
        if index:
            return image, {"boxes": [crowd], "labels": [1], "iscrowd": [1]}
        return image, {"boxes": [crowd, car], "labels": [1, 0], "iscrowd": [1, 0]}


def outputs() -> dict[str, Tensor]:
    """Return what a detector returns for two images."""
    anchors = torch.tensor([[0.0, 0, 14, 14], [4, 4, 12, 12], [0, 0, 4, 4]])
    generator = torch.Generator().manual_seed(1)
    return {
        "cls_logits": torch.randn(2, 3, 2, generator=generator),
        "bbox_regression": torch.randn(2, 3, 4, generator=generator),
        "anchors": anchors,
    }


def same(_: Any, label: Any) -> Any:
    """Return the label of a transform that changes nothing."""
    return _, label


@pytest.mark.parametrize("settings", [{}, {"memory": "stream"}, {"transform": f"{__name__}.same"}])
def test_training_goes_without_them(settings: dict[str, Any]) -> None:
    data = DataConfig(augment="crop-flip", workers=0, **settings)
    images: Images = from_dataset(Crowded(), data, "boxes")
    assert images.labels.tolist() == [0, 0], "the class that partitions split by is of objects that count"
    loader = ClientLoader(images, data, torch.device("cpu"), seed=0)
    (batch,) = loader.batches(np.arange(2), 2, rng=np.random.default_rng(0), train=True)
    assert isinstance(batch.targets, Boxes)
    assert batch.targets.ignored is None
    assert sorted(batch.targets.offsets.diff().tolist()) == [0, 1]
    (batch,) = loader.batches(np.arange(2), 2)
    assert isinstance(batch.targets, Boxes)
    assert batch.targets.ignored is not None
    assert batch.targets.ignored.tolist() == [CROWD, 0, CROWD]
    empty = torch.empty(0, 4), torch.empty(0, dtype=torch.int64)
    alone = Boxes.join([(torch.tensor([[4.0, 4, 12, 12]]), torch.tensor([0])), empty])
    task = Detection()
    assert torch.equal(task.losses(outputs(), batch.targets), task.losses(outputs(), alone))
    assert task.measure(outputs(), batch.targets)["boxes"].tolist() == [1, 0]
