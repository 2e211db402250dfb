#!/usr/bin/env python3
"""Run fedddp's command line with a stopwatch; `speed.py`, `scaling.py`, `breakdown.py` and `gpu.py` start it.

    python scripts/benchmark/stopwatch.py OUT [--parts] [--memory] [--profile] -- run FILE ...

Every rank writes OUT/rank-N.json: when each round ended (on the coordinator), the seconds of its phases, and
the peak of this rank's memory. fedddp itself is not changed: names of the package are wrapped at run time.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timers import Timers, holder
from workloads import WARM_UP

if TYPE_CHECKING:
    from torch.profiler import profile

RECORDS = "fedddp.tracking.tracker.Tracker.log"
"""What the coordinator calls once per round, at its end, with the row of `history.jsonl`."""

PROFILED = 2
"""Rounds that torch.profiler records."""


class Stopwatch:
    """Notes the end of every round."""

    def __init__(self, timers: Timers | None, *, memory: bool, profiling: bool) -> None:
        """Wrap `RECORDS`.

        Args:
            timers: yield the seconds by part of every round.
            memory: note the peak of memory in every round too.
            profiling: record some rounds with torch.profiler.
        """
        self.timers, self.memory, self.profiling = timers, memory, profiling
        self.ended: list[float] = []
        """End of each round in seconds of the machine's steady clock, which all processes share."""
        self.cpu: list[float] = []
        """CPU seconds of this process at these times."""
        self.rows: list[dict[str, Any]] = []
        """What the rounds recorded of seconds, loss and steps."""
        self.parts: list[dict[str, Any]] = []
        self.peaks: list[int] = []
        self.device: dict[str, float] = {}
        """Kernels, copies, launches and waits per step, by torch.profiler."""
        self._profiler: profile | None = None
        owner, name = holder(RECORDS)
        records = getattr(owner, name)

        @functools.wraps(records)
        def noted(tracker: object, row: dict[str, Any]) -> None:
            self.note(row)
            records(tracker, row)

        setattr(owner, name, noted)

    def note(self, row: dict[str, Any]) -> None:
        """Note the end of a round."""
        synchronize()
        self.ended.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.rows.append(
            {key: row[key] for key in row if key.startswith(("time/", "bytes/", "train/loss", "train/steps"))}
        )
        if self.memory:
            self.peaks.append(peak_bytes())
        if self.timers is not None:
            self.parts.append(self.timers.take())
        if self.profiling and len(self.ended) == WARM_UP:
            from torch.profiler import profile

            self._profiler = profile()  # of the CPU, and of the GPU if there is one
            self._profiler.start()
        elif self._profiler is not None and len(self.ended) == WARM_UP + PROFILED:
            self._profiler.stop()
            steps = sum(int(row["train/steps"]) for row in self.rows[-PROFILED:])
            self.device = per_step(self._profiler, steps)

    def write(self, folder: Path) -> None:
        """Write what was noted on this rank."""
        noted = {
            "ended": self.ended,
            "cpu": self.cpu,
            "rows": self.rows,
            "parts": self.parts,
            "peaks": self.peaks,
            "device": self.device,
            "peak_bytes": peak_bytes(),
            "peak_gpu_bytes": peak_gpu_bytes(),
        }
        (folder / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(noted))


def synchronize() -> None:
    """Wait for the GPU, if this process uses one."""
    torch = sys.modules["torch"]
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """Return the largest resident set that this process had so far; 0 where the system does not report it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def peak_gpu_bytes() -> int:
    """Return the most memory of a GPU that this process's tensors took so far."""
    torch = sys.modules["torch"]
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_initialized() else 0


def per_step(profiler: profile, steps: int) -> dict[str, float]:
    """Return what was counted while `profiler` ran, divided by `steps`."""
    counts = dict.fromkeys(("kernels", "copies", "launches", "waits"), 0)
    for event in profiler.key_averages():
        if event.key.startswith(("Optimizer.", "ProfilerStep")):  # marks of torch, on the GPU's line too
            continue
        if event.device_type.name == "CUDA":
            copies = event.key.startswith(("Memcpy", "Memset"))
            counts["copies" if copies else "kernels"] += event.count
        elif event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")):
            counts["launches"] += event.count
        elif event.key.startswith("cuda") and event.key.endswith("Synchronize"):
            counts["waits"] += event.count
    return {name: count / max(steps, 1) for name, count in counts.items()}


def main() -> None:
    """Run the command line behind `--`, and write what the stopwatch noted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for rank-0.json, rank-1.json, ...")
    parser.add_argument("--parts", action="store_true", help="time the parts of a round")
    parser.add_argument("--memory", action="store_true", help="note the memory's peak after every round")
    parser.add_argument("--profile", action="store_true", help="count kernels with torch.profiler")
    parser.add_argument("command", nargs="+", help="of fedddp")
    given = parser.parse_args()
    from fedddp.cli import main as fedddp

    stopwatch = Stopwatch(Timers() if given.parts else None, memory=given.memory, profiling=given.profile)
    try:
        fedddp(given.command)
    finally:
        stopwatch.write(given.out)


if __name__ == "__main__":
    main()
