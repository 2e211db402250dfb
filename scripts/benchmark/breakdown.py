#!/usr/bin/env python3
"""Show where each millisecond of a round goes, what a round costs at least, and what a start costs.

    .venv/bin/python scripts/benchmark/breakdown.py --table docs/benchmarks.md

`round`: the parts of a round of the workloads, on one rank; `timers.py` lists the functions behind each part.
`fixed`: a round of one client with one example and a tiny model. `start`: from the launch to the end of the
first round, beside a bare torch script that does the same. It takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median

from processes import LEAST_ROUNDS, Measured, federation, run_fedddp, run_loop, settings
from report import Table, check_marks, milliseconds, numbers, parser_of, progress, publish, seconds, words
from timers import REST, parts
from workloads import MEASURED, WARM_UP, WORKLOADS, describe

ENGINES = {
    # name: further settings of fedddp
    "auto": "",
    "eager": "--local.engine eager",
}
"""What the rounds of a workload are taken apart with, one table each."""


def measure_round(given: argparse.Namespace) -> list[Table]:
    """Return a table of parts for each workload and configuration."""
    work = [(name, engine) for name in given.workloads for engine in given.engines]
    tables = []
    for name, engine in progress(work, "parts of a round"):
        # Evaluated in every round, which is fedddp's default.
        extra = f"--evaluation.every 1 {ENGINES[engine]}"
        ran = run_fedddp(1, federation(name, given.root, given.rounds), extra, watch="--parts")
        tables.append(table_of_parts(f"{describe(name)}; engine {engine}", ran))
    return tables


def table_of_parts(title: str, ran: Measured) -> Table:
    """Return the parts of the counted rounds: means, so that they add up."""
    rounds = ran.ranks[0]["parts"][WARM_UP:-1]
    whole = fmean(sum(one["seconds"].values()) for one in rounds)
    rows = []
    for part in parts():
        spent = fmean(one["seconds"].get(part, 0.0) for one in rounds)
        calls = fmean(one["calls"].get(part, 0) for one in rounds)
        if calls or part == REST:  # a part of another engine is not called
            number = f"{calls:,.0f}" if calls else ""
            rows.append([part, number, f"{1000 * spent:.2f}", f"{100 * spent / whole:.1f} %"])
    rows.append(["round", "", f"{1000 * whole:.2f}", "100.0 %"])
    note = f"One rank; means of {len(rounds)} rounds, evaluated in each. The timers' own time is in them."
    return Table(title, ("part", "calls", "ms/round", "share"), rows, [note])


def measure_fixed(given: argparse.Namespace) -> list[Table]:
    """Return the table of the least that a round costs."""
    runs: dict[int, list[Measured]] = {ranks: [] for ranks in given.ranks}
    rounds = max(LEAST_ROUNDS, given.fixed_rounds)
    least = settings(
        {
            "data.dataset": "inputs.n200",
            "data.clients": 20,
            "cohort.size": 1,
            "model.name": "inputs.p1000",
            "local.steps": 1,
            "local.batch_size": 1,
            "rounds": rounds,
            "evaluation.every": rounds,
            "checkpoint.every": rounds,
        }
    )
    for ranks in progress(given.ranks * given.repeat, "fixed cost"):
        runs[ranks].append(run_fedddp(ranks, least))
    rows = []
    for ranks, measured in runs.items():
        cpu = 1000 * median(median(run.cpu_seconds()) for run in measured)
        rows.append([str(ranks), *milliseconds([median(run.seconds()) for run in measured]), f"{cpu:.2f}"])
    note = (
        f"Runs of each, in turn: {given.repeat}, of {rounds} rounds; the range is that of the runs' medians. "
        "CPU: of rank 0."
    )
    title = "Fixed cost: one client with one example, 1,000 parameters"
    return [Table(title, ("ranks", "ms/round", "range", "CPU ms/round"), rows, [note])]


def measure_start(given: argparse.Namespace) -> list[Table]:
    """Return the table of starts: of the workload `tiny`, beside the hand-written loop's."""
    runs: dict[tuple[str, int], list[Measured]] = {}
    for ranks in progress(given.ranks * given.repeat, "start"):
        loop = run_loop(ranks, "tiny", given.root, LEAST_ROUNDS)
        runs.setdefault(("loop", ranks), []).append(loop)
        fedddp = run_fedddp(ranks, federation("tiny", given.root, LEAST_ROUNDS))
        runs.setdefault(("fedddp", ranks), []).append(fedddp)
    rows = []
    for ranks in given.ranks:
        loops = [run.start() for run in runs["loop", ranks]]
        for program in ("loop", "fedddp"):
            starts = [run.start() for run in runs[program, ranks]]
            ratios = [own / loop for own, loop in zip(starts, loops, strict=True)]
            processes = f"{program}, {ranks} process{'es' if ranks > 1 else ''}"
            rows.append([processes, *seconds(starts, 1), *seconds(ratios, 2)])
    columns = ("program", "start, s", "range", "against the loop", "range")
    note = (
        f"Runs of each, in turn: {given.repeat}. From the launch (by torchrun for two processes) to the end "
        "of the first round, less one usual round."
    )
    return [Table("Start to the first round, of tiny", columns, rows, [note])]


PARTS: dict[str, Callable[[argparse.Namespace], list[Table]]] = {
    "round": measure_round,
    "fixed": measure_fixed,
    "start": measure_start,
}


def main() -> None:
    """Measure and print the tables."""
    marks = {part: f"breakdown-{part}" for part in PARTS}
    parser = parser_of(__doc__, list(marks.values()))
    parser.add_argument("--parts", type=words, default=list(PARTS), help=f"default: {','.join(PARTS)}")
    parser.add_argument("--workloads", type=words, default=list(MEASURED), help="whose rounds are shown")
    parser.add_argument("--engines", type=words, default=list(ENGINES), help=f"default: {','.join(ENGINES)}")
    parser.add_argument("--rounds", type=int, default=8, help="of a workload; default: %(default)s")
    parser.add_argument("--fixed-rounds", type=int, default=300, help="of one client; default: %(default)s")
    parser.add_argument("--ranks", type=numbers, default=[1, 2], help="of fixed cost and start; default: 1,2")
    parser.add_argument("--repeat", type=int, default=3, help="of fixed cost and start; default: %(default)s")
    parser.add_argument("--root", default="", help="folder with torchvision's MNIST")
    given = parser.parse_args()
    wrong = [name for name in given.parts if name not in PARTS]
    wrong += [name for name in given.workloads if name not in WORKLOADS]
    wrong += [name for name in given.engines if name not in ENGINES]
    if wrong or given.rounds < LEAST_ROUNDS:
        parser.error(f"unknown: {', '.join(wrong)}" if wrong else f"--rounds is at least {LEAST_ROUNDS}")
    check_marks(given.table, [marks[part] for part in given.parts])
    given.root = str(Path(given.root).resolve()) if given.root else ""
    for part in given.parts:
        publish(PARTS[part](given), given.table, marks[part])


if __name__ == "__main__":
    main()
