"""The shipped batch scripts train real federations on two emulated nodes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from slurm_cluster import TEMPLATES, Cluster

pytestmark = pytest.mark.timeout(240)
PYTHON = str(Path(sys.executable).parent)
ROUNDS = 8
DIGITS = ("digits", "--rounds", str(ROUNDS), "--topology.ranks_per_client", "2")


def submit(cluster: Cluster, folder: Path, script: str, *arguments: str) -> str:
    """Submit a script of `slurm/`, options first, from a folder without a .venv; return its id."""
    split = next((i for i, word in enumerate(arguments) if not word.startswith("--")), 0)
    options, rest = arguments[:split], arguments[split:]
    path = f"{PYTHON}:{cluster.environment['PATH']}"
    command = ("sbatch", "--parsable", *options, str(TEMPLATES / script), *rest)
    return cluster.call(*command, cwd=folder, PATH=path)


def rounds(run: Path) -> list[int]:
    """Return the rounds that a run has recorded so far."""
    history = run / "history.jsonl"
    lines = history.read_text().splitlines(keepends=True) if history.exists() else []
    return [json.loads(line)["round"] for line in lines if line.endswith("\n")]


def wait_for_round(cluster: Cluster, job: str, run: Path, wanted: int) -> None:
    """Wait until a running job has recorded round `wanted`."""
    deadline = time.monotonic() + 90
    while max(rounds(run), default=0) < wanted:
        facts = cluster.facts(job)
        assert time.monotonic() < deadline, f"{facts}\n{cluster.output(facts)}"
        assert facts["JobState"] not in ("FAILED", "COMPLETED"), cluster.output(facts)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one client group on one node, trained without interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = submit(cluster, folder, "federated.sbatch", "--ntasks-per-node=2", *DIGITS)
    facts = cluster.end(job, timeout_s=120)
    assert facts["JobState"] == "COMPLETED", cluster.output(facts)
    assert "wandb sync" in cluster.output(facts)
    return folder / "runs" / f"fedddp-{job}"


def test_stopped_and_broken_job_ends_with_the_same_bits(
    cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    options = ("--nodes=2", "--ntasks-per-node=2")
    settings = (*DIGITS, "--checkpoint.every", "1")
    job = submit(cluster, tmp_path, "federated.sbatch", *options, *settings)
    run = tmp_path / "runs" / f"fedddp-{job}"
    wait_for_round(cluster, job, run, 2)
    cluster.call("scancel", "--signal=USR1", "--batch", job)  # the time limit is near
    wait_for_round(cluster, job, run, 5)
    down = ("update", "nodename=node2", "state=down", "reason=test")
    cluster.call("scontrol", *down)  # the job is killed and requeued; the node comes back by itself
    facts = cluster.end(job, timeout_s=120)

    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "2"), cluster.output(facts)
    assert rounds(run) == list(range(1, ROUNDS + 1))
    ours, expected = (load_file(path / "model.safetensors") for path in (run, undisturbed))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_array_of_four(cluster: Cluster, tmp_path: Path) -> None:
    lines = str(TEMPLATES / "sweep.txt")
    job = submit(cluster, tmp_path, "sweep.sbatch", lines, "digits", "--rounds", "2")
    for task in range(1, 5):
        facts = cluster.end(f"{job}_{task}", timeout_s=120)
        assert facts["JobState"] == "COMPLETED", cluster.output(facts)

    runs = sorted((tmp_path / "runs" / f"sweep-{job}").iterdir())
    assert [rounds(run) for run in runs] == [[1, 2]] * 4
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    settings = [(c["data"]["partition"]["alpha"], c["seed"]) for c in configs]
    assert settings == [(0.1, 0), (0.1, 1), (1.0, 0), (1.0, 1)]
    assert {config["track"]["group"] for config in configs} == {f"sweep-{job}"}
    assert all(len(list((run / "wandb").glob("offline-run-*"))) == 1 for run in runs)
