"""The tracker of a run: history on disk, progress on the screen, wandb and other trackers.

Only the coordinator tracks; the other ranks hold a `NullTracker`. Lines on disk are the record of
a run: they are written first, and a failure there ends the run. Trackers are a convenience: one
that fails is reported in one line, and the run continues without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedddp.section import NonNegativeInt, Section
from fedddp.storage.history import HISTORY, History, plain, read_rows
from fedddp.storage.judged import best_of

if TYPE_CHECKING:
    from rich.console import Console

    from fedddp.tracking.trackers import RunDescription

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """Where metrics go besides the run folder, and what is shown while the run lasts."""

    key = "tracking"

    trackers: list[str] = field(default_factory=lambda: ["wandb"])
    """Trackers, any that accelerate knows: wandb, tensorboard, mlflow, ...; [] for none."""

    project: str = "fedddp"
    """Project (or experiment) of the trackers under which the run appears."""

    group: str | None = None
    """wandb group that the run belongs to, such as the name of a sweep."""

    tags: list[str] = field(default_factory=list)
    """wandb tags of the run."""

    mode: Literal["auto", "offline"] = "auto"
    """wandb: `auto` is online with a login (`wandb login`), else offline; heeds WANDB_MODE."""

    report: bool = False
    """Write `report.html` to the run directory when the run ends; the wandb run shows it."""

    pictures: bool = True
    """Send pictures of test images to trackers: those of highest loss, with their masks or boxes, and the
    report, which has some. Online, wandb uploads them."""

    progress: bool = True
    """Show progress: a live bar on a terminal, one line per round elsewhere."""

    profile: NonNegativeInt = 0
    """Rounds that torch.profiler records after the first two; traces and tables are in RUN/profile."""

    def __post_init__(self) -> None:
        if set(self.trackers) <= {"wandb"}:
            return  # wandb comes with fedddp; the import below takes seconds
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        installed = {str(name) for name in get_available_trackers()}  # type: ignore[no-untyped-call]
        for name in self.trackers:
            if name not in LOGGER_TYPE_TO_CLASS:
                known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
                raise ValueError(f"trackers: unknown tracker {name!r}; accelerate has {known}")
            if name not in installed:
                raise ValueError(f"trackers: this needs the package of {name!r}; pip install {name}")


class NullTracker:
    """Tracks nothing: the tracker of every rank but the coordinator. `Tracker` has the same methods."""

    run_id: str | None = None
    """The wandb run; goes into checkpoints, so that a resumed run continues the same one."""

    def client_done(self, count: int = 1) -> None:
        """Count clients (of all groups) whose local training ended, for clients/s."""

    def begin_round(self, clients: int, at_once: int = 1) -> None:
        """Show that a round of `clients` begins, of which all groups together train `at_once` at a time."""

    def stopping(self) -> None:
        """Show what is finished before the run stops; may be called from any thread."""

    def log(self, row: Row) -> None:
        """Record one round.

        Args:
            row: "round" from 1, and metrics such as "train/loss", "eval/accuracy" (a fraction),
                "time/round" (seconds), "bytes/up". Lists stay in `history.jsonl`.

        Raises:
            OSError: the line cannot be written.
        """

    def log_clients(self, rows: list[Row]) -> None:
        """Record the metrics of clients, one row for each with its "round" and "client".

        Raises:
            OSError: a line cannot be written.
        """

    @property
    def client_rows(self) -> int:
        """Lines about clients so far; goes into checkpoints, so that a resume notices missing ones."""
        return 0

    def sync(self) -> None:
        """Force all lines to the disk; call it before a checkpoint is written."""

    def finish(
        self, model_file: Path | None = None, summary: Row | None = None, *, failed: bool = False
    ) -> None:
        """End the record; a second call does nothing.

        Args:
            model_file: the final model, which becomes an artifact of the wandb run.
            summary: the last metrics, for the wandb run's summary.
            failed: whether the run ended by an error.
        """


class Tracker(NullTracker):
    """The coordinator's record of a run: history, progress and trackers."""

    def __init__(
        self,
        tracking: TrackingConfig,
        folder: Path,
        config: Row,
        *,
        name: str,
        total_rounds: int,
        resume_round: int = 0,
        resume_client_rows: int | None = None,
        run_id: str | None = None,
        console: Console | None = None,
    ) -> None:
        """Open the history and start the trackers; no collective.

        Args:
            tracking: the settings.
            folder: the run folder.
            config: the resolved configuration, nested.
            name: the run's name.
            total_rounds: rounds of the whole run.
            resume_round: rounds that the checkpoint has; lines after it are cut off.
            resume_client_rows: lines about clients that the checkpoint has; None where it does not know.
            run_id: the `run_id` that the checkpoint has.
            console: where to write; standard output by default.

        Raises:
            ValueError: a line of the history is corrupt.
            OSError: the run folder cannot be written.
        """
        from fedddp.tracking.progress import QuietConsole, RoundProgress  # rich stays out of `fedddp --help`

        self.run_id = run_id
        self._tracking, self._folder, self._round = tracking, folder, resume_round
        self._history = History(folder, resume_round, resume_client_rows)
        self._console = console or QuietConsole()
        self._clients: list[Row] = []
        self._trackers: dict[str, Any] = {}
        self._finished = False
        used = tracking.trackers or tracking.progress
        earlier = read_rows(folder / HISTORY) if resume_round and used else []
        if tracking.trackers:
            self._start(plain(config), name, earlier)
        self._progress = RoundProgress(
            total_rounds,
            resume_round,
            visible=tracking.progress,
            console=self._console,
            earlier=earlier,
            best=best_of(config),
        )

    def _start(self, config: Row, name: str, earlier: list[Row]) -> None:
        """Start the trackers; `earlier`: the rows that the run's earlier launches have logged."""
        from fedddp.tracking.derived import DerivedMetrics
        from fedddp.tracking.trackers import RunDescription

        self._derived = DerivedMetrics(earlier, best_of(config))
        run = RunDescription(self._tracking, self._folder, config, name, self._round)
        for kind in self._tracking.trackers:
            if kind == "wandb":
                self._attempt(kind, self._start_wandb, run)
            else:
                self._attempt(kind, self._start_other, kind, run)

    def _start_other(self, kind: str, run: RunDescription) -> None:
        from fedddp.tracking.trackers import AccelerateTracker

        self._trackers[kind] = AccelerateTracker(kind, run)

    def _start_wandb(self, run: RunDescription) -> None:
        from fedddp.tracking.wandb_run import WandbRun

        tracker = WandbRun(run, self.run_id, self._show, self._derived)
        if tracker.run_id:  # else wandb is disabled
            self._trackers["wandb"], self.run_id = tracker, tracker.run_id

    def begin_round(self, clients: int, at_once: int = 1) -> None:
        """Show that a round begins."""
        self._progress.begin_round(clients, at_once)

    def client_done(self, count: int = 1) -> None:
        """Count clients whose local training ended, for clients/s."""
        self._progress.clients_done(count)

    def stopping(self) -> None:
        """Show what is finished before the run stops."""
        self._progress.stopping()

    def log(self, row: Row) -> None:
        """Record one round: on disk first, then on the screen and in the trackers."""
        self._history.log(row)
        self._round = row["round"]
        self._progress.round(row)
        if self._trackers:
            numbers = self._derived.numbers(row)
            for kind, tracker in list(self._trackers.items()):
                self._attempt(kind, tracker.log, numbers, row)

    def log_clients(self, rows: list[Row]) -> None:
        """Record the metrics of clients; trackers get a table of the last call's rows when the run ends."""
        self._history.log_clients(rows)
        self._clients = rows

    @property
    def client_rows(self) -> int:
        """Lines about clients so far."""
        return self._history.client_rows

    def sync(self) -> None:
        """Force all lines to the disk."""
        self._history.sync()

    def finish(
        self, model_file: Path | None = None, summary: Row | None = None, *, failed: bool = False
    ) -> None:
        """End the record: close the files, finish the trackers, and show how to upload the run."""
        if self._finished:
            return
        self._finished = True
        self._history.close()
        self._progress.close()
        if self._trackers:
            from fedddp.tracking.trackers import Ending

            ending = Ending(self._round, self._clients, model_file, plain(summary or {}), failed)
            for kind, tracker in list(self._trackers.items()):
                self._attempt(kind, tracker.finish, ending)

    def _attempt(self, kind: str, action: Callable[..., object], *args: object) -> None:
        try:
            action(*args)
        except Exception as error:  # whatever happens to a tracker, training continues
            self._trackers.pop(kind, None)
            self._show(f"{kind}: {reason(error)}; the run continues without this tracker")

    def _show(self, line: str) -> None:
        from fedddp.tracking.progress import show

        show(self._console, line)


def reason(error: Exception) -> str:
    """Return the first line of an error."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
