#!/usr/bin/env python3
"""Seconds and bytes of a round with privacy, compression and secure aggregation, beside the plain round.

    .venv/bin/python scripts/benchmark/protection.py --workloads cnn,tiny --table docs/benchmarks.md

Each configuration trains on one rank, in turn. Seconds are also given as CPU time, which other work on the
machine changes less.
"""

from __future__ import annotations

from fnmatch import fnmatch
from statistics import median

from processes import LEAST_ROUNDS, Measured, federation, run_fedddp
from report import Table, check_marks, parser_of, progress, publish, words
from workloads import WORKLOADS, describe

MARK = "protection"
DP = "--privacy {} --privacy.delta 1e-5 --privacy.clip 1e-3"
"""Of the settings with noise; costs do not depend on the clip, and a small one keeps losses finite."""
CONFIGURATIONS = {
    "plain": "",
    "CentralDP": f"{DP.format('CentralDP')} --privacy.noise_multiplier 1",
    "LocalDP": f"{DP.format('LocalDP')} --privacy.epsilon 8",
    "QSGD, 7 levels": "--transport.up QSGD --transport.up.levels 7",
    "EDEN, 4 bits": "--transport.up EDEN",
    "TopK, 1 %": "--transport.up TopK",
    "SecAgg": "--secure_aggregation SecAgg",
    "SecAggPlus": "--secure_aggregation SecAggPlus",
    "CentralDP, SecAggPlus": (
        f"{DP.format('CentralDP')} --privacy.noise_multiplier 1 --secure_aggregation SecAggPlus"
    ),
}
"""Settings by name; the first is what the others are compared with."""


def megabytes(run: Measured, way: str) -> str:
    """Return the bytes of a counted round, up or down, in MB."""
    return f"{median(run.phase(f'bytes/{way}')) / 1e6:.1f}"


def table(workload: str, runs: dict[str, Measured]) -> Table:
    """Return a workload's table."""
    plain = next(iter(runs.values()))
    rows = []
    for name, run in runs.items():
        wall, cpu = median(run.seconds()), median(run.cpu_seconds())
        more = cpu - median(plain.cpu_seconds())
        bytes_of = [megabytes(run, way) for way in ("up", "down")]
        rows.append([name, f"{wall:.2f}", f"{cpu:.2f}", f"{more:+.2f}", *bytes_of])
    columns = ("configuration", "s/round", "CPU s/round", "more than plain", "MB up", "MB down")
    note = f"One run of each, of {len(plain.seconds())} counted rounds, on one rank."
    return Table(describe(workload), columns, rows, [note])


def main() -> None:
    """Measure all configurations in turn and print the tables."""
    parser = parser_of(__doc__, [MARK])
    parser.add_argument("--workloads", type=words, default=["tiny"], help="default: tiny; or cnn")
    parser.add_argument(
        "--rounds", type=int, default=6, help=f"of a run, at least {LEAST_ROUNDS}; default: 6"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="configurations, and the plain one"
    )
    given = parser.parse_args()
    if wrong := [name for name in given.workloads if name not in WORKLOADS]:
        parser.error(f"unknown: {', '.join(wrong)}")
    if given.rounds < LEAST_ROUNDS:
        parser.error(f"--rounds is at least {LEAST_ROUNDS}")
    check_marks(given.table, [MARK])
    chosen = [
        (name, settings)
        for name, settings in CONFIGURATIONS.items()
        if not (settings and given.only) or any(fnmatch(name, pattern) for pattern in given.only)
    ]
    tables = []
    for workload in given.workloads:
        runs = {
            name: run_fedddp(1, federation(workload, "", given.rounds), settings)
            for name, settings in progress(chosen, workload)
        }
        tables.append(table(workload, runs))
    publish(tables, given.table, MARK)


if __name__ == "__main__":
    main()
