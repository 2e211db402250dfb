"""Progress on the screen: a live bar on a terminal, elsewhere a line per round."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

REFRESH_S = 0.1
"""Seconds between two drawings of the bar while a round lasts."""


class QuietConsole(Console):
    """A console that falls silent when its reader leaves or its disk is full: progress is a convenience."""

    def on_broken_pipe(self) -> None:
        """Write to nowhere from now on, so that later output of this process does not fail either."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError, ValueError):  # no file behind standard output
            os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:  # a full disk, a terminal that is gone
            self._buffer.clear()
            self.on_broken_pipe()


def show(console: Console, line: str) -> None:
    """Write `line` as it is: not wrapped (paths are to be copied) and not read as markup."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


class RoundProgress:
    """Shows rounds as they end, and clients as they are trained.

    On a terminal one line at the bottom is redrawn; in a file or a pipe every round is a line.
    Both show the round, the loss, the last accuracy, clients/s and the remaining time.
    """

    def __init__(self, total_rounds: int, done: int = 0, *, visible: bool, console: Console) -> None:
        """Start the clock and, on a terminal, the bar.

        Args:
            total_rounds: rounds of the run.
            done: rounds done before this process started (a resumed run).
            visible: False to show nothing.
            console: where to write.
        """
        self._total, self._done, self._resumed = total_rounds, done, done
        self._visible, self._console = visible, console
        self._start = self._drawn = time.monotonic()
        self._clients = 0
        self._scores: dict[str, str] = {}
        self._bar: Progress | None = None
        if visible and console.is_interactive:
            # Drawn from here and not from a thread: a drawing thread could hold a lock while a
            # data loader forks its workers.
            self._bar = Progress(
                TextColumn("round [bold]{task.completed:.0f}/{task.total:.0f}[/]"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}"),
                console=console,
                auto_refresh=False,
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_rounds, completed=done, status="")
            self._bar.start()

    def clients_done(self, count: int) -> None:
        """Count `count` more clients as trained."""
        self._clients += count
        if self._bar and time.monotonic() - self._drawn >= REFRESH_S:
            self._draw(self._bar)

    def round(self, row: Mapping[str, Any]) -> None:
        """Show that the round `row["round"]` (1-based) ended, with its losses and accuracy."""
        self._done = row["round"]
        loss = row.get("train/loss", row.get("eval/loss"))
        accuracy = row.get("eval/accuracy")
        if loss is not None:
            self._scores["loss"] = f"{loss:.4f}"
        if accuracy is not None:
            self._scores["accuracy"] = f"{100 * accuracy:.2f} %"
        if self._bar:
            self._draw(self._bar)
        elif self._visible:
            scores = [f"{label} {value}" for label, value in self._scores.items()]
            show(
                self._console,
                "  ".join([f"round {self._done}/{self._total}", *scores, *self._pace()]),
            )
            self._scores.clear()  # an old accuracy must not look like this round's

    def close(self) -> None:
        """Leave the last state of the bar on the screen and release the terminal."""
        if self._bar:
            self._draw(self._bar)
            self._bar.stop()
            self._bar = None

    def _draw(self, bar: Progress) -> None:
        scores = [f"[dim]{label}[/] [cyan]{value}[/]" for label, value in self._scores.items()]
        status = "  ".join([*scores, *self._pace()])
        bar.update(self._task, completed=self._done, status=status, refresh=True)
        self._drawn = time.monotonic()

    def _pace(self) -> list[str]:
        """Return clients/s and the remaining time, both from the mean pace since this process began."""
        elapsed = max(time.monotonic() - self._start, 1e-6)
        rate, left = self._clients / elapsed, self._total - self._done
        rounds = self._done - self._resumed
        parts = []
        if self._clients:
            parts.append(f"{rate:,.0f} clients/s" if rate >= 100 else f"{rate:.3g} clients/s")
        if rounds and left > 0:
            parts.append(f"ETA {timedelta(seconds=round(elapsed / rounds * left))}")
        elif left <= 0:
            parts.append(f"took {timedelta(seconds=round(elapsed))}")
        return parts
