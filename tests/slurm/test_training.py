"""The shipped batch scripts train on two emulated nodes."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from slurm.cluster import TEMPLATES, Cluster

from fedddp import Federation, load_config
from fedddp.testing import run_world

PYTHON = str(Path(sys.executable).parent)
LINES = TEMPLATES / "sweep.txt"
ROUNDS = 4
SMALL = ("--rounds", str(ROUNDS), "--data.examples", "200")
DIGITS = ("digits", *SMALL, "--topology.ranks_per_client", "2", "--tracking.trackers", "[]")

ALGORITHM = """
import os, signal, time
from fedddp.algorithms import FedAvg

class Paced(FedAvg):
    def begin(self, context):
        starts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if (starts, context.round) == (0, 1):
            signal.pause()  # the batch script repeats its signal until the run stops
        while (starts, context.round) == (1, 2):
            time.sleep(0.1)  # until it is killed
"""
"""FedAvg that is stopped in round 2 of its first start and killed in round 3 of its second, on any machine.

The recipe's momentum is given again, as another algorithm has its own.
"""


def submit(cluster: Cluster, folder: Path, script: str, *arguments: str) -> str:
    """Submit a script of slurm/, options first, from a folder without a .venv; return the job's id."""
    split = next((i for i, word in enumerate(arguments) if not word.startswith("--")), 0)
    options, rest = arguments[:split], arguments[split:]
    path = f"{PYTHON}:{cluster.environment['PATH']}"
    command = ("sbatch", "--parsable", *options, str(TEMPLATES / script), *rest)
    return cluster.call(*command, cwd=folder, PATH=path)


def rounds(run: Path) -> list[int]:
    """Return the rounds in the history of a run."""
    history = run / "history.jsonl"
    lines = history.read_text().splitlines(keepends=True) if history.exists() else []
    return [json.loads(line)["round"] for line in lines if line.endswith("\n")]


def wait_for_round(cluster: Cluster, job_id: str, run: Path, wanted: int) -> None:
    """Wait until a running job has recorded round `wanted`."""
    deadline = time.monotonic() + 500
    while max(rounds(run), default=0) < wanted:
        job = cluster.job(job_id)
        assert time.monotonic() < deadline, f"{job}\n{cluster.output(job)}"
        assert job["JobState"] not in ("FAILED", "COMPLETED"), cluster.output(job)
        time.sleep(0.05)


@dataclass
class Submitted:
    """Two jobs at a time, so that one uses the processors while the other waits for Slurm."""

    folder: Path
    federated: str
    sweep: str


@pytest.fixture(scope="module")
def submitted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "mine.py").write_text(ALGORITHM)
    shape = ("--nodes=2", "--ntasks-per-node=1")  # one client group, a rank on each node
    own = ("--algorithm", "mine.Paced", "--algorithm.momentum", "0.7", "--checkpoint.every", "1")
    federated = submit(cluster, folder, "federated.sbatch", *shape, *DIGITS, *own)
    # Not on node2, which will go down; the last line, and a test reads the others.
    options = ("--nodelist=node1", "--array=4")
    sweep = submit(cluster, folder, "sweep.sbatch", *options, str(LINES), "digits", *SMALL)
    return Submitted(folder, federated, sweep)


def train_uninterrupted(output: Path) -> None:
    config = load_config(DIGITS[0], list(DIGITS[1:]))
    Federation(config, output=str(output), name="uninterrupted").run()


def test_a_stopped_and_killed_job_ends_with_the_same_bits(
    cluster: Cluster, submitted: Submitted, tmp_path: Path
) -> None:
    job_id, run = submitted.federated, submitted.folder / "runs" / f"fedddp-{submitted.federated}"
    wait_for_round(cluster, job_id, run, 1)
    cluster.call("scancel", "--signal=USR1", "--batch", job_id)  # as shortly before the time limit
    wait_for_round(cluster, job_id, run, 2)
    down = ("update", "nodename=node2", "state=down", "reason=test")
    cluster.call("scontrol", *down)  # the job is killed and requeued; the node comes back by itself
    run_world(train_uninterrupted, tmp_path, size=4)  # two client groups, not one
    job = cluster.end(job_id)

    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "2"), cluster.output(job)
    assert rounds(run) == list(range(1, ROUNDS + 1))
    ours, theirs = (load_file(f / "model.safetensors") for f in (run, tmp_path / "uninterrupted"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert cluster.output(job).count("resuming ") == 2


def test_every_line_of_the_shipped_sweep_is_a_run_of_its_own() -> None:
    configs = [load_config("digits", shlex.split(line)) for line in LINES.read_text().splitlines()]
    settings = [(config.data.partition.alpha, config.seed) for config in configs]  # type: ignore[attr-defined]
    assert settings == [(0.1, 0), (0.1, 1), (1.0, 0), (1.0, 1)]


def test_the_shipped_sweep_trains_a_run(cluster: Cluster, submitted: Submitted) -> None:
    sweep = f"sweep-{submitted.sweep}"
    job = cluster.end(f"{submitted.sweep}_4")
    assert job["JobState"] == "COMPLETED", cluster.output(job)
    assert "To upload the run: wandb sync " in cluster.output(job)

    (run,) = (submitted.folder / "runs" / sweep).iterdir()
    assert rounds(run) == list(range(1, ROUNDS + 1))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["data"]["partition"]["alpha"], config["seed"]) == (1.0, 1)
    assert config["tracking"]["group"] == sweep
    (log,) = run.glob("wandb/offline-run-*/*.wandb")
    assert sweep.encode() in log.read_bytes()
