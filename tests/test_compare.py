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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from browser import Tags
from launching import type_on_this_rank
from PIL import Image
from rich.console import Console

from fedddp.algorithms import AggregatedUpdate, FedAvg, ServerState
from fedddp.cli import main
from fedddp.commands.console import STOPPED
from fedddp.comparison import _stretched, prepare
from fedddp.config.loader import load_config
from fedddp.reporting.curves import differing, over_seeds, read
from fedddp.reporting.labels import distinguish
from fedddp.reporting.render import panels, save_figure, write
from fedddp.reporting.tables import cells, latex, paper_cells, target_of, terminal, write_table
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
    for hundredth in range(20, 101, 20):
        exact = read(make_run(tmp_path / f"{hundredth}", [row(hundredth / 100)]))
        assert round(100 * target_of([exact])) == 95 * hundredth // 100, "95 % of it is in whole percent"


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
    assert differing([curve.settings for curve in curves]) == ["data.partition.alpha"]
    small, large = over_seeds(curves)
    assert [small.name, large.name] == ["FedAvg, alpha 0.1", "FedAvg, alpha 1"]
    assert large.seeds == (0, 1, 2)
    np.testing.assert_allclose(large.score, [0.6, 0.8])
    np.testing.assert_allclose(large.std, [0.1, 0.0], atol=1e-12, err_msg="the sample's: n - 1")
    assert cells([large], 0.7)[1][1] == "80.00 ± 0.00 %"
    twice = over_seeds([curves[0], curves[0]])
    assert len(twice) == 2, "the same seed twice is not a mean over seeds"


def test_seeds_of_other_rounds_or_evaluations_are_not_one_mean(tmp_path: Path) -> None:
    same: dict[str, Any] = {"algorithm": {"name": "FedAvg"}, "rounds": 2}
    make_run(tmp_path / "a", [row(0.5), row(0.7)], seed=0, **same)
    make_run(tmp_path / "b", [row(0.6), row(0.8)], seed=1, **same)
    make_run(tmp_path / "c", [row(0.1)] * 6, seed=2, **{**same, "rounds": 6})
    make_run(tmp_path / "d", [row(0.2)], seed=3, evaluation={"every": 2}, **same)
    curves = over_seeds([read(folder) for folder in sorted(tmp_path.iterdir())])
    assert [curve.seeds for curve in curves] == [(0, 1), (2,), (3,)]
    np.testing.assert_allclose(curves[0].score, [0.55, 0.75])
    assert len({curve.name for curve in curves}) == 3


@pytest.fixture
def uneven(tmp_path: Path) -> list[Any]:
    """Return the mean of two seeds, of which one alone reaches more than 60 %, and a worse run."""
    for seed, accuracies in enumerate(([0.3, 0.6, 0.6, 0.6], [0.5, 0.5, 0.7, 0.9])):
        rows = [row(a, **{"staleness/histogram": [1, 1]}) for a in accuracies]
        make_run(tmp_path / f"a-seed={seed}", rows, seed=seed, local={"lr": 0.1})
    make_run(tmp_path / "b", [row(0.2)], local={"lr": 0.2})
    return over_seeds([read(folder) for folder in sorted(tmp_path.iterdir())])


def test_a_mean_reaches_an_accuracy_where_each_of_its_seeds_does(uneven: list[Any], tmp_path: Path) -> None:
    assert target_of(uneven) == 0.57, "95 % of the 60 % that both seeds of the best reach"
    assert uneven[0].reach(0.57)["rounds"] == (2 + 3) / 2, "the mean curve has 55 % in round 2, 65 % in 3"
    assert cells(uneven, 0.57, totals=False)[1][2] == "2.5"
    header, first, second = paper_cells(uneven, 0.57)
    assert (header[4], first[4], second[4]) == ("rounds to 57 %", "2.5 ± 0.7", "–")
    assert np.isnan(uneven[0].reach(0.65)["rounds"]), "the mean curve has 75 % at the end, one seed 60 %"
    assert cells(uneven, 0.65, totals=False)[1][2:7] == ["–"] * 5
    rows = paper_cells(uneven, 0.65)
    assert rows[0] == ["", "seeds", "accuracy in %", "best in %"], "columns of dashes are left out"
    assert rows[1] == ["a", "2", "75.00 ± 21.21", "75.00 ± 21.21"]
    write_table(uneven, 0.65, tmp_path / "t.tex")
    assert "--" not in (tmp_path / "t.tex").read_text()


@pytest.mark.parametrize(("accuracy", "text"), [(0.575, "57.5 %"), (0.58, "58 %"), (0.57, "57 %")])
def test_the_accuracy_to_race_for_is_the_same_number_everywhere(
    uneven: list[Any], accuracy: float, text: str, tmp_path: Path
) -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(terminal(uneven, accuracy, 80))
    assert f"to {text} test accuracy." in console.export_text()
    assert f"rounds to {text}" in paper_cells(uneven, accuracy)[0]
    files = write(uneven, tmp_path / "out", accuracy, "title")
    for path in files[0], files[3]:
        assert f"to {text} test accuracy" in path.read_text()
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    panels(uneven, accuracy)["Accuracy over rounds"](axes)
    (line,) = [line for line in axes.get_lines() if line.get_label() == f"target {text}"]
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), 100 * accuracy)


def test_the_figure_of_a_paper_names_the_line_of_the_target(uneven: list[Any], tmp_path: Path) -> None:
    import matplotlib as mpl

    for curves, others in ((uneven, ["a", "b"]), (uneven[:1], ["a"])):
        for panel in ("bytes", None):
            with mpl.rc_context():
                figure = drawn(curves, 0.57, panel)
            legends = [*figure.legends, *(a.get_legend() for a in figure.axes if a.get_legend())]
            (legend,) = legends
            assert [text.get_text() for text in legend.get_texts()] == [*others, "target 57 %"]


def drawn(curves: list[Any], target: float, panel: Any) -> Any:
    """Return the figure that `save_figure` writes."""
    from fedddp.reporting import render

    kept: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "save", lambda figure, path: kept.append(figure))
        save_figure(curves, target, Path("unused.pdf"), panel)
    return kept[0]


@pytest.mark.parametrize("width", [40, 60, 80, 130])
def test_the_caption_explains_the_columns_shown_and_names_the_others(uneven: list[Any], width: int) -> None:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(terminal(uneven, 0.57, width))
    header, text = console.export_text().split("\n", 1)
    explained, _, left_out = " ".join(text.split()).partition("Left out: ")
    names = left_out.partition(";")[0].split(", ")
    words = {"examples": "xamples count once", "bytes": "ytes both ways", "wall s": "all time is without"}
    for column, meaning in {**words, "stale": "tale: mean", "idle": "dle: share"}.items():
        assert (column in header) == (meaning in explained), column
        recorded = column != "idle"
        assert (column in names) == (recorded and column not in header), column
    assert ("stale" in header) == (width >= 80)


def test_columns_without_a_value_are_neither_shown_nor_named_where_room_is_scarce(tmp_path: Path) -> None:
    curve = read(make_run(tmp_path / ("a-run-with-a-name-of-24-" + "x" * 60), [row(0.5)]))
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(terminal([curve], 0.4, 80))
    text = " ".join(console.export_text().split())
    assert "stale" not in text
    assert "idle" not in text


def test_settings_that_are_the_same_in_all_runs_are_not_among_what_differs(
    uneven: list[Any], tmp_path: Path
) -> None:
    for name, lr, rounds in (("x", 0.1, 6), ("y", 0.2, 6), ("z", 0.2, 7)):
        make_run(tmp_path / "more" / name, [row(0.5)], local={"lr": lr}, rounds=rounds, seed=3)
    x, y, z = (read(tmp_path / "more" / name) for name in "xyz")

    def parts(curves: list[Any]) -> tuple[list[str], list[str]]:
        text = write(curves, tmp_path / "out", 0.5, "title")[3].read_text()
        different, same = text.partition("What differs")[2].split("What is the same in all runs")
        return re.findall(r"<tr><td>([^<]*)", different), re.findall(r"<tr><td>([^<]*)", same)

    assert parts([x, y]) == (["local.lr"], ["rounds", "seeds"])
    assert parts([y, z]) == (["rounds"], ["seeds", "local.lr"])
    assert parts(uneven)[0] == ["local.lr", "seeds"]
    assert parts([x, x]) == ([], ["rounds", "seeds", "local.lr"])


def test_of_two_runs_with_one_seed_the_last_counts(tmp_path: Path) -> None:
    measured = [(0, 0.5), (1, 0.7), (0, 0.9)]
    runs = [make_run(tmp_path / f"{n}", [row(a)], seed=seed) for n, (seed, a) in enumerate(measured)]
    (curve,) = over_seeds([read(run) for run in runs])
    assert curve.score.tolist() == [0.8]
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


@pytest.mark.parametrize("width", [30, 50, 60, 79])
def test_a_narrow_terminal_leaves_columns_out_and_cuts_no_number(tmp_path: Path, width: int) -> None:
    rows = [row(0.5), row(0.912)]
    curves = over_seeds(
        [
            read(make_run(tmp_path / f"{lr}-{seed}", rows, seed=seed, local={"lr": lr}, algorithm="FedAvg"))
            for lr in (0.125, 0.25)
            for seed in (0, 1)
        ]
    )
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(terminal(curves, 0.9, width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert text.count("91.20 ± 0.00 %") == 2
    assert "…" not in text
    header, left_out = text.splitlines()[0], " ".join(text.split()).partition("Left out:")[2]
    assert bool(left_out) == (width < 79)
    for column in ("rounds", "examples", "bytes", "virtual s", "wall s"):
        assert (column in header) != (column in left_out)


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
    (code, printed), (other_code, _) = run_world(type_on_this_rank, command, size=2)
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
    assert {"--output", "--accuracy", "--figure", "--panel", "--table"} <= set(
        capsys.readouterr().out.split()
    )


def test_the_example_in_the_documentation_runs() -> None:
    example, *_ = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "compare.md").read_text(), re.DOTALL)
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


def test_the_page_loads_no_other_file_and_the_pictures_can_be_read(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / name, [row(0.1), row(0.5 + n / 10)], algorithm={"name": name}, note="<script>")
        for n, name in enumerate(["A & B", "Fed<b>"])
    ]
    curves = [read(folder) for folder in folders]
    files = {path.suffix: path for path in write(curves, tmp_path / "out", 0.5, "A < B")}
    page, text = Tags(), files[".html"].read_text()
    page.feed(text)
    assert all(target.startswith("#") for target in page.wanted), "all it shows is in it"
    assert page.tags.count("script") == 2, "its data, and its own"
    assert {"svg", "table", "details"} <= set(page.tags)
    assert "A &amp; B" in text
    assert "<th>Fed&lt;b&gt;</th>" in text
    assert not re.search(r"url\((?!#)|@import", text)
    ET.parse(files[".svg"])
    with Image.open(files[".png"]) as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 10
    before = files[".svg"].read_bytes()
    write(curves, tmp_path / "out", 0.5, "A < B")
    assert files[".svg"].read_bytes() == before, "the same curves make the same file"


# ---- labels ----


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ([{"algorithm": "FedAvg"}, {"algorithm": "FedProx"}], ["FedAvg", "FedProx"]),
        (
            [
                {"algorithm": "FedAvg", "algorithm.momentum": 0.0},
                {"algorithm": "FedAvg", "algorithm.momentum": 0.5},
                {"algorithm": "FedProx", "algorithm.mu": 0.1, "algorithm.momentum": 0.0},
            ],
            ["FedAvg, momentum 0", "FedAvg, momentum 0.5", "FedProx"],
        ),
        (
            [
                {"algorithm": "a.lab.Own", "algorithm.lr": 1.0, "local.lr": 0.1},
                {"algorithm": "a.lab.Own", "algorithm.lr": 1.0, "local.lr": 0.2},
            ],
            ["Own, lr 0.1", "Own, lr 0.2"],
        ),
        (
            [
                {"algorithm.lr": 1.0, "local.lr": 0.1},
                {"algorithm.lr": 2.0, "local.lr": 0.1},
                {"algorithm.lr": 2.0, "local.lr": 0.2},
            ],
            ["run, algorithm lr 1", "run, algorithm lr 2, local lr 0.1", "run, algorithm lr 2, local lr 0.2"],
        ),
        (
            [
                {"data.partition": "IID", "local.clip_norm": None},
                {"data.partition": "Dirichlet", "data.partition.alpha": 0.3, "local.clip_norm": None},
                {"data.partition": "Dirichlet", "data.partition.alpha": 0.3, "local.clip_norm": 1},
            ],
            ["run, IID", "run, Dirichlet, no clip norm", "run, Dirichlet, clip norm 1"],
        ),
    ],
)
def test_labels_are_the_shortest_that_distinguish_runs(
    settings: list[dict[str, Any]], labels: list[str]
) -> None:
    keys = dict.fromkeys(key for one in settings for key in one)
    found = distinguish(settings, [k for k in keys if len({repr(one.get(k)) for one in settings}) > 1])
    assert found == labels
    assert len(set(found)) == len(found)


def test_runs_with_numbered_names_are_named_by_what_differs(tmp_path: Path) -> None:
    for name, momentum in (("digits", 0.0), ("digits-2", 0.9)):
        algorithm = {"name": "FedAvg", "momentum": momentum}
        make_run(tmp_path / name, [row(0.5)], finished=momentum == 0, algorithm=algorithm)
    curves = over_seeds([read(folder) for folder in sorted(tmp_path.iterdir())])
    assert [curve.name for curve in curves] == ["FedAvg, momentum 0", "FedAvg, momentum 0.9 (unfinished)"]


# ---- for papers ----


@pytest.fixture
def seeds(tmp_path: Path) -> list[Any]:
    """Return two means over three seeds, and a run that does not reach 90 %."""
    for lr, start in ((0.1, 0.90), (0.2, 0.80)):
        for seed in range(3):
            rows = [row(0.3), row(start), row(start + 0.02 * seed)]
            settings: dict[str, Any] = {"algorithm": {"name": "FedAvg", "lr": 1.0}, "local": {"lr": lr}}
            make_run(tmp_path / f"{lr}-{seed}", rows[seed > 1 :], seed=seed, **settings)
    return over_seeds([read(folder) for folder in sorted(tmp_path.iterdir())])


def test_a_table_of_a_paper_has_means_and_standard_deviations(seeds: list[Any], tmp_path: Path) -> None:
    header, first, second = paper_cells(seeds, 0.9)
    assert header[:5] == ["", "seeds", "accuracy in %", "best in %", "rounds to 90 %"]
    assert first[:4] == ["FedAvg, lr 0.1", "3", "92.00 ± 2.00", "92.00 ± 2.00"]
    assert first[4] == f"{5 / 3:.1f} ± {np.std([2, 2, 1], ddof=1):.1f}", "runs reach it in rounds 2, 2 and 1"
    assert second[2] == "82.00 ± 2.00"
    assert second[4:] == ["–"] * 5, "not all of its seeds reach it"
    write_table(seeds, 0.9, tmp_path / "out" / "t.md")
    lines = (tmp_path / "out" / "t.md").read_text().splitlines()
    assert lines[2].startswith("| FedAvg, lr 0.1 | 3 | 92.00 ± 2.00 |")
    write_table(seeds, 0.9, tmp_path / "t.tex")
    text = (tmp_path / "t.tex").read_text()
    assert r"FedAvg, lr 0.1 & 3 & 92.00 $\pm$ 2.00 & 92.00 $\pm$ 2.00 &" in text
    assert text.count(r"\\") == 3
    assert "\\begin{tabular}{lrrrrrrrr}" in text


def test_a_table_of_latex_has_no_character_that_latex_reads_itself() -> None:
    (line,) = [line for line in latex([["a_b & 50 %", "x$y#^~{}\\"]]).splitlines() if line.startswith("a")]
    assert line == (r"a\_b \& 50 \% & x\$y\#\textasciicircum{}\textasciitilde{}\{\}\textbackslash{} \\")


def inches(path: Path) -> tuple[float, float]:
    """Return the width and height of a figure, read from its file."""
    if path.suffix == ".pdf":
        found = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+) ?\]", path.read_bytes())
        assert found
        return float(found[1]) / 72, float(found[2]) / 72
    if path.suffix == ".svg":
        root = ET.parse(path).getroot()
        return float(root.attrib["width"][:-2]) / 72, float(root.attrib["height"][:-2]) / 72
    with Image.open(path) as picture:
        return picture.width / 200, picture.height / 200


@pytest.mark.parametrize("kind", ["pdf", "svg", "png"])
def test_figures_of_a_paper_have_its_widths(seeds: list[Any], tmp_path: Path, kind: str) -> None:
    one, all_panels = tmp_path / f"one.{kind}", tmp_path / "new" / f"all.{kind}"
    save_figure(seeds, 0.9, one, "bytes")
    save_figure(seeds, 0.9, all_panels)
    assert inches(one)[0] == pytest.approx(3.4, abs=0.01)
    assert inches(all_panels)[0] == pytest.approx(7.0, abs=0.01)
    assert inches(one)[1] < inches(all_panels)[1] < 6
    before = one.read_bytes()
    save_figure(seeds, 0.9, one, "bytes")
    assert one.read_bytes() == before


def test_only_panels_that_have_something_to_show_are_drawn(tmp_path: Path) -> None:
    plain = {key: value for key, value in row(0.5).items() if key != "time/virtual"}
    rounds = read(make_run(tmp_path / "rounds", [{**plain, "time/idle": [0.001]}]))
    assert list(panels([rounds], 0.5)) == [
        f"Accuracy over {a}" for a in ("rounds", "examples", "bytes", "wall s")
    ]
    stale = read(make_run(tmp_path / "b", [row(0.5, **{"staleness/histogram": [3], "time/idle": [2.0, 0]})]))
    assert list(panels([rounds, stale], 0.5))[3:] == [
        *("Accuracy over virtual s", "Accuracy over wall s", "Staleness", "Idle time"),
    ]
    with pytest.raises(ValueError, match="--panel bytes: no run recorded it"):
        save_figure(
            [read(make_run(tmp_path / "c", [{"eval/accuracy": 0.5}]))], 0.5, tmp_path / "x.pdf", "bytes"
        )


def test_the_band_is_one_standard_deviation_around_the_mean(seeds: list[Any]) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    panels(seeds, 0.9)["Accuracy over rounds"](axes)
    np.testing.assert_allclose(np.asarray(axes.get_lines()[0].get_ydata(), float), 100 * seeds[0].score)
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    last = band[np.isclose(band[:, 0], seeds[0].x["rounds"][-1])][:, 1]
    mean, std = 100 * seeds[0].score[-1], 100 * seeds[0].std[-1]
    assert std > 0.5
    np.testing.assert_allclose([last.min(), last.max()], [mean - std, mean + std])


def test_the_command_writes_a_figure_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        make_run(tmp_path / "runs" / name, [row(0.5), row(0.7)], algorithm={"name": name})
    compare("runs", "--figure", "paper/f.pdf", "--panel", "time", "--table", "paper/t.tex")
    assert capsys.readouterr().out.splitlines()[-2:] == ["paper/f.pdf", "paper/t.tex"]
    assert inches(Path("paper/f.pdf"))[0] == pytest.approx(3.4, abs=0.01)
    with pytest.raises(SystemExit) as refused:
        main(["compare", "digits", "--figure", "f.jpeg"])
    assert refused.value.code == 2
    assert "--figure=f.jpeg: must end in .pdf, .png, .svg" in capsys.readouterr().err
    assert not Path("runs/digits").exists(), "nothing was trained"


@pytest.mark.parametrize(("stop_after", "expected"), [(0, 0), (5, 45)])
def test_a_run_with_more_rounds_waits_as_many_times_longer_for_a_better_value(
    stop_after: int, expected: int
) -> None:
    config = load_config("digits", ["--evaluation.stop_after", str(stop_after)])
    assert _stretched(config, config, 9.0).evaluation.stop_after == expected
