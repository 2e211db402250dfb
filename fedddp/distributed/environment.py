"""What the launcher set in this process's environment, and how a rank leaves the last word to another."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from fedddp.section import ConfigError

FIRST_ERROR_S = 10.0
"""Seconds a rank stays while another reports the error: a launcher ends the job when one rank leaves."""


TASKS = (
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpiexec", "PMI_SIZE", "PMI_RANK"),
)
"""Programs that start several tasks, with the variables that hold their number and rank."""


@dataclass(frozen=True)
class Launch:
    """This process among those that the launcher (torchrun, accelerate launch, or none) started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    restarts: int
    launcher: str
    """Which launcher started this process; the same after it restarted its ranks."""

    @classmethod
    def from_environment(cls) -> Launch:
        """Read torchrun's variables; without a launcher this is a world of one."""
        env = os.environ
        size = int(env.get("WORLD_SIZE", "1"))
        return cls(
            rank=int(env.get("RANK", "0")),
            world_size=size,
            local_rank=int(env.get("LOCAL_RANK", "0")),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", str(size))),
            restarts=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
            launcher=f"{socket.gethostname()} {os.getppid()} {env.get('TORCHELASTIC_RUN_ID', '')}",
        )

    @classmethod
    def check(cls) -> None:
        """Refuse to train a whole run in each of several tasks that no launcher made one world of.

        Raises:
            ConfigError: the starter, its task, and what to use.
        """
        if "WORLD_SIZE" in os.environ:
            return
        for starter, size, rank in TASKS:
            if int(os.environ.get(size, "1")) > 1:
                raise ConfigError(
                    f"this is task {os.environ.get(rank, '?')} of {os.environ[size]} of {starter}, but no "
                    "launcher made one world of them; start ranks with torchrun, or a job with "
                    "slurm/federated.sbatch"
                )

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank is the coordinator (rank 0)."""
        return self.rank == 0


def threads_of_environment() -> int:
    """Return the threads that OMP_NUM_THREADS gives a rank; 1 where it is not set to a number."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdigit() and int(text) else 1


@contextlib.contextmanager
def kineto_silenced() -> Iterator[None]:
    """Keep torch's profiler from writing its own log to standard error in the block."""
    given = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        yield
    finally:
        if given is None:
            del os.environ["KINETO_LOG_LEVEL"]


def wait_for_first_error() -> None:
    """Wait for the launcher to end this rank, so that the rank that failed first reports the error."""
    if threading.current_thread() is threading.main_thread():
        # The launcher ends the workers of data loaders too, of which torch would report each in a traceback.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    time.sleep(FIRST_ERROR_S)
