"""What is shown of a run while it lasts: numbers from its rows and the clock, as text that fits a line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from rich.filesize import decimal

from fedddp.storage.history import Metric, direction, judged_by, number, working_seconds

Row = Mapping[str, Any]

GAP = 2
"""Columns between two parts of a line."""


class Part(NamedTuple):
    """A part of a line, such as "loss 0.2500"."""

    label: str
    value: str
    rank: int
    """A line that cannot hold all parts holds those of low rank first."""

    @property
    def text(self) -> str:
        """The label and the value."""
        return f"{self.label} {self.value}" if self.label else self.value


def fitting(parts: Sequence[Part], columns: int) -> list[Part]:
    """Return the parts that `columns` hold side by side, in the same sequence: none is cut."""
    kept: set[Part] = set()
    used = 0
    for part in sorted(parts, key=lambda part: part.rank):
        columns_of_part = len(part.text) + (GAP if kept else 0)
        if used + columns_of_part <= columns:
            kept.add(part)
            used += columns_of_part
    return [part for part in parts if part in kept]


class Status:
    """The numbers of a run in progress: scores, pace, bytes, idle time."""

    def __init__(
        self,
        total_rounds: int,
        done: int = 0,
        *,
        best: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            total_rounds: rounds of the run.
            done: rounds done before this launch of the run (a resumed run).
            best: the first metric of its `checkpoint.best`, which it is judged by where rows have it.
            clock: returns seconds.
        """
        self.total, self.done, self.resumed = total_rounds, done, done
        self._best, self._clock, self._start = best, clock, clock()
        self.cohort = 0
        """Clients of the round in progress; 0 where it is not known."""
        self.in_round = 0
        """Those of them that are trained."""
        self._at_once = 1
        self._clients = self._examples = 0  # of this launch's rows
        self._bytes = 0
        self._idle = self._group_seconds = 0.0
        self._loss: tuple[str, float] | None = None  # label, last
        self._score: tuple[str, float, float | None] | None = None  # name, last, the one before
        self._privacy: tuple[float, bool] | None = None  # ε, whether its noise can be repeated

    def begin_round(self, clients: int, at_once: int = 1) -> None:
        """Note that a round trains `clients`, of which `at_once` train at a time."""
        self.cohort, self.in_round, self._at_once = clients, 0, max(1, at_once)

    def clients_done(self, count: int) -> None:
        """Count `count` more clients of the round as trained."""
        self.in_round += count

    def earlier(self, rows: Iterable[Row]) -> None:
        """Add the rows of earlier launches: their scores and bytes, and not their pace."""
        for row in rows:
            self._add(row)

    def round(self, row: Row) -> None:
        """Add the row of a round of this launch."""
        self.done = row["round"]
        cohort = row.get("cohort")
        clients = len(cohort) if isinstance(cohort, list) else self.in_round
        self._clients += clients
        self.in_round = max(0, self.in_round - clients)  # asynchronous: some are of the next round
        self._examples += int(number(row, "train/examples") or 0)
        self._add(row)

    def _add(self, row: Row) -> None:
        self._bytes += int((number(row, "bytes/up") or 0) + (number(row, "bytes/down") or 0))
        idle = row.get("time/idle")
        idle = idle if isinstance(idle, list) and all(isinstance(s, int | float) for s in idle) else []
        self._idle += sum(idle)
        self._group_seconds += len(idle) * working_seconds(row)
        self._loss = _loss(row) or self._loss
        epsilon = number(row, "privacy/epsilon")
        if epsilon is not None:
            self._privacy = (epsilon, bool(row.get("privacy/simulated")))
        judged = judged_by([row], self._best)
        # A row without a score, such as one of NaN, does not make the run one that is judged by its loss.
        name = None if judged is None else judged.key
        if name is not None and (self._score is None or self._rank(name) >= self._rank(self._score[0])):
            before = self._score[1] if self._score and self._score[0] == name else None
            self._score = (name, row[name], before)

    def _rank(self, name: str) -> int:
        """Return a higher number for a metric that the run is rather judged by."""
        if name == self._best:
            return 3
        return 0 if not name.startswith("eval/") else 2 if direction(name) > 0 else 1

    # ---- as text ----

    @property
    def fraction(self) -> float:
        """Rounds done, with the share of the round in progress."""
        within = min(self.in_round / self.cohort, 1.0) if self.cohort else 0.0
        return self.done + (within if self.done < self.total else 0.0)

    def scores(self, row: Row | None = None, *, arrows: bool = True) -> list[Part]:
        """Return the training loss (else the test loss), the metric it is judged by with its change, and ε.

        Args:
            row: leave out what this row does not have; None: the last that any row had.
            arrows: False where the terminal has no arrows.
        """
        parts = []
        if self._loss is not None and (row is None or _loss(row) is not None):
            label, loss = self._loss
            if not (self._score and label_of(self._score[0]) == label):  # else it follows, with its change
                parts.append(Part(label, f"{loss:.4f}", 3))
        if self._score and (row is None or number(row, self._score[0]) is not None):
            name, value, before = self._score
            text = score_text(name, value)
            if before is not None:
                text += f" {_change(name, value - before, arrows=arrows)}"
            parts.append(Part(label_of(name), text, 1))
        if self._privacy is not None:
            epsilon, simulated = self._privacy
            label = "ε" if arrows else "epsilon"
            parts.append(Part(f"simulated {label}" if simulated else label, f"{epsilon:.3g}", 2))
        return parts

    def left(self, *, ended: bool = False) -> list[Part]:
        """Return the remaining time, from the mean pace of this launch; once it has `ended` what it took."""
        elapsed, done = self._elapsed(), self.fraction - self.resumed
        if ended or self.done >= self.total:
            return [Part("took", str(timedelta(seconds=round(elapsed))), 2)]
        if done <= 0:
            return []
        seconds = elapsed / done * (self.total - self.fraction)
        return [Part("ETA", str(timedelta(seconds=round(seconds))), 2)]

    def pace(self, *, within_round: bool = False) -> list[Part]:
        """Return clients and images per second; with the clients done `within_round`."""
        elapsed = max(self._elapsed(), 1e-6)
        clients = self._clients + self.in_round
        rate = rate_text(clients / elapsed)
        parts = [Part("", f"{rate} clients/s", 1)] if clients else []
        if within_round and self.cohort and self.done < self.total:
            done = f"{min(self.in_round, self.cohort)}/{self.cohort} clients"
            parts = [Part("", f"{done}, {rate}/s" if clients else done, 1)]
        if self._examples:
            parts.append(Part("", f"{rate_text(self._examples / elapsed)} images/s", 2))
        return parts

    def costs(self) -> list[Part]:
        """Return bytes both ways, and the share of the training time in which a group did not train."""
        parts = [Part("sent", size_text(self._bytes), 5)] if self._bytes else []
        if self._group_seconds:
            share = min(self._idle / self._group_seconds, 1.0)
            parts.append(Part("idle", f"{100 * share:.0f} %", 6))
        return parts

    def stopping(self) -> str:
        """Return what is finished before the run stops."""
        first, last = self.in_round + 1, min(self.in_round + self._at_once, self.cohort)
        if first > self.cohort:
            work = f"round {min(self.done + 1, self.total)}"
        else:
            work = f"client {first}" if first >= last else f"clients {first} to {last}"
            work += f" of {self.cohort}"
        return f"stopping: finishing {work} (Ctrl-C again stops at once, unsaved)"

    def forecast(self, row: Row) -> str | None:
        """Return how long the run will take, by its first round; None where no round is left."""
        left = self.total - self.done
        if not left:
            return None
        took = number(row, "time/round") or self._elapsed()
        rounds = f"the {left} rounds left" if self.resumed else f"{self.total} rounds"
        return (
            f"round {self.done} took {took:.1f} s; {rounds} will take "
            f"{about(took * (left if self.resumed else self.total))}"
        )

    def _elapsed(self) -> float:
        return self._clock() - self._start


# ---- numbers as text ----


def label_of(name: str) -> str:
    """Return a metric's key as it is shown: train loss, test loss, accuracy, IoU, clients/accuracy_mean."""
    return Metric(name).label


def _loss(row: Row) -> tuple[str, float] | None:
    """Return the label and the value of the training loss, else of the loss on the test data."""
    found = (name for name in ("train/loss", "eval/loss") if number(row, name, finite=False) is not None)
    name = next(found, None)
    return None if name is None else (label_of(name), row[name])


def score_text(name: str, value: float) -> str:
    """Return a metric as text: an accuracy in percent."""
    return Metric(name).text(value)


def _change(name: str, change: float, *, arrows: bool) -> str:
    metric = Metric(name)
    digits = f"{metric.factor * change:+.{metric.digits}f}"
    if float(digits) == 0:
        return "=" if arrows else "+0"
    return f"{'↑' if change > 0 else '↓'}{digits[1:]}" if arrows else digits


def rate_text(rate: float) -> str:
    """Return a rate with three digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def size_text(count: int) -> str:
    """Return bytes with two or three digits, such as 3.2 GB and 126 MB."""
    number, _, unit = decimal(count, precision=1).partition(" ")
    value = float(number.replace(",", ""))
    return f"{value:.0f} {unit}" if value >= 10 or unit.startswith("byte") else f"{value:.1f} {unit}"


def about(seconds: float) -> str:
    """Return a length of time in words, such as "about 5 minutes"."""
    units = ((90, 1, "second"), (90 * 60, 60, "minute"), (36 * 3600, 3600, "hour"), (math.inf, 86400, "day"))
    _, unit, noun = next(row for row in units if seconds < row[0])
    if unit == 1 and seconds >= 45:
        return "about a minute"
    if unit == 60 and seconds >= 50 * 60:
        return "about an hour"
    number = max(1, round(seconds / unit))
    return f"about {number} {noun}{'' if number == 1 else 's'}"
