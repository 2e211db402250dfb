"""Asynchronous training under torchrun: a rank is killed, the run resumes, and its arrivals are replayed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from launching import torchrun
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


def train_again(folder: Path, options: str) -> bool:
    """Resume or repeat the run on this world's ranks; return whether it finished."""
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    target, *flags = f"{RUN} {OPTIONS} {options}".split()
    finished: bool = Federation(load_config(target, flags)).run().finished
    return finished


def test_a_killed_rank_is_reported_and_the_run_resumes(tmp_path: Path) -> None:
    command = f"run {RUN} {OPTIONS} --name wall"
    broken = torchrun(tmp_path, ALGORITHM, command, ranks=3, strike="2")
    assert broken.returncode == 1
    (line,) = [line for line in broken.stderr.splitlines() if line.startswith("error: ")]
    assert "rank 2: no heartbeat (killed, stopped or hung)" in line
    assert "client" in line
    # On two groups, of which each is a pair; the ranks of `run_world` start faster than torchrun's.
    assert all(run_world(train_again, tmp_path, "--name wall --resume auto", size=5))
    wall = tmp_path / "runs" / "wall"
    assert [row["round"] for row in read_rows(wall / "history.jsonl")] == [1, 2, 3]
    arrivals = read_rows(wall / "arrivals.jsonl")
    assert len(arrivals) == 12
    assert {row["group"] for row in arrivals} == {0, 1}
    assert all(run_world(train_again, tmp_path, f"--name repeated --replay {wall}", size=5))
    ours, theirs = (load_file(tmp_path / "runs" / n / "model.safetensors") for n in ("repeated", "wall"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    repeated = read_rows(tmp_path / "runs" / "repeated" / "arrivals.jsonl")
    assert [row["dispatch_id"] for row in repeated] == [row["dispatch_id"] for row in arrivals]
