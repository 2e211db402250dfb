"""Reports, comparisons and lists of runs that are judged by other metrics than accuracy."""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file, save_file
from synthetic_runs import NAMES, TASKS, make_run

from fedddp.cli import main
from fedddp.reporting.classes import class_table, over_rounds
from fedddp.reporting.curves import read, read_all
from fedddp.reporting.gallery import gallery
from fedddp.reporting.render import panels
from fedddp.reporting.report import summary as summary_cells
from fedddp.reporting.report import write_report
from fedddp.reporting.runs import read_run
from fedddp.reporting.tables import cells, goal_text, note, paper_cells, target_of
from fedddp.storage.history import Metric, judged_by, main_metric
from fedddp.tracking import overlays
from fedddp.tracking.summary import score_of
from fedddp.tracking.tracker import TrackingConfig
from fedddp.tracking.trackers import Ending, RunDescription, pictures
from fedddp.tracking.trackers import class_table as class_rows
from fedddp.tracking.wandb_run import WandbRun

each_task = pytest.mark.parametrize("target", [t for t in TASKS if t != "class"])


# ---- the metric that a run is judged by ----


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"eval/loss": 1.0, "eval/iou": 0.5, "eval/accuracy": 0.1}, "eval/accuracy"),
        ({"eval/loss": 1.0, "eval/iou_per_class": [1.0], "eval/iou": 0.5, "eval/dice": 0.9}, "eval/iou"),
        ({"eval/dice_loss": 1.0, "eval/loss": 0.5}, "eval/loss"),
        ({"eval/dice_loss": 1.0}, "eval/dice_loss"),
        ({"eval/accuracy": None, "eval/ap": float("nan"), "eval/loss": 2.0}, "eval/loss"),
        ({"train/loss": 1.0}, None),
    ],
)
def test_a_row_is_judged_by_its_accuracy_or_the_first_score_or_the_loss(
    row: dict[str, Any], key: str | None
) -> None:
    assert main_metric(row) == key


def test_a_run_is_judged_by_one_metric_even_if_its_last_row_lacks_it() -> None:
    rows: list[dict[str, Any]] = [{"round": 1, "eval/iou": 0.25, "eval/loss": 1.0}]
    rows.append({"round": 2, "eval/iou": None, "eval/loss": 0.5})
    assert judged_by(rows) == Metric("eval/iou")
    score = score_of(rows)
    assert score is not None
    assert (score.name, score.last, score.last_round) == ("eval/iou", 0.25, 1)


@pytest.mark.parametrize(
    ("key", "text", "title", "heading", "sign"),
    [
        ("eval/accuracy", "94.17 %", "test accuracy in %", "Accuracy", 1),
        ("eval/iou", "0.9417", "test IoU", "IoU", 1),
        ("eval/map", "0.9417", "test mAP", "mAP", 1),
        ("eval/pixel_accuracy", "94.17 %", "test pixel accuracy in %", "Pixel accuracy", 1),
        ("eval/loss", "0.9417", "test loss", "Test loss", -1),
    ],
)
def test_percent_is_for_accuracies_and_lower_is_better_for_losses(
    key: str, text: str, title: str, heading: str, sign: int
) -> None:
    metric = Metric(key)
    assert (metric.text(0.94174), metric.axis, metric.heading, metric.sign) == (text, title, heading, sign)


# ---- comparisons ----


def history(folder: Path, key: str, values: list[float]) -> Path:
    """Write a run whose `key` has these values, with 10 examples per round."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{seed: 0, algorithm: {name: FedAvg}}")
    rows = [
        {"round": n, key: value, "train/examples": 10, "time/round": 1.0} for n, value in enumerate(values, 1)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "model.safetensors").touch()
    return folder


def test_a_table_of_segmentation_runs_shows_the_iou(tmp_path: Path) -> None:
    curves = [read(history(tmp_path / "a", "eval/iou", [0.2, 0.55, 0.5]))]
    curves.append(read(history(tmp_path / "b", "eval/iou", [0.1, 0.3, 0.4])))
    target = target_of(curves)
    assert target == pytest.approx(0.52), "95 % of 0.55 is 0.5225"
    header, first, second = cells(curves, target)
    assert header[:3] == ["run", "IoU", "rounds"]
    assert first[:4] == ["a", "0.5000", "2 / 3", "20 / 30"]
    assert second[:3] == ["b", "0.4000", "– / 3"]
    assert note(curves, target).startswith("a / b: to a test IoU of 0.52 / in all.")
    assert paper_cells(curves, target)[0][:4] == ["", "seeds", "IoU", "best IoU"]
    assert paper_cells(curves, target)[1][2:5] == ["0.5000", "0.5500", "2.0"]


def test_a_race_to_a_loss_goes_downwards(tmp_path: Path) -> None:
    curve = read(history(tmp_path / "a", "eval/loss", [2.0, 1.02, 1.0, 1.5]))
    assert curve.best == 1.0
    assert target_of([curve]) == pytest.approx(1.05), "5 % above the lowest"
    assert curve.reach(1.05)["rounds"] == 2
    assert curve.reach(0.9)["rounds"] != curve.reach(0.9)["rounds"], "NaN: never"
    assert cells([curve], 1.05)[0][1] == "test loss"


@pytest.mark.parametrize(("best", "target"), [(0.02, 0.019), (0.5, 0.47), (0.0, 0.0), (0.0123, 0.011)])
def test_the_target_of_small_scores_keeps_two_digits(best: float, target: float, tmp_path: Path) -> None:
    curve = read(history(tmp_path / "a", "eval/ap", [0.0, best]))
    assert target_of([curve]) == pytest.approx(target, rel=1e-9)
    assert goal_text(curve.metric, target) == f"{target:g}"


def test_a_panel_of_a_comparison_is_drawn_in_units_of_its_metric(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    curves = read_all([history(tmp_path / n, "eval/iou", [0.25, 0.5]) for n in "ab"])
    found = panels(curves, 0.4)
    assert "IoU over rounds" in found
    axes = Figure().subplots()
    found["IoU over rounds"](axes)
    assert axes.get_ylabel() == "test IoU"
    line, *_, target = axes.get_lines()
    assert list(np.asarray(line.get_ydata(), float)) == [0.25, 0.5]
    assert (float(np.asarray(target.get_ydata(), float)[0]), target.get_label()) == (0.4, "target 0.4")


def run(words: list[str]) -> None:
    """Run a command that succeeds."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert not stop.value.code


def test_runs_of_two_tasks_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history(tmp_path / "a", "eval/iou", [0.5])
    history(tmp_path / "b", "eval/accuracy", [0.5])
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path)])
    assert capsys.readouterr().err == (
        "error: a is judged by eval/iou, but b by eval/accuracy; compare runs of one task\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--accuracy 0.5", "--accuracy is not for runs that are judged by eval/iou; give --target"),
        ("--target nan", "--target must be a finite number"),
        ("--target 0.3 --accuracy 0.3", "exclude each other"),
    ],
)
def test_a_target_that_cannot_be_is_refused(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history(tmp_path / "a", "eval/iou", [0.2, 0.5])
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path), *flags.split()])
    assert message in capsys.readouterr().err


def test_accuracy_is_refused_before_a_run_of_another_task_is_trained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "compare digits --task Segmentation --data.dataset scenes --model.name unet --accuracy 0.5"
    with pytest.raises(SystemExit):
        main(words.split())
    assert "digits has task=Segmentation; give --target" in capsys.readouterr().err


def test_compare_races_to_the_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history(tmp_path / "a", "eval/iou", [0.2, 0.5])
    run(["compare", str(tmp_path), "--target", "0.15"])
    assert "to a test IoU of 0.15" in capsys.readouterr().out
    text = (tmp_path / "comparison.md").read_text()
    assert "| a | 0.5000 | 1 / 2 |" in text
    page = (tmp_path / "comparison.html").read_text()
    assert "<h2>IoU</h2>" in page
    assert "ccuracy" not in page.split("<body>")[1].split("<script")[0]


def test_runs_are_sorted_by_what_they_are_judged_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, key, values in (
        ("a", "eval/iou", [0.5, 0.25]),
        ("b", "eval/iou", [0.75]),
        ("c", "eval/loss", [0.5]),
        ("d", "eval/loss", [0.25, 3.0]),
        ("e", "eval/accuracy", [0.1]),
    ):
        history(tmp_path / name, key, values)
    for flag in ("score", "accuracy"):
        run(["runs", str(tmp_path), "--sort", flag])
        lines = capsys.readouterr().out.splitlines()[1:6]
        assert [line.split()[0] for line in lines] == ["e", "b", "a", "d", "c"], "of a loss the lowest first"
    assert "IoU 0.7500 (1)" in lines[1]
    assert " 10.00 % (1)" in lines[0]


# ---- the report ----


def page_of(folder: Path) -> str:
    return write_report([folder]).read_text()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each task."""
    base = tmp_path_factory.mktemp("runs")
    return {target: make_run(base / target, target, size=SIZES.get(target, 48)) for target in TASKS}


@pytest.fixture(scope="module")
def texts(folders: dict[str, Path]) -> dict[str, str]:
    """The page of the run with masks; of the others, as pages take long to draw, what tests read of it."""
    found = {"mask": page_of(folders["mask"])}
    for target in ("multilabel", "boxes"):
        run = read_run(folders[target])
        assert run.examined is not None
        found[target] = "".join([*class_table(0, run, [run.name]), gallery(0, run, run.examined).content])
    return found


SIZES = {"boxes": 40}

Texts = dict[str, str]


def table(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table behind a heading."""
    part = text[text.index(heading) :]
    rows = re.findall(r"<tr>(.*?)</tr>", part[: part.index("</table>")])
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]


def test_the_tables_of_classes_have_the_last_rows_numbers(texts: Texts) -> None:
    expected = {
        "mask": [
            ["class", "IoU", "Dice"],
            ["background", "0.9375", "0.9688"],
            ["road", "0.1875", "0.2500"],
            ["sky &lt;0&gt;", "–", "–"],
        ],
        "multilabel": [
            ["class", "F1", "AP"],
            ["rain", "0.5000", "0.8750"],
            ["night", "0.7500", "0.2500"],
            ["car &amp; van", "0.1250", "–"],
        ],
        "boxes": [["class", "AP"], ["car", "0.5000"], ["person", "0.3750"], ["bike", "–"]],
    }
    for target, rows in expected.items():
        assert table(texts[target], "Classes after round 2") == rows


def test_the_page_of_a_classification_run_has_no_table_of_classes(folders: dict[str, Path]) -> None:
    run = read_run(folders["class"])
    assert class_table(0, run, [run.name]) == []
    assert [chart.title for chart in over_rounds(0, run)] == ["Recall of each class"]


def test_the_summary_is_of_the_judged_metric(texts: Texts) -> None:
    text = texts["mask"]
    header, row = table(text, "<h2>Summary")
    assert header[4:8] == ["IoU", "best (round)", "worst 10 %", "test loss"]
    assert row[4:8] == ["0.5625", "0.5625 (2)", "0.1000", "0.4000"]
    for label in ("test IoU", "pixel accuracy in %", ">Dice<", "IoU of each client", "IoU of each class"):
        assert label in text
    assert "test accuracy" not in text


def test_a_page_of_two_tasks_names_the_metric_of_each_run(folders: dict[str, Path]) -> None:
    header, first, second = summary_cells([read_run(folders[target]) for target in ("mask", "class")])
    assert (header[4], first[4], second[4]) == ("score", "IoU 0.5625", "accuracy 75.00 %")


def drawn(text: str) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Return the pictures of a page as arrays (H, W, 3)."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    files = (io.BytesIO(base64.b64decode(source)) for source in found)
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def test_the_page_shows_image_truth_and_prediction_side_by_side(
    texts: Texts, folders: dict[str, Path]
) -> None:
    text, folder = texts["mask"], folders["mask"]
    pictures_of_page = drawn(text)
    assert len(pictures_of_page) == 12
    tensors = load_file(folder / "wrong.safetensors")
    image = np.moveaxis(tensors["images"][0], 0, -1)
    side = 192 // 48
    for shown, mask in zip(pictures_of_page[:3], (None, *(tensors[n][0] for n in ("truth", "predicted")))):  # noqa: B905
        small = shown[side // 2 :: side, side // 2 :: side].astype(int)  # the centre of each enlarged pixel
        assert shown.shape == (192, 192, 3)
        for y, x in itertools.product(range(4, 44, 5), repeat=2):
            wanted = image[y, x].astype(float)
            near = None if mask is None else mask[y - 1 : y + 2, x - 1 : x + 2]
            if near is not None and (near != near[1, 1]).any():
                continue  # an edge
            colour = None if near is None else {0: None, 1: (255, 110, 58), 2: (0, 141, 249)}[int(near[1, 1])]
            if colour is not None:
                wanted = 0.55 * wanted + 0.45 * np.array(colour)
            np.testing.assert_allclose(small[y, x], wanted, atol=0.51)
    legend = re.findall(r'<li><i style="background: (#\w+)"></i>(.*?)</li>', text)
    assert legend == [("#ff6e3a", "road"), ("#008df9", "sky &lt;0&gt;"), ("#808080", "not counted")]
    assert "test example 7, loss 1.250" in text


def test_with_no_background_class_0_has_a_colour_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "mask")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        config.replace('"Segmentation"', '"Segmentation", "background": false')
    )
    assert '<i style="background: #ff6e3a"></i>background' in page_of(folder)


def test_boxes_are_drawn_at_their_places(texts: Texts) -> None:
    picture, *_ = drawn(texts["boxes"])
    assert picture.shape == (320, 320, 3), "40 pixels, times 8"
    orange, blue = (255, 110, 58), (0, 141, 249)
    # The true car is a solid line from (4, 8) to (20, 28), times 8; the person from (24, 20) to (36, 38).
    assert all(tuple(picture[y, 8 * 4]) == orange for y in range(8 * 8 + 30, 8 * 28 - 2))
    assert all(tuple(picture[y, 8 * 36]) == blue for y in range(8 * 20 + 2, 8 * 38 - 2))
    # The predicted car, from (4.8, 10) to (22, 27.2), is broken.
    dashes = [tuple(picture[y, 8 * 22]) == orange for y in range(8 * 10 + 20, 8 * 27)]
    assert 0.3 < np.mean(dashes) < 0.7
    # The box of score 0.1 around all is not drawn.
    assert not any(tuple(picture[y, 1]) == blue for y in range(20, 300))


def test_labels_are_listed_with_what_was_missed_and_what_is_extra(texts: Texts) -> None:
    items = re.findall(r"<span>(true: .*?)</span>", texts["multilabel"])
    assert items[0].split("<br>") == [
        "true: rain, car &amp; van",
        "<b>missed: car &amp; van</b>",
        "<b>extra: night</b>",
        "loss 2.500",
    ]
    assert items[1] == "true: none<br><b>extra: night</b><br>loss 1.250"
    assert items[3] == "true: rain<br>loss 0.625"


def test_the_confusion_matrix_of_masks_is_in_pixels(texts: Texts) -> None:
    text = texts["mask"]
    assert "Confusion matrix in pixels" in text
    for number in ("812k", "1200", "4100", "21k"):
        assert f">{number}</text>" in text


@each_task
def test_a_page_of_a_run_without_pictures_or_with_corrupt_ones(target: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", target)
    tensors = load_file(folder / "wrong.safetensors")
    (folder / "wrong.safetensors").unlink()
    run = read_run(folder)
    assert run.examined is not None
    assert "loss 2.500" in gallery(0, run, run.examined).content
    name = {"mask": "predicted", "boxes": "truth.labels"}.get(target, "images")
    tensors[name] = tensors[name][:-1]
    save_file(tensors, folder / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"evaluation\.json is corrupt"):
        read_run(folder)


# ---- colours ----


def test_colours_differ_for_all_readers() -> None:
    """Also for those without red or green cones: Machado et al. (2009), severity 1; distances in Oklab."""
    colours = np.array([overlays.class_colour(label, background=False) for label in range(12)]) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    without_red = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216]]
    without_red += [[-0.003882, -0.048116, 1.051998]]
    without_green = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413]]
    without_green += [[-0.011820, 0.042940, 0.968881]]
    to_cones = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    to_cones += [[0.0883024619, 0.2817188376, 0.6299787005]]
    to_lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]]
    to_lab += [[0.0259040371, 0.7827717662, -0.8086757660]]
    for seen in (linear, linear @ np.array(without_red).T, linear @ np.array(without_green).T):
        lab = np.cbrt(seen.clip(0, 1) @ np.array(to_cones).T) @ np.array(to_lab).T
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 0.11


def test_background_is_black_and_other_classes_keep_their_colours() -> None:
    assert overlays.class_colour(0, background=True) == (0, 0, 0)
    assert overlays.class_colour(1, background=True) == overlays.class_colour(0, background=False)
    assert len(overlays.palette(background=True)) == 768
    assert overlays.palette(background=False)[-3:] == [128, 128, 128]
    first = [overlays.class_colour(label, background=False) for label in range(36)]
    assert len(set(first)) == 36


# ---- trackers ----


@each_task
def test_trackers_get_the_table_of_classes_and_the_worst_examples(target: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", target, size=60)
    last = json.loads((folder / "history.jsonl").read_text().splitlines()[-1])
    ending = Ending(2, [], folder / "model.safetensors", last, failed=False)
    found = class_rows(folder, ending)
    assert found is not None
    assert (
        found[0]
        == {
            "mask": ["class", "iou", "dice"],
            "multilabel": ["class", "f1", "ap"],
            "boxes": ["class", "ap"],
        }[target]
    )
    assert [row[0] for row in found[1]] == NAMES[target]
    drawn_pictures = pictures(folder, ending)
    assert ("eval/worst" in drawn_pictures) == (target != "multilabel")
    without = pictures(folder, ending, of_images=False)
    assert {*drawn_pictures} - {*without} == ({"eval/worst"} & {*drawn_pictures})
    if target == "mask":  # 4 examples of 3 pictures, 60 pixels times 4, with gaps of 6
        assert drawn_pictures["eval/worst"].shape == (4 * 240 + 18, 3 * 240 + 12, 3)


@pytest.mark.parametrize("target", ["mask", "boxes"])
def test_wandb_gets_masks_and_boxes(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from fedddp.storage.examined import parse_examined
    from fedddp.tracking.wandb_run import _annotated

    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "Image", lambda picture, **about: calls.append(about))
    folder = make_run(tmp_path / "a", target, size=40)
    examined = parse_examined(folder, json.loads((folder / "evaluation.json").read_text()))
    _annotated(examined, 1, NAMES[target])
    assert calls[0]["caption"] == "test example 7, loss 1.250"
    if target == "mask":
        truth = calls[0]["masks"]["ground_truth"]
        assert truth["class_labels"] == {0: "background", 1: "road", 2: "sky <0>", 255: "not counted"}
        np.testing.assert_array_equal(truth["mask_data"], load_file(folder / "wrong.safetensors")["truth"][1])
    else:
        box = calls[0]["boxes"]["predictions"]["box_data"][0]
        assert box["position"] == pytest.approx({"minX": 4.8, "minY": 10, "maxX": 22, "maxY": 27.2})
        assert box["scores"] == {"score": 0.875}
        assert (box["class_id"], box["box_caption"], box["domain"]) == (0, "car", "pixel")


def test_the_end_of_a_run_prints_the_metric(tmp_path: Path) -> None:
    from fedddp.tracking.summary import summary

    folder = make_run(tmp_path / "a", "mask")
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    console = Console(file=io.StringIO(), width=100)
    console.print(summary(rows, folder, 2, finished=True))
    first = console.file.getvalue().splitlines()[0]  # type: ignore[attr-defined]
    assert re.split(r"\s{2,}", first.strip()) == ["IoU", "0.5625 in round 2, the best"]


class Recorded:
    """Keeps what would be logged to a wandb run."""

    def __init__(self, offline: bool) -> None:
        self.offline = offline
        self.keys: set[str] = set()

    def log(self, values: dict[str, Any], step: int) -> None:
        self.keys |= values.keys()


@pytest.mark.parametrize(("offline", "wanted"), [(False, True), (False, False), (True, True)])
def test_pictures_of_test_images_that_are_uploaded_are_logged_and_can_be_left_out(
    offline: bool, wanted: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_run(tmp_path / "a", "mask")
    (folder / "report.html").write_text("<p>")
    run, own = WandbRun.__new__(WandbRun), Recorded(offline)
    tracking = TrackingConfig(pictures=wanted, report=True)
    run._described, run._run = RunDescription(tracking, folder, {}, "a", 0), own  # type: ignore[assignment]
    ending = Ending(2, [], folder / "model.safetensors", {}, failed=False)
    with caplog.at_level(logging.INFO, "fedddp"):
        run._log_pictures(ending)
        run._log_report(ending)
    assert own.keys >= {"clients/split", "round"}
    assert ({"eval/worst", "report"} <= own.keys) == wanted
    uploaded = [line for line in caplog.messages if "--tracking.pictures false leaves them out" in line]
    assert len(uploaded) == (2 if wanted and not offline else 0)
