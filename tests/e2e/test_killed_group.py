"""Asynchronous training under torchrun: a group is killed, the run goes on, its record is replayed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import torchrun
from safetensors.torch import load_file

from fedddp import Federation
from fedddp.history import read_rows
from fedddp.settings import load
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


def start(folder: Path, ranks: int, options: str, strike: str = "none") -> subprocess.CompletedProcess[str]:
    return torchrun(folder, METHOD, f"run {RUN} {options}", ranks=ranks, timeout_s=100, strike=strike)


def go_on(folder: Path, options: str) -> bool:
    """Resume on this world's ranks; return whether the run finished."""
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    target, *flags = f"{RUN} {options} --resume auto".split()
    return Federation(load(target, flags)).run().finished


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("ranks", "killed"), [(1, 2), (2, 4)], ids=["1+2 ranks", "1+2x2 ranks"])
def test_a_killed_group_ends_the_job_with_its_name_and_the_run_goes_on(
    ranks: int, killed: int, tmp_path: Path
) -> None:
    options = f"--name wall --topology.ranks_per_client {ranks}"
    broken = start(tmp_path, 1 + 2 * ranks, options, strike=str(killed))
    assert broken.returncode == 1
    (line,) = [line for line in broken.stderr.splitlines() if line.startswith("error: ")]
    assert f"rank {killed}: no sign of life (killed, stopped or hung)" in line
    assert "client" in line
    if ranks == 1:
        again = start(tmp_path, 3, f"{options} --resume auto")
        assert again.returncode == 0, again.stderr
        assert "from round-00001" in again.stdout
    else:  # ranks of the tests, which start sooner
        assert all(run_world(go_on, tmp_path, options, size=5, timeout_s=100))
    wall = tmp_path / "runs" / "wall"
    assert [row["round"] for row in read_rows(wall / "history.jsonl")] == [1, 2, 3]
    arrivals = read_rows(wall / "arrivals.jsonl")
    assert len(arrivals) == 12
    assert {row["group"] for row in arrivals} == {0, 1}
    if ranks == 1:
        replay = start(tmp_path, 3, f"--name again --replay {wall}")
        assert replay.returncode == 0, replay.stderr
        ours, theirs = (load_file(tmp_path / "runs" / n / "model.safetensors") for n in ("again", "wall"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        repeated = read_rows(tmp_path / "runs" / "again" / "arrivals.jsonl")
        assert [row["ticket"] for row in repeated] == [row["ticket"] for row in arrivals]
