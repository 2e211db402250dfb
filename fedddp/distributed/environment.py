"""What the launcher set in this process's environment, and how a rank leaves the last word to another."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass

FIRST_ERROR_S = 10.0
"""Seconds a rank stays while another reports the error: a launcher ends the job when one rank leaves."""


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

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank is the coordinator (rank 0)."""
        return self.rank == 0


def wait_for_first_error() -> None:
    """Wait for the launcher to end this rank, so that the rank that failed first reports the error."""
    time.sleep(FIRST_ERROR_S)
