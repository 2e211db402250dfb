"""How the ranks of a world are shared out over client groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Interval

from fedddp.section import EXECUTION, ConfigError, PositiveInt, Section

YEAR_S = 365 * 24 * 3600


@dataclass(frozen=True, kw_only=True)
class TopologyConfig(Section):
    """How the ranks of the world are shared out: G client groups of R ranks, and a coordinator."""

    key = "topology"

    ranks_per_client: PositiveInt = field(default=1, metadata=EXECUTION)
    """Ranks R that train one client together, data-parallel; >= 1, and it divides the ranks that train."""

    coordinator: Literal["colocated", "dedicated"] = field(default="colocated", metadata=EXECUTION)
    """`colocated`: rank 0 coordinates and trains; `dedicated`: rank 0 only coordinates."""

    backend: Literal["auto", "nccl", "gloo"] = field(default="auto", metadata=EXECUTION)
    """Communication library; `auto` is NCCL when every rank has its own GPU, gloo otherwise."""

    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=EXECUTION)
    """Where models train; `auto` is the GPU when there is one."""

    threads: PositiveInt | None = None
    """CPU threads per rank, >= 1; none: OMP_NUM_THREADS, else 1. The last bits of a model depend on it."""

    timeout_s: Annotated[float, Interval(gt=0, le=YEAR_S)] = field(default=1800.0, metadata=EXECUTION)
    """Seconds a rank waits for the others before it fails, in (0, 31536000]; longer than a round."""

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
