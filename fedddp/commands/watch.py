"""The command that follows a run from its files: `watch`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from fedddp.commands.console import STOPPED, fail, is_coordinator, parse, say, show
from fedddp.commands.run_info import CORRUPT, RunInfo, read_run_info
from fedddp.storage.history import HISTORY, number
from fedddp.storage.judged import best_of
from fedddp.storage.run_record import MODEL, RECORD, is_locked, read_warnings
from fedddp.tracking.progress import QuietConsole, RoundProgress
from fedddp.tracking.summary import summary

CODES = {"running": 0, "finished": 0, "stopped": STOPPED, "failed": 1, CORRUPT: 1}
"""The exit code of `watch`, by the state of the run at its end."""

WARNINGS = 5
"""Warnings of before that are shown when `watch` starts."""


def watch(rest: list[str]) -> None:
    """Follow a run from the files in its directory, until it ends."""
    from fedddp.section import local_path

    own = _parse(rest)
    if own is None or not is_coordinator():
        return
    try:
        folder = local_path(own.run, "RUN")
    except ValueError as error:
        fail(str(error))
    if own.once and not _has_begun(folder):
        fail(f"{folder} is no run directory yet; leave out --once to wait for it")
    raise SystemExit(Watch(folder, own.interval).follow(once=own.once))


def _parse(rest: list[str]) -> argparse.Namespace | None:
    """Return the options; None after printing the help."""
    options = argparse.ArgumentParser(
        prog="fedddp watch",
        description="Follow a run from its files until it ends. Ctrl-C leaves the run alone.",
        epilog=f"It waits for a run to start. Exit codes: finished 0, failed 1, stopped {STOPPED}.",
        allow_abbrev=False,
        exit_on_error=False,
        add_help=False,
    )
    options.add_argument("run", nargs="?", metavar="RUN", help="run directory")
    options.add_argument("--interval", type=float, default=2.0, metavar="S", help="seconds between looks (2)")
    options.add_argument("--once", action="store_true", help="show how the run is now, and end")
    own = parse(
        options,
        rest,
        {"run": "give a run directory, e.g. `fedddp watch runs/digits`; `fedddp runs` lists them"},
    )
    if own is not None and not own.interval > 0:
        fail(f"--interval must be > 0, got {own.interval:g}")
    return own


def _has_begun(folder: Path) -> bool:
    """Return whether the run in `folder` has got so far that its files show its state."""
    return any((folder / name).exists() for name in (RECORD, MODEL)) or bool(
        (folder / HISTORY).is_file() and (folder / HISTORY).stat().st_size
    )


class Watch:
    """Looks at the files of a run again and again: a file server knows no notifications."""

    def __init__(self, folder: Path, interval_s: float) -> None:
        """Prepare to look at `folder` every `interval_s` seconds."""
        self.folder, self.interval_s = folder, interval_s
        self.console = QuietConsole()
        self.progress: RoundProgress | None = None
        self.rows = 0
        """Rows that are shown."""
        self.seconds = 0.0
        """Of the rounds of this launch that are shown; the pace is taken from the rows, not from a clock."""
        self.warnings: int | None = None
        """Warnings that are shown; None before the first look."""

    def follow(self, *, once: bool = False) -> int:
        """Show the run until it ends, or `once`; return the exit code."""
        if not once and not _has_begun(self.folder):
            say(f"waiting for {self.folder} (Ctrl-C ends the wait)")
        try:
            while not _has_begun(self.folder):
                time.sleep(self.interval_s)
            while True:
                run = read_run_info(self.folder)
                # A launch that resumes the run holds its lock some time before it records that it runs.
                ended = run.state != "running" and not is_locked(self.folder)
                self._show(run)
                if ended or once:
                    break
                time.sleep(self.interval_s)
        finally:
            if self.progress:
                self.progress.close()
        self._show_end(run)
        return CODES[run.state]

    def _show(self, run: RunInfo) -> None:
        """Show the rows and the warnings that are new."""
        if run.rounds is None:
            return
        if self.progress and len(run.rows) < self.rows:  # a resume cut off rows after its checkpoint
            self.progress.close()
            self.progress = None
        if self.progress is None:
            self.progress = self._start(run)
        for row in run.rows[self.rows :]:
            self.seconds += number(row, "time/round") or 0.0
            self.progress.round(row)
        self.rows = len(run.rows)
        lines = read_warnings(self.folder)
        new = lines[-WARNINGS:] if self.warnings is None else lines[self.warnings :]
        for line in new:
            say(f"warning: {line}")
        self.warnings = len(lines)

    def _start(self, run: RunInfo) -> RoundProgress:
        """Return the bar, with all rows but the last of before."""
        sessions = run.record.sessions if run.record else ()
        resumed = min(sessions[-1].from_round if sessions else 0, len(run.rows))
        self.seconds, self.rows = 0.0, max(resumed, len(run.rows) - 1)
        progress = RoundProgress(
            run.rounds or run.done,
            resumed,
            visible=True,
            console=self.console,
            earlier=run.rows[:resumed],
            best=best_of(run.sections),
            clock=lambda: self.seconds,
            memory=False,
        )
        for row in run.rows[resumed : self.rows]:
            self.seconds += number(row, "time/round") or 0.0
            progress.status.round(row)
        return progress

    def _show_end(self, run: RunInfo) -> None:
        if run.rows and run.state != "running":
            finished = run.state == "finished"
            show(summary(run.rows, self.folder, run.rounds or run.done, finished=finished))
        error = run.problem or (run.record.error if run.record else None)
        say(f"{run.state}: {self.folder}{f': {error}' if error and run.state != 'finished' else ''}")
