"""Comparisons: their numbers, the settings that all runs share, and what is trained or only read."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from launching import type_on_this_rank
from PIL import Image
from rich.console import Console

from fedddp.algorithms import AggregatedUpdate, FedAvg, ServerState
from fedddp.cli import main
from fedddp.commands.console import STOPPED
from fedddp.reporting.compare import prepare
from fedddp.reporting.curves import differing, over_seeds, read
from fedddp.reporting.render import cells, target_of, terminal, write
from fedddp.section import ConfigError
from fedddp.testing import run_world

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("no_dashboards")

SMALL = """
data: {dataset: digits, examples: 200, clients: 4}
model: {name: 2nn}
cohort: {size: 2}
local: {epochs: 2, batch_size: 10, lr: 0.1}
tracking: {trackers: [], progress: false}
rounds: 3
compare:
"""


def make_run(folder: Path, rows: Sequence[dict[str, Any]], finished: bool = True, **settings: Any) -> Path:
    """Write a run directory."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = [json.dumps({"round": number, **row}) + "\n" for number, row in enumerate(rows, 1)]
    (folder / "history.jsonl").write_text("".join(lines))
    if finished:
        (folder / "model.safetensors").touch()
    return folder


def row(accuracy: float | None, **more: Any) -> dict[str, Any]:
    usual = {
        "train/examples": 100,
        "bytes/up": 1000,
        "bytes/down": 500,
        "time/virtual": 2.0,
        "time/round": 4.0,
    }
    known = {} if accuracy is None else {"eval/accuracy": accuracy}
    return {**usual, "time/evaluate": 0.5, "time/checkpoint": 0.5, **known, **more}


def compare(*words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *words])
    assert stop.value.code == 0


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_axes_are_summed_up_to_the_first_evaluation_that_reaches_the_accuracy(
    tmp_path: Path,
) -> None:
    rows = [row(None), row(0.5), row(None), row(0.91), row(None), row(0.89)]
    curve = read(make_run(tmp_path / "run", rows))
    assert curve.reach(0.9) == {
        "rounds": 4,
        "examples": 400,
        "bytes": 6000,
        "virtual s": 8.0,
        "wall s": 12.0,
    }
    assert cells([curve], 0.9)[1] == [
        *("run", "89.00 %", "4 / 6", "400 / 600", "6.00 kB / 9.00 kB", "8 / 12", "12 / 18", "–", "–"),
    ]
    assert cells([curve], 0.9, totals=False)[1][2:7] == ["4", "400", "6.00 kB", "8", "12"]
    assert cells([curve], 0.95)[1][2] == "– / 6", "never reached"
    assert target_of([curve]) == 0.86, "95 % of 91 %, in whole percent"


def test_cells_without_a_measurement_show_a_dash(tmp_path: Path) -> None:
    wall = [{k: v for k, v in row(0.5).items() if k != "time/virtual"}]
    curve = read(make_run(tmp_path / "run", wall, finished=False))
    assert curve.name == "run (unfinished)"
    assert np.isnan(curve.x["virtual s"]).all()
    assert cells([curve], 0.5)[1][5] == "– / –"


def test_staleness_and_idle_time_are_means_over_arrivals_and_over_groups(tmp_path: Path) -> None:
    rows = [
        row(0.5, **{"staleness/histogram": [3, 1], "time/idle": [0.0, 3.0]}),
        row(0.6, **{"staleness/histogram": [1, 0, 5], "time/idle": [1.5, 3.0]}),
    ]
    curve = read(make_run(tmp_path / "run", rows))
    assert curve.staleness.tolist() == [4, 1, 5]
    assert curve.idle.tolist() == [0.25, 1.0], "of 6 s without evaluation and checkpoints"
    assert cells([curve], 0.5)[1][-2:] == ["1.1", "62 %"]


def test_runs_that_differ_in_the_seed_alone_become_one_curve(tmp_path: Path) -> None:
    for alpha in (0.1, 1.0):
        for seed in (0, 1, 2):
            make_run(
                tmp_path / f"{alpha}-{seed}",
                [row(0.5 + 0.1 * seed * alpha), row(0.8)],
                seed=seed,
                name=f"{alpha}-{seed}",
                data={"partition": {"name": "Dirichlet", "alpha": alpha}},
                algorithm={"name": "FedAvg", "lr": 1.0},
            )
    curves = [read(folder) for folder in sorted(tmp_path.iterdir())]
    assert differing(curves) == ["data.partition.alpha"]
    small, large = over_seeds(curves)
    assert [small.name, large.name] == ["FedAvg data.partition.alpha=0.1", "FedAvg data.partition.alpha=1.0"]
    assert large.seeds == (0, 1, 2)
    np.testing.assert_allclose(large.accuracy, [0.6, 0.8])
    np.testing.assert_allclose([large.low[0], large.high[0]], [0.5, 0.7])
    twice = over_seeds([curves[0], curves[0]])
    assert len(twice) == 2, "the same seed twice is not a mean over seeds"


def test_of_two_runs_with_one_seed_the_last_counts(tmp_path: Path) -> None:
    measured = [(0, 0.5), (1, 0.7), (0, 0.9)]
    runs = [make_run(tmp_path / f"{n}", [row(a)], seed=seed) for n, (seed, a) in enumerate(measured)]
    (curve,) = over_seeds([read(run) for run in runs])
    assert curve.accuracy.tolist() == [0.8]
    assert sorted(curve.seeds) == [0, 1]


def test_finished_runs_are_compared_where_no_configuration_was_read_before(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/a", [row(0.5)], local={"lr": 0.1})
    make_run(tmp_path / "runs/b", [row(0.7)], local={"lr": 0.2})
    command = [sys.executable, "-m", "fedddp", "compare", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_run_of_a_file_is_trained_with_each_of_its_seeds() -> None:
    Path("my.yaml").write_text(SMALL.replace("compare:", "seeds: [0, 3]\ncompare:") + "  FedAvg: {}\n")
    compare("my.yaml", "--rounds", "1")
    seeds = {
        path.parent.name: yaml.safe_load(path.read_text())["seed"]
        for path in Path("runs/my").glob("*/config.yaml")
    }
    assert seeds == {"FedAvg-seed=0": 0, "FedAvg-seed=3": 3}
    assert "FedAvg |" in Path("runs/my/comparison.md").read_text()


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ("[0, 0]", "my.yaml: seeds must be different whole numbers, as in [0, 1, 2], got [0, 0]"),
        ("[]", "my.yaml: seeds must be different whole numbers"),
        ("[a]", "my.yaml: seeds[0] must be a whole number, got a"),
        ("3", "my.yaml: seeds must be a list"),
    ],
)
def test_seeds_that_are_none_are_refused(seeds: str, words: str) -> None:
    Path("my.yaml").write_text(f"seeds: {seeds}{SMALL}  FedAvg: {{}}\n")
    with pytest.raises(ConfigError) as refused:
        prepare(["my.yaml"], [])
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize("width", [80, 100, 119, 120])
def test_the_table_fits_the_terminal_and_shows_every_number_whole(tmp_path: Path, width: int) -> None:
    rows = [row(0.5, **{"train/examples": 1_234_567, "time/idle": [1.0]}), row(0.91)]
    names = ["FedBuff-of-ten-with-a-rather-long-name-of-its-own", "FedAvg"]
    curves = [read(make_run(tmp_path / name, rows, local={"lr": n})) for n, name in enumerate(names)]
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(terminal(curves, 0.9, width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for shown in ("91.00 %", "3.00 kB", "accuracy", "rounds", "bytes", "virtual s", "wall s"):
        assert shown in text
    assert "…" not in text


def test_runs_of_different_modules_of_the_users_are_no_repetitions(tmp_path: Path) -> None:
    for seed, layers in enumerate(("Small", "Large")):
        module = {"class": f"lab.{layers}", "parameters": 10 + seed, "digest": f"{seed:016x}"}
        make_run(
            tmp_path / layers,
            [row(0.5), row(0.8)],
            seed=seed,
            algorithm={"name": "FedAvg", "lr": 1.0},
            objects={"module": module},
        )
    curves = over_seeds([read(folder) for folder in sorted(tmp_path.iterdir())])
    assert [curve.name for curve in curves] == ["Large", "Small"]


def test_all_runs_have_the_data_the_seed_and_the_budget_of_the_first(tmp_path: Path) -> None:
    runs = "  FedAvg: {}\n  SyncSGD: {algorithm: SyncSGD, local: {steps: 1}}\n"
    Path("mine.yaml").write_text(SMALL + runs)
    compare("mine.yaml", "--seed", "3")
    folder = Path("runs/mine")
    first, other = (
        yaml.safe_load((folder / name / "config.yaml").read_text()) for name in ("FedAvg", "SyncSGD")
    )
    for key in ("data", "seed", "clock"):
        assert first[key] == other[key]
    assert first["seed"] == 3
    assert (first["rounds"], other["rounds"]) == (3, 30), "45 examples, twice, against batches of 10"
    assert (first["evaluation"]["every"], other["evaluation"]["every"]) == (1, 10)
    seen = [sum(r["train/examples"] for r in history(folder / name)) for name in ("FedAvg", "SyncSGD")]
    assert seen[1] == pytest.approx(seen[0], rel=0.2)
    assert {path.name for path in folder.glob("comparison.*")} == {
        f"comparison.{kind}" for kind in ("md", "png", "svg", "html")
    }


def test_all_ranks_train_one_run_after_another() -> None:
    small = "--rounds 1 --data.examples 300 --tracking.trackers []"
    command = f"compare compare-paradigms {small}"
    (code, printed), (other_code, _) = run_world(type_on_this_rank, command, size=2, timeout_s=100)
    assert (code, other_code) == (0, 0), printed
    assert printed[-1] == "runs/compare-paradigms/comparison.html"
    folder = Path("runs/compare-paradigms")
    for name in ("FedAvg", "FedProx", "FedAsync", "FedBuff", "SyncSGD", "AsyncSGD"):
        assert (folder / name / "model.safetensors").exists()
        assert f"\n{name} " in (folder / "comparison.md").read_text().replace("| ", "\n")


def test_recipes_use_the_data_of_the_first_and_flags_are_for_all() -> None:
    small = "--data.examples 300 --data.clients 12 --rounds 1 --output OUT"
    small += " --tracking.trackers [] --tracking.progress false"
    compare("digits", "digits-fedprox", "digits-fedbuff", *small.split())
    split = [yaml.safe_load(Path(f"OUT/{n}/config.yaml").read_text()) for n in ("digits", "digits-fedprox")]
    assert split[0]["data"] == split[1]["data"]
    assert split[0]["data"]["clients"] == 12
    assert split[1]["algorithm"]["name"] == "FedProx"


def test_a_second_call_reads_finished_runs_and_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(SMALL + "  a: {}\n  b: {algorithm: {name: FedProx, mu: 1.0}}\n")
    compare("mine.yaml")
    lines = {name: history(Path(f"runs/mine/{name}")) for name in "ab"}
    table = Path("runs/mine/comparison.md").read_bytes()
    compare("mine.yaml")
    assert {name: history(Path(f"runs/mine/{name}")) for name in "ab"} == lines
    assert Path("runs/mine/comparison.md").read_bytes() == table
    capsys.readouterr()
    compare("runs/mine")
    assert Path("runs/mine/comparison.md").read_bytes() == table
    compare("runs/mine/b", "runs/mine/a", "--output", "elsewhere", "--accuracy", "0.2")
    assert "to 20 % test accuracy" in capsys.readouterr().out
    assert Path("elsewhere/comparison.html").exists()


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    compare("--help")
    assert {"--output", "--accuracy"} <= set(capsys.readouterr().out.split())


def test_the_example_in_the_documentation_runs() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "compare.md").read_text(), re.DOTALL)
    Path("mine.yaml").write_text(example)
    quick = "--rounds 1 --data.examples 300 --tracking.trackers [] --tracking.progress false"
    compare("mine.yaml", *quick.split())
    assert {path.parent.name for path in Path("runs/mine").glob("*/model.safetensors")} == {
        *("FedAvg", "FedBuff", "slow-and-steady"),
    }


class StoppedOnce(FedAvg):
    """FedAvg that is interrupted in its second step."""

    def step(self, server: ServerState, aggregated: AggregatedUpdate) -> None:
        super().step(server, aggregated)
        if server.version == 1 and not Path("was stopped").exists():
            Path("was stopped").touch()
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_stopped_comparison_resumes_with_the_same_command(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(SMALL + "  a: {}\n  b: {algorithm: test_compare.StoppedOnce}\n")
    with pytest.raises(SystemExit) as stop:
        main(["compare", "mine.yaml"])
    assert stop.value.code == STOPPED
    assert "Stopped. Resume with the same launcher and: fedddp compare mine.yaml" in capsys.readouterr().out
    assert not list(Path("runs/mine").glob("comparison.*"))
    compare("mine.yaml")
    assert [r["round"] for r in history(Path("runs/mine/b"))] == [1, 2, 3]


class Page(HTMLParser):
    """Collects the tags of a page and the files that it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.wanted: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.wanted += [v or "" for k, v in attributes if k in ("src", "href", "xlink:href")]


def test_the_page_loads_no_other_file_and_the_pictures_can_be_read(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / name, [row(0.1), row(0.5 + n / 10)], algorithm={"name": name}, note="<script>")
        for n, name in enumerate(["A & B", "Fed<b>"])
    ]
    curves = [read(folder) for folder in folders]
    files = {path.suffix: path for path in write(curves, tmp_path / "out", 0.5, "A < B")}
    page, text = Page(), files[".html"].read_text()
    page.feed(text)
    assert all(target.startswith("#") for target in page.wanted), "all it shows is in it"
    assert "script" not in page.tags
    assert {"svg", "table", "details"} <= set(page.tags)
    assert "A &amp; B" in text
    assert not re.search(r"url\((?!#)|@import", text)
    ET.parse(files[".svg"])
    with Image.open(files[".png"]) as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 10
    before = files[".svg"].read_bytes()
    write(curves, tmp_path / "out", 0.5, "A < B")
    assert files[".svg"].read_bytes() == before, "the same curves make the same file"
