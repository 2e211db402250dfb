"""The launchers' command lines: torchrun, accelerate launch, and torchrun on two nodes.

Each start costs seconds, so there are few of them; tests/test_*.py test what ranks compute.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model

from fedddp import load_config
from fedddp.cli import main
from fedddp.models.zoo import lenet

BIN = Path(sys.executable).parent
SHORT = "run digits --rounds 2 --data.examples 400 --tracking.trackers []"

Launched = subprocess.Popen[str]


class Launcher:
    """Starts launchers in process groups of their own; none outlives the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Launched] = []

    def start(self, command: str, **variables: str) -> Launched:
        program, *arguments = shlex.split(command)
        env = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(Path(__file__).parents[2])}
        process = subprocess.Popen(
            [str(BIN / program), *arguments],
            cwd=self.folder,
            env=env | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, command: str) -> tuple[int, str, str]:
        """Return exit code, standard output and standard error."""
        process = self.start(command)
        out, err = process.communicate(timeout=500)
        return process.returncode, out, err


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    yield launcher
    for process in launcher.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def train_on_one_rank() -> dict[str, torch.Tensor]:
    """Return the model that this process trains as a world of one rank."""
    with pytest.raises(SystemExit) as stop:
        main(f"{SHORT} --output SINGLE".split())
    assert stop.value.code == 0
    return load_file("SINGLE/digits/model.safetensors")


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_quickstart_job_learns_and_writes_a_run_directory(launch: Launcher) -> None:
    command = "--standalone --nproc-per-node 4 -m fedddp run digits --topology.ranks_per_client 2"
    code, out, err = launch.run(f"torchrun {command} --output OUT --rounds 5 --checkpoint.every 2")
    assert code == 0, err
    assert out.splitlines()[-1] == "run directory: OUT/digits"
    assert "To upload the run: wandb sync " in out
    folder = launch.folder / "OUT" / "digits"
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        *("config.yaml", "history.jsonl", "clients.jsonl", "checkpoints", "model.safetensors", "wandb"),
        *("run.json", "run.log", "split.json", "evaluation.json", "wrong.safetensors"),
    }
    history = lines(folder / "history.jsonl")
    assert [row["round"] for row in history] == list(range(1, 6))
    assert history[-1]["eval/accuracy"] > 0.75  # type: ignore[operator]
    for name in ("train/loss", "eval/loss", "time/round", "time/train", "bytes/up", "bytes/down", "cohort"):
        assert name in history[-1]
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["round-00004", "round-00005"]
    again = load_config(str(folder / "config.yaml"))
    assert (again.topology.ranks_per_client, again.rounds) == (2, 5)
    missing, unexpected = load_model(lenet(10, (1, 8, 8)), folder / "model.safetensors")
    assert not missing
    assert not unexpected


def test_two_ranks_of_accelerate_launch_train_the_same_bits_as_one_rank(launch: Launcher) -> None:
    options = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    code, _, err = launch.run(
        f"accelerate launch {options} --main_process_port 0 -m fedddp {SHORT} --output OUT"
    )
    assert code == 0, err
    two, one = load_file("OUT/digits/model.safetensors"), train_on_one_rank()
    for name, tensor in one.items():
        assert torch.equal(two[name], tensor), name


def test_torchrun_on_two_nodes_trains_one_client_data_parallel(launch: Launcher) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (
        f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} --rdzv-id a"
    )
    command = f"torchrun {options} -m fedddp {SHORT} --topology.ranks_per_client 2 --output OUT"
    agents = [launch.start(command, GLOO_SOCKET_IFNAME="lo") for _ in range(2)]
    outputs = [agent.communicate(timeout=500) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "".join(out for out, _ in outputs).count("run directory: ") == 1
    two, one = load_file("OUT/digits/model.safetensors"), train_on_one_rank()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-5)
