"""The benchmark scripts run with their smallest settings and print their rows; no times are asserted.

One starts the processes that it measures as users do; the others fork them, which saves the imports.
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedddp import load_config
from fedddp.testing import run_world

ROOT = Path(__file__).parent.parent
BENCHMARK = ROOT / "scripts" / "benchmark"
GPU = torch.cuda.is_available()
TRIAL = ("--workloads", "trial", "--rounds", "4")

Tables = dict[str, list[list[str]]]
Run = Callable[..., str]


def run_in_process(script: str, *arguments: str) -> str:
    """Return what a script prints, in a process of its own."""
    program = [sys.executable, str(BENCHMARK / f"{script}.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_program(program: str, arguments: list[str], folder: str) -> None:
    """Run a program of the benchmarks on this rank, as if it were started by itself."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    os.environ["WANDB_MODE"] = "disabled"
    os.chdir(folder)
    sys.path.insert(0, str(BENCHMARK))
    sys.argv = [program, *arguments]
    try:
        runpy.run_path(str(BENCHMARK / program), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code  # noqa: PT017 - a program that only returns has succeeded, too


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import modules of the benchmarks here, for one test: their names are too common for a whole suite."""
    monkeypatch.syspath_prepend(BENCHMARK)
    for file in BENCHMARK.glob("*.py"):
        assert file.stem not in sys.modules
        monkeypatch.setitem(sys.modules, file.stem, None)  # so that it is removed in the end
        del sys.modules[file.stem]
    return importlib.import_module


@pytest.fixture
def run(
    modules: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Return what a script prints; it runs here, and what it measures on a fresh rank for each."""
    processes = modules("processes")

    def launch(size: int, program: str, arguments: list[str], folder: str, *, python: str = "") -> Any:
        assert size == 1
        assert not python
        launched = time.perf_counter()
        run_world(run_program, program, arguments, folder, size=1)
        (file,) = Path(folder).glob("rank-*.json")
        return processes.Measured(launched, [processes.json.loads(file.read_text())])

    monkeypatch.setattr(processes, "launch", launch)

    def call(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        modules(script).main()
        return capsys.readouterr().out

    return call


def tables_of(printed: str) -> Tables:
    """Return the cells of the tables that were printed, by title, headings first."""
    found: Tables = {}
    for title, body in re.findall(r"^### (.*)\n\n((?:\|.*\n)+)", printed, re.MULTILINE):
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


def test_speed_compares_with_the_loop_and_writes_its_table(tmp_path: Path) -> None:
    """In processes of their own, started by the script."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    what = ("--repeat", "1", "--only", "fedddp, 1 rank", "--table", str(page))
    printed = run_in_process("speed", *TRIAL, *what, "--peers", "pfl", "--peer-python", sys.executable)
    note, printed = printed.split("\n", 1)
    assert note == f"pfl is left out: {sys.executable} cannot import pfl; see --peer-python"
    title = "trial: 784-200-10 perceptron, 159,010 parameters; 10 of 20 clients per round"
    rows = rows_of(tables_of(printed), title)
    assert names(rows) == ["loop, 1 process", "fedddp, 1 rank"]
    assert rows[0][4:6] == ["1.00", "1.00–1.00"]
    assert all(re.fullmatch(r"[\d.]+–[\d.]+", row[2]) for row in rows)
    before, inside, after = re.split(r"<!-- /?speed -->\n", page.read_text())
    assert (before, after) == ("before\n", "after\n")
    assert inside.strip() == printed.strip()


def test_a_file_without_marks_is_refused_before_anything_runs(tmp_path: Path, run: Run) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks\n")
    with pytest.raises(SystemExit) as ended:
        run("scaling", "--axes", "ranks", "--table", str(page))
    assert ended.value.code == (
        f"error: --table {page} has no lines <!-- scaling-ranks --> and <!-- /scaling-ranks -->; add them"
    )
    assert page.read_text() == "no marks\n"


def test_scaling_over_clients_and_ranks_names_what_does_not_fit(run: Run) -> None:
    printed = run("scaling", "--axes", "clients,ranks", "--clients", "1e3", "--ranks", "1,4096", *TRIAL)
    tables = tables_of(printed)
    assert names(rows_of(tables, "Clients: 100 per round")) == ["1,000"]
    assert names(rows_of(tables, "Ranks: trial")) == ["1"]
    assert re.search("^4096 ranks are left out: each needs a core", printed, re.MULTILINE)


def test_scaling_over_parameters(run: Run) -> None:
    printed = run("scaling", "--axes", "parameters", "--parameters", "1e6", "--ranks", "1", "--rounds", "4")
    (row,) = rows_of(tables_of(printed), "Parameters:")
    assert row[:2] == ["1,000,567", "1"]
    if sys.platform == "linux":
        assert float(row[-1]) > 0, "a model takes memory"


def test_breakdown_of_a_round_adds_up(run: Run) -> None:
    rows = rows_of(tables_of(run("breakdown", "--parts", "round", "--engines", "auto", *TRIAL)), "trial:")
    assert {"sample, assign", "send", "batches", "server step", "evaluation", "record"} <= {*names(rows)}
    assert names(rows)[-2:] == ["rest", "round"]
    milliseconds = [float(row[2]) for row in rows]
    assert sum(milliseconds[:-1]) == pytest.approx(milliseconds[-1], abs=0.01 * len(rows))


def test_the_cost_of_protection_is_compared_with_the_plain_round(run: Run) -> None:
    only = ("CentralDP", "*7 levels", "Top*", "SecAggPlus")
    printed = run("protection", *TRIAL, *(word for pattern in only for word in ("--only", pattern)))
    (rows,) = tables_of(printed).values()
    assert names(rows[1:]) == ["plain", "CentralDP", "QSGD, 7 levels", "TopK, 1 %", "SecAggPlus"]
    up = {row[0]: float(row[4]) for row in rows[1:]}
    assert up["plain"] == up["CentralDP"] == 6.4
    assert up["TopK, 1 %"] < up["QSGD, 7 levels"] < 0.9 < 1.9 * up["plain"] < up["SecAggPlus"]


def test_every_protection_that_is_compared_has_settings_that_load(modules: Callable[[str], Any]) -> None:
    configurations = modules("protection").CONFIGURATIONS
    assert len(configurations) == 9
    for settings in configurations.values():
        load_config("digits", shlex.split(settings))


def test_breakdown_of_fixed_cost_and_start(run: Run) -> None:
    few = ("--ranks", "1", "--repeat", "1", "--fixed-rounds", "10")
    tables = tables_of(run("breakdown", "--parts", "fixed,start", *few))
    assert names(rows_of(tables, "Fixed cost")) == ["1"]
    assert names(rows_of(tables, "Start")) == ["loop, 1 process", "fedddp, 1 process"]


def test_a_part_that_the_package_no_longer_has_is_an_error(modules: Callable[[str], Any]) -> None:
    timers = modules("timers")
    timers.PARTS = (("part", "fedddp.section.Section.gone"),)
    with pytest.raises(SystemExit, match=r"error: fedddp has no fedddp\.section\.Section\.gone"):
        timers.Timers()


@pytest.mark.skipif(GPU, reason="this machine has a GPU")
def test_the_benchmark_of_a_gpu_names_what_is_missing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^error: this benchmark needs a GPU"):
        run("gpu")
    assert capsys.readouterr().out == ""


def test_the_benchmark_of_a_gpu_compares_with_the_loop(run: Run) -> None:
    trial = (*TRIAL, "--repeat", "1", "--only", "fedddp")
    # Torch's CUDA does not survive a fork.
    printed = run_in_process("gpu", *trial) if GPU else run("gpu", *trial, "--device", "cpu")
    tables = tables_of(printed)
    assert names(rows_of(tables, "trial:")) == ["loop", "fedddp"]
    if GPU:
        ((name, kernels, *_),) = rows_of(tables, "Kernels")
        assert name == "trial: fedddp"
        assert float(kernels) > 0
