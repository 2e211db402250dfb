"""The benchmark scripts run with their smallest settings and print their rows; no times are asserted."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fedddp import load_config

ROOT = Path(__file__).parent.parent
BENCHMARK = ROOT / "scripts" / "benchmark"
GPU = torch.cuda.is_available()
TRIAL = ("--workloads", "trial", "--rounds", "4")

Done = subprocess.CompletedProcess[str]
Tables = dict[str, list[list[str]]]

COMMANDS: dict[str, tuple[str, ...]] = {}
"""Of each test, the script that it needs, and its arguments; PAGE is a file with marks."""


def runs(script: str, *arguments: str) -> Callable[[Any], Any]:
    """Have the script run for the test, whose fixture `done` waits for it."""

    def note(test: Any) -> Any:
        COMMANDS[test.__name__] = (script, *arguments)
        return test

    return note


def run(command: Sequence[str]) -> Done:
    script, *arguments = command
    program = [sys.executable, str(BENCHMARK / f"{script}.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(program, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "page.md"
    file.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    return file


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest, page: Path) -> Iterator[dict[str, Future[Done]]]:
    """Run the scripts of all selected tests, two at a time: they wait for imports most of the time."""
    wanted = {item.name for item in request.session.items} & COMMANDS.keys()
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run, [str(page) if word == "PAGE" else word for word in command])
            for name, command in COMMANDS.items()
            if name in wanted
        }


@pytest.fixture
def done(request: pytest.FixtureRequest, started: dict[str, Future[Done]]) -> Done:
    return started[request.node.name].result()


@pytest.fixture
def tables(done: Done) -> Tables:
    """The cells of the tables that were printed, by title, headings first."""
    assert done.returncode == 0, done.stdout + done.stderr
    found: Tables = {}
    for title, body in re.findall(r"^### (.*)\n\n((?:\|.*\n)+)", done.stdout, re.MULTILINE):
        rows = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in body.splitlines()]
        assert {len(row) for row in rows[:1] + rows[2:]} == {len(rows[0])}
        found[title] = [rows[0], *rows[2:]]  # without the rule below the headings
    return found


def rows_of(tables: Tables, title: str) -> list[list[str]]:
    """Return the rows of the only table whose title begins so, without its headings."""
    ((_, *rows),) = (cells for name, cells in tables.items() if name.startswith(title))
    return rows


def names(rows: Sequence[Sequence[str]]) -> list[str]:
    return [row[0] for row in rows]


@runs(
    *("speed", *TRIAL, "--repeat", "1", "--only", "fedddp, 1 rank", "--table", "PAGE"),
    *("--peers", "pfl", "--peer-python", sys.executable),
)
def test_speed_compares_with_the_loop_and_writes_its_table(tables: Tables, done: Done, page: Path) -> None:
    note, printed = done.stdout.split("\n", 1)
    assert note == f"pfl is left out: {sys.executable} cannot import pfl; see --peer-python"
    rows = rows_of(tables, "trial: 784-200-10 perceptron, 159,010 parameters; 10 of 20 clients per round")
    assert names(rows) == ["loop, 1 process", "fedddp, 1 rank"]
    assert rows[0][4:6] == ["1.00", "1.00–1.00"]
    assert all(re.fullmatch(r"[\d.]+–[\d.]+", row[2]) for row in rows)
    before, inside, after = re.split(r"<!-- /?speed -->\n", page.read_text())
    assert (before, after) == ("before\n", "after\n")
    assert inside.strip() == printed.strip()


def test_a_file_without_marks_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("no marks\n")
    done = run(("scaling", "--axes", "ranks", "--table", str(tmp_path / "page.md")))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith("has no lines <!-- scaling-ranks --> and <!-- /scaling-ranks -->; add them")
    assert (tmp_path / "page.md").read_text() == "no marks\n"


@runs("scaling", "--axes", "clients,ranks", "--clients", "1e3", "--ranks", "1,4096", *TRIAL)
def test_scaling_over_clients_and_ranks_names_what_does_not_fit(tables: Tables, done: Done) -> None:
    assert names(rows_of(tables, "Clients: 100 per round")) == ["1,000"]
    assert names(rows_of(tables, "Ranks: trial")) == ["1"]
    assert re.search("^4096 ranks are left out: each needs a core", done.stdout, re.MULTILINE)


@runs("scaling", "--axes", "parameters", "--parameters", "1e6", "--ranks", "1", "--rounds", "4")
def test_scaling_over_parameters(tables: Tables) -> None:
    (row,) = rows_of(tables, "Parameters:")
    assert row[:2] == ["1,000,567", "1"]
    if sys.platform == "linux":
        assert float(row[-1]) > 0, "a model takes memory"


@runs("breakdown", "--parts", "round", "--engines", "auto", *TRIAL)
def test_breakdown_of_a_round_adds_up(tables: Tables) -> None:
    rows = rows_of(tables, "trial:")
    assert {"sample, assign", "send", "batches", "server step", "evaluation", "record"} <= {*names(rows)}
    assert names(rows)[-2:] == ["rest", "round"]
    milliseconds = [float(row[2]) for row in rows]
    assert sum(milliseconds[:-1]) == pytest.approx(milliseconds[-1], abs=0.01 * len(rows))


@runs(
    "protection",
    *TRIAL,
    "--only",
    "CentralDP",
    "--only",
    "*7 levels",
    "--only",
    "Top*",
    "--only",
    "SecAggPlus",
)
def test_the_cost_of_protection_is_compared_with_the_plain_round(tables: Tables) -> None:
    (rows,) = tables.values()
    assert names(rows[1:]) == ["plain", "CentralDP", "QSGD, 7 levels", "TopK, 1 %", "SecAggPlus"]
    up = {row[0]: float(row[4]) for row in rows[1:]}
    assert up["plain"] == up["CentralDP"] == 6.4
    assert up["TopK, 1 %"] < up["QSGD, 7 levels"] < 0.9 < 1.9 * up["plain"] < up["SecAggPlus"]


def test_every_protection_that_is_compared_has_settings_that_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARK)
    import protection

    assert len(protection.CONFIGURATIONS) == 9
    for settings in protection.CONFIGURATIONS.values():
        load_config("digits", shlex.split(settings))


@runs("breakdown", "--parts", "fixed,start", "--ranks", "1", "--repeat", "1", "--fixed-rounds", "10")
def test_breakdown_of_fixed_cost_and_start(tables: Tables) -> None:
    assert names(rows_of(tables, "Fixed cost")) == ["1"]
    assert names(rows_of(tables, "Start")) == ["loop, 1 process", "fedddp, 1 process"]


def test_a_part_that_the_package_no_longer_has_is_an_error() -> None:
    gone = "fedddp.section.Section.gone"
    code = f"import timers; timers.PARTS = (('part', '{gone}'),); timers.Timers()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARK), str(ROOT)])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: fedddp has no {gone}")


@pytest.mark.skipif(GPU, reason="this machine has a GPU")
@runs("gpu")
def test_the_benchmark_of_a_gpu_names_what_is_missing(done: Done) -> None:
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: this benchmark needs a GPU")


@runs("gpu", *TRIAL, "--repeat", "1", "--only", "fedddp", *([] if GPU else ["--device", "cpu"]))
def test_the_benchmark_of_a_gpu_compares_with_the_loop(tables: Tables) -> None:
    assert names(rows_of(tables, "trial:")) == ["loop", "fedddp"]
    if GPU:
        ((name, kernels, *_),) = rows_of(tables, "Kernels")
        assert name == "trial: fedddp"
        assert float(kernels) > 0
