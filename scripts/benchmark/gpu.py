#!/usr/bin/env python3
"""Compare fedddp with a loop written by hand on one GPU: rounds, utilisation, kernels per step.

    .venv/bin/python scripts/benchmark/gpu.py --table docs/benchmarks.md

It takes less than ten minutes. A round's time is wall time, the GPU's work included. Utilisation is what
nvidia-smi reports while the counted rounds last. Kernels, copies, launches and waits are counted by
torch.profiler in a run of their own. `--device cpu` tries the rest of the script without a GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean, median
from types import TracebackType
from typing import NamedTuple

from processes import LEAST_ROUNDS, Measured, federation, run_fedddp, run_loop
from report import Table, check_marks, parser_of, progress, publish, seconds, words
from workloads import MEASURED, WORKLOADS, describe

MARK = "gpu"
ROUNDS = {"cnn": 12, "tiny": 30, "trial": 4}
"""Of a run: long enough for nvidia-smi, short enough for ten minutes."""

PROFILE_ROUNDS = 6
SAMPLE_S = 0.2
"""Seconds between samples of the utilisation."""


class Configuration(NamedTuple):
    """What is measured: the loop, or fedddp with further settings."""

    name: str
    settings: str | None
    """Of fedddp, as on its command line; None: the hand-written loop."""
    workloads: tuple[str, ...] = tuple(WORKLOADS)


BF16 = "--local.precision bf16 --local.channels_last true"
CONFIGURATIONS = (
    Configuration("loop", None),
    Configuration("fedddp", ""),
    Configuration("fedddp, graphs", "--local.engine graph"),
    Configuration("fedddp, bf16", "--local.precision bf16", ("tiny",)),
    Configuration("fedddp, bf16 channels last", BF16, ("cnn",)),
)


class Utilisation:
    """Samples the utilisation of the first GPU for as long as the block lasts."""

    def __init__(self, gpu: bool) -> None:
        """Sample nothing where there is no GPU or no nvidia-smi."""
        self.command = shutil.which("nvidia-smi") if gpu else None
        self.samples: list[tuple[float, float]] = []
        """Time on the clock of `Measured.ended`, and percent."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Utilisation:
        """Start to sample."""
        if self.command:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self._ended.set()
        if self.command:
            self._thread.join()

    def _sample(self) -> None:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        wanted = [f"--id={first}", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        query = [str(self.command), *wanted]
        while not self._ended.wait(SAMPLE_S):
            done = subprocess.run(query, check=False, capture_output=True, text=True)
            if done.returncode == 0 and done.stdout.strip().isdigit():
                self.samples.append((time.perf_counter(), float(done.stdout)))

    def during(self, run: Measured) -> list[float]:
        """Return the percentages sampled in the run's counted rounds."""
        begin, end = run.ended[-2] - sum(run.seconds()), run.ended[-2]
        return [percent for at, percent in self.samples if begin <= at <= end]


class Runs(NamedTuple):
    """The runs of one configuration."""

    measured: list[Measured]
    utilisation: list[float]
    """Percent."""


def chosen(workload: str, only: Sequence[str]) -> list[Configuration]:
    """Return the loop, and the configurations of a workload that match one of `only` (none: all)."""
    fitting = [one for one in CONFIGURATIONS if workload in one.workloads]
    return [
        one
        for one in fitting
        if one.settings is None or not only or any(fnmatch(one.name, pattern) for pattern in only)
    ]


def measure(one: Configuration, name: str, given: argparse.Namespace, runs: Runs) -> None:
    """Run one configuration once, and add what was measured to `runs`."""
    rounds = given.rounds or ROUNDS[name]
    with Utilisation(given.device == "cuda") as utilisation:
        if one.settings is None:
            ran = run_loop(1, name, given.root, rounds, device=given.device)
        else:
            arguments = federation(name, given.root, rounds)
            ran = run_fedddp(1, arguments, one.settings, device=given.device)
    runs.measured.append(ran)
    runs.utilisation.extend(utilisation.during(ran))


def table(name: str, runs: dict[Configuration, Runs]) -> Table:
    """Return a workload's table."""
    w, rows = WORKLOADS[name], []
    loops = runs[CONFIGURATIONS[0]].measured
    for one, (measured, utilisation) in runs.items():
        rounds = [value for run in measured for value in run.seconds()]
        pairs = zip(measured, loops, strict=True)
        ratios = [median(loop.seconds()) / median(run.seconds()) for run, loop in pairs]
        used = f"{fmean(utilisation):.0f} %" if utilisation else "–"
        images = f"{w.cohort * w.examples / median(rounds):,.0f}"
        rows.append([one.name, *seconds(rounds, 4), images, *seconds(ratios, 2), used])
    columns = (
        "configuration",
        "s/round",
        "range",
        "images/s",
        "times as fast as the loop",
        "range",
        "GPU used",
    )
    note = f"Runs of each, in turn: {len(loops)}, of {len(loops[0].seconds())} counted rounds."
    return Table(describe(name), columns, rows, [note])


def table_of_kernels(given: argparse.Namespace) -> Table:
    """Return the table of what fedddp gives the GPU to do, per optimizer step of a client."""
    rows = []
    for name in progress(given.workloads, "kernels"):
        for one in chosen(name, given.only):
            if one.settings is not None:
                arguments = federation(name, given.root, PROFILE_ROUNDS)
                ran = run_fedddp(1, arguments, one.settings, device=given.device, watch="--profile")
                counts = ran.ranks[0]["device"]
                memory = f"{ran.ranks[0]['peak_gpu_bytes'] / 1e6:,.0f}"
                cells = [f"{counts[kind]:.2f}" for kind in ("kernels", "copies", "launches", "waits")]
                rows.append([f"{name}: {one.name}", *cells, memory])
    columns = (
        "configuration",
        "kernels/step",
        "copies/step",
        "launches/step",
        "waits/step",
        "GPU memory, MB",
    )
    note = "Launches: of kernels and of graphs, by the CPU. Waits: calls in which the CPU waits for the GPU."
    return Table("Kernels", columns, rows, [note])


def gpu_name(device: str) -> str | None:
    """Return the name of the GPU, or None where torch sees none."""
    import torch

    if device != "cuda":
        return "no GPU: a trial on the CPU"
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def main() -> None:
    """Measure all configurations in turn and print the tables."""
    parser = parser_of(__doc__, [MARK])
    parser.add_argument("--workloads", type=words, default=list(MEASURED))
    parser.add_argument("--repeat", type=int, default=3, help="turns; default: %(default)s")
    parser.add_argument("--rounds", type=int, help=f"of a run, at least {LEAST_ROUNDS}; default: {ROUNDS}")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="configurations")
    parser.add_argument("--root", default="", help="folder with torchvision's MNIST")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args()
    if not set(given.workloads) <= WORKLOADS.keys() or (given.rounds or LEAST_ROUNDS) < LEAST_ROUNDS:
        parser.error(f"--workloads are of {', '.join(WORKLOADS)}, --rounds at least {LEAST_ROUNDS}")
    gpu = gpu_name(given.device)
    if gpu is None:
        sys.exit("error: this benchmark needs a GPU, but torch sees none; --device cpu tries the script")
    check_marks(given.table, [MARK])
    given.root = str(Path(given.root).resolve()) if given.root else ""
    tables = []
    for name in given.workloads:
        runs = {one: Runs([], []) for one in chosen(name, given.only)}
        for one in progress([one for _ in range(given.repeat) for one in runs], name):
            measure(one, name, given, runs[one])
        tables.append(table(name, runs))
    if given.device == "cuda":
        tables.append(table_of_kernels(given))
    publish(tables, given.table, MARK, machine=gpu)


if __name__ == "__main__":
    main()
