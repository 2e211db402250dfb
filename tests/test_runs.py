"""The commands that look at runs: `runs`, `show` and `watch`, also of runs that are going or were killed."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedddp.cli import main
from fedddp.commands.console import STOPPED
from fedddp.commands.run_info import ago
from fedddp.storage.history import read_rows
from fedddp.storage.run_record import state_of

ROOT = Path(__file__).parent.parent
SESSION = {
    "started": "2026-01-02T03:04:05+00:00",
    "ended": "2026-01-02T03:05:06+00:00",
    "command": "fedddp run digits --rounds 3",
    "fedddp": "0.1.0",
    "torch": "2.11.0",
    "torchvision": "0.26.0",
    "python": "3.12.1",
    "platform": "Linux-6.1",
    "git_commit": "0123456789abcdef+",
    "device": "cpu (AMD EPYC)",
    "ranks": 2,
    "groups": 2,
    "ranks_per_client": 1,
    "threads": 1,
    "from_round": 0,
}


def make_run(
    folder: str,
    accuracies: list[float],
    state: str = "finished",
    *,
    config: dict[str, Any] | None = None,
    error: str | None = None,
    sessions: list[dict[str, Any]] | None = None,
) -> Path:
    """Write a run directory of one row per accuracy."""
    path = Path(folder)
    path.mkdir(parents=True)
    rows = [
        {"round": n, "train/loss": 1 / n, "eval/accuracy": a, "time/round": 1.0, "cohort": [0, 1]}
        for n, a in enumerate(accuracies, 1)
    ]
    (path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data": {"dataset": "digits"}, "algorithm": {"name": "FedAvg"}, "rounds": 3, **(config or {})}
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    record = {"state": state, "error": error, "sessions": sessions or [SESSION]}
    (path / "run.json").write_text(json.dumps(record))
    if state == "finished":
        (path / "model.safetensors").touch()
    return path


def typed(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[object, list[str]]:
    """Return the exit code and the printed lines of `fedddp COMMAND`."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command))
    printed = capsys.readouterr()
    return stop.value.code, (printed.out or printed.err).splitlines()


@pytest.fixture
def some() -> None:
    """Four runs, two of them in folders inside."""
    fedprox = {"algorithm": {"name": "FedProx", "mu": 0.1}, "data": {"dataset": "cifar10"}}
    early, late = ({**SESSION, "ended": f"2026-01-0{day}T00:00:00+00:00"} for day in (1, 9))
    make_run("runs/b", [0.5, 0.9, 0.8], sessions=[late])
    make_run("runs/lab/seed-0", [0.2, 0.3], "stopped", config=fedprox, sessions=[early])
    make_run("runs/lab/deep/er/seed-1", [0.95], "failed", error="no memory")
    make_run("runs/a", [])
    for folder in ("runs/b/checkpoints/round-1", "runs/.trash/old", "runs/b/wandb/x"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "history.jsonl").touch()


def names(lines: list[str]) -> list[str]:
    """Return the first words of the rows of the list."""
    return [line.split()[0] for line in lines[1:] if not line.startswith("left out")]


# ---- runs ----


@pytest.mark.usefixtures("some")
def test_runs_in_nested_folders_are_listed_with_state_and_best_round(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        code, lines = typed("runs", capsys)
    assert code == 0
    rows = {line.split()[0]: re.split(r"\s{2,}", line.strip()) for line in lines}
    assert rows.pop("run") == [
        *("run", "state", "rounds", "best (round)", "last", "age", "algorithm", "dataset", "train loss"),
    ]
    assert list(rows) == ["a", "b", "lab/deep/er/seed-1", "lab/seed-0"]
    b = rows["b"]
    assert b[:5] == ["b", "finished", "3/3", "90.00 % (2)", "80.00 %"]
    assert b[6:] == ["FedAvg", "digits", "0.3333"]
    assert re.fullmatch(r"\d+ d ago", b[5])
    assert rows["lab/seed-0"][1:4] == ["stopped", "2/3", "30.00 % (2)"]
    assert rows["lab/seed-0"][6:] == ["FedProx", "cifar10", "0.5000"]
    assert rows["lab/deep/er/seed-1"][1:3] == ["failed", "1/3"]
    assert rows["a"][1:5] == ["finished", "0/3", "–", "–"]
    assert rows["a"][-1] == "–"


@pytest.mark.usefixtures("some")
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("--sort accuracy", ["lab/deep/er/seed-1", "b", "lab/seed-0", "a"]),
        ("--sort loss", ["b", "lab/seed-0", "lab/deep/er/seed-1", "a"]),
        ("--sort rounds", ["b", "lab/seed-0", "lab/deep/er/seed-1", "a"]),
        ("--sort age --state stopped --state finished", ["b", "a", "lab/seed-0"]),
        ("--state failed", ["lab/deep/er/seed-1"]),
        ("--filter fedprox", ["lab/seed-0"]),
        ("--filter algorithm=FedAvg --filter LAB", ["lab/deep/er/seed-1"]),
        ("--filter algorithm.mu=0.1", ["lab/seed-0"]),
        ("--filter data.dataset=cifar10", ["lab/seed-0"]),
    ],
)
def test_runs_are_sorted_and_filtered(
    options: str, found: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = typed(f"runs {options}", capsys)
    assert code == 0
    assert names(lines) == found


@pytest.mark.usefixtures("some")
def test_a_folder_without_fitting_runs_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("runs --filter nothing", capsys)[1][-1] == "none of the 4 runs in runs fits"
    Path("empty").mkdir()
    assert typed("runs empty", capsys)[1][-1] == "empty holds no runs"
    code, (line,) = typed("runs --sort speed", capsys)
    assert code == 2
    assert line.startswith("error: argument --sort: invalid choice: 'speed'")
    assert typed("runs --help", capsys)[1][0].startswith("usage: fedddp runs")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_list_fits_the_terminal_and_no_cell_is_cut(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "a-name-that-is-much-longer-than-the-column-that-it-is-given-in-a-list"
    make_run(f"runs/{name}", [0.5], config={"algorithm": {"name": "my_laboratory.algorithms.MyOwnAlgorithm"}})
    make_run("runs/short", [0.5])
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        _, (*lines, out) = typed("runs", capsys)
    assert out.startswith(f"left out of {width} columns: ")
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    *folded, short = names(lines)
    assert (short, "".join(folded)) == ("short", name), "it is folded"
    assert "50.00 % (1)" in lines[1]


@pytest.mark.parametrize("width", range(20, 125, 3))
def test_columns_are_left_out_on_the_right_and_named(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("runs/digits", [0.5, 0.9, 0.8])
    widths = {"run": 8, "state": 10, "rounds": 8, "best (round)": 14, "last": 9, "age": 11}
    widths |= {"algorithm": 11, "dataset": 9, "train loss": 12}
    fits = [title for n, title in enumerate(widths, 1) if sum([*widths.values()][:n]) <= width]
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        # "1000 d ago" for years to come
        patch.setattr("fedddp.commands.runs.ago", lambda _: "1 min ago")
        head, _, *rest = typed("runs", capsys)[1]
    assert re.split(r"\s{2,}", head.strip()) == fits
    out = ", ".join([*widths][len(fits) :])
    assert rest == ([f"left out of {width} columns: {out} (COLUMNS=92 shows all)"] if out else [])
    assert width != 80 or fits[:6] == ["run", "state", "rounds", "best (round)", "last", "age"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"rou', "line 2 is corrupt"),
        (b"\xff\xfe", "line 2 is corrupt"),
        (b"[1]", "line 2 is corrupt"),
        (b'{"loss": 1}', "line 2 is corrupt"),
        (b'{"round": "x"}', "line 2 is corrupt"),
        (b'{"round": 1, "train/loss": "y"}', None),
        (b'{"round": 1, "eval/accuracy": "y", "time/round": []}', None),
        (b"", "line 2 is corrupt"),
        (None, "it is no file"),
    ],
)
def test_a_corrupt_run_does_not_keep_the_others_from_the_list(
    content: bytes | None,
    words: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = b'{"round": 1, "train/loss": 1.5}\n'
    for name in "abc":
        Path(f"runs/{name}").mkdir(parents=True)
        Path(f"runs/{name}/history.jsonl").write_bytes(row)
    path = Path("runs/b/history.jsonl")
    path.write_bytes(row + (content or b"") + b"\n" + row)
    if content is None:
        path.unlink()
        os.mkfifo(path)
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        code, lines = typed("runs", capsys)
    assert code == 0
    rows = {line.split()[0]: line.split() for line in lines[1:4]}
    assert sorted(rows) == ["a", "b", "c"]
    for name in "ac":
        assert rows[name][1:5] == ["stopped", "1", "–", "–"]
        assert "1.5000" in rows[name]
    if words:
        assert rows["b"][1] == "corrupt"
        (problem,) = lines[4:]
        assert problem.startswith("b: ")
        assert words in problem
    else:
        assert len(lines) == 4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s ago"), (59, "59 s ago"), (3599, "59 min ago"), (10800, "3 h ago"), (90000, "1 d ago")],
)
def test_an_age_is_one_number(seconds: float, text: str) -> None:
    assert ago(seconds) == text


# ---- show ----


def shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Return what `fedddp show` prints, by its labels."""
    code, lines = typed(f"show '{folder}'", capsys)
    assert code == 0
    assert max(map(len, lines)) <= 80
    found: dict[str, list[str]] = {}
    label = ""
    start = len(re.match(r"run\s+", lines[0])[0])  # type: ignore[index]
    for line in lines:
        label = line[:start].strip() or label
        found.setdefault(label, []).append(line[start:].strip())
    return found


def test_show_prints_what_is_known_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "algorithm": {"name": "FedProx", "lr": 1.0, "mu": 0.5},
        "local": {"lr": 0.2, "epochs": 1},
        "output": "elsewhere",
        "name": "one",
    }
    resumed = {**SESSION, "started": "2026-01-03T00:00:00+00:00", "from_round": 2}
    folder = make_run("runs/one", [0.5, 0.9, 0.8], config=config, sessions=[SESSION, resumed])
    (folder / "run.log").write_text(
        "2026-01-02 03:04:06 INFO resuming\n2026-01-02 03:04:07 WARNING round 2: NaN in client 3\n"
    )
    found = shown(folder, capsys)
    assert found["state"][0].startswith("finished, ")
    assert found["rounds"] == ["3 of 3"]
    assert found["started"] == ["2026-01-02 03:04:05 UTC", "2026-01-03 00:00:00 UTC, resumed after round 2"]
    assert found["command"] == ["fedddp run digits --rounds 3"]
    assert " ".join(found["versions"]) == "fedddp 0.1.0, torch 2.11.0, torchvision 0.26.0, Python 3.12.1"
    assert found["git commit"] == ["0123456789abcdef with changes"]
    assert " ".join(found["device"]) == "cpu (AMD EPYC); 2 ranks in 2 client groups of 1, 1 thread per rank"
    assert found["accuracy"] == ["80.00 % in round 3 (best: 90.00 % in round 2)"]
    assert found["train loss"] == ["0.3333 in round 3, the best"]
    assert sorted(found["settings"]) == [
        "algorithm.mu: 0.5 (default: 0.01)",
        "algorithm: FedProx (default: FedAvg)",
        "local.lr: 0.2 (default: 0.05)",
        "rounds: 3 (default: 10)",
    ]
    assert found["warnings"] == ["round 2: NaN in client 3"]
    assert "history.jsonl" in " ".join(found["files"])
    assert found["next"] == ["fedddp report runs/one", "fedddp predict runs/one IMAGE"]


def test_show_of_a_failed_run_has_its_error_and_how_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run("my runs/one", [0.5], "failed", error="rank 3: no memory", config={"output": "my runs"})
    (folder / "checkpoints").mkdir()
    found = shown(folder, capsys)
    assert found["error"] == ["rank 3: no memory"]
    assert " ".join(found["next"]).startswith(
        "fedddp run 'my runs/one/config.yaml' --output 'my runs' --name one --resume auto"
    )


@pytest.mark.parametrize("words", ["", "nowhere", "a b", "--x"])
def test_show_needs_one_run_directory(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, (line,) = typed(f"show {words}", capsys)
    assert code == 2
    assert re.match("error: (give one run directory|nowhere is no run directory)", line)


# ---- watch ----


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("stopped", STOPPED), ("failed", 1)])
def test_watch_of_a_run_that_ended_shows_it_and_exits_by_its_state(
    state: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("runs/one", [0.5, 0.9], state, error="no memory" if state == "failed" else None)
    (Path("runs/one") / "run.log").write_text("2026-01-02 03:04:07 WARNING round 2: NaN in client 3\n")
    exit_code, lines = typed("watch runs/one", capsys)
    assert exit_code == code
    assert re.match(r"round 2/3  train loss 0\.5000  accuracy 90\.00 % ↑40\.00  ETA 0:00:01", lines[0])
    assert "warning: round 2: NaN in client 3" in lines
    assert lines[-1] == f"{state}: runs/one" + (": no memory" if state == "failed" else "")


@pytest.mark.parametrize("words", ["", "x --interval 0", "x --interval y", "nowhere --once", "x y", "x --z"])
def test_watch_refuses_what_it_does_not_know(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, (line,) = typed(f"watch {words}", capsys)
    assert code == 2
    assert line.startswith("error: ")


def start(command: str, folder: Path) -> subprocess.Popen[str]:
    """Start `fedddp COMMAND` in its own session."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedddp", *shlex.split(command)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def wait_for_rows(folder: Path, count: int) -> None:
    """Wait until a run has written so many rows."""
    while not (folder / "history.jsonl").exists() or len(read_rows(folder / "history.jsonl")) < count:
        time.sleep(0.05)


def test_watch_waits_for_a_run_follows_it_and_ends_with_it(
    processes: list[subprocess.Popen[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is watched from before it starts until it is killed, and another leaves the run alone."""
    watcher = start("watch runs/digits --interval 0.1", tmp_path)
    processes.append(watcher)
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == "waiting for runs/digits (Ctrl-C ends the wait)\n"
    run = start(
        "run digits --data.examples 100 --rounds 100000 --tracking.trackers [] --checkpoint.every 100000",
        tmp_path,
    )
    processes.append(run)
    assert re.match(r"round \d+/100000  train loss ", watcher.stdout.readline())
    folder = tmp_path / "runs/digits"
    assert state_of(folder) == "running"
    code, lines = typed("watch runs/digits --once", capsys)
    assert code == 0
    assert lines[-1] == "running: runs/digits"
    assert " running " in typed("runs", capsys)[1][1]
    assert shown(Path("runs/digits"), capsys)["next"] == ["fedddp watch runs/digits"]

    other = start("watch runs/digits --interval 0.1", tmp_path)
    processes.append(other)
    assert other.stdout is not None
    other.stdout.readline()
    other.send_signal(signal.SIGINT)
    assert other.wait() == 130
    assert "Traceback" not in other.stdout.read()
    assert run.poll() is None

    before = len(read_rows(folder / "history.jsonl"))
    wait_for_rows(folder, before + 3)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert watcher.wait() == 1
    rest = watcher.stdout.read().splitlines()
    assert rest[-1] == "failed: runs/digits"
    numbers = [int(m[1]) for line in rest if (m := re.match(r"round (\d+)/100000", line))]
    assert numbers == list(range(numbers[0], numbers[-1] + 1)), "every round, once"
    assert numbers[-1] == len(read_rows(folder / "history.jsonl"))
    assert " failed " in typed("runs", capsys)[1][1]
    assert "it was killed" in " ".join(shown(Path("runs/digits"), capsys)["error"])
