"""Asynchronous training on pairs: a rank is killed, the run resumes, and its arrivals are replayed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from launching import type_and_wait_briefly
from safetensors.torch import load_file

from fedddp import Federation, load_config
from fedddp.storage.history import read_rows
from fedddp.testing import run_world

ALGORITHM = """
import os, signal
from fedddp.algorithms import FedBuff

class Killing(FedBuff):
    def begin(self, context):
        if context.round >= 5 and os.environ["RANK"] == os.environ.get("STRIKE"):
            os.kill(os.getpid(), signal.SIGKILL)
"""
RUN = (
    "digits --rounds 3 --data.dataset shapes --data.examples 200 --data.image_size 12 --cohort.size 4 "
    "--algorithm mine.Killing --algorithm.buffer_size 3 --clock Wall --topology.coordinator dedicated "
    "--checkpoint.every 1 --tracking.trackers []"
)
OPTIONS = "--topology.ranks_per_client 2"


def train_until_killed(folder: Path) -> tuple[object, list[str]]:
    """Type the command on this rank; rank 2 is a process of its own, and is killed.

    tests/test_faults.py kills a rank under torchrun.
    """
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    os.environ["STRIKE"] = "2"
    if os.environ["RANK"] == "2" and (rank := os.fork()):
        return os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]), []
    return type_and_wait_briefly(f"run {RUN} {OPTIONS} --name wall")


def train_again(folder: Path) -> list[bool]:
    """Resume the run on this world's ranks, then repeat it; return whether each finished."""
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    finished = []
    for options in ("--name wall --resume auto", "--name repeated --replay runs/wall"):
        target, *flags = f"{RUN} {OPTIONS} {options}".split()
        finished.append(Federation(load_config(target, flags)).run().finished)
    return finished


def test_a_killed_rank_is_reported_and_the_run_resumes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ALGORITHM)
    broken = run_world(train_until_killed, tmp_path, size=3)
    assert [code for code, _ in broken] == [1, 1, -signal.SIGKILL]
    (line,) = [line for _, lines in broken for line in lines if line.startswith("error: ")]
    assert "rank 2: no heartbeat (killed, stopped or hung)" in line
    assert "client" in line
    # On two groups, of which each is a pair.
    assert run_world(train_again, tmp_path, size=5) == [[True, True]] * 5
    wall = tmp_path / "runs" / "wall"
    assert [row["round"] for row in read_rows(wall / "history.jsonl")] == [1, 2, 3]
    arrivals = read_rows(wall / "arrivals.jsonl")
    assert len(arrivals) == 12
    assert {row["group"] for row in arrivals} == {0, 1}
    ours, theirs = (load_file(tmp_path / "runs" / n / "model.safetensors") for n in ("repeated", "wall"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    repeated = read_rows(tmp_path / "runs" / "repeated" / "arrivals.jsonl")
    assert [row["dispatch_id"] for row in repeated] == [row["dispatch_id"] for row in arrivals]
