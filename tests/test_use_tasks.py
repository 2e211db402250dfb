"""The card, the tables of `eval` and exported files of models that are no classifiers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from synthetic_runs import NAMES, TASKS, make_run
from torch import Tensor, nn

from fedddp.commands.use_tables import as_json, evaluation_tables
from fedddp.config.loader import dump_yaml, to_dict
from fedddp.config.schema import Config
from fedddp.evaluation import Metrics
from fedddp.inference import TrainedModel
from fedddp.inference.card import model_card
from fedddp.inference.metrics import ClientMetrics, RunMetrics, evaluate
from fedddp.inference.other_data import other_data
from fedddp.section import ConfigError
from fedddp.tasks import MultiLabel, Segmentation, Task


class Pixelwise(nn.Module):
    """Logits of three classes for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(images)
        return out


class Heads(Pixelwise):
    """Two outputs by name."""

    def forward(self, images: Tensor) -> Any:
        return {"scores": self.head(images).mean((2, 3)), "maps": self.head(images)}


def model(task: Task, module: nn.Module, side: int = 8) -> TrainedModel:
    return TrainedModel(module.eval(), tuple(NAMES["mask"]), (3, side, side), (0.5,) * 3, (0.5,) * 3, task)


# ---- the card ----


def with_model(folder: Path, target: str) -> Path:
    """Add what a card needs to a run that was written by hand."""
    make_run(folder, target)
    config: dict[str, Any] = to_dict(Config())
    config["data"] |= {"dataset": "scenes", "clients": 4}
    (folder / "config.yaml").write_text(dump_yaml({**config, "task": {"name": TASKS[target]}}))
    header = {
        "classes": json.dumps(NAMES[target]),
        "task": TASKS[target],
        "target": target,
        "fedddp": "0.1.0",
    }
    sizes = {"channels": 3, "size": [48, 48], "mean": [0.5] * 3, "std": [0.25] * 3}
    save_file(
        {"w": torch.zeros(3)}, folder / "model.safetensors", {**header, "preprocessing": json.dumps(sizes)}
    )
    return folder


EXPECTED = {
    "mask": (
        "pipeline_tag: image-segmentation",
        "A lenet that gives every pixel one of 3 classes, trained with FedAvg",
        "Its IoU on the test data is 0.5625.",
        "IoU and Dice per class:\n\n| class | IoU | Dice |\n| --- | --- | --- |\n"
        "| background | 0.9375 | 0.9688 |\n| road | 0.1875 | 0.2500 |\n| sky <0> | not tested | not tested |",
        "- It knows 3 classes and gives every pixel one of them.",
        "- The class with the lowest IoU is road: 0.1875.",
        "IoU over clients:\n\n| mean | worst 10 % | best 10 % | standard deviation |\n"
        "| --- | --- | --- | --- |\n| 0.2000 | 0.1000 | 0.3000 | 0.4000 |",
        "| pixel accuracy | 93.75 % |",
    ),
    "multilabel": (
        "pipeline_tag: image-classification",
        "A lenet for 3 labels, of which an image has any number",
        "Its F1 on the test data is 0.6250.",
        "| car & van | 0.1250 | not tested |",
        "- The class with the lowest F1 is car & van: 0.1250.",
    ),
    "boxes": (
        "pipeline_tag: object-detection",
        "A lenet that finds objects of 3 classes",
        "Its AP on the test data is 0.4375.",
        "AP per class:\n\n| class | AP |",
        "found.boxes.of(0)",
    ),
}


@pytest.mark.parametrize("target", EXPECTED)
def test_a_card_describes_the_task(target: str, tmp_path: Path) -> None:
    text = model_card(with_model(tmp_path / "a", target))
    for words in EXPECTED[target]:
        assert words in text, text
    assert "test examples" not in text, "a confusion matrix of masks counts pixels"


# ---- eval ----


def found(metrics: Metrics, confusion: Any, rows: list[Metrics]) -> RunMetrics:
    counts = None if confusion is None else torch.tensor(confusion)
    return RunMetrics("scenes", "data", 4, True, metrics, counts, ClientMetrics(rows, True, False, None))


def printed(measured: RunMetrics, of: TrainedModel) -> str:
    console = Console(record=True, width=120)
    for part in evaluation_tables(measured, of, "runs/a", best=False):
        console.print(part)
    return console.export_text()


def test_eval_has_a_table_of_classes_for_masks(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {
        **{"iou": 0.5625, "pixel_accuracy": 0.9375, "loss": 0.5},
        "iou_per_class": [0.9375, 0.1875, None],
        "dice_per_class": [0.96875, 0.25, None],
    }
    rows = [{"client": c, "examples": 3, "iou": (0.5, 0.125, 0.25)[c], "loss": 1.0} for c in range(3)]
    measured = found(metrics, [[1500, 20, 0], [7, 300, 0], [0, 0, 0]], rows)
    lines = [line.split() for line in printed(measured, model(Segmentation(), Pixelwise())).splitlines()]
    assert ["class", "pixels", "IoU", "Dice"] in lines
    assert ["background", "1,520", "0.9375", "0.9688"] in lines
    assert ["sky", "<0>", "0", "not", "tested", "not", "tested"] in lines
    clients = [line for line in lines if line[1:2] == ["3"]]
    assert [line[0] for line in clients] == ["1", "2", "0"], "the worst first"
    assert "IoU: mean 0.2917, worst tenth 0.1250, best tenth 0.5000," in " ".join(
        word for line in lines for word in line
    )
    content = as_json(measured, model(Segmentation(), Pixelwise()))
    assert content["per_class"]["iou"] == {"background": 0.9375, "road": 0.1875, "sky <0>": None}
    assert content["clients"]["metric"] == "iou"
    assert content["clients"]["iou"]["worst10"] == 0.125


class Masks(torch.utils.data.Dataset[tuple[Any, Any]]):
    """One image of 16 x 8 pixels, whose classes have other numbers than the model's."""

    classes = ("sky <0>", "road")

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        mask = np.zeros((16, 8), np.uint8)
        mask[8:], mask[4, 0] = 1, 255
        return np.zeros((16, 8, 3), np.uint8), mask


def other(root: str, train: bool) -> Masks:
    return Masks()


class Unknown(Masks):
    """A class that the model does not know."""

    classes = ("sky <0>", "river")


def unknown(root: str, train: bool) -> Unknown:
    return Unknown()


def test_masks_of_other_data_are_matched_by_the_names_of_classes() -> None:
    images = other_data(
        model(Segmentation(), Pixelwise()), Config().data.__class__(dataset=f"{__name__}.other")
    )
    assert images.pixels is not None
    assert images.pixels.shape == (1, 4, 8, 8), "the centre: rows 4 to 12"
    mask = images.pixels[0, 3]
    assert mask[0].tolist() == [255, *[2] * 7]
    assert mask[1:4].eq(2).all()
    assert mask[4:].eq(1).all()
    with pytest.raises(ConfigError, match="class 'river' is not one of the model's"):
        other_data(model(Segmentation(), Pixelwise()), Config().data.__class__(dataset=f"{__name__}.unknown"))


def test_labels_are_evaluated_in_the_order_of_the_model() -> None:
    class Labelled(torch.utils.data.Dataset[tuple[Any, Any]]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            return np.zeros((8, 8, 3), np.uint8), [[1, 0, 0], [0, 0, 1]][index]

    class Fixed(Pixelwise):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([[2.0, -2.0, -2.0]]).repeat(len(images), 1)

    metrics = evaluate(model(MultiLabel(), Fixed()), Labelled())
    assert metrics["f1"] == pytest.approx(2 * 1 / (2 * 1 + 1 + 1))
    assert metrics["f1_per_class"] == [pytest.approx(2 / 3), None, 0.0]


# ---- export ----


def test_an_exported_segmentation_model_gives_the_logits_of_every_pixel(tmp_path: Path) -> None:
    made = model(Segmentation(), Pixelwise())
    done = made.export(tmp_path / "a.pt2")
    assert done.compared.startswith(("the same logits as", "logits within"))
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=extra).module()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    wanted = made.module((images.float() / 255 - 0.5) / 0.5)
    torch.testing.assert_close(program(images), wanted, atol=1e-5, rtol=0)
    assert json.loads(extra["metadata.json"])["output"] == "logits: float32 (n, classes, height, width)"


def test_a_dictionary_of_outputs_keeps_its_names(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = model(Segmentation(), Heads())
    assert made.export(tmp_path / "a.onnx").outputs == "scores, maps"
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    assert [output.name for output in session.get_outputs()] == ["scores", "maps"]
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    wanted = made.module((images.float() / 255 - 0.5) / 0.5)
    for name, array in zip(("scores", "maps"), session.run(None, {"images": images.numpy()}), strict=True):
        torch.testing.assert_close(torch.from_numpy(array), wanted[name], atol=1e-5, rtol=0)


def test_other_outputs_are_refused_in_one_line(tmp_path: Path) -> None:
    class Listed(Pixelwise):
        def forward(self, images: Tensor) -> Any:
            return [self.head(images)]

    with pytest.raises(ConfigError, match="the module returns list; only a tensor or a dictionary"):
        model(Segmentation(), Listed()).export(tmp_path / "a.pt2")
