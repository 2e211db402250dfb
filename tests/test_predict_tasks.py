"""Masks, boxes and labels of image files: in pixels of the files, on disk and as JSON."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fedddp.cli import main
from fedddp.data.resizing import Placement, Resizing
from fedddp.data.targets import Boxes, Detections, Target
from fedddp.inference import TrainedModel, evaluate
from fedddp.inference.drawn import MaskOfFile, file_names
from fedddp.inference.pictures import LINE, MARGIN, contact_sheet
from fedddp.tasks import MultiLabel, Segmentation, Task

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)


class Channels(nn.Module):
    """Takes the three channels for the logits of three classes."""

    def forward(self, images: Tensor) -> Tensor:
        return images


class Means(nn.Module):
    """Takes the means of the channels for the logits of three labels."""

    def forward(self, images: Tensor) -> Tensor:
        return 8 * (images.mean((2, 3)) - 0.5)


@dataclass(frozen=True, kw_only=True)
class Found(Task):
    """Finds the same two boxes in every image."""

    target: ClassVar[Target] = "boxes"

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return torch.zeros(())

    def measure(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        return {}

    def predict(self, outputs: Tensor) -> Detections:
        one = torch.tensor([[0.0, 0.0, 10.0, 20.0], [5.0, 10.0, 50.0, 50.0]]), torch.tensor([2, 0])
        return Detections(Boxes.join([one] * len(outputs)), torch.tensor([0.9, 0.25]).repeat(len(outputs)))


def model(task: Task, module: nn.Module, side: int = 50) -> TrainedModel:
    """Return a model of three classes that sees colours as they are."""
    return TrainedModel(module, ("red", "green", "blue"), (3, side, side), (0.0,) * 3, (1.0,) * 3, task)


@pytest.fixture
def predicting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what runs `fedddp predict run ...` with a model that is made here."""
    Path("run").mkdir(exist_ok=True)

    def predict(made: TrainedModel, *words: str) -> None:
        monkeypatch.setattr("fedddp.commands.predict.chosen_model", lambda _: made)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "300")
            with pytest.raises(SystemExit) as stop:
                main(["predict", "run", *words])
        assert not stop.value.code

    return predict


def pixels_of(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the pixels of a picture."""
    with Image.open(path) as picture:
        return np.asarray(picture)


# ---- geometry ----


def test_a_box_is_given_back_in_pixels_of_the_image() -> None:
    """200 x 100 pixels become 100 x 50, of which the model sees columns 25 to 75."""
    placed = Placement.of((100, 200), (50, 50))
    assert (placed.tall, placed.broad, placed.top, placed.left) == (50, 100, 0, 25)
    boxes = placed.boxes(torch.tensor([[0.0, 0.0, 10.0, 20.0], [40.0, 45.0, 50.0, 50.0]]))
    assert boxes.tolist() == [[50, 0, 70, 40], [130, 90, 150, 100]]
    high = Placement.of((100, 40), (80, 80))  # 200 x 80, of which rows 60 to 140 are seen
    assert high.boxes(torch.tensor([[0.0, 0.0, 80.0, 80.0]])).tolist() == [[0, 30, 40, 70]]


@pytest.mark.parametrize("size", [(60, 90), (120, 60), (31, 47), (30, 30)])
def test_boxes_come_back_where_training_took_them_from(size: tuple[int, int]) -> None:
    box = torch.tensor([[size[1] / 2 - 6.0, size[0] / 2 - 5.0, size[1] / 2 + 7.0, size[0] / 2 + 4.0]])
    seen = Resizing(30).boxes(Boxes.join([(box, torch.tensor([0]))]), size).boxes
    torch.testing.assert_close(Placement.of(size, (30, 30)).boxes(seen), box)


def test_a_mask_is_given_back_at_the_size_of_the_image() -> None:
    classes = torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8)
    found = Placement.of((4, 8), (2, 2)).mask(classes)  # 2 x 4, of which columns 1 and 2 are seen
    o = 255
    assert found.tolist() == [
        [o, o, 0, 0, 1, 1, o, o],
        [o, o, 0, 0, 1, 1, o, o],
        [o, o, 2, 2, 3, 3, o, o],
        [o, o, 2, 2, 3, 3, o, o],
    ]


@pytest.mark.parametrize("size", [(60, 90), (120, 60), (90, 150)])
def test_masks_come_back_where_training_took_them_from(size: tuple[int, int]) -> None:
    factor = min(size) // 30
    small = torch.randint(0, 9, (size[0] // factor, size[1] // factor), generator=torch.Generator())
    mask = small.to(torch.uint8).repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    found = Placement.of(size, (30, 30)).mask(Resizing(30).mask(mask[None])[0])
    seen = found != 255
    assert int(seen.sum()) == (30 * factor) ** 2
    assert torch.equal(found[seen], mask[seen])


# ---- from Python ----


def bands(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an image (height, width, 3) whose left third is red, then green, then blue."""
    labels = np.repeat(np.arange(width) * 3 // width, height).reshape(width, height).T
    return COLOURS[labels]


def test_a_segmentation_model_gives_the_class_of_every_pixel() -> None:
    found = model(Segmentation(), Channels(), 6).predict([bands(6, 6)] * 2)
    assert found.dtype == torch.uint8
    assert found.tolist() == [[[0, 0, 1, 1, 2, 2]] * 6] * 2
    assert model(Segmentation(), Channels(), 6).predict([]).shape == (0, 6, 6)


def test_a_multilabel_model_gives_probabilities() -> None:
    image = np.zeros((6, 6, 3), np.uint8)
    image[..., 1] = 255
    found = model(MultiLabel(), Means(), 6).predict(image)
    low, high = 1 / (1 + np.exp(4)), 1 / (1 + np.exp(-4))
    np.testing.assert_allclose(found, [[low, high, low]], rtol=1e-5)


def test_detections_of_several_batches_are_joined() -> None:
    found = model(Found(), Channels()).predict([bands(50, 50)] * 3, batch_size=2)
    assert isinstance(found, Detections)
    assert (len(found.boxes), found.boxes.offsets.tolist()) == (3, [0, 2, 4, 6])
    assert found.boxes.of(2)[1].tolist() == [2, 0]
    assert found.scores.tolist() == pytest.approx([0.9, 0.25] * 3)
    assert len(model(Found(), Channels()).predict([]).boxes) == 0


class Pairs(torch.utils.data.Dataset[tuple[Any, Any]]):
    """Two images with masks."""

    classes = ("red", "green", "blue")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        mask = np.repeat(np.arange(6) // 2, 6).reshape(6, 6).T.astype(np.uint8)
        if index:
            mask[0] = 255  # does not count
            mask[1, :2] = 1  # two of red's pixels are green
        return bands(6, 6), mask


def test_evaluate_measures_masks() -> None:
    metrics = evaluate(model(Segmentation(), Channels(), 6), Pairs())
    # Red: 12 + 8 right, 2 predicted beside; green: 24 - 2 right, 2 missed; blue: all.
    assert metrics["iou_per_class"] == pytest.approx([20 / 22, 22 / 24, 1.0])
    assert metrics["pixel_accuracy"] == pytest.approx(64 / 66)


# ---- the command ----


def test_predict_writes_masks_that_can_be_read_back(
    predicting: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(bands(100, 180)).save(tmp_path / "wide.png")
    Image.fromarray(bands(50, 50)).save(tmp_path / "small.jpg", quality=100)
    segments = model(Segmentation(background=False), Channels())
    out = tmp_path / "out"
    predicting(segments, str(tmp_path), "--output", str(out), "--json", str(tmp_path / "all.json"))
    printed = capsys.readouterr().out
    assert "mask pixels outside of it are 255" in printed
    with Image.open(out / "wide.mask.png") as mask:
        assert (mask.mode, mask.size) == ("P", (180, 100))
        values, palette = np.asarray(mask), mask.getpalette()
    assert (values[:, :40] == 255).all(), "180 x 100 becomes 90 x 50, of which columns 20 to 70 are seen"
    assert (values[:, 140:] == 255).all()
    np.testing.assert_array_equal(values[:, 40:140], np.tile(np.arange(40, 140) // 60, (100, 1)))
    assert palette is not None
    assert palette[:6] == [255, 110, 58, 0, 141, 249]
    overlay = pixels_of(out / "wide.overlay.png")
    assert overlay.shape == (100, 180, 3)
    every = json.loads((tmp_path / "all.json").read_text())
    assert json.loads((out / "predictions.json").read_text()) == every
    found = {Path(one["image"]).name: one for one in every["predictions"]}
    wide = found["wide.png"]
    assert (wide["height"], wide["width"], wide["pixels_outside"]) == (100, 180, 8000)
    assert [(c["class"], c["pixels"]) for c in wide["classes"]] == [
        ("red", 2000),
        ("green", 6000),
        ("blue", 2000),
    ]
    assert [c["share"] for c in wide["classes"]] == pytest.approx([2 / 18, 6 / 18, 2 / 18])
    assert wide["share_outside"] == pytest.approx(8 / 18)
    assert json.loads((out / "predictions.json").read_text()) == json.loads(
        (tmp_path / "all.json").read_text()
    )
    (line,) = (line for line in printed.splitlines() if "wide.png" in line and "44.4 %" in line)
    assert line.split()[1:7] == ["(not", "seen)", "44.4", "%", "green", "33.3"]


def test_predict_writes_boxes_in_pixels_of_the_image(
    predicting: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full((100, 200, 3), 90, np.uint8)).save(tmp_path / "a.png")
    out = tmp_path / "out"
    predicting(model(Found(), Channels()), str(tmp_path / "a.png"), "--output", str(out))
    assert "1 × blue" in capsys.readouterr().out, "the other has a score of 0.25"
    with (out / "boxes.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "class", "score", "left", "top", "right", "bottom"]
    assert rows[1:] == [[str(tmp_path / "a.png"), "blue", "0.9", "50.0", "0.0", "70.0", "40.0"]]
    words = (str(tmp_path / "a.png"), "--output", str(out), "--threshold", "0.2", "--json", "-")
    predicting(model(Found(), Channels()), *words)
    (one,) = json.loads(capsys.readouterr().out)["predictions"]
    assert [(b["class"], b["box"]) for b in one["boxes"]] == [
        ("blue", [50, 0, 70, 40]),
        ("red", [60, 20, 150, 100]),
    ]
    picture = pixels_of(Path(one["picture"]))
    assert picture.shape == (2 * 100, 2 * 200, 3), "small images are enlarged, so that names can be read"
    assert tuple(picture[2 * 30, 2 * 70]) == (128, 0, 51), "the right edge of the blue box: the third colour"


def test_predict_prints_labels_above_the_threshold(
    predicting: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = np.zeros((50, 50, 3), np.uint8)
    image[..., 1], image[..., 2] = 255, 128
    Image.fromarray(image).save(tmp_path / "a.png")
    words = (str(tmp_path / "a.png"), "--json", "-", "--top", "1")
    predicting(model(MultiLabel(), Means()), *words)
    (one,) = json.loads(capsys.readouterr().out)["predictions"]
    assert [label["class"] for label in one["labels"]] == ["green", "blue"]
    assert one["labels"][1]["probability"] == pytest.approx(
        1 / (1 + np.exp(-8 * (128 / 255 - 0.5))), rel=1e-5
    )
    assert [c["class"] for c in one["classes"]] == ["green"]
    predicting(model(MultiLabel(), Means()), str(tmp_path / "a.png"), "--threshold", "0.9")
    assert "green 98.2 %" in capsys.readouterr().out
    predicting(model(MultiLabel(), Means()), str(tmp_path / "a.png"), "--threshold", "0.99")
    assert capsys.readouterr().out.split()[-1] == "none"


def test_the_caption_of_a_mask_is_the_share_of_its_foreground() -> None:
    mask = np.array([[0, 0, 1, 255], [0, 2, 2, 255]], dtype=np.uint8)  # 6 pixels that the model saw
    one = MaskOfFile(Path("a.png"), mask, ("sky", "road", "car"), Image.new("RGB", (4, 2)))
    caption = one.foreground(background=True)
    assert (caption.classes, caption.probabilities, caption.shares) == (("car, road",), (0.5,), True)
    assert one.foreground(background=False).probabilities == (1.0,)
    nothing = MaskOfFile(Path("a.png"), 0 * mask, ("sky", "road", "car"), Image.new("RGB", (4, 2)))
    assert nothing.foreground(background=True).classes == ("no foreground",)


@pytest.mark.parametrize("task", [Segmentation(), Found()])
def test_a_contact_sheet_of_masks_and_boxes(
    task: Task, predicting: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(bands(100, 180)).save(tmp_path / "a.png")
    sheet = tmp_path / "sheet.png"
    words = (str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), "--save", str(sheet))
    predicting(model(task, Channels()), *words)
    assert capsys.readouterr().out.splitlines()[-1] == str(sheet)
    assert pixels_of(sheet).shape[1] > 300


# ---- the folder of a call, and the model it is of ----


def content_of(folder: Path) -> tuple[set[str], Any]:
    """Return the names of the files in a folder but for `predictions.json`, and what that holds."""
    names = {path.name for path in folder.iterdir()}
    return names - {"predictions.json"}, json.loads((folder / "predictions.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Return the one line in which `fedddp predict run ...` is refused, after `predicting` was used."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["predict", "run", *map(str, words)])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_a_call_replaces_what_an_earlier_one_listed_and_nothing_else(
    predicting: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        Image.fromarray(bands(6, 6)).save(f"{name}.png")
    segments, folder = model(Segmentation(), Channels(), 6), Path("run") / "predictions"
    predicting(segments, "a.png", "b.png")
    names, content = content_of(folder)
    assert names == {f"{name}.{kind}.png" for name in "ab" for kind in ("mask", "overlay")}
    assert sorted(names) == content["files"]
    (folder / "notes.txt").write_text("mine")
    (folder / "c.overlay.png").write_text("mine")
    line = refused(capsys, "b.png", "c.png")
    assert "run/predictions/c.overlay.png exists, and predictions.json does not list it" in line
    assert content_of(folder)[1] == content, "nothing is written"
    (folder / "c.overlay.png").unlink()
    predicting(segments, "b.png", "c.png")
    names, content = content_of(folder)
    assert names == {f"{name}.{kind}.png" for name in "bc" for kind in ("mask", "overlay")} | {"notes.txt"}
    assert content["files"] == sorted(names - {"notes.txt"})
    assert [one["mask"] for one in content["predictions"]] == [str(folder / f"{n}.mask.png") for n in "bc"]
    Path("half.png").write_bytes(Path("a.png").read_bytes()[:40])
    assert "no image could be read" in refused(capsys, "half.png")
    assert content_of(folder) == (names, content)
    assert "run/predictions holds images to predict" in refused(capsys, folder / "b.overlay.png")


def test_a_call_that_was_interrupted_can_be_repeated(
    predicting: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        Image.fromarray(bands(6, 6)).save(f"{name}.png")
    segments, folder = model(Segmentation(), Channels(), 6), Path("run") / "predictions"
    predicting(segments, "b.png")
    (folder / "b.mask.png").unlink()
    (folder / "b.mask.png").mkdir()  # cannot be replaced, when a.mask.png is there already
    assert "cannot write run/predictions: Is a directory" in refused(capsys, "a.png", "b.png")
    assert (folder / "a.mask.png").is_file()
    (folder / "b.mask.png").rmdir()
    predicting(segments, "a.png", "b.png")
    assert content_of(folder)[0] == {f"{name}.{kind}.png" for name in "ab" for kind in ("mask", "overlay")}


@pytest.mark.parametrize(
    "text",
    ['[{"mask": "a.mask.png"}]', '{"files": ["../a.png"]}', '{"files": [".."]}', '{"files": "a"}', "{"],
)
def test_a_list_of_files_that_is_not_ours_deletes_nothing(
    text: str, predicting: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(bands(6, 6)).save("a.png")
    predicting(model(Segmentation(), Channels(), 6), "a.png", "--output", "out")
    names = content_of(Path("out"))[0]
    Path("out/predictions.json").write_text(text)
    assert "out/predictions.json is no list of files" in refused(capsys, "a.png", "--output", "out")
    assert {path.name for path in Path("out").iterdir()} == names | {"predictions.json"}
    assert Path("a.png").exists()


@pytest.mark.parametrize(
    ("words", "metadata", "folder", "text"),
    [
        ((), {}, "predictions", "final"),
        ((), {"client": "Oslo"}, "predictions-Oslo", "client Oslo, final"),
        ((), {"client": "a/b"}, "predictions-a%2Fb", "client a/b, final"),
        ((), {"client": "a+best"}, "predictions-a%2Bbest", "client a+best, final"),
        (
            ("--best",),
            {"metric": "eval/dice", "round": "7"},
            "predictions+best",
            "best by eval/dice, round 7",
        ),
        (
            ("--best=eval/iou",),
            {"client": "Oslo", "metric": "eval/iou", "round": "3"},
            *("predictions-Oslo+best-eval-iou", "client Oslo, best by eval/iou, round 3"),
        ),
    ],
)
def test_each_model_of_a_run_has_its_folder_and_is_named(
    words: tuple[str, ...],
    metadata: dict[str, str],
    folder: str,
    text: str,
    predicting: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.fromarray(bands(6, 6)).save("a.png")
    made = dataclasses.replace(model(Found(), Channels(), 50), metadata=metadata)
    predicting(made, "a.png", *words, "--save", "sheet.png", "--json", "all.json")
    assert f"model run ({text})" in capsys.readouterr().out.splitlines()
    names, content = content_of(Path("run") / folder)
    assert names == {"a.boxes.png", "boxes.csv"}
    assert content == json.loads(Path("all.json").read_text())
    number = int(metadata["round"]) if "round" in metadata else None
    best = words[0].partition("=")[2] or True if words else False
    known = {"run": "run", "best": best, "client": metadata.get("client"), "round": number}
    assert {name: content[name] for name in known} == known
    title = np.asarray(contact_sheet(f"run ({text}): 1 images", []))[: MARGIN + 2 * LINE]
    sheet = pixels_of(Path("sheet.png"))
    wide = min(title.shape[1], sheet.shape[1])
    np.testing.assert_array_equal(sheet[: MARGIN + LINE, :wide], title[: MARGIN + LINE, :wide])


def test_the_final_model_is_of_the_last_round_of_the_history(
    predicting: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run/history.jsonl").write_text('{"round": 1}\n{"round": 2}\n')
    Image.fromarray(bands(6, 6)).save("a.png")
    predicting(model(MultiLabel(), Means(), 6), "a.png")
    assert "model run (final, round 2)" in capsys.readouterr().out.splitlines()


def test_masks_and_earlier_predictions_are_not_predicted(
    predicting: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("A/images", "A/masks", "B/train/Images", "B/train/Labels", "C/masks", "D"):
        folder = Path("hosp") / place
        folder.mkdir(parents=True)
        Image.fromarray(bands(6, 6)).save(folder / "p.png")
    segments = model(Segmentation(), Channels(), 6)
    predicting(segments, "hosp", "--output", "hosp/out")
    left = "hosp: masks are left out (hosp/A/masks, hosp/B/train/Labels)"
    assert capsys.readouterr().out.splitlines()[0] == left
    names, content = content_of(Path("hosp/out"))
    images = [f"hosp/{place}/p.png" for place in ("A/images", "B/train/Images", "C/masks", "D")]
    assert [one["image"] for one in content["predictions"]] == images, "C has no images beside the masks"
    (Path("hosp/out") / "more").mkdir()
    Image.fromarray(bands(6, 6)).save("hosp/out/more/p.png")
    predicting(segments, "hosp", "hosp/D/../D/p.png", "--output", "hosp/out")
    assert "hosp: earlier predictions are left out (hosp/out)" in capsys.readouterr().out.splitlines()
    assert content_of(Path("hosp/out")) == (names | {"more"}, content)
    predicting(segments, "hosp/A/masks", "--json", "-", "--output", "out")
    assert len(json.loads(capsys.readouterr().out)["predictions"]) == 1, "they are named"


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        (Segmentation(), ("--threshold", "0.5"), "--threshold is for labels and boxes"),
        (MultiLabel(), ("--output", "x"), "--output is for masks and boxes"),
        (MultiLabel(), ("--threshold", "2"), "--threshold must be in [0, 1], got 2"),
    ],
)
def test_options_of_another_task_are_refused(
    task: Task,
    flags: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.fromarray(bands(10, 10)).save(tmp_path / "a.png")
    Path("run").mkdir()
    monkeypatch.setattr("fedddp.commands.predict.chosen_model", lambda _: model(task, Channels()))
    with pytest.raises(SystemExit):
        main(["predict", "run", str(tmp_path / "a.png"), *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (("a/1.png", "a/2.png"), ["1", "2"]),
        (("a/1.png", "a/1.jpg"), ["1.png", "1.jpg"]),
        (("a/1.png", "b/1.png"), ["a-1", "b-1"]),
        (("x/a/1.png", "y/a/1.png"), ["x-1", "y-1"]),
        (("h/A/images/p.png", "h/B/images/p.png", "h/B/images/q.png"), ["A-p", "B-p", "B-q"]),
        (("A/train/1.png", "A/val/1.png", "B/val/1.png"), ["A-train-1", "A-val-1", "B-val-1"]),
        (("A/1.png", "A/1.jpg", "B/1.png"), ["A-1.png", "A-1.jpg", "B-1.png"]),
        (("a/b/1.png", "b/a/1.png"), ["b-1", "a-1"]),
        (("1.png", "n/1.png"), ["1", "n-1"]),
        (
            ("a-b/c.png", "a/b-c.png", "a/c.png", "a-b/b-c.png"),
            ["a-b-c.png", "a-b-c.png-2", "a-c.png", "a-b-b-c.png"],
        ),
    ],
)
def test_files_are_named_apart(files: tuple[str, ...], names: list[str]) -> None:
    assert file_names([Path(file) for file in files]) == names
