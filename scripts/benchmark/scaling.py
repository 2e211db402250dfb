#!/usr/bin/env python3
"""Measure how fedddp's rounds and memory grow with the clients, the ranks and the parameters.

    .venv/bin/python scripts/benchmark/scaling.py --table docs/benchmarks.md
    .venv/bin/python scripts/benchmark/scaling.py --axes parameters --parameters 1e5,1e6,1e7,1e8

By default it takes under five minutes on two cores. Each axis changes one number and keeps all others. A
round's time is wall time, from the end of the round before to its own. Memory is the largest resident set
(VmHWM of /proc) that a rank ever had; other systems than Linux do not report it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from processes import LEAST_ROUNDS, Measured, federation, run_fedddp, settings
from report import (
    Table,
    check_marks,
    cores,
    milliseconds,
    numbers,
    parser_of,
    progress,
    publish,
    seconds,
    words,
)
from workloads import MEASURED, WORKLOADS, describe, exact_size

COHORT = 100
"""Clients per round on the axis of clients."""

BASE = 1000
"""Parameters of the model whose memory is subtracted on the axis of parameters."""

COPIES = 12
"""Models that a rank is taken to need at most, when it is checked whether they fit into memory."""

MB = 1e6


# ---- clients ----


def measure_clients(given: argparse.Namespace) -> list[Table]:
    """Return the table over populations: equal cohorts of clients with one 8 x 8 image each."""
    rows = []
    for clients in progress(given.clients, "clients"):
        ran = run_fedddp(
            1,
            settings(
                {
                    "data.dataset": f"inputs.n{clients}",
                    "data.clients": clients,
                    "cohort.size": min(COHORT, clients),
                    "model.name": "inputs.p10000",
                    "local.steps": 1,
                    **once_at_the_end(given.rounds),
                }
            ),
        )
        memory = f"{ran.peak_bytes() / MB:,.0f}"
        rows.append([f"{clients:,}", *milliseconds(ran.seconds()), f"{ran.start():.1f}", memory])
    columns = ("clients", "ms/round", "range", "start, s", "memory of the rank, MB")
    note = (
        "Start: from the launch to the end of the first round, less one round. "
        "The images grow with the clients, and so do start and memory."
    )
    title = f"Clients: {COHORT} per round, one step with one image each, 10,000 parameters, 1 rank"
    return [Table(title, columns, rows, [note])]


def once_at_the_end(rounds: int) -> dict[str, object]:
    """Return the settings of a run that evaluates and saves in its last round alone."""
    return {"rounds": rounds, "evaluation.every": rounds, "checkpoint.every": rounds}


# ---- ranks ----


def measure_ranks(given: argparse.Namespace) -> list[Table]:
    """Return a table per workload over the ranks, each of which is a client group."""
    fitting = [ranks for ranks in given.ranks if ranks <= cores()]
    notes = ["Efficiency: images/s per rank, in the same turn, against those of the first row."]
    left_out = ", ".join(str(ranks) for ranks in given.ranks if ranks > cores())
    if left_out:
        notes.append(f"{left_out} ranks are left out: each needs a core, and this machine has {cores()}.")
    tables = []
    for name in given.workloads:
        runs: dict[int, list[Measured]] = {ranks: [] for ranks in fitting}
        for ranks in progress(fitting * given.repeat, f"ranks, {name}"):
            runs[ranks].append(run_fedddp(ranks, federation(name, given.root, given.rounds)))
        tables.append(table_of_ranks(name, runs, notes))
    return tables


def table_of_ranks(name: str, runs: dict[int, list[Measured]], notes: Sequence[str]) -> Table:
    """Return a workload's table."""
    w, rows = WORKLOADS[name], []
    base = min(runs) if runs else 1
    for ranks, measured in runs.items():
        rounds = [value for run in measured for value in run.seconds()]
        efficiencies = [
            base * median(first.seconds()) / (ranks * median(run.seconds()))
            for run, first in zip(measured, runs[base], strict=True)
        ]
        images = f"{w.cohort * w.examples / median(rounds):,.0f}"
        memory = f"{max(run.peak_bytes() for run in measured) / MB:,.0f}"
        rows.append([str(ranks), *seconds(rounds), images, *seconds(efficiencies, 2), memory])
    columns = ("ranks", "s/round", "range", "images/s", "efficiency", "range", "memory per rank, MB")
    return Table(f"Ranks: {describe(name)}", columns, rows, notes)


# ---- parameters ----


def measure_parameters(given: argparse.Namespace) -> list[Table]:
    """Return the table over the sizes of the model, on one rank and on two."""
    rows, left_out = [], []
    for ranks in [ranks for ranks in (1, 2) if ranks <= min(max(given.ranks), cores())]:
        base = run_sized(BASE, ranks, given.rounds).peak_bytes()
        for size in progress(given.parameters, f"parameters, ranks: {ranks}"):
            if ranks * (base + COPIES * 4 * size) > available_bytes():
                left_out.append(f"{size:,} parameters on {ranks} ranks are left out: memory may not suffice.")
            else:
                rows.append(row_of_parameters(run_sized(size, ranks, given.rounds), exact_size(size), base))
    columns = ("parameters", "ranks", "ms/round", "range", "aggregate, ms", "range")
    more = ("server step, ms", "range", "memory of rounds, MB", "models", "of the run, MB", "models")
    note = (
        f"Memory: a peak, less the run's with {BASE:,} parameters, also as multiples of the model (4 bytes "
        "per parameter). Of rounds: rank 0, without evaluation and checkpoint; of the run: the largest."
    )
    title = "Parameters: perceptrons, 2 of 20 clients per round, one step with two images"
    return [Table(title, [*columns, *more], rows, [note, *left_out])]


def row_of_parameters(ran: Measured, parameters: int, base: int) -> list[str]:
    """Return the cells of a model with `parameters` parameters; `base` is the memory of a tiny one."""
    training, everything = (
        [f"{(peak - base) / MB:,.0f}", f"{(peak - base) / (4 * parameters):.1f}"]
        for peak in (ran.peak_bytes_of_training(), ran.peak_bytes())
    )
    times = (ran.seconds(), ran.phase("time/aggregate"), ran.phase("time/step"))
    cells = [cell for values in times for cell in milliseconds(values, 1)]
    return [f"{parameters:,}", str(len(ran.ranks)), *cells, *training, *everything]


def run_sized(size: int, ranks: int, rounds: int) -> Measured:
    """Train a perceptron with about `size` parameters."""
    values = {
        "data.dataset": "inputs.n200",
        "data.clients": 20,
        "cohort.size": 2,
        "model.name": f"inputs.p{size}",
        "local.steps": 1,
        "local.batch_size": 2,
        **once_at_the_end(rounds),
    }
    return run_fedddp(ranks, settings(values), watch="--memory")


def available_bytes() -> float:
    """Return the memory that new processes can take; without limit where the system does not report it."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    free = [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return free[0] if free else float("inf")


AXES: dict[str, Callable[[argparse.Namespace], list[Table]]] = {
    "clients": measure_clients,
    "ranks": measure_ranks,
    "parameters": measure_parameters,
}


def main() -> None:
    """Measure the axes and print their tables."""
    marks = {axis: f"scaling-{axis}" for axis in AXES}
    parser = parser_of(__doc__, list(marks.values()))
    parser.add_argument("--axes", type=words, default=list(AXES), help=f"default: {','.join(AXES)}")
    parser.add_argument("--clients", type=numbers, default=numbers("1e2,1e3,1e4,1e5,1e6"))
    parser.add_argument("--ranks", type=numbers, default=numbers("1,2,4,8"))
    parser.add_argument("--parameters", type=numbers, default=numbers("1e5,1e6,1e7"))
    parser.add_argument("--workloads", type=words, default=list(MEASURED), help="of the axis of ranks")
    parser.add_argument("--rounds", type=int, default=8, help="of a run; default: %(default)s")
    parser.add_argument("--repeat", type=int, default=1, help="turns over the ranks; default: %(default)s")
    parser.add_argument("--root", default="", help="folder with torchvision's MNIST, for the axis of ranks")
    given = parser.parse_args()
    wrong = [name for name in given.axes if name not in AXES]
    wrong += [name for name in given.workloads if name not in WORKLOADS]
    if wrong or given.rounds < LEAST_ROUNDS:
        parser.error(f"unknown: {', '.join(wrong)}" if wrong else f"--rounds is at least {LEAST_ROUNDS}")
    check_marks(given.table, [marks[axis] for axis in given.axes])
    given.root = str(Path(given.root).resolve()) if given.root else ""
    for axis in given.axes:
        publish(AXES[axis](given), given.table, marks[axis])


if __name__ == "__main__":
    main()
