"""A real Slurm with two emulated nodes on this machine, for the batch scripts of slurm/."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).parent
TEMPLATES = HERE.parent.parent / "fedddp" / "slurm"
SEARCH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
ACTIVE = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED", "SIGNALING"}


class Cluster:
    """Slurm's commands, as a user of the cluster runs them."""

    def __init__(self, variables: dict[str, str]) -> None:
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "OMP"))}
        # Where node names do not resolve, the start script gives the head's address.
        self.mode = "plain" if "FEDDDP_MASTER_ADDR" in variables else "uts"
        self.environment = own | {"PATH": SEARCH, "WANDB_MODE": "offline"} | variables

    def call(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """Run a command of Slurm's and return what it prints."""
        result = subprocess.run(
            command,
            env=self.environment | variables,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """Return Slurm's fields of a job (of an array: its first task)."""
        line = self.call("scontrol", "show", "job", "-o", job_id).splitlines()[0]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def end(self, job_id: str, timeout_s: float = 500) -> dict[str, str]:
        """Wait until a job has ended and return Slurm's fields of it."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(job_id))["JobState"] in ACTIVE:
            assert time.monotonic() < deadline, f"not ended: {job}\n{self.output(job)}"
            time.sleep(0.1)
        return job

    @staticmethod
    def output(job: dict[str, str]) -> str:
        """Return what a job has printed."""
        path = Path(job["StdOut"])
        return path.read_text() if path.exists() else ""
