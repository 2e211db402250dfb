"""What the commands print, and the codes they exit with, when all is well or a run is stopped."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedddp import Config
from fedddp.algorithms import AggregatedUpdate, FedAvg, ServerState
from fedddp.cli import STOPPED, main
from fedddp.config.reference import documented
from fedddp.section import class_name, section_in, settings
from fedddp.storage.history import read_rows

RUN = "run digits --rounds 4 --data.examples 200 --tracking.trackers [] --tracking.progress false"


class StopsInTheSecondRound(FedAvg):
    """FedAvg in a process that is asked to end while it steps the second time."""

    def step(self, server: ServerState, aggregated: AggregatedUpdate) -> None:
        super().step(server, aggregated)
        if server.version == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def typed(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[object, list[str]]:
    """Return the exit code and the printed lines of `fedddp COMMAND`."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command))
    printed = capsys.readouterr()
    assert printed.err == ""
    return stop.value.code, printed.out.splitlines()


def test_a_stopped_run_prints_the_command_that_resumes_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = typed(f"{RUN} --algorithm {__name__}.StopsInTheSecondRound --name 'a+b'", capsys)
    assert code == STOPPED == 75
    start, command = out[-1].split(": fedddp ")
    assert start == "Stopped. Resume with the same launcher and"
    assert command.endswith("--name a+b --resume auto")
    history = Path("runs/a+b/history.jsonl")
    assert [row["round"] for row in read_rows(history)] == [1, 2]
    code, out = typed(command, capsys)
    assert code == 0
    assert out[0].startswith("resuming runs/a+b from round-00002")
    assert out[-1] == "run directory: runs/a+b"
    assert [row["round"] for row in read_rows(history)] == [1, 2, 3, 4]


def test_a_batch_script_learns_of_a_stopped_run_from_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDDDP_STOPPED_FILE", "stopped")
        code, out = typed(f"{RUN} --algorithm {__name__}.StopsInTheSecondRound", capsys)
        assert code == 0
        assert out[-1].endswith("--name digits --resume auto")
        Path("stopped").unlink()
        code, _ = typed(out[-1].split(": fedddp ")[1], capsys)
    assert code == 0
    assert not Path("stopped").exists()


@pytest.mark.parametrize("option", ["--help", "help", "run --help", "run digits -h", "--version"])
def test_help_and_version_are_no_errors(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = typed(option, capsys)
    assert code == 0
    assert out


def test_help_has_every_setting_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    _, out = typed("run --help", capsys)
    text = " ".join(" ".join(out).split())
    plain = 0
    for key, hint, cls in settings(Config):
        if class_name(cls) != cls.__name__:
            continue  # a class that another test made
        if section_in(hint) is None:
            plain += 1
            assert f"--{key} (" in text
            assert documented(cls)[key.rpartition(".")[2]] in text
        else:
            assert f"{key}: " in text or f"--{key} NAME (default: " in text, key
    assert plain > 100
    assert "FedProx: " in text
    assert "with_" not in text
    assert max(map(len, out)) <= 110


# ---- run directories that fedddp wrote before 0.1.0 ----


@pytest.fixture
def before() -> Path:
    """A run directory as the version before 0.1.0 left it: its sections, metrics and files."""
    folder = Path("runs") / "before"
    (folder / "checkpoints").mkdir(parents=True)
    config: dict[str, Any] = {
        "data": {"dataset": "digits", "clients": 20, "partition": {"name": "IID"}, "skew": None},
        "model": {"name": "lenet", "weights": None, "norm": "keep", "freeze": []},
        "algorithm": {"name": "FedBuff", "lr": 1.0, "buffer_size": 2},
        "clock": {"name": "Virtual", "speed": {"name": "SameSpeed", "visit_s": 0.1}},
        "track": {"with": [], "project": "fedddp", "progress": True},
        "rounds": 2,
        "seed": 0,
        "output": "runs",
        "name": "before",
        "replay": None,
        "resume": "never",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rows = [
        {
            "round": number,
            "train/loss": 1.5,
            "train/examples": 100,
            "bytes/up": 1000,
            "bytes/down": 1000,
            "time/virtual": 0.5,
            "eval/accuracy": 0.4 * number,
            "time/round": 0.3,
        }
        for number in (1, 2)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "model.safetensors").touch()
    return folder


def test_runs_and_compare_read_a_run_written_before_0_1_0(
    before: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = typed("runs", capsys)
    assert code == 0
    assert out[1].split() == ["before", "2", "1.5000", "0.8000", "finished"]
    code, out = typed(f"compare {before} --output report", capsys)
    assert code == 0
    assert "80.00 %" in Path("report/comparison.md").read_text()
    assert out[-1] == "report/comparison.html"


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ("--name before --resume auto", "resume"),
        ("--algorithm FedBuff --replay runs/before", "replay"),
    ],
)
def test_a_run_written_before_0_1_0_is_neither_resumed_nor_repeated(
    options: str, key: str, before: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path: path.read_bytes() for path in before.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(f"{RUN} {options}"))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {key}: runs/before/config.yaml was written by fedddp before 0.1.0")
    assert "cannot" in line
    assert {path: path.read_bytes() for path in files} == files
