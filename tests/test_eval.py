"""What `fedddp eval` and the other commands do with odd runs, data and names."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from launching import call, error, evaluated, printed
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedddp import Federation, LocalConfig, TrackingConfig, load_config
from fedddp.federation import Result
from fedddp.reporting.curves import over_seeds, read
from fedddp.reporting.tables import terminal
from fedddp.tracking.heat_map import heat_map

QUIET = TrackingConfig(trackers=[], progress=False)
FEW = ["--data.clients", "4", "--cohort.size", "4", "--rounds", "2"]
ODD = ["cat [b]", "x[/y]", ":dog:"]
TWICE = ["a", "a", "b"]
MANY = [f"kind {label}" for label in range(1001)]


class Stripes(Dataset[tuple[Tensor, int]]):
    """Pictures of one bright row, which is their class."""

    def __init__(self, classes: list[str], labels: list[int]) -> None:
        self.classes, self.targets = classes, labels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.randint(0, 120, (1, 8, 8), generator=torch.Generator().manual_seed(index))
        image[0, self.targets[index] % 3] += 100
        return image.byte(), self.targets[index]


def twice(root: str, train: bool) -> Dataset[Any]:
    return Stripes(TWICE, [0, 1, 2] * 8)


def swapped(root: str, train: bool) -> Dataset[Any]:
    return Stripes(["b", "a"], [0, 1] * 8)


def nameless(root: str, train: bool) -> Dataset[Any]:
    return Stripes(["a"], [0, 1, 2] * 8)


def many(root: str, train: bool) -> Dataset[Any]:
    return Stripes(MANY, [0, 1, 1000] * 8)


def odd_data(root: str, train: bool) -> Dataset[Any]:
    return Stripes(ODD, [0, 1, 2] * 8)


class Net(nn.Module):
    """A linear model."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits


def make_net(num_classes: int) -> nn.Module:
    return Net(num_classes)


class Recorder:
    """A callable that is no function, and remembers its calls."""

    __name__ = "recorder"
    calls = 0

    def __call__(self) -> nn.Module:
        Recorder.calls += 1
        return nn.Identity()


RECORDER = Recorder()


def train_stripes(folder: Path, name: str, classes: list[str], labels: list[int]) -> Result:
    """Train on stripes whose classes have any names."""
    config = load_config(None, [*FEW, "--data.partition", "IID", "--output", str(folder), "--name", name])
    data = Stripes(classes, labels)
    module = Net(len(classes))
    result: Result = Federation(config, module=module, train=data, test=data, tracking=QUIET).run()
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("the runs")


@pytest.fixture(scope="module")
def odd(runs: Path) -> Result:
    """A run whose classes and folder look like markup."""
    return train_stripes(runs / "lr[b]", "odd", ODD, [0, 1, 2] * 8)


@pytest.fixture(scope="module")
def ditto(runs: Path) -> Result:
    """A run whose clients keep a whole convolutional model each, in the memory layout channels-last."""
    data = "--data.dataset digits --data.examples 300 --data.holdout 0.25 --evaluation.clients 4"
    flags = [*FEW, *data.split(), "--model.name", "cnn", "--algorithm", "Ditto"]
    config = load_config(None, [*flags, "--output", str(runs), "--name", "ditto"])
    local = LocalConfig(epochs=2, batch_size=16, lr=0.1, channels_last=True)
    result: Result = Federation(config, local=local, tracking=QUIET).run()
    return result


# ---- what the clients keep ----


def test_the_layout_of_what_clients_keep_is_that_of_their_checkpoint(
    ditto: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not that of the settings, which may have been resumed on another device."""
    shutil.copytree(ditto.folder, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["local"]["channels_last"] = "auto"
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["sessions"][-1]["device"] = "cuda (NVIDIA H100)"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    rows = evaluated(capsys, str(tmp_path / "run"))["clients"]["rows"]
    lines = [json.loads(line) for line in (ditto.folder / "clients.jsonl").read_text().splitlines()]
    recorded = [{n: v for n, v in line.items() if n != "round"} for line in lines if line["round"] == 2]
    assert len(recorded) == 4
    for row, expected in zip(rows, recorded, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("best_round", [1, 2])
def test_the_best_model_does_not_go_with_what_clients_keep_of_another_round(
    best_round: int, ditto: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ditto.folder, tmp_path / "run")
    with safe_open(ditto.folder / "model.safetensors", framework="pt") as opened:
        header = {**opened.metadata(), "round": str(best_round), "metric": "eval/accuracy", "value": "0.5"}
    save_file(load_file(ditto.folder / "model.safetensors"), tmp_path / "run" / "best.safetensors", header)
    found = evaluated(capsys, str(tmp_path / "run"), "--best")
    text = " ".join(printed(capsys, "eval", str(tmp_path / "run"), "--best").split())
    if best_round == 2:
        assert (found["clients"]["states_round"], found["clients_left_out"]) == (2, None)
        assert "each client's own model of round 2" in text
    else:
        assert found["clients"] is None
        assert "the model is of round 1, but what the clients keep" in found["clients_left_out"]
        assert found["clients_left_out"] in text
    assert evaluated(capsys, str(tmp_path / "run"))["clients"]["states_round"] == 2


# ---- names of classes ----


def test_classes_of_the_same_name_stay_apart(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = [0, 1, 2] * 8
    result = train_stripes(runs, "twice", TWICE, labels)
    own = [str(result.folder), "--module", f"{__name__}.Net", "--data.dataset"]
    found = evaluated(capsys, *own, f"{__name__}.twice")
    assert np.sum(found["confusion"], axis=1).tolist() == [8, 8, 8], "every label as it is"
    row = result.history[-1]
    assert found["metrics"]["accuracy"] == pytest.approx(row["eval/accuracy"])
    assert list(found["recall"].values()) == pytest.approx(row["eval/recall"])
    assert list(found["recall"]) == ["0 a", "1 a", "2 b"]
    line = error(capsys, "eval", *own, f"{__name__}.swapped")
    assert "the model has several classes named 'a'" in line
    recalls = printed(capsys, "card", str(result.folder)).split("Recall per class:")[1].split("\n\n")[1]
    assert [line.split(" | ")[0] for line in recalls.splitlines()[2:]] == ["| a", "| a", "| b"]


def test_data_with_several_classes_of_a_name_or_labels_without_one_are_refused(
    odd: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [str(odd.folder), "--module", f"{__name__}.Net", "--data.dataset"]
    line = error(capsys, "eval", *own, f"{__name__}.twice")
    assert f"data.dataset={__name__}.twice has several classes named 'a'" in line
    line = error(capsys, "eval", *own, f"{__name__}.nameless")
    assert "label 1 has no name among its 1 classes" in line


def test_of_more_than_a_thousand_classes_there_is_no_matrix(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train_stripes(runs, "many", MANY, [0, 1, 1000] * 8)
    own = [str(result.folder), "--module", f"{__name__}.Net", "--data.dataset", f"{__name__}.many"]
    found = evaluated(capsys, *own)
    assert (found["confusion"], found["confused"]) == (None, [])
    assert found["metrics"]["accuracy"] == pytest.approx(result.history[-1]["eval/accuracy"])
    assert {name for name, recall in found["recall"].items() if recall is not None} == {
        "kind 0",
        "kind 1",
        "kind 1000",
    }
    text = printed(capsys, "eval", *own)
    assert "class (20 lowest of 1001)" in text
    row = next(line for line in text.splitlines() if "kind 1000" in line)
    assert row.split() == ["kind", "1000", f"{100 * found['recall']['kind 1000']:.2f}", "%"]
    assert "A Net for 1001 classes" in printed(capsys, "card", str(result.folder)).replace(f"{__name__}.", "")
    call("report", str(result.folder))


# ---- names that look like markup ----


def test_names_that_look_like_markup_are_shown_as_they_are(
    odd: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [str(odd.folder), "--module", f"{__name__}.Net", "--data.dataset", f"{__name__}.odd_data"]
    lines = printed(capsys, "eval", *own).splitlines()
    for name in ODD:
        assert any(line.strip().startswith(name) for line in lines), name
    for name in (":dog:", "cat [b]"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (8, 8)).save(tmp_path / "images" / name / f"{number}.png")
    assert ":dog:, cat [b]" in printed(capsys, "init", "images")
    text = printed(capsys, "watch", "--once", str(odd.folder))
    assert f"report'{odd.folder}'".replace(" ", "") in "".join(text.split()), "of several lines perhaps"
    shutil.copytree(odd.folder, tmp_path / "lr[b]")
    curve = over_seeds([read(tmp_path / "lr[b]")])
    console = Console(width=140, file=StringIO())
    console.print(terminal(curve, 0.5, 140))
    assert "lr[b]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_heat_map_shows_names_that_look_like_formulas() -> None:
    counts, axes = [[1, 2], [3, 4]], ("x", "y")
    broken = heat_map(counts, ["a", "b"], [r"$\x$", "c"], axes, "")
    assert (broken != heat_map(counts, ["a", "b"], ["", "c"], axes, "")).any()


# ---- what a run directory may name ----


@pytest.mark.parametrize(
    "name", ["os.getcwd", "platform.machine", f"{__name__}.RECORDER", f"{__name__}.Recorder"]
)
def test_a_run_whose_model_is_no_module_and_no_function_is_refused(
    name: str, ditto: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ditto.folder, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["model"]["name"] = name
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    line = error(capsys, "eval", "run")
    assert f"model.name={name} is neither a subclass of nn.Module nor a function of your own" in line
    assert f"--module {name}" in line
    assert Recorder.calls == 0


@pytest.mark.parametrize("name", ["make_net", "Net"])
def test_a_run_of_a_dotted_path_is_read(name: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FEW, "--data.dataset", f"{__name__}.odd_data", "--data.partition", "IID", "--output", str(runs)]
    config = load_config(None, [*flags, "--model.name", f"{__name__}.{name}", "--name", name])
    result = Federation(config, tracking=QUIET).run()
    found = evaluated(capsys, str(result.folder))
    assert found["metrics"]["accuracy"] == pytest.approx(result.history[-1]["eval/accuracy"])


# ---- histories with values of wrong types ----


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train/loss", "low"),
        ("train/loss", [1.0]),
        ("train/examples", "many"),
        ("eval/accuracy", "high"),
        ("eval/loss", {"a": 1}),
        ("cohort", 5),
        ("bytes/up", [1]),
        ("bytes/down", float("inf")),
        ("time/round", "long"),
        ("time/round", float("nan")),
        ("time/evaluate", "long"),
        ("time/checkpoint", {}),
        ("time/idle", 3),
        ("time/idle", ["a"]),
    ],
)
def test_a_value_that_is_no_number_is_taken_as_absent(
    key: str, value: object, odd: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other numbers of the run are shown as they would be without the value."""
    texts: list[tuple[str, ...]] = []
    for broken in (True, False):
        shutil.copytree(odd.folder, tmp_path / "run")
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        record["sessions"][-1]["ended"] = "2020-01-02T03:04:05+00:00"  # many days ago, in both
        (tmp_path / "run" / "run.json").write_text(json.dumps(record))
        rows = [json.loads(line) for line in (odd.folder / "history.jsonl").read_text().splitlines()]
        rows = [{n: v for n, v in row.items() if n != key} | ({key: value} if broken else {}) for row in rows]
        (tmp_path / "run" / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shown = printed(capsys, "show", "run").split("files")[0]
        texts.append((shown, printed(capsys, "watch", "--once", "run"), printed(capsys, "runs", ".")))
        shutil.rmtree(tmp_path / "run")
    assert texts[0] == texts[1]
