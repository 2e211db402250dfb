"""What the launcher set in this process's environment."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """What the launcher (torchrun, accelerate launch, or none) says of this process."""

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
