"""The shipped batch scripts train on two emulated nodes."""

from __future__ import annotations

import json
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
ROUNDS = 8
DIGITS = ("digits", "--rounds", str(ROUNDS), "--topology.ranks_per_client", "2", "--tracking.trackers", "[]")


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
    shape = ("--nodes=2", "--ntasks-per-node=1")  # one client group, a rank on each node
    federated = submit(cluster, folder, "federated.sbatch", *shape, *DIGITS, "--checkpoint.every", "1")
    # Not on node2, which will go down.
    lines = str(TEMPLATES / "sweep.txt")
    sweep = submit(cluster, folder, "sweep.sbatch", "--nodelist=node1", lines, "digits", "--rounds", "2")
    return Submitted(folder, federated, sweep)


def train_uninterrupted(output: Path) -> None:
    config = load_config(DIGITS[0], list(DIGITS[1:]))
    Federation(config, output=str(output), name="uninterrupted").run()


def test_a_stopped_and_killed_job_ends_with_the_same_bits(
    cluster: Cluster, submitted: Submitted, tmp_path: Path
) -> None:
    job_id, run = submitted.federated, submitted.folder / "runs" / f"fedddp-{submitted.federated}"
    wait_for_round(cluster, job_id, run, 2)
    cluster.call("scancel", "--signal=USR1", "--batch", job_id)  # as shortly before the time limit
    wait_for_round(cluster, job_id, run, 5)
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


def test_the_shipped_sweep_trains_its_four_runs(cluster: Cluster, submitted: Submitted) -> None:
    sweep = f"sweep-{submitted.sweep}"
    for task in range(1, 5):
        job = cluster.end(f"{submitted.sweep}_{task}")
        assert job["JobState"] == "COMPLETED", cluster.output(job)
        assert "To upload the run: wandb sync " in cluster.output(job)

    runs = sorted((submitted.folder / "runs" / sweep).iterdir())
    assert [rounds(run) for run in runs] == [[1, 2]] * 4
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    settings = [(c["data"]["partition"]["alpha"], c["seed"]) for c in configs]
    assert settings == [(0.1, 0), (0.1, 1), (1.0, 0), (1.0, 1)]
    assert {config["tracking"]["group"] for config in configs} == {sweep}
    logged = [path.read_bytes() for run in runs for path in run.glob("wandb/offline-run-*/*.wandb")]
    assert [sweep.encode() in log for log in logged] == [True] * 4
