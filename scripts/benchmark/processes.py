"""Start the programs that are measured, each in processes of its own, and read what they wrote."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from workloads import LR, WARM_UP, WORKLOADS

HERE = Path(__file__).resolve().parent
LEAST_ROUNDS = WARM_UP + 2
"""Of a run: the last round is not counted either, since fedddp evaluates and saves in it."""


@dataclass(frozen=True)
class Measured:
    """What one run of a program was measured to take."""

    launched: float
    """When its processes were started, in seconds of the clock of `ended`."""
    ranks: list[dict[str, Any]]
    """What each rank wrote; see `stopwatch.py`."""

    @property
    def ended(self) -> list[float]:
        """When each round ended, in seconds of a steady clock that all processes share."""
        ended: list[float] = self.ranks[0]["ended"]
        return ended

    def seconds(self) -> list[float]:
        """Return the wall time of each counted round: from the end of the one before to its own."""
        return [after - before for before, after in pairwise(self.ended)][WARM_UP - 1 : -1]

    def cpu_seconds(self) -> list[float]:
        """Return the CPU time of rank 0's process in each counted round."""
        return [after - before for before, after in pairwise(self.ranks[0]["cpu"])][WARM_UP - 1 : -1]

    def start(self) -> float:
        """Return the seconds from the launch to the end of the first round, less those of a usual round."""
        return self.ended[0] - self.launched - median(self.seconds())

    def phase(self, name: str) -> list[float]:
        """Return the seconds that fedddp recorded as `name`, of each counted round."""
        return [float(row.get(name, 0.0)) for row in self.ranks[0]["rows"]][WARM_UP:-1]

    def peak_bytes_of_training(self) -> int:
        """Return the peak of rank 0 before the last round, in which it evaluates and saves."""
        return int(self.ranks[0]["peaks"][-2])

    def peak_bytes(self) -> int:
        """Return the largest peak of a rank's resident memory."""
        return max(int(rank["peak_bytes"]) for rank in self.ranks)


def federation(name: str, root: str, rounds: int) -> list[str]:
    """Return the settings of a workload for fedddp; it evaluates and saves in the last round alone."""
    w = WORKLOADS[name]
    return settings(
        {
            "data.dataset": "inputs.images",
            "data.root": root or "none",
            "data.examples": w.clients * w.examples,
            "data.clients": w.clients,
            "cohort.size": w.cohort,
            "model.name": w.model,
            "local.batch_size": w.batch,
            "local.lr": LR,
            "rounds": rounds,
            "evaluation.every": rounds,
            "checkpoint.every": rounds,
        }
    )


def settings(values: dict[str, object]) -> list[str]:
    """Return settings as arguments."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def run_fedddp(
    processes: int, arguments: Sequence[str], extra: str = "", *, watch: str = "", device: str = "cpu"
) -> Measured:
    """Train with fedddp.

    Args:
        processes: ranks, each with one thread.
        arguments: settings.
        extra: further settings, as on a command line; they win.
        watch: option of `stopwatch.py`.
        device: `topology.device`.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.yaml"
        file.write_text(f"topology: {{device: {device}}}\ntracking: {{trackers: [], progress: false}}\n")
        command = ["run", str(file), *arguments, "--output", folder, *shlex.split(extra)]
        options = [watch] if watch else []
        return launch(processes, "stopwatch.py", [*options, folder, "--", *command], folder)


def run_loop(
    processes: int,
    name: str,
    root: str,
    rounds: int,
    *,
    program: str = "loop.py",
    python: str = "",
    device: str = "cpu",
) -> Measured:
    """Train a workload with the hand-written loop, or with a peer's program that takes the same arguments."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--root", root] if root else []
        options += ["--device", device] if device != "cpu" else []
        return launch(processes, program, [folder, name, str(rounds), *options], folder, python=python)


def launch(processes: int, program: str, arguments: list[str], folder: str, *, python: str = "") -> Measured:
    """Run a program of this folder, under torchrun if it is to have several processes.

    Args:
        processes: their number, with one thread each.
        program: file name.
        arguments: of the program; it writes rank-0.json, rank-1.json, ... into `folder`.
        folder: where it runs.
        python: the interpreter; this one by default.

    It exits with the program's own error, if it fails.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [
        python or sys.executable,
        *(torchrun if processes > 1 else []),
        str(HERE / program),
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    launched = time.perf_counter()
    done = subprocess.run(command, check=False, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {shlex.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    files = sorted(Path(folder).glob("rank-*.json"), key=lambda file: int(file.stem.split("-")[1]))
    return Measured(launched, [json.loads(file.read_text()) for file in files])
