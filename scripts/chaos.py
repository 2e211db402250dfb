#!/usr/bin/env python
"""Inject faults into training under torchrun, and check that every run ends with the right bits.

    .venv/bin/python scripts/chaos.py --runs 10 --faults 50 --output chaos

A fault hits a random rank, the coordinator included, at a random moment:

- `kill -9`, SIGSTOP (a rank that hangs), SIGUSR1 (Slurm's notice) or SIGHUP (a lost terminal);
- `kill -9` of torchrun, which leaves its ranks to themselves, or of a worker of a rank's loader;
- a file of the newest checkpoint that is cut short or has a flipped bit, followed by a kill of all ranks;
- a run directory that is moved away, for which one line must be printed, and then back;
- files of the coordinator that cannot grow, as on a full disk, and a pipe that closes.

Runs differ in algorithm, ranks per client and seed. A run fails if torchrun
gives up on it after fewer faults than it may restart the ranks for. `--table FILE` writes the results as the
Markdown table of docs/reliability.md. Exit code 0: every run ended with the bits of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedddp.storage.history import read_rows

FAULTS = (
    *("kill -9", "SIGSTOP", "SIGUSR1", "SIGHUP", "cut checkpoint", "flipped bit"),
    *("killed torchrun", "killed worker", "moved directory", "full disk", "closed pipe"),
)
SURVIVED = ("SIGUSR1", "SIGHUP", "killed torchrun", "moved directory", "closed pipe")
"""Faults that are no failure of a rank, so that torchrun does not count them."""
ROUNDS = 12
RANKS = 4
RESTARTS = 3
"""Failures after which torchrun restarts the ranks; after more, this script starts torchrun again."""
TIMEOUT_S = 20
CONTINUE_S = 40
"""Seconds until a stopped rank is continued when all others have left: torchrun waits for it."""
RUN_LIMIT_S = 1200
CASES: tuple[tuple[str, ...], ...] = (
    ("--algorithm", "FedAvg", "--algorithm.momentum", "0.5"),
    ("--algorithm", "FedAvg", "--local.momentum", "0.9", "--local.optimizer_state", "keep"),
    ("--algorithm", "SCAFFOLD"),
    ("--algorithm", "FedAdam", "--algorithm.lr", "0.01", "--local.schedule", "cosine"),
    ("--algorithm", "FedDyn", "--cohort.sampling", "poisson"),
    ("--algorithm", "FedBuff", "--algorithm.buffer_size", "3", "--clock.speed", "LogNormalSpeed"),
)


@dataclass
class FaultyRun:
    """A run, its configuration, and the faults that were injected into it."""

    number: int
    case: tuple[str, ...]
    ranks_per_client: int
    directory: Path
    """The run directory."""
    wanted: int
    """Faults that this run is to get."""
    faults: list[str] = field(default_factory=list)
    """The faults so far, in words."""
    next_after: int | None = None
    """The round after which the next fault comes; None until it is drawn."""
    pipe_open: bool = True
    """Whether what torchrun prints is read."""
    launches: int = 0
    result: str = ""
    """How the run ended; empty before."""

    @property
    def output(self) -> Path:
        """The folder of the run directory."""
        return self.directory.parent

    def arguments(self, name: str) -> list[str]:
        """Return the arguments of `fedddp run`, with this name of the run directory."""
        return [
            *("digits", "--rounds", str(ROUNDS), "--seed", str(self.number)),
            *("--local.epochs", "4", "--local.lr", "0.02"),
            *("--topology.ranks_per_client", str(self.ranks_per_client), *self.case),
            *("--data.memory", "stream", "--data.workers", "1"),
            *("--topology.timeout_s", str(TIMEOUT_S), "--checkpoint.every", "1", "--tracking.trackers", "[]"),
            *("--output", str(self.output), "--name", name, "--resume", "auto"),
        ]


def launch(run: FaultyRun, name: str, ranks: int, restarts: int) -> subprocess.Popen[bytes]:
    """Start torchrun in a session of its own, where SIGUSR1 is ignored until the ranks handle it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*torchrun, f"--max-restarts={restarts}", "-m", "fedddp", "run", *run.arguments(name)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "OMP_NUM_THREADS": "1",
        # A stopped rank obeys no SIGTERM. torchrun waits 30 s before a restart, whatever this variable is.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
        "FEDDDP_STOPPED_FILE": str(run.output / f"{name}.stopped"),
    }
    ignoring = ["bash", "-c", 'trap "" USR1; exec "$@"', "torchrun"]
    with (run.output / f"{name}.log").open("ab") as log:
        launcher = subprocess.Popen(
            [*ignoring, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    run.pipe_open = True
    threading.Thread(target=copy, args=(run, launcher, run.output / f"{name}.log"), daemon=True).start()
    return launcher


def copy(run: FaultyRun, launcher: subprocess.Popen[bytes], log: Path) -> None:
    """Append what a launcher prints to `log`, until its pipe is to be closed."""
    assert launcher.stdout is not None
    with launcher.stdout as pipe, log.open("ab", buffering=0) as file:
        for line in pipe:
            if not run.pipe_open:
                return
            file.write(line)


def ranks_of(launcher: int) -> list[int]:
    """Return the process ids of the ranks that `launcher` started, by rank."""
    found: dict[int, int] = {}
    for child in children_of(launcher):
        with contextlib.suppress(OSError):
            rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_bytes())
            if rank:
                found[int(rank[1])] = child
    return [found[rank] for rank in sorted(found)]


def children_of(process: int) -> list[int]:
    """Return the process ids of the children of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"\nPPid:\t{process}\n" in (entry / "status").read_text():
                found.append(int(entry.name))
    return found


def move_away_and_back(run: FaultyRun, launcher: subprocess.Popen[bytes]) -> str:
    """Move the run directory away until the run has failed with one line; return how that went."""
    while not run.directory.exists():  # a busy machine takes its time to start
        time.sleep(0.05)
    log, elsewhere = run.output / f"{run.directory.name}.log", run.directory.with_suffix(".moved")
    before = log.stat().st_size
    run.directory.rename(elsewhere)
    deadline = time.monotonic() + 2 * TIMEOUT_S
    line = b""
    while not line and time.monotonic() < deadline and launcher.poll() is None:
        time.sleep(0.05)
        line = b"".join(re.findall(rb"error: .*deleted or moved.*", log.read_bytes()[before:])[:1])
    kill_all(launcher)
    if run.directory.exists():  # torchrun had restarted the ranks by then
        shutil.rmtree(run.directory)
    elsewhere.rename(run.directory)
    return "one line" if line else "NO LINE"


def rounds_done(directory: Path) -> int:
    """Return the number of rounds in the run's history."""
    history = directory / "history.jsonl"
    return history.read_bytes().count(b"\n") if history.exists() else 0


def corrupt_newest(directory: Path, kind: str, rng: random.Random) -> str | None:
    """Cut a file of the newest checkpoint short, or flip one of its bits; return which file."""
    checkpoints = [path for path in (directory / "checkpoints").glob("round-*") if path.is_dir()]
    if not checkpoints:
        return None
    newest = max(checkpoints, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    file = rng.choice(sorted(newest.iterdir()))
    data = bytearray(file.read_bytes())
    position = rng.randrange(len(data))
    if kind == "flipped bit":
        data[position] ^= 1 << rng.randrange(8)
    file.write_bytes(data[:position] if kind == "cut checkpoint" else data)
    return f"{newest.name}/{file.name}"


def inject(run: FaultyRun, launcher: subprocess.Popen[bytes], kind: str, rng: random.Random) -> bool:
    """Inject one fault; return whether it was possible."""
    ranks = ranks_of(launcher.pid)
    if len(ranks) < RANKS or launcher.poll() is not None:
        return False
    rank = rng.randrange(len(ranks))

    def send(number: int, processes: list[int], where: str) -> str | None:
        for process in processes[:1]:
            os.kill(process, number)
        return where if processes else None

    actions: dict[str, Callable[[], str | None]] = {
        "cut checkpoint": lambda: corrupt_and_kill(run, ranks, kind, rng),
        "flipped bit": lambda: corrupt_and_kill(run, ranks, kind, rng),
        "killed torchrun": lambda: send(signal.SIGKILL, [launcher.pid], "its ranks end by themselves"),
        "killed worker": lambda: send(signal.SIGKILL, children_of(ranks[rank]), f"of rank {rank}"),
        "moved directory": lambda: move_away_and_back(run, launcher),
        "full disk": lambda: fill_disk(ranks[0]),
        "closed pipe": lambda: close_pipe(run),
    }
    number = getattr(signal, kind, signal.SIGKILL)
    action = actions.get(kind, lambda: send(number, [ranks[rank]], f"rank {rank}"))
    done = rounds_done(run.directory)
    try:
        where = action()
    except ProcessLookupError:
        return False
    if where is None:
        return False
    run.faults.append(f"{kind} ({where}) after round {done}")
    run.next_after = None
    return True


def corrupt_and_kill(run: FaultyRun, ranks: list[int], kind: str, rng: random.Random) -> str:
    """Corrupt the newest checkpoint while no rank writes or reads, and kill the ranks."""
    for process in ranks:
        os.kill(process, signal.SIGSTOP)
    file = corrupt_newest(run.directory, kind, rng)
    for process in ranks:
        os.kill(process, signal.SIGKILL)
    return file or "no checkpoint yet; ranks killed"


def fill_disk(rank: int) -> str:
    """Let no file of a rank grow: a write fails as on a full disk."""
    resource.prlimit(rank, resource.RLIMIT_FSIZE, (1, 1))
    return "rank 0"


def close_pipe(run: FaultyRun) -> str:
    """Close the pipe that torchrun prints to, after its next line."""
    run.pipe_open = False
    return "of torchrun"


def train(run: FaultyRun, rng: random.Random, kinds: list[str], report: Callable[[], None]) -> None:
    """Launch the run until it is finished, and inject its faults, of the first `kinds`; they are removed."""
    name = run.directory.name
    stopped = run.output / f"{name}.stopped"
    deadline = time.monotonic() + RUN_LIMIT_S
    while time.monotonic() < deadline:
        stopped.unlink(missing_ok=True)
        run.launches += 1
        before = len(run.faults)
        launcher = launch(run, name, RANKS, RESTARTS)
        seen_running = time.monotonic()
        try:
            while launcher.poll() is None and time.monotonic() < deadline:
                if not all_stopped(launcher.pid):
                    seen_running = time.monotonic()
                elif time.monotonic() - seen_running > CONTINUE_S:
                    continue_ranks(run, launcher.pid)
                if due(run, rng):
                    time.sleep(rng.random() / 2)
                    if inject(run, launcher, kinds[0], rng):
                        kinds.pop(0)
                        report()
                time.sleep(0.02)
        finally:
            kill_all(launcher)
        if launcher.returncode == 0 and not stopped.exists():
            return
        fatal = [fault for fault in run.faults[before:] if not fault.startswith(SURVIVED)]
        if launcher.returncode > 0 and len(fatal) <= RESTARTS:
            run.result = f"FAILED after {len(fatal)} faults since its launch, see {name}.log"
            return
    run.result = f"NOT FINISHED in {RUN_LIMIT_S / 60:.0f} minutes"


def all_stopped(launcher: int) -> bool:
    """Return whether all remaining ranks are stopped (SIGSTOP)."""
    ranks = ranks_of(launcher)
    with contextlib.suppress(OSError):
        return bool(ranks) and all("\nState:\tT" in Path(f"/proc/{r}/status").read_text() for r in ranks)
    return False


def continue_ranks(run: FaultyRun, launcher: int) -> None:
    """Continue ranks that were stopped while they were about to exit: torchrun waits for them."""
    for rank in ranks_of(launcher):
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGCONT)
    run.faults[-1] += ", while it was exiting; continued"


def due(run: FaultyRun, rng: random.Random) -> bool:
    """Return whether to inject a fault now: faults are spread over the rounds, at least one round apart."""
    if len(run.faults) == run.wanted:
        return False
    done = rounds_done(run.directory)
    if run.next_after is None:
        spread = (len(run.faults) + rng.random()) * (ROUNDS - 2) / run.wanted
        run.next_after = max(int(spread), done + bool(run.faults))
    return done >= run.next_after


def kill_all(launcher: subprocess.Popen[bytes]) -> None:
    """Kill a launcher and its ranks, which have sessions of their own."""
    for process in (launcher.pid, *ranks_of(launcher.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    launcher.wait()


def compare(run: FaultyRun) -> None:
    """Train the same without faults, on one client group, and compare the bits and the history."""
    name = f"{run.directory.name}-uninterrupted"
    uninterrupted = launch(run, name, run.ranks_per_client, restarts=0)
    if uninterrupted.wait(600):
        run.result = f"the uninterrupted run FAILED, see {name}.log"
        return
    try:
        ours, theirs = (load_file(d / "model.safetensors") for d in (run.directory, run.output / name))
    except (OSError, SafetensorError) as error:
        run.result = f"NO MODEL: {error}"
        return
    rounds = [row["round"] for row in read_rows(run.directory / "history.jsonl")]
    same = ours.keys() == theirs.keys() and all(ours[n].equal(theirs[n]) for n in ours)
    if not same:
        run.result = "OTHER BITS"
    elif "NO LINE" in " ".join(run.faults):
        run.result = "NO LINE for a moved directory"
    elif rounds != list(range(1, ROUNDS + 1)):
        run.result = f"HISTORY {rounds}"
    else:
        run.result = "same bits"


def table(runs: list[FaultyRun], seconds: float) -> str:
    """Return the results of the runs that have ended, in Markdown."""
    runs = [run for run in runs if run.result]
    faults = [fault for run in runs for fault in run.faults]
    counts = {kind: sum(fault.startswith(kind) for fault in faults) for kind in FAULTS}
    same = sum(run.result == "same bits" for run in runs)
    lines = [
        f"{len(faults)} faults in {len(runs)} runs of {ROUNDS} rounds on {RANKS} ranks, "
        f"{seconds / 60:.0f} minutes: {', '.join(f'{count} × {kind}' for kind, count in counts.items())}. "
        f"Runs that ended with the same bits and a complete history: {same} of {len(runs)}.",
        "",
        "| run | algorithm and settings | R | faults, in order | launches | result |",
        "|--:|---|--:|---|--:|---|",
    ]
    for run in runs:
        settings = " ".join(run.case).replace("--algorithm ", "").replace("--", "")
        cells = (run.number, f"`{settings}`", run.ranks_per_client, "; ".join(run.faults) or "none")
        lines.append("| " + " | ".join(map(str, (*cells, run.launches, run.result))) + " |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=2, help="number of runs")
    parser.add_argument("--faults", type=int, default=5, help="number of faults, over all runs")
    parser.add_argument("--seed", type=int, default=0, help="of the kinds, ranks and moments of the faults")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the runs and their logs")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    return parser.parse_args()


def main() -> None:
    """Train all runs with faults, compare each with an uninterrupted run, and print the results."""
    args = parse()
    args.output.mkdir(parents=True)
    rng, start = random.Random(args.seed), time.monotonic()
    kinds = [FAULTS[n % len(FAULTS)] for n in range(args.faults)]
    rng.shuffle(kinds)
    runs = [
        FaultyRun(
            number=n,
            case=CASES[n % len(CASES)],
            ranks_per_client=1 + (n + n // len(CASES)) % 2,
            directory=args.output / f"run-{n}",
            wanted=(args.faults + n) // args.runs,
        )
        for n in range(args.runs)
    ]
    console = Console(soft_wrap=True)
    for run in runs:

        def report(run: FaultyRun = run) -> None:
            done = sum(len(other.faults) for other in runs)
            console.print(f"fault {done}/{args.faults}, run {run.number}: {run.faults[-1]}", markup=False)

        train(run, rng, kinds, report)
        if not run.result:
            compare(run)
        console.print(f"run {run.number}: {len(run.faults)} faults, {run.launches} launches, {run.result}")
        if args.table:
            args.table.write_text(table(runs, time.monotonic() - start))
    console.print(table(runs, time.monotonic() - start), markup=False)
    sys.exit(0 if all(run.result == "same bits" for run in runs) else 1)


if __name__ == "__main__":
    main()
