"""The metric that a run is judged by, its clients by name, and the scores of a constant prediction."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from synthetic_runs import make_run

from fedddp.commands.run_info import find_runs, read_run_info
from fedddp.commands.show import describe
from fedddp.reporting.curves import read_all
from fedddp.reporting.report import constants
from fedddp.reporting.report import summary as summary_cells
from fedddp.reporting.runs import read_run
from fedddp.reporting.sections import clients, learning, mistakes
from fedddp.storage.client_rows import TAIL, client_table, constant_of, last_evaluation, named
from fedddp.storage.examined import parse_examined
from fedddp.storage.history import Metric, judged_by, read_json
from fedddp.storage.judged import averages_note, best_of, judged_together
from fedddp.tracking import overlays
from fedddp.tracking.derived import DerivedMetrics
from fedddp.tracking.status import Status
from fedddp.tracking.summary import run_score, summary

MEAN, IOU = "clients/iou_mean", "eval/iou"
CENTRES = [("Altstadt", 12, 0.8), ("Bergheim", 10, 0.3), ("Chur", 8, 0.4)]


def centres(folder: Path, *, best: Any = MEAN, constant: float = 0.25, last: float = 0.5) -> Path:
    """Write a run of three centres; the mean of their IoU is `last`, the IoU of the test 0.5625."""
    make_run(folder, "mask")
    config = json.loads((folder / "config.yaml").read_text())
    config["checkpoint"] = {"best": best}
    config["data"]["clients"] = 3
    (folder / "config.yaml").write_text(json.dumps(config))
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    for row in rows:
        row[MEAN] = last
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        {"round": n, "client": c, "name": name, "examples": size, "iou": iou - 0.1 * (n == 1)}
        | {"constant": constant + 0.1 * (c - 1)}
        for n in (1, 2)
        for c, (name, size, iou) in enumerate(CENTRES)
    ]
    (folder / "clients.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def printed(content: Any) -> list[list[str]]:
    """Return the cells of a table as it is printed at 80 columns."""
    console = Console(file=io.StringIO(), width=80)
    console.print(content)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


# ---- what a run is judged by ----


@pytest.mark.parametrize(
    ("best", "key"), [(MEAN, MEAN), ([MEAN, IOU], MEAN), (None, IOU), ([], IOU), ("eval/f1", IOU)]
)
def test_a_run_is_judged_everywhere_by_the_first_metric_of_checkpoint_best(
    best: Any, key: str, tmp_path: Path
) -> None:
    folder = centres(tmp_path / "runs" / "a", best=best)
    rows, first = history(folder), best_of({"checkpoint": {"best": best}})
    assert judged_by(rows, first) == Metric(key)
    status = Status(2, best=first)
    for row in rows:
        status.round(row)
    label = Metric(key).label
    found = {
        "progress": status.scores()[-1].label,
        "end": printed(summary(rows, folder, 2, finished=True))[0][0],
        "show": next(line[0] for line in printed(describe(read_run_info(folder))) if "IoU" in line[0]),
        "runs": Metric(find_runs(tmp_path)[0].score.name).label,  # type: ignore[union-attr]
        "report": summary_cells([read_run(folder)])[0][4],
        "compare": read_all([folder])[0].metric.label,
        "result": Metric(run_score(rows, folder).name).label,  # type: ignore[union-attr]
    }
    assert found == dict.fromkeys(found, label)
    derived = DerivedMetrics(rows, first).best
    assert ("best/clients/iou_mean" in derived, derived["best/iou"]) == (key == MEAN, 0.5625)


def test_a_row_without_the_chosen_metric_does_not_change_what_a_run_is_judged_by() -> None:
    status = Status(3, best="eval/loss")
    rows: list[dict[str, Any]] = [{IOU: 0.5, "eval/loss": 2.0}, {IOU: 0.6}, {IOU: 0.7, "eval/loss": 1.5}]
    for number, row in enumerate(rows, 1):
        status.round({"round": number, **row})
    assert [part.text for part in status.scores()] == ["test loss 1.5000 ↓0.5000"]


CHOSEN: dict[str, Any] = {"checkpoint": {"best": MEAN}}
BOTH, ALONE, TESTED = [{IOU: 0.5, MEAN: 0.4}], [{MEAN: 0.4}], [{IOU: 0.5, "eval/loss": 1.0}]


@pytest.mark.parametrize(
    ("histories", "configs", "keys"),
    [
        ([BOTH, BOTH], [CHOSEN, CHOSEN], [MEAN, MEAN]),
        ([BOTH, BOTH], [CHOSEN, {}], [MEAN, MEAN]),
        ([BOTH, ALONE], [{}, {}], [MEAN, MEAN]),
        ([BOTH, TESTED], [CHOSEN, {}], [IOU, IOU]),  # the second has no mean over clients
        ([TESTED, TESTED], [{"checkpoint": {"best": ["eval/loss"]}}, {}], [IOU, IOU]),
        ([TESTED], [{"checkpoint": {"best": ["eval/loss"]}}], ["eval/loss"]),
        ([ALONE, TESTED, BOTH], [{}, {}, CHOSEN], [MEAN, IOU, MEAN]),  # nothing is common
        ([[], []], [{}, CHOSEN], [None, None]),
    ],
)
def test_runs_side_by_side_are_judged_by_what_they_have_in_common(
    histories: Any, configs: Any, keys: list[str | None]
) -> None:
    assert [metric and metric.key for metric in judged_together(histories, configs)] == keys


# ---- clients by name, a constant prediction ----


@pytest.mark.parametrize(
    ("last", "constant", "below"),
    [(0.5, 0.25, False), (0.5, 0.5, True), (0.50004, 0.5, True), (0.5002, 0.5, False), (0.4, 0.5, True)],
)
def test_a_run_that_does_not_beat_a_constant_prediction_has_a_line_at_its_end(
    last: float, constant: float, below: bool, tmp_path: Path
) -> None:
    folder = centres(tmp_path / "a", last=last, constant=constant)
    lines = printed(summary(history(folder), folder, 2, finished=True))
    text = " ".join(" ".join(line) for line in lines)
    expected = f"not better than a constant prediction, {constant:.4f}: train longer, or try another local.lr"
    assert (expected in text) == below
    assert f"scores {constant:.4f} in mean IoU of clients" in constants([read_run(folder)])[0]


def test_of_a_test_the_constant_prediction_is_that_of_the_test(tmp_path: Path) -> None:
    folder = centres(tmp_path / "a", best=None)
    file = folder / "evaluation.json"
    for constant, below in ((0.5625, True), (0.56, False)):
        file.write_text(json.dumps({**read_json(file), "constant": {"iou": constant}}))
        text = str(printed(summary(history(folder), folder, 2, finished=True)))
        assert ("not better" in text) == below


def test_few_clients_are_listed_by_name_instead_of_tenths(tmp_path: Path) -> None:
    folder = centres(tmp_path / "a")
    expected = [["Altstadt", "12", "0.8000", "0.1500"], ["Bergheim", "10", "0.3000", "0.2500"]]
    expected += [["Chur", "8", "0.4000", "0.3500"]]
    for content in (summary(history(folder), folder, 2, finished=True), describe(read_run_info(folder))):
        lines = printed(content)
        at = next(i for i, line in enumerate(lines) if line[0] == "by client")
        assert lines[at] == ["by client", "client", "examples", "IoU", "constant prediction"]
        assert lines[at + 1 : at + 4] == expected
        assert "tenth" not in str(lines)
    run = read_run(folder)
    blocks = clients([run], ["a"]).blocks
    assert [re.findall("<td>([^<]*)</td>", block) for block in blocks if isinstance(block, str)] == [
        [cell for line in expected for cell in line]
    ]
    unnamed = [{key: value for key, value in row.items() if key != "name"} for row in run.clients]
    keys = [getattr(block, "key", "table") for block in clients([run], ["a"]).blocks]
    assert "clients iou_worst10" not in keys
    many = dataclasses.replace(run, clients=unnamed)
    keys = [getattr(block, "key", "table") for block in clients([many], ["a"]).blocks]
    assert ("clients iou_worst10" in keys, "table" in keys) == (True, False)
    (folder / "clients.jsonl").unlink()  # privacy.strict, secure aggregation
    assert "by client" not in str(printed(summary(history(folder), folder, 2, finished=True)))


def test_what_a_constant_prediction_scores_stands_beside_its_own_metric_alone() -> None:
    rows = [
        {"round": 1, "client": c, "name": name, "examples": 4, "iou": 0.5, "loss": 2.0, "constant": 0.25}
        for c, name in enumerate(("Rome", "Oslo"))
    ]
    assert [len(line) for line in client_table(rows, Metric(MEAN))] == [4, 4, 4]
    assert [*client_table(rows, Metric("eval/loss"))][:2] == [
        ("client", "examples", "loss"),
        ("Rome", "4", "2.0000"),
    ]
    assert constant_of(Metric(MEAN), rows, {}) == 0.25
    assert constant_of(Metric("clients/iou_worst10"), rows, {}) is None
    assert constant_of(Metric("clients/loss_mean"), rows, {}) is None
    assert named(rows, Metric(MEAN))
    assert not named([{**row, "name": str(row["client"])} for row in rows], Metric(MEAN)), "cameras"


def test_the_last_evaluation_is_read_from_the_end_of_a_long_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = centres(tmp_path / "a")
    file = folder / "clients.jsonl"
    file.write_text(file.read_text() + '{"round": 3, "cli')  # being written
    expected = [name for name, _, _ in CENTRES]
    assert [row["name"] for row in last_evaluation(folder)] == expected
    length = len(file.read_bytes()) - len(file.read_bytes().split(b"\n")[0]) // 2
    assert length < TAIL
    monkeypatch.setattr("fedddp.storage.client_rows.TAIL", length)
    assert [row["name"] for row in last_evaluation(folder)] == expected


def test_examples_that_are_not_recorded_are_not_zero(tmp_path: Path) -> None:
    folder = centres(tmp_path / "a")
    rows = history(folder)
    assert ["examples", "200"] in printed(summary(rows, folder, 2, finished=True))
    strict = [{key: value for key, value in row.items() if key != "train/examples"} for row in rows]
    assert not any(line[0] == "examples" for line in printed(summary(strict, folder, 2, finished=True)))
    assert "total/examples" not in DerivedMetrics(strict[:1]).numbers(strict[1])
    assert DerivedMetrics(rows[:1]).numbers(rows[1])["total/examples"] == 200


# ---- the report ----


def test_a_curve_is_drawn_once(tmp_path: Path) -> None:
    run = read_run(centres(tmp_path / "a"))
    blocks = learning([run], ["a"]).blocks
    assert "clients/iou_mean over rounds" in [getattr(block, "key", "") for block in blocks]
    assert len([block for block in blocks if "Dice leaves out background" in str(block)]) == 1
    assert "clients iou_mean" not in [getattr(block, "key", "") for block in clients([run], ["a"]).blocks]
    by_test = read_run(centres(tmp_path / "b", best=None))
    assert "clients iou_mean" in [getattr(block, "key", "") for block in clients([by_test], ["b"]).blocks]


def test_without_a_global_model_the_missing_matrix_has_the_right_reason(tmp_path: Path) -> None:
    run = dataclasses.replace(read_run(centres(tmp_path / "a")), examined=None)
    assert "when a run with test data ends" in mistakes([run]).missing
    assert "each client has a model of its own" in mistakes([dataclasses.replace(run, alone=True)]).missing


def test_margins_that_do_not_count_are_grey_in_the_prediction_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "mask", size=40)
    stored = load_file(folder / "wrong.safetensors")
    ignored = stored["truth"] == 255
    assert ignored.any()
    assert (stored["predicted"][ignored] != 255).all(), "the model predicts there"
    examined = parse_examined(folder, read_json(folder / "evaluation.json"))
    assert examined.masks is not None
    assert (examined.masks[1][ignored] == 255).all()
    np.testing.assert_array_equal(examined.masks[1][~ignored], stored["predicted"][~ignored])
    assert examined.images is not None
    true, predicted = (
        np.asarray(overlays.on_image(examined.images[0], side[0], 40, background=True))[0]
        for side in examined.masks
    )
    grey = examined.images[0][:, 0].T + 0.45 * (128.0 - examined.images[0][:, 0].T)
    np.testing.assert_array_equal(predicted, true)
    np.testing.assert_allclose(predicted, grey, atol=0.51)


@pytest.mark.parametrize(
    ("names", "task", "noted"),
    [
        ({"iou", "dice"}, {"name": "Segmentation"}, True),
        ({"iou", "dice"}, {"background": True}, True),
        ({"iou", "dice"}, {"background": False}, False),
        ({"iou"}, {}, False),
        ({"dice", "loss"}, {}, False),
    ],
)
def test_where_iou_and_dice_stand_together_a_note_names_their_classes(
    names: set[str], task: dict[str, Any], noted: bool
) -> None:
    assert (averages_note(names, {"task": task}) is not None) == noted
