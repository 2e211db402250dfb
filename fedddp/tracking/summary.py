"""The table that ends a run: scores, work, time by phase, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedddp.storage.client_rows import client_table, constant_of, last_evaluation, named
from fedddp.storage.history import Metric, direction, judged_by, number, read_config, read_json
from fedddp.storage.judged import best_of
from fedddp.storage.run_record import ALONE, BEST, EVALUATION, MODEL, read_model_header
from fedddp.tracking.status import Row, label_of, score_text, size_text

if TYPE_CHECKING:
    from rich.table import Table

NOT_PHASES = ("time/round", "time/virtual", "time/idle")


class Score(NamedTuple):
    """The main metric of a run."""

    name: str
    """Its key, such as "eval/accuracy"."""
    last: float
    last_round: int
    best: float
    best_round: int

    @property
    def text(self) -> str:
        """The last value with its round, and the best one where it is another."""
        last = f"{score_text(self.name, self.last)} in round {self.last_round}"
        if self.best == self.last:
            return f"{last}, the best"
        return f"{last} (best: {score_text(self.name, self.best)} in round {self.best_round})"


def score_of(rows: Sequence[Row], name: str | None = None) -> Score | None:
    """Return the last and the best value of a metric; None where no row has it.

    `name` is its key, by default that which `main_metric` gives. Of equal values the first is
    the best; of a loss the smallest.
    """
    if name is None:
        metric = judged_by(rows)
        if metric is None:
            return None
        name = metric.key
    values = ((number(row, name), row["round"]) for row in rows)
    found = [(value, round_number) for value, round_number in values if value is not None]
    if not found:
        return None
    sign = direction(name)
    best, best_round = max(found, key=lambda item: (sign * item[0], -item[1]))
    last, last_round = found[-1]
    return Score(name, last, last_round, best, best_round)


def last_value(rows: Sequence[Row], name: str) -> float | None:
    """Return the last value of a metric; None where no row has it."""
    found = (number(row, name) for row in reversed(rows))
    return next((float(value) for value in found if value is not None), None)


def run_score(rows: Sequence[Row], folder: Path) -> Score | None:
    """Return the last and the best value of what the run in `folder` is judged by."""
    judged = judged_by(rows, best_of(_sections(folder)))
    return None if judged is None else score_of(rows, judged.key)


def _sections(folder: Path) -> Row:
    """Return the configuration of a run; empty where it cannot be read."""
    try:
        return read_config(folder / "config.yaml")
    except (OSError, ValueError):
        return {}


def clients_shown(folder: Path, metric: Metric) -> Table | None:
    """Return the last evaluation of a few clients with names as a table; None of others."""
    from rich.table import Table
    from rich.text import Text

    rows = _evaluated(folder)
    if not named(rows, metric):
        return None
    titles, *lines = client_table(rows, metric)
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for index, title in enumerate(titles):
        table.add_column(title, justify="right" if index else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def _evaluated(folder: Path) -> list[dict[str, Any]]:
    try:
        return last_evaluation(folder)
    except (OSError, ValueError):
        return []


def _against_constant(score: Score, folder: Path) -> str | None:
    """Return a line where the last score does not beat a constant prediction, as both are shown."""
    metric = Metric(score.name)
    try:
        central = read_json(folder / EVALUATION).get("constant") or {}
    except (OSError, ValueError):
        central = {}
    constant = constant_of(metric, _evaluated(folder) if metric.of_clients else [], central)
    if constant is None or metric.sign * round(score.last - constant, 4) > 0:
        return None
    line = f"not better than a constant prediction, {metric.text(constant)}"
    return f"{line}: train longer, or try another local.lr"


def _privacy(rows: Sequence[Row], folder: Path) -> str | None:
    """Return what the run may claim of the privacy of its clients; None where it claims nothing."""
    from fedddp.privacy.statement import statement  # by way of torch, which `fedddp runs` does not need

    if number(rows[-1], "privacy/epsilon") is None:
        return None
    try:
        return statement(read_config(folder / "config.yaml"), rows)
    except (OSError, ValueError):
        return None


def next_commands(folder: Path) -> list[str]:
    """Return the commands that come after a finished run; with its best model where it kept that."""
    path = shlex.quote(str(folder))
    best = " --best" if (folder / BEST).exists() else ""
    if ALONE in read_model_header(folder / MODEL):
        chosen = f"fedddp predict {path} IMAGE --client NAME{best}"
        return [f"fedddp report {path}", f"fedddp eval {path} --cross-site", chosen]
    return [f"fedddp report {path}", f"fedddp predict {path} IMAGE{best}"]


def phases_text(rows: Sequence[Row]) -> str:
    """Return the seconds of all rounds, with those of the phases that took more than a hundredth of them."""
    total = _sum(rows, "time/round")
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("time/"))
    phases = {name.removeprefix("time/"): _sum(rows, name) for name in names if name not in NOT_PHASES}
    largest = sorted((item for item in phases.items() if item[1] > total / 100), key=lambda item: -item[1])
    parts = [f"{name} {seconds:.1f}" for name, seconds in largest]
    return f"{total:.1f} s{': ' if parts else ''}{', '.join(parts)}"


def _sum(rows: Sequence[Row], name: str) -> float:
    """Return the sum of what the rows have at `name`; of integers it is one."""
    return sum(number(row, name) or 0 for row in rows)


def summary(rows: Sequence[Row], folder: Path, total_rounds: int, *, finished: bool) -> Table:
    """Return the table that ends a run.

    Args:
        rows: one per round, at least one.
        folder: the run directory.
        total_rounds: rounds that the run was given.
        finished: False where it was stopped.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", box=None, show_header=False, padding=(0, 2, 0, 0))
    table.columns[0].style = "dim"
    table.columns[1].overflow = "fold"
    score, other = run_score(rows, folder), score_of(rows)
    if score:
        table.add_row(Text(label_of(score.name)), score.text)
        below = _against_constant(score, folder) if finished else None
        if below:
            table.add_row("", below)
        clients = clients_shown(folder, Metric(score.name))
        if clients:
            table.add_row("by client", clients)
    if score and other and other.name != score.name:
        table.add_row(Text(label_of(other.name)), other.text)
    loss = last_value(rows, "train/loss")
    if loss is not None:
        table.add_row("train loss", f"{loss:.4f}")
    done = rows[-1]["round"]
    early = " (ended early)" if finished and done < total_rounds else ""
    table.add_row("rounds", f"{done} of {total_rounds}{early}")
    if any(number(row, "train/examples") is not None for row in rows):  # privacy.strict does not record them
        table.add_row("examples", f"{_sum(rows, 'train/examples'):,}")
    up, down = (int(_sum(rows, f"bytes/{way}")) for way in ("up", "down"))
    table.add_row("bytes", f"{size_text(up)} up, {size_text(down)} down")
    protected = _privacy(rows, folder)
    if protected is not None:
        table.add_row("privacy", Text(protected))
    table.add_row("time", phases_text(rows))
    if finished:
        for index, command in enumerate(next_commands(folder)):
            table.add_row("" if index else "next", Text(command))  # a folder may look like markup
    return table
