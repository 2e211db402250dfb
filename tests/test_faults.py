"""What the launchers and the outside do to a run: killed ranks, a rank that raises, damaged files."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import torchrun, type_on_this_rank
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fedddp import Run, Topology
from fedddp.cli import main
from fedddp.config.loader import load, to_yaml
from fedddp.config.schema import ConfigError
from fedddp.distributed.launch import connect
from fedddp.storage.checkpoint import Checkpoints
from fedddp.storage.history import read_rows
from fedddp.testing import run_world

Command = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parent.parent
METHOD = """
import os, signal, torch
from pathlib import Path
from fedddp import FedAvg

class Strikes(FedAvg):
    def begin(self, visit):
        for strike in os.environ["STRIKE"].split(","):
            what, rank, number = strike.split()
            struck = Path(f"struck-{what}")
            if os.environ.get("RANK", "0") == rank and visit.round + 1 == int(number) and not struck.exists():
                struck.touch()
                self.strike(what)

    def strike(self, what):
        if what == "raise":
            raise RuntimeError("the disk of this rank is on fire")
        if what == "memory":
            torch.empty(1 << 60)
        if what == "unmount":
            Path("images").rename("elsewhere")
        if what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, what))
"""
SMALL = "--rounds 3 --local.epochs 1 --checkpoint.every 1 --track.with [] --algorithm mine.Strikes"
STRUCK = f"run digits {SMALL} --name struck"


def bits(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    ours, theirs = bits(one), bits(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for run in (one, other):
        assert [row["round"] for row in read_rows(run / "history.jsonl")] == [1, 2, 3]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Types a command in this process, a world of one; returns exit code, output and errors."""
    (tmp_path / "mine.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def typed(arguments: str, strike: str = "none") -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STRIKE", f"{strike} 0 2")
            with pytest.raises(SystemExit) as stop:
                main(shlex.split(arguments))
        assert isinstance(stop.value.code, int)
        return stop.value.code, *capfd.readouterr()

    return typed


@pytest.mark.timeout(180)
def test_a_killed_coordinator_costs_a_round_and_a_rank_that_raises_ends_the_job(
    tmp_path: Path, command: Command
) -> None:
    broken = torchrun(tmp_path, METHOD, STRUCK, "--max-restarts=1", strike="SIGKILL 0 2,raise 1 3")
    assert "from round-00001" in broken.stdout, "killed in round 2"
    assert broken.returncode == 1
    assert broken.stderr.count(" in strike\n") == 1, "one traceback; torchrun's own has none of our files"
    # The survivor of the first fault has an error, too.
    *before, line = [line for line in broken.stderr.splitlines() if line.startswith("error:")]
    assert all("rank 0: no sign of life" in line for line in before)
    assert len(before) <= 1
    assert line.startswith("error: rank 1: the disk of this rank is on fire; while training client ")
    assert line.endswith(" in round 3")
    code, out, _ = command(f"{STRUCK} --resume auto")
    assert code == 0
    assert "from round-00002" in out
    assert command(f"run digits {SMALL} --name in-peace")[0] == 0
    assert_same_bits(tmp_path / "runs" / "struck", tmp_path / "runs" / "in-peace")


def test_an_error_of_all_ranks_at_once_is_printed_once() -> None:
    flags = "--rounds 1 --data.examples 400 --track.with [] --local.lr 1e30"
    typed = run_world(type_on_this_rank, f"run digits {flags}", size=2)
    assert [code for code, _ in typed] == [1, 1]
    (line,) = [line for _, lines in typed for line in lines if line.startswith("error: ")]
    assert "its training loss became nan; lower local.lr" in line
    assert not any("Traceback" in line for _, lines in typed for line in lines)


@pytest.mark.parametrize("number", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_stopped_run_says_how_to_go_on(tmp_path: Path, command: Command, number: str) -> None:
    code, out, err = command(f"run digits {SMALL}", number)
    assert code == 75, err
    (again,) = re.findall("^stopped; go on with the same launcher and: fedddp (run .*)$", out, re.MULTILINE)
    code, out, _ = command(again)
    assert code == 0
    assert "from round-00001-00001" in out  # in the middle of a round, after the visit that was interrupted
    assert command(f"run digits {SMALL} --name in-peace")[0] == 0
    assert_same_bits(tmp_path / "runs" / "digits", tmp_path / "runs" / "in-peace")


def test_out_of_memory_is_one_line_with_the_client_its_batch_and_what_to_set(command: Command) -> None:
    code, _, err = command(f"run digits {SMALL} --local.batch_size 7", "memory")
    assert code == 1
    assert len(err.splitlines()) == 1
    assert re.match(
        r"error: client \d+: out of CPU memory in round 2 with local.batch_size=7 over 1 rank ", err
    )
    for setting in ("local.accumulate", "local.precision=bf16", "topology.ranks_per_client"):
        assert setting in err


def test_data_whose_disk_goes_away_are_named_and_the_run_goes_on_when_it_is_back(
    tmp_path: Path, command: Command
) -> None:
    for index in range(24):
        path = tmp_path / "images" / ("test", "train")[index > 3] / f"class-{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 10 * index, np.uint8)).save(path)
    data = "--data.dataset image_folder --data.root images --data.memory stream --data.workers 0"
    run = f"run digits {data} --data.clients 4 --cohort.size 2 {SMALL}"
    code, _, err = command(f"{run} --name one", "unmount")
    assert code == 1, err
    assert re.match(
        r"error: images/train/class-\d/\d+.png cannot be read .*No such file.*; bring its disk back and "
        r"go on with --resume auto; while training client \d in round 2$",
        err,
    )
    Path("elsewhere").rename("images")
    assert command(f"{run} --name one --resume auto")[0] == 0
    assert command(f"{run} --name in-peace")[0] == 0
    assert_same_bits(tmp_path / "runs" / "one", tmp_path / "runs" / "in-peace")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of rounds 1 and 2, which hold ones and twos."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = checkpoints_in(folder)
    for number in (1, 2):
        module = nn.Linear(3, 2)
        nn.init.constant_(module.weight, number)
        tensors = {"server.v": torch.full((4,), float(number))}
        checkpoints.save(f"round-{number:05d}", module, tensors, {"round": number}, lambda _: [])
    return folder


def checkpoints_in(folder: Path) -> Checkpoints:
    world = connect(Topology())
    world.close()
    return Checkpoints(folder, 2, world)


def damaged(data: bytes, kind: str, what: object) -> bytes:
    """Return `data` cut at a place, with a bit flipped, or something else altogether."""
    if isinstance(what, bytes):
        return what
    place = int(str(what))
    if kind == "cut":
        return data[: place % len(data)]
    flipped = bytearray(data)
    flipped[place // 8 % len(data)] ^= 1 << place % 8
    return bytes(flipped)


DAMAGE = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 10_000)),
    st.tuples(st.just("flip"), st.integers(0, 80_000)),
    st.tuples(st.just("garbage"), st.binary(max_size=200) | st.text(max_size=200).map(str.encode)),
    st.tuples(st.just("garbage"), st.sampled_from([b"[" * 2000, b"{}", b"null", b'{"facts": 1}', b"\xff"])),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.sampled_from(["model.safetensors", "state.safetensors", "state.json"]), DAMAGE)
def test_whatever_happened_to_a_checkpoint_a_whole_one_is_chosen(
    saved: Path, file: str, damage: tuple[str, object]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(saved, Path(place) / "checkpoints"))
        path = folder / "round-00002" / file
        path.write_bytes(damaged(path.read_bytes(), *damage))
        found, lines = checkpoints_in(folder).newest()
        assert found is not None
        value = found.facts["round"]  # a bit in state.json may be one of its spaces
        assert value == 1 or (file == "state.json" and damage[0] == "flip")
        assert found.tensors("model.safetensors")["weight"].eq(value).all()
        assert len(lines) == 2 - value
        assert all("\n" not in line for line in lines)


WHOLE_YAML = to_yaml(Run(rounds=3, name="one")).encode()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(DAMAGE)
def test_whatever_stands_in_a_yaml_file_is_a_run_or_one_line(damage: tuple[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_bytes(damaged(WHOLE_YAML, *damage))
        try:
            load(str(path))
        except ConfigError as error:  # anything else would be a traceback
            assert "\n" not in str(error)  # noqa: PT017 - a run is as good
