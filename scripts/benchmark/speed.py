#!/usr/bin/env python3
"""Measure the seconds per round of fedddp and of a loop written by hand, which shows what the machine can do.

    .venv/bin/python scripts/benchmark/speed.py --repeat 3 --table docs/benchmarks.md

All train the same model on the same images with FedAvg; in the workload `ddp` two processes share a client's
batches. The configurations run in turn (A B C A B C), so that a ratio compares runs of the same minute. A
round's time is wall time, from the end of the round before to its own: sampling, sending, training, sums,
record. The first two rounds are not counted, nor is the last one, in which fedddp evaluates and saves. With
`--root DIR` (torchvision's MNIST files) the images are MNIST's, else made ones of the same shape. It takes
about twenty minutes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import NamedTuple

from processes import LEAST_ROUNDS, Measured, federation, run_fedddp, run_loop
from report import Table, check_marks, parser_of, progress, publish, seconds, words
from workloads import MEASURED, WORKLOADS, describe

MARK = "speed"
EACH = tuple(WORKLOADS)
OF_CLIENTS = tuple(name for name, workload in WORKLOADS.items() if not workload.ddp)
"""Workloads whose processes share the clients."""


class Configuration(NamedTuple):
    """What is measured: a program, its processes and its settings."""

    name: str
    processes: int
    program: str
    """`loop`, `fedddp` or a peer."""
    settings: str = ""
    """Further settings of fedddp, as on its command line."""
    workloads: tuple[str, ...] = OF_CLIENTS


BF16 = "--local.precision bf16 --local.channels_last true"
BY_DDP = "--topology.ranks_per_client 2"
CONFIGURATIONS = (
    Configuration("loop, 1 process", 1, "loop"),
    Configuration("fedddp, 1 rank", 1, "fedddp"),
    Configuration("fedddp, 1 rank, bf16 channels last", 1, "fedddp", BF16, ("cnn",)),
    Configuration("loop, 2 processes", 2, "loop", workloads=EACH),
    Configuration("fedddp, 2 groups of 1", 2, "fedddp"),
    Configuration("fedddp, 2 groups of 1, eager", 2, "fedddp", "--local.engine eager"),
    Configuration(
        "fedddp, 2 groups of 1, float32 sums", 2, "fedddp", "--aggregation.sums float32", ("tiny",)
    ),
    Configuration("fedddp, 2 groups of 1, bf16 channels last", 2, "fedddp", BF16, ("cnn",)),
    Configuration("fedddp, 1 group of 2", 2, "fedddp", BY_DDP, ("ddp",)),
    Configuration(
        "fedddp, 1 group of 2, not channels last",
        2,
        "fedddp",
        f"{BY_DDP} --local.channels_last false",
        ("ddp",),
    ),
)
PEERS = {
    # name: the module that must be importable, the program that trains with it, what is measured
    "pfl": (
        "pfl",
        "peer_pfl.py",
        (
            Configuration("pfl-research, 1 process", 1, "pfl"),
            Configuration("pfl-research, 2 processes", 2, "pfl"),
        ),
    ),
}


def measure(one: Configuration, workload: str, root: str, rounds: int, python: str) -> Measured:
    """Run one configuration once."""
    if one.program == "fedddp":
        return run_fedddp(one.processes, federation(workload, root, rounds), one.settings)
    if one.program == "loop":
        return run_loop(one.processes, workload, root, rounds)
    return run_loop(one.processes, workload, root, rounds, program=PEERS[one.program][1], python=python)


def table(workload: str, runs: dict[Configuration, list[Measured]]) -> Table:
    """Return a workload's table; ratios compare each run with the loop's of the same turn."""
    w = WORKLOADS[workload]
    loops = {one.processes: measured for one, measured in runs.items() if one.program == "loop"}
    rows = []
    for one, measured in runs.items():
        rounds = [value for run in measured for value in run.seconds()]
        pairs = zip(measured, loops[one.processes], strict=True)
        ratios = [median(run.seconds()) / median(loop.seconds()) for run, loop in pairs]
        images = f"{w.cohort * w.examples / median(rounds):,.0f}"
        cpu = f"{median(value for run in measured for value in run.cpu_seconds()):.3f}"
        rows.append([one.name, *seconds(rounds), images, *seconds(ratios, 2), cpu])
    columns = ("configuration", "s/round", "range", "images/s", "against the loop", "range", "CPU s/round")
    first = next(iter(runs.values()))
    note = (
        f"Runs of each, in turn: {len(first)}, of {len(first[0].seconds())} counted rounds. CPU: seconds of "
        "rank 0's process, which other work on the machine changes less than wall time."
    )
    return Table(describe(workload), columns, rows, [note])


def available_peers(names: Sequence[str], python: str) -> list[Configuration]:
    """Return the configurations of the peers that `python` can import; name the others in one line each."""
    found: list[Configuration] = []
    for name in names:
        module, _, configurations = PEERS[name]
        try:
            subprocess.run([python, "-c", f"import {module}"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            print(f"{name} is left out: {python} cannot import {module}; see --peer-python", flush=True)
        else:
            found += configurations
    return found


def chosen(
    configurations: Sequence[Configuration], workload: str, only: Sequence[str]
) -> list[Configuration]:
    """Return the configurations of a workload that match a pattern of `only`, and their loops."""
    fitting = [one for one in configurations if workload in one.workloads]
    wanted = [one for one in fitting if not only or any(fnmatch(one.name, pattern) for pattern in only)]
    processes = {one.processes for one in wanted}
    return [one for one in fitting if one in wanted or (one.program == "loop" and one.processes in processes)]


def main() -> None:
    """Measure all configurations in turn and print the tables."""
    parser = parser_of(__doc__, [MARK])
    parser.add_argument(
        "--workloads", type=words, default=[*MEASURED, "ddp"], help=f"default: {','.join(MEASURED)},ddp"
    )
    parser.add_argument("--repeat", type=int, default=3, help="turns; default: %(default)s")
    parser.add_argument(
        "--rounds", type=int, help=f"of a run, at least {LEAST_ROUNDS}; default: 20, 10 of tiny"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="configurations, e.g. '*1 rank'"
    )
    parser.add_argument("--root", default="", help="folder with torchvision's MNIST")
    parser.add_argument("--peers", type=words, default=[], help=f"other frameworks, of {', '.join(PEERS)}")
    parser.add_argument(
        "--peer-python", default="python3", help="interpreter that has them; default: %(default)s"
    )
    given = parser.parse_args()
    wrong = [name for name in given.workloads if name not in WORKLOADS]
    wrong += [name for name in given.peers if name not in PEERS]
    if wrong or (given.rounds or LEAST_ROUNDS) < LEAST_ROUNDS:
        parser.error(f"unknown: {', '.join(wrong)}" if wrong else f"--rounds is at least {LEAST_ROUNDS}")
    check_marks(given.table, [MARK])
    root = str(Path(given.root).resolve()) if given.root else ""
    configurations = [*CONFIGURATIONS, *available_peers(given.peers, given.peer_python)]
    tables = []
    for name in given.workloads:
        runs: dict[Configuration, list[Measured]] = {
            one: [] for one in chosen(configurations, name, given.only)
        }
        rounds = given.rounds or WORKLOADS[name].rounds
        for one in progress([one for _ in range(given.repeat) for one in runs], name):
            runs[one].append(measure(one, name, root, rounds, given.peer_python))
        tables.append(table(name, runs))
    publish(tables, given.table, MARK)


if __name__ == "__main__":
    main()
