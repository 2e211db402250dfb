"""The command that lists runs: `runs`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fedddp.commands.console import fail, is_coordinator, parse, say, show
from fedddp.commands.run_info import CORRUPT, RunInfo, ago, find_runs
from fedddp.storage.history import Metric, direction
from fedddp.tracking.progress import QuietConsole
from fedddp.tracking.status import score_text

if TYPE_CHECKING:
    from rich.table import Table

STATES = ("running", "stopped", "failed", "finished", CORRUPT)
STYLES = {"running": "cyan", "failed": "red", CORRUPT: "red", "finished": "green", "stopped": "yellow"}


def _by_score(run: RunInfo) -> tuple[bool, str, float]:
    """Return a key that has the best first, among runs that are judged by the same metric."""
    score = run.score
    if score is None:
        return True, "", 0.0
    # Scores of different metrics do not compare: those of one metric stand together.
    return False, score.name, -direction(score.name) * score.best


SORTS: dict[str, Callable[[RunInfo], Any]] = {
    "name": lambda run: run.name,
    "score": _by_score,
    "accuracy": _by_score,
    "loss": lambda run: float("inf") if run.loss is None else run.loss,
    "rounds": lambda run: -run.done,
    "age": lambda run: float("inf") if run.age_s is None else run.age_s,
}
"""What the list is sorted by: the best and the newest first. A score is of the metric a run is judged by."""

LONGEST_NAME = 24
"""Columns that a name may take; a longer one is folded where the other columns need them."""


class Column(NamedTuple):
    """A column of the list."""

    title: str
    text: Callable[[RunInfo], str]


def _best(run: RunInfo) -> str:
    if run.score is None:
        return "–"
    metric = Metric(run.score.name)
    name = "" if metric.key == "eval/accuracy" else f"{metric.label} "
    return f"{name}{metric.text(run.score.best)} ({run.score.best_round})"


COLUMNS = (
    Column("run", lambda run: run.name),
    Column("state", lambda run: run.state),
    Column("rounds", lambda run: f"{run.done}/{run.rounds}" if run.rounds else str(run.done)),
    Column("best (round)", _best),
    Column("last", lambda run: score_text(run.score.name, run.score.last) if run.score else "–"),
    Column("age", lambda run: ago(run.age_s)),
    Column("algorithm", lambda run: run.algorithm or "–"),
    Column("dataset", lambda run: run.dataset or "–"),
    Column("train loss", lambda run: "–" if run.loss is None else f"{run.loss:.4f}"),
)
"""Where the terminal is too narrow, those on the right are left out."""


def runs(rest: list[str]) -> None:
    """Print the runs of a folder and of the folders inside it."""
    from fedddp.section import local_path

    own = _parse(rest)
    if own is None:
        return
    try:
        output = local_path(own.output, "output")
    except ValueError as error:
        fail(str(error))
    if not output.is_dir():
        fail(f"{output} is not a folder; give the --output of your runs")
    found = find_runs(output)
    chosen = [run for run in found if run.state in (own.state or STATES) and _matches(run, own.filter)]
    chosen.sort(key=SORTS[own.sort])
    width = QuietConsole().width
    shown, needed = _fitting(chosen, width)
    show(_table(chosen, shown))
    if not is_coordinator():
        return
    left_out = ", ".join(column.title for column in COLUMNS[len(shown) :])
    if left_out:
        say(f"left out of {width} columns: {left_out} (COLUMNS={needed} shows all)")
    for run in chosen:
        if run.problem:
            say(f"{run.name}: {run.problem}")
    if not chosen:
        say(f"{output} holds no runs" if not found else f"none of the {len(found)} runs in {output} fits")


def _parse(rest: list[str]) -> argparse.Namespace | None:
    """Return the options; None after printing the help."""
    options = argparse.ArgumentParser(
        prog="fedddp runs",
        description="List the runs of a folder and of the folders inside it.",
        allow_abbrev=False,
        exit_on_error=False,
        add_help=False,
    )
    options.add_argument("output", nargs="?", default="runs", metavar="OUTPUT", help="folder (runs)")
    options.add_argument(
        "--sort",
        choices=SORTS,
        default="name",
        help="best or newest first (name); score: accuracy, mean IoU, ...",
    )
    options.add_argument("--state", choices=STATES, action="append", help="only runs in this state")
    options.add_argument(
        "--filter",
        metavar="TEXT",
        action="append",
        default=[],
        help="only runs with TEXT in their name, algorithm or dataset, or with a setting: algorithm=FedAvg",
    )
    return parse(options, rest)


def _matches(run: RunInfo, filters: Sequence[str]) -> bool:
    """Return whether a run fits all filters."""
    settings = run.settings
    for text in filters:
        key, equals, value = text.partition("=")
        if equals:
            if str(settings.get(key)).lower() != value.lower():
                return False
        elif not any(text.lower() in word.lower() for word in (run.name, run.algorithm, run.dataset)):
            return False
    return True


def _fitting(found: Sequence[RunInfo], width: int) -> tuple[Sequence[Column], int]:
    """Return the columns of the list that fit `width`, at least the first, and the width of all."""
    count = used = 0
    for number, column in enumerate(COLUMNS, 1):
        longest = max(len(text) for text in [column.title, *map(column.text, found)])
        used += (min(longest, LONGEST_NAME) if column.title == "run" else longest) + 2
        count = number if used <= width else count
    return COLUMNS[: max(count, 1)], used


def _table(found: Sequence[RunInfo], columns: Sequence[Column]) -> Table:
    """Return the list as a table; no cell is cut."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column.title, overflow="fold", no_wrap=column.title != "run")
    for run in found:
        cells = [column.text(run) for column in columns]
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in cells))
    return table
