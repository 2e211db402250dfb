"""Progress on the screen: a live bar on a terminal, one display in a notebook, elsewhere a line per round."""

from __future__ import annotations

import contextlib
import html
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedddp.tracking.memory import gpu_bytes, resident_bytes
from fedddp.tracking.status import GAP, Part, Row, Status, fitting, size_text

REFRESH_S = 0.1
"""Seconds between two drawings of the bar while a round lasts."""

NOTEBOOK_REFRESH_S = 0.5

SHORTEST_BAR = 6
"""Columns of the bar; on a narrower terminal other parts are left out for it."""


class QuietConsole(Console):
    """A console that falls silent when its reader leaves or its disk is full: progress is a convenience."""

    silenced: ClassVar[bool] = False

    def __init__(self, **options: Any) -> None:
        """Take rich's `options`; in the block of `silence` nothing is shown.

        Text is shown as it is: a name with brackets or colons is no markup and no emoji.
        """
        options = {"markup": False, "emoji": False, **options}
        super().__init__(quiet=options.pop("quiet", False) or self.silenced, **options)

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


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Let consoles that are made in the block show nothing, as with `fedddp run --quiet`."""
    QuietConsole.silenced = True
    try:
        yield
    finally:
        QuietConsole.silenced = False


def show(console: Console, line: str) -> None:
    """Write `line` as it is: not wrapped (paths are to be copied) and not read as markup."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


class RoundProgress:
    """Shows rounds as they end, and clients as they are trained.

    On a terminal two lines at the bottom are redrawn, in a notebook one display is updated; in a file or a
    pipe every round is a line.
    """

    def __init__(
        self,
        total_rounds: int,
        done: int = 0,
        *,
        visible: bool,
        console: Console,
        earlier: Iterable[Row] = (),
        best: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        memory: bool = True,
    ) -> None:
        """Start the clock and, on a terminal, the bar.

        Args:
            total_rounds: rounds of the run.
            done: rounds done before this process started (a resumed run).
            visible: False to show nothing.
            console: where to write.
            earlier: rows of those rounds.
            best: the first metric of `checkpoint.best`, which the run is judged by.
            clock: returns seconds.
            memory: whether to show the memory of this process, which trains.
        """
        self.status = Status(total_rounds, done, best=best, clock=clock)
        self.status.earlier(earlier)
        self._console, self._memory = console, memory
        self._stopping = False
        self._view: _View = _Nothing()
        if visible and console.is_jupyter:
            self._view = _Notebook(self.status, self._costs)
        elif visible and console.is_interactive:
            self._view = _Bar(self.status, self._costs, console)
        elif visible:
            self._view = _Lines(self.status, self._costs, console)

    def begin_round(self, clients: int, at_once: int = 1) -> None:
        """Start a round of `clients`, of which `at_once` train at a time, on all groups together."""
        self.status.begin_round(clients, at_once)
        self._view.within_round()

    def clients_done(self, count: int) -> None:
        """Count `count` more clients as trained."""
        self.status.clients_done(count)
        self._view.within_round()

    def round(self, row: Mapping[str, Any]) -> None:
        """Show that the round `row["round"]` (1-based) ended, with its losses and scores."""
        first = self.status.done == self.status.resumed
        self.status.round(row)
        self._view.round(row)
        forecast = self.status.forecast(row) if first else None
        if forecast:
            self._view.note(forecast)

    def stopping(self) -> None:
        """Show, once, what is finished before the run stops; may be called from any thread."""
        if not self._stopping:
            self._stopping = True
            self._view.note(self.status.stopping())

    def close(self) -> None:
        """Leave the last state of the bar on the screen and release the terminal."""
        self._view.close()
        self._view = _Nothing()

    def _costs(self) -> list[Part]:
        parts = self.status.costs()
        if self._memory:
            parts.append(Part("memory", size_text(resident_bytes()), 3))
            on_gpu = gpu_bytes()
            parts += [] if on_gpu is None else [Part("GPU", size_text(on_gpu), 4)]
        return parts


class _View:
    """How progress is shown."""

    def within_round(self) -> None:
        """Show the clients of the round, if it is time."""

    def round(self, row: Row) -> None:
        """Show the end of a round."""

    def note(self, line: str) -> None:
        """Show a line that stays."""

    def close(self) -> None:
        """Show the last state."""


class _Nothing(_View):
    """Shows nothing."""


class _Lines(_View):
    """Writes a line per round; it is as wide as a bar's, and leaves out parts as that does."""

    def __init__(self, status: Status, costs: Callable[[], list[Part]], console: Console) -> None:
        self._status, self._costs, self._console = status, costs, console

    def round(self, row: Row) -> None:
        status, width = self._status, self._console.width
        arrows = not self._console.options.ascii_only
        memory = [part for part in self._costs() if part.label in ("memory", "GPU")]
        head = f"round {status.done}/{status.total}"
        line = [Part("", head, 0)]
        for parts in ([*status.scores(row, arrows=arrows), *status.left()], [*status.pace(), *memory]):
            used = sum(len(part.text) + GAP for part in line)
            line += fitting(parts, width - used)
        show(self._console, (" " * GAP).join(part.text for part in line))

    def note(self, line: str) -> None:
        show(self._console, line)


class _Bar(_View):
    """Redraws two lines at the bottom of the terminal.

    They are drawn from here and not from a thread: a drawing thread could hold a lock while a data loader
    forks its workers.
    """

    def __init__(self, status: Status, costs: Callable[[], list[Part]], console: Console) -> None:
        self._status, self._costs, self._console = status, costs, console
        self._closed = False
        self._live = Live(self, console=console, auto_refresh=False)
        self._live.start(refresh=True)
        self._drawn = time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        status, width = self._status, options.max_width
        number = status.done if self._closed else min(status.done + 1, status.total)
        head = f"round {number}/{status.total}"
        scores = [*status.scores(arrows=not options.ascii_only), *status.left(ended=self._closed)]
        first = fitting(scores, width - len(head) - SHORTEST_BAR - 2 * GAP)
        line = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False, expand=True)
        for ratio in (None, 1, None):
            line.add_column(ratio=ratio, no_wrap=True)
        bar = ProgressBar(total=status.total, completed=status.fraction)
        line.add_row(Text(head, style="bold"), bar, _line(first))
        yield line
        second = fitting([*status.pace(within_round=not self._closed), *self._costs()], width)
        if second or not status.done:
            # Without it the ^C that a terminal echoes would wrap behind a line of full width.
            yield _line(second or [Part("", "no round yet", 0)])

    def within_round(self) -> None:
        if time.monotonic() - self._drawn >= REFRESH_S:
            self._draw()

    def round(self, row: Row) -> None:
        self._draw()

    def note(self, line: str) -> None:
        show(self._console, line)

    def close(self) -> None:
        self._closed = True
        self._draw()
        self._live.stop()

    def _draw(self) -> None:
        self._live.refresh()
        self._drawn = time.monotonic()


class _Notebook(_View):
    """Updates one display of a notebook."""

    def __init__(self, status: Status, costs: Callable[[], list[Part]]) -> None:
        self._status, self._costs, self._notes = status, costs, dict[str, None]()
        display = importlib.import_module("IPython.display").display  # a notebook has it
        self._handle = display(self._content(), raw=True, display_id=True)
        self._drawn = time.monotonic()

    def within_round(self) -> None:
        if time.monotonic() - self._drawn >= NOTEBOOK_REFRESH_S:
            self._draw()

    def round(self, row: Row) -> None:
        self.within_round()

    def note(self, line: str) -> None:
        self._notes[line] = None
        self._draw()

    def close(self) -> None:
        self._draw()

    def _draw(self) -> None:
        self._handle.update(self._content(), raw=True)
        self._drawn = time.monotonic()

    def _content(self) -> dict[str, str]:
        status = self._status
        head = f"round {status.done}/{status.total}"
        lines = [[*status.scores(), *status.left()], [*status.pace(within_round=True), *self._costs()]]
        texts = [*("  ".join(part.text for part in line) for line in lines), *self._notes]
        bar = f'<progress value="{status.fraction:.3f}" max="{status.total}"></progress>'
        escaped = "<br>".join(html.escape(text) for text in texts)
        return {
            "text/plain": "\n".join([head, *texts]),
            "text/html": f"<div><b>{head}</b> {bar}<br>{escaped}</div>",
        }


def _line(parts: Iterable[Part]) -> Text:
    """Return parts side by side: labels dim, scores coloured."""
    line = Text(no_wrap=True)
    for part in parts:
        line.append(" " * GAP if line else "")
        line.append(f"{part.label} " if part.label else "", style="dim")
        line.append(part.value, style="cyan" if part.label else "")
    return line
