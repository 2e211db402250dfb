"""How the ranks of a world are shared out over client groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedddp.section import ConfigError, PositiveFloat, PositiveInt, Section


@dataclass(frozen=True, kw_only=True)
class TopologyConfig(Section):
    """How the ranks of the world are shared out: G client groups of R ranks, and a coordinator."""

    key = "topology"

    ranks_per_client: PositiveInt = 1
    """Ranks R that train one client together, data-parallel; >= 1, and it divides the ranks that train."""

    coordinator: Literal["colocated", "dedicated"] = "colocated"
    """`colocated`: rank 0 coordinates and trains; `dedicated`: rank 0 only coordinates."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication library; `auto` is NCCL when every rank has its own GPU, gloo otherwise."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models train; `auto` is the GPU when there is one."""

    threads: PositiveInt = 1
    """CPU threads of each rank, >= 1; sums in another order, so a model's last bits, depend on it."""

    timeout_s: PositiveFloat = 1800.0
    """Seconds a rank waits for the others before it fails, > 0; longer than the longest round."""

    def __post_init__(self) -> None:
        if self.backend == "nccl" and self.device == "cpu":
            raise ConfigError("topology.backend=nccl needs GPUs, but topology.device=cpu; use backend=gloo")

    def groups(self, world_size: int) -> int:
        """Return the number G of client groups in a world of `world_size` ranks.

        Raises:
            ConfigError: the ranks that train are none, or do not divide into groups of R.
        """
        training = world_size - (self.coordinator == "dedicated")
        if training < 1:
            raise ConfigError(
                "topology.coordinator=dedicated needs at least 2 ranks, but the world has 1; "
                "start more with torchrun --nproc-per-node"
            )
        if training % self.ranks_per_client:
            reserved = " (1 is the coordinator)" if training < world_size else ""
            raise ConfigError(
                f"topology.ranks_per_client={self.ranks_per_client} does not divide the {training} "
                f"training ranks of a world of {world_size}{reserved}; change --nproc-per-node or "
                "ranks_per_client"
            )
        return training // self.ranks_per_client
