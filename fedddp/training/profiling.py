"""Profiles of some rounds by torch.profiler: per rank a trace, its phases and its slowest operators."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedddp.algorithms import AsynchronousAlgorithm
from fedddp.distributed.environment import kineto_silenced

if TYPE_CHECKING:
    from rich.table import Table

    from fedddp.training.session import Session

logger = logging.getLogger(__name__)

FOLDER = "profile"
PHASE = "phase: "
"""How a phase of a round is marked in the trace."""

OPERATORS = 15
"""Operators in the table."""


class NoProfiler:
    """Profiles nothing."""

    def phase(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Mark the block as a phase of the round."""
        return contextlib.nullcontext()

    def step(self) -> None:
        """Note that a round ended on this rank."""


class Profiler(NoProfiler):
    """Profiles rounds of this rank, after two that warm up, and writes what it found."""

    def __init__(self, directory: Path, rank: int, device: torch.device, *, rounds: int, left: int) -> None:
        """Prepare; `start` begins.

        Args:
            directory: the run directory.
            rank: of the world.
            device: on which this rank trains.
            rounds: how many to record, >= 1.
            left: rounds that the run still trains; with fewer than `rounds` + 2, fewer warm up.
        """
        from torch.profiler import ProfilerActivity, profile, schedule

        rounds = min(rounds, max(left, 1))
        spare = left - rounds
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self.folder, self.rank = directory / FOLDER, rank
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "won't be using warmup"
            self.profile = profile(
                activities=activities,
                schedule=schedule(wait=int(spare > 1), warmup=int(spare > 0), active=rounds, repeat=1),
            )

    def phase(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Mark the block in the trace."""
        return torch.profiler.record_function(PHASE + name)

    def step(self) -> None:
        """Begin the next round of the schedule."""
        self.profile.step()

    def write(self) -> None:
        """Write the trace and the tables, after training; a full disk costs them, and not the run."""
        from rich.console import Console

        results = self.profile.profiler
        if results is None or results.kineto_results is None:
            logger.warning("no round was profiled: the run was stopped before")
            return
        logger.info("writing the profile", extra={"stage": True})
        try:
            self.folder.mkdir(exist_ok=True)
            self.profile.export_chrome_trace(str(self.folder / f"rank-{self.rank}.json.gz"))
            events = self.profile.key_averages()
            with (self.folder / f"rank-{self.rank}.txt").open("w", encoding="utf-8") as file:
                console = Console(file=file, width=80)
                console.print(phases(events))
                console.print()
                console.print(operators(events))
        except (OSError, RuntimeError) as error:
            logger.warning("%s: cannot write the profile (%s)", self.folder, error)


@contextlib.contextmanager
def profiled(s: Session) -> Iterator[None]:
    """Profile the rounds that `tracking.profile` asks for in the block, which trains."""
    from fedddp.training.session import Stopped  # which imports this module

    left = s.config.rounds - s.rounds_done
    if not s.config.tracking.profile or not left:
        yield
        return
    if isinstance(s.config.algorithm, AsynchronousAlgorithm) and not s.world.is_coordinator:
        left = 1  # it learns of rounds at synchronization points only, of which there may be one
    rounds = s.config.tracking.profile
    profiler = Profiler(s.directory, s.world.rank, s.world.device, rounds=rounds, left=left)
    s.profiler = profiler
    try:
        with kineto_silenced(), profiler.profile:
            yield
    except Stopped:
        profiler.write()
        raise
    finally:
        s.profiler = NoProfiler()
    profiler.write()


def phases(events: Any) -> Table:
    """Return how long this rank was in each phase of the profiled rounds."""
    from rich.table import Table

    table = Table("phase", "seconds", "times", "share", box=None, header_style="bold", title_justify="left")
    found = {e.key.removeprefix(PHASE): e for e in events if e.key.startswith(PHASE) and not _on_gpu(e)}
    total = sum(e.cpu_time_total for e in events if e.key.startswith("ProfilerStep") and not _on_gpu(e))
    for name, event in sorted(found.items(), key=lambda item: -item[1].cpu_time_total):
        spent = event.cpu_time_total
        table.add_row(name, f"{spent / 1e6:.3f}", str(event.count), _share(spent, total))
    other = max(0.0, total - sum(event.cpu_time_total for event in found.values()))
    table.add_row("other", f"{other / 1e6:.3f}", "", _share(other, total))
    return table


def operators(events: Any) -> Table:
    """Return the operators that took longest by themselves, on the GPU where there is one."""
    from rich.table import Table

    found = [e for e in events if not e.key.startswith((PHASE, "ProfilerStep")) and not _on_gpu(e)]
    gpu = any(e.self_device_time_total for e in found)
    column = "self_device_time_total" if gpu else "self_cpu_time_total"
    total = sum(getattr(e, column) for e in found)
    where = "GPU" if gpu else "CPU"
    table = Table("operator", f"{where} seconds", "calls", "share", box=None, header_style="bold")
    for event in sorted(found, key=lambda e: -getattr(e, column))[:OPERATORS]:
        spent = getattr(event, column)
        table.add_row(event.key, f"{spent / 1e6:.3f}", f"{event.count:,}", _share(spent, total))
    return table


def _on_gpu(event: Any) -> bool:
    return str(event.device_type) != "DeviceType.CPU"


def _share(part: float, total: float) -> str:
    return f"{100 * part / total:.1f} %" if total else ""
