"""Faults from outside: killed ranks, a rank that raises, signals, lost disks, corrupt files."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import torchrun, type_and_wait_briefly
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fedddp import Config, ConfigError, TopologyConfig, load_config
from fedddp.cli import main
from fedddp.config.loader import to_yaml
from fedddp.distributed import environment as launch_environment
from fedddp.distributed.launch import connect
from fedddp.storage.checkpoint import Checkpoints
from fedddp.storage.history import read_rows
from fedddp.testing import run_world

Command = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parent.parent
ALGORITHM = """
import os, signal, time, torch
from pathlib import Path
from fedddp.algorithms import FedAvg

class Faulty(FedAvg):
    def begin(self, context):
        for fault in os.environ["STRIKE"].split(","):
            kind, rank, number = fault.split()
            done = Path(f"done-{kind}")
            if os.environ.get("RANK", "0") == rank and context.round + 1 == int(number) and not done.exists():
                done.touch()
                # The checkpoint of the round before is written while this one trains.
                while kind == "SIGKILL" and not [*Path("runs").glob(f"*/checkpoints/round-*{context.round}")]:
                    time.sleep(0.01)
                self.inject(kind)

    def inject(self, kind):
        if kind == "raise":
            raise RuntimeError("the disk of this rank is on fire")
        if kind == "memory":
            torch.empty(1 << 60)
        if kind == "unmount":
            Path("images").rename("elsewhere")
        if kind.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, kind))
"""
"""An algorithm that injects the faults in STRIKE, each once: kind, rank and round (from 1)."""

SMALL = "--rounds 3 --local.epochs 1 --checkpoint.every 1 --tracking.trackers [] --algorithm mine.Faulty"
DIGITS = f"run digits --data.examples 300 {SMALL}"
INTERRUPTED = f"{DIGITS} --name interrupted"


def assert_same_bits(one: Path, other: Path) -> None:
    ours, theirs = (load_file(directory / "model.safetensors") for directory in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for directory in (one, other):
        assert [row["round"] for row in read_rows(directory / "history.jsonl")] == [1, 2, 3]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in this process, a world of one rank; return exit code, output and errors."""
    (tmp_path / "mine.py").write_text(ALGORITHM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def run_command(arguments: str, fault: str = "none") -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STRIKE", f"{fault} 0 2")
            with pytest.raises(SystemExit) as stop:
                main(shlex.split(arguments))
        assert isinstance(stop.value.code, int)
        return stop.value.code, *capfd.readouterr()

    return run_command


def test_a_killed_coordinator_resumes_and_a_rank_that_raises_ends_the_job(
    tmp_path: Path, command: Command
) -> None:
    broken = torchrun(tmp_path, ALGORITHM, INTERRUPTED, "--max-restarts=1", strike="SIGKILL 0 2,raise 1 3")
    assert "from round-00001" in broken.stdout, "killed in round 2"
    assert broken.returncode == 1
    assert broken.stderr.count(" in inject\n") == 1, "one traceback; torchrun's own has none of our files"
    # The rank that survives the first fault reports an error, too.
    *before, line = [line for line in broken.stderr.splitlines() if line.startswith("error:")]
    assert all("rank 0: no heartbeat" in line for line in before)
    assert len(before) <= 1
    started = "error: rank 1: RuntimeError: the disk of this rank is on fire; while training client "
    assert line.startswith(started)
    assert line.endswith(" in round 3")
    code, out, _ = command(f"{INTERRUPTED} --resume auto")
    assert code == 0
    assert "from round-00002" in out
    assert command(f"{DIGITS} --name uninterrupted")[0] == 0
    assert_same_bits(tmp_path / "runs" / "interrupted", tmp_path / "runs" / "uninterrupted")


def test_an_error_of_all_ranks_is_reported_once() -> None:
    flags = "--rounds 1 --data.examples 400 --tracking.trackers [] --local.lr 1e30"
    reports = run_world(type_and_wait_briefly, f"run digits {flags}", size=2)
    assert [code for code, _ in reports] == [1, 1]
    (line,) = [line for _, lines in reports for line in lines if line.startswith("error: ")]
    assert "its training loss became nan; lower local.lr" in line
    assert not any("Traceback" in line for _, lines in reports for line in lines)


def test_a_configuration_error_is_reported_once() -> None:
    reports = run_world(type_and_wait_briefly, "run digits --topology.ranks_per_client 3", size=2)
    assert [code for code, _ in reports] == [2, 2]
    (line,) = [line for _, lines in reports for line in lines]
    assert line.startswith("error: ")
    assert "ranks_per_client=3 does not divide the 2 training ranks" in line


@pytest.mark.parametrize("signal", ["SIGUSR1", "SIGTERM", "SIGHUP", "SIGINT"])
def test_a_stopped_run_prints_the_command_that_resumes_it(
    tmp_path: Path, command: Command, signal: str
) -> None:
    code, out, err = command(DIGITS, signal)
    assert code == 75, err
    (again,) = re.findall("^Stopped. Resume with the same launcher and: fedddp (run .*)$", out, re.MULTILINE)
    code, out, _ = command(again)
    assert code == 0
    assert (
        "from round-00001-00001" in out
    )  # in the middle of a round, after the client whose training was interrupted
    assert command(f"{DIGITS} --name uninterrupted")[0] == 0
    assert_same_bits(tmp_path / "runs" / "digits", tmp_path / "runs" / "uninterrupted")


def test_out_of_memory_is_reported_in_one_line_with_the_settings_to_change(command: Command) -> None:
    code, _, err = command(f"{DIGITS} --local.batch_size 7", "memory")
    assert code == 1
    assert len(err.splitlines()) == 1
    assert re.match(
        r"error: client \d+: out of CPU memory in round 2 with local.batch_size=7, "
        r"topology.ranks_per_client=1 and ",
        err,
    )
    for setting in ("local.accumulate", "local.precision=bf16", "topology.ranks_per_client"):
        assert setting in err


def test_a_lost_disk_is_reported_and_the_run_resumes_when_it_is_back(
    tmp_path: Path, command: Command
) -> None:
    for index in range(24):
        path = tmp_path / "images" / ("test", "train")[index > 3] / f"class-{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 10 * index, np.uint8)).save(path)
    data = "--data.dataset image_folder --data.root images --data.memory stream --data.workers 0"
    streaming = f"run digits {data} --data.clients 4 --cohort.size 2 {SMALL}"
    code, _, err = command(f"{streaming} --name one", "unmount")
    assert code == 1, err
    assert re.match(
        r"error: images/train/class-\d/\d+.png cannot be read .*No such file.*; bring its disk back and "
        r"resume with --resume auto; while training client \d in round 2$",
        err,
    )
    Path("elsewhere").rename("images")
    assert command(f"{streaming} --name one --resume auto")[0] == 0
    assert command(f"{streaming} --name uninterrupted")[0] == 0
    assert_same_bits(tmp_path / "runs" / "one", tmp_path / "runs" / "uninterrupted")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of rounds 1 and 2, which hold ones and twos."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = checkpoints_in(folder)
    for number in (1, 2):
        module = nn.Linear(3, 2)
        nn.init.constant_(module.weight, number)
        tensors = {"server.v": torch.full((4,), float(number))}
        checkpoints.save(f"round-{number:05d}", module, tensors, {"round": number}, lambda _: [])
    return folder


def checkpoints_in(folder: Path) -> Checkpoints:
    world = connect(TopologyConfig())
    world.close()
    return Checkpoints(folder, 2, world)


def corrupt(data: bytes, kind: str, detail: object) -> bytes:
    """Return `data` cut at a byte, with a bit flipped, or replaced by other bytes."""
    if isinstance(detail, bytes):
        return detail
    position = int(str(detail))
    if kind == "cut":
        return data[: position % len(data)]
    flipped = bytearray(data)
    flipped[position // 8 % len(data)] ^= 1 << position % 8
    return bytes(flipped)


CORRUPTION = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 10_000)),
    st.tuples(st.just("flip"), st.integers(0, 80_000)),
    st.tuples(st.just("garbage"), st.binary(max_size=200) | st.text(max_size=200).map(str.encode)),
    st.tuples(
        st.just("garbage"), st.sampled_from([b"[" * 2000, b"{}", b"null", b'{"metadata": 1}', b"\xff"])
    ),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.sampled_from(["model.safetensors", "state.safetensors", "state.json"]), CORRUPTION)
def test_with_any_corruption_of_the_newest_checkpoint_an_intact_one_is_chosen(
    saved: Path, file: str, corruption: tuple[str, object]
) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(saved, Path(parent) / "checkpoints"))
        path = folder / "round-00002" / file
        path.write_bytes(corrupt(path.read_bytes(), *corruption))
        found, lines = checkpoints_in(folder).newest()
        assert found is not None
        value = found.metadata["round"]  # a bit in state.json may be one of its spaces
        assert value == 1 or (file == "state.json" and corruption[0] == "flip")
        assert found.tensors("model.safetensors")["weight"].eq(value).all()
        assert len(lines) == 2 - value
        assert all("\n" not in line for line in lines)


INTACT_YAML = to_yaml(Config(rounds=3, name="one")).encode()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(CORRUPTION)
def test_with_any_corruption_a_yaml_file_is_a_configuration_or_a_one_line_error(
    corruption: tuple[str, object],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_bytes(corrupt(INTACT_YAML, *corruption))
        try:
            load_config(str(path))
        except ConfigError as error:  # any other exception is a traceback for the user
            assert "\n" not in str(error)  # noqa: PT017 - a configuration is allowed, too


def test_a_rank_that_waits_for_another_ones_error_reports_no_killed_loader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def as_torchs_loader(*_: object) -> None:
        raise RuntimeError("DataLoader worker is killed by signal: Terminated.")

    monkeypatch.setattr(launch_environment, "FIRST_ERROR_S", 0.5)
    before = signal.signal(signal.SIGCHLD, as_torchs_loader)
    try:
        worker = subprocess.Popen(["sleep", "0.1"])
        launch_environment.wait_for_first_error()
        worker.wait()
    finally:
        signal.signal(signal.SIGCHLD, before)
