"""Asynchronous training under torchrun: a group is killed, the run goes on, its record is replayed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from launching import torchrun
from safetensors.torch import load_file

from fedddp import Federation
from fedddp.config.loader import load
from fedddp.storage.history import read_rows
from fedddp.testing import run_world

METHOD = """
import os, signal
from fedddp import FedBuff

class Strikes(FedBuff):
    def begin(self, visit):
        if visit.round >= 5 and os.environ["RANK"] == os.environ.get("STRIKE"):
            os.kill(os.getpid(), signal.SIGKILL)
"""
RUN = (
    "digits --rounds 3 --data.dataset shapes --data.examples 200 --data.image_size 12 --cohort.size 4 "
    "--algorithm mine.Strikes --algorithm.buffer_size 3 --clock Wall --topology.coordinator dedicated "
    "--checkpoint.every 1 --track.with []"
)


OPTIONS = "--topology.ranks_per_client 2"


def train_again(folder: Path, options: str) -> bool:
    """Train on this world's ranks; return whether the run finished."""
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    target, *flags = f"{RUN} {OPTIONS} {options}".split()
    return Federation(load(target, flags)).run().finished


@pytest.mark.timeout(180)
def test_a_killed_group_ends_the_job_with_its_name_and_the_run_goes_on(tmp_path: Path) -> None:
    command = f"run {RUN} {OPTIONS} --name wall"
    broken = torchrun(tmp_path, METHOD, command, ranks=5, timeout_s=100, strike="4")
    assert broken.returncode == 1
    (line,) = [line for line in broken.stderr.splitlines() if line.startswith("error: ")]
    assert "rank 4: no sign of life (killed, stopped or hung)" in line
    assert "client" in line
    # The ranks of the tests start sooner than torchrun's.
    assert all(run_world(train_again, tmp_path, "--name wall --resume auto", size=5, timeout_s=60))
    wall = tmp_path / "runs" / "wall"
    assert [row["round"] for row in read_rows(wall / "history.jsonl")] == [1, 2, 3]
    arrivals = read_rows(wall / "arrivals.jsonl")
    assert len(arrivals) == 12
    assert {row["group"] for row in arrivals} == {0, 1}
    assert all(run_world(train_again, tmp_path, f"--name again --replay {wall}", size=5, timeout_s=60))
    ours, theirs = (load_file(tmp_path / "runs" / n / "model.safetensors") for n in ("again", "wall"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    repeated = read_rows(tmp_path / "runs" / "again" / "arrivals.jsonl")
    assert [row["ticket"] for row in repeated] == [row["ticket"] for row in arrivals]
