"""What the commands print, and the codes they exit with, when all is well or a run is stopped."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedddp import Config
from fedddp.algorithms import AggregatedUpdate, FedAvg, ServerState
from fedddp.cli import main
from fedddp.commands.console import STOPPED
from fedddp.config.reference import documented
from fedddp.section import class_name, section_in, settings
from fedddp.storage.history import read_rows

ROOT = Path(__file__).parent.parent
RUN = "run digits --rounds 4 --data.examples 200 --tracking.trackers [] --tracking.progress false"


class StopsInTheSecondRound(FedAvg):
    """FedAvg in a process that is asked to end while it steps the second time."""

    def step(self, server: ServerState, aggregated: AggregatedUpdate) -> None:
        super().step(server, aggregated)
        if server.version == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def exit_code(command: str) -> object:
    """Return the exit code of `fedddp COMMAND`."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command))
    return stop.value.code


def typed(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[object, list[str]]:
    """Return the exit code and the printed lines of `fedddp COMMAND`."""
    code = exit_code(command)
    printed = capsys.readouterr()
    assert printed.err == ""
    return code, printed.out.splitlines()


@pytest.mark.parametrize(
    ("options", "name", "again"),
    [
        ("--name 'a+b'", "a+b", "--name a+b --resume auto"),
        ("--resume never", "digits", "--name digits --resume auto"),
        ("--resume=never --name=one", "one", "--name one --resume auto"),
        ("--name=--x --seed 3", "--x", "--seed 3 --name=--x --resume auto"),
        ("--name one --output 'two words'", "one", "--output 'two words' --name one --resume auto"),
    ],
)
def test_a_stopped_run_prints_the_command_that_resumes_it(
    options: str, name: str, again: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = typed(f"{RUN} --algorithm {__name__}.StopsInTheSecondRound {options}", capsys)
    assert code == STOPPED == 75
    start, command = out[-1].split(": fedddp ")
    assert start == "Stopped. Resume with the same launcher and"
    assert command.endswith(again)
    assert command.count("--name") == command.count("--resume") == 1
    directory = Path("two words" if "two words" in options else "runs") / name
    assert [row["round"] for row in read_rows(directory / "history.jsonl")] == [1, 2]
    code, out = typed(command, capsys)
    assert code == 0
    assert out[0].startswith(f"resuming {directory} from round-00002")
    assert out[-1] == f"run directory: {directory}"
    assert [row["round"] for row in read_rows(directory / "history.jsonl")] == [1, 2, 3, 4]


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


def test_a_stopped_run_whose_file_cannot_be_made_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("FEDDDP_STOPPED_FILE", "missing/stopped")
        assert exit_code(f"{RUN} --algorithm {__name__}.StopsInTheSecondRound") == STOPPED
    printed = capsys.readouterr()
    assert printed.err == "error: FEDDDP_STOPPED_FILE=missing/stopped: No such file or directory\n"
    assert printed.out.splitlines()[-1].startswith("Stopped. Resume with the same launcher and: fedddp run")
    assert not Path("missing").exists()


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


# ---- where the output goes ----


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    """As in `fedddp run digits | head -1`."""
    command = [sys.executable, "-m", "fedddp", *shlex.split(RUN), "--tracking.progress", "true"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("round 1/4")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0
    assert [row["round"] for row in read_rows(tmp_path / "runs/digits/history.jsonl")] == [1, 2, 3, 4]
    assert (tmp_path / "runs/digits/model.safetensors").exists()


@contextmanager
def unread_output() -> Iterator[None]:
    """Give standard output a reader that has left."""
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.MonkeyPatch.context() as patch, open(writer, "w") as stream:
        patch.setattr(sys, "stdout", stream)
        yield
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # for what is left in the buffer
        if sys.stdout is not stream:
            sys.stdout.close()


@pytest.mark.parametrize("progress", ["true", "false"])
@pytest.mark.parametrize("command", ["run digits", "compare digits"])
def test_output_that_cannot_be_written_does_not_end_the_run(command: str, progress: str) -> None:
    options = RUN.removeprefix("run digits").replace("progress false", f"progress {progress}")
    with unread_output():
        assert exit_code(f"{command} {options} --output out") == 0
    (model,) = Path("out").glob("*/model.safetensors")
    assert len(read_rows(model.parent / "history.jsonl")) == 4
    assert Path("out/comparison.html").exists() == command.startswith("compare")


def test_a_configuration_that_cannot_be_printed_does_not_fail_the_command() -> None:
    with unread_output():
        assert exit_code("run digits --print_config") == 0


@pytest.mark.parametrize(
    "command",
    [
        "run --help",
        "recipes",
        "runs .",
        "plan digits",
        "partition digits --data.clients 30 --data.examples 300",
    ],
)
def test_a_terminal_that_cannot_show_a_letter_shows_a_question_mark(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert exit_code(command) == 0
        print("\nη")  # as what a library prints later
    stream.flush()
    assert stream.buffer.getvalue().endswith(b"\n?\n")
    assert len(stream.buffer.getvalue().splitlines()) > 2


def test_an_error_is_reported_where_its_letters_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        assert exit_code("run größe") == 2
    assert stream.buffer.getvalue().startswith(b"error: unknown recipe 'gr??e'")


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
    assert out[1].split()[:7] == ["before", "finished", "2/2", "80.00", "%", "(2)", "80.00"]
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


@pytest.mark.parametrize(
    "command",
    ["runs ~nosuchuser/x", "compare ~nosuchuser/x", "compare digits --output ~nosuchuser/x"],
)
def test_a_home_folder_that_is_not_known_is_one_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(command.split())
    assert refused.value.code == 2
    assert re.fullmatch(r"error: \w+=~nosuchuser/x: .*; write the folder out\n", capsys.readouterr().err)


def test_a_comparison_is_written_and_read_below_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--rounds 1 --data.examples 200 --tracking.trackers [] --tracking.progress false"
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(tmp_path / "home"))
        codes = []
        for command in (f"compare digits --output ~/runs {small}", "compare ~/runs"):
            with pytest.raises(SystemExit) as ended:
                main(command.split())
            codes.append(ended.value.code)
    assert codes == [0, 0]
    assert capsys.readouterr().out.count(str(tmp_path / "home/runs/comparison.md")) == 2


@pytest.mark.parametrize("command", ["--help", "run --help", "runs --help"])
def test_a_reader_that_has_left_does_not_fail_a_command(command: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m fedddp {command} | true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_class_without_a_source_file_has_no_descriptions_and_breaks_no_help() -> None:
    for known in (True, False):
        module = types.ModuleType("typed_in")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "typed_in", module)
            exec("import dataclasses\n@dataclasses.dataclass\nclass Typed:\n    x: int = 1", vars(module))
            if known:
                assert documented(module.Typed) == {}
        assert documented(module.Typed) == {}
