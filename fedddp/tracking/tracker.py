"""The tracker of a run: history on disk, progress on the screen, wandb and other trackers.

Only the coordinator tracks; the other ranks hold a `NullTracker`. Lines on disk are the record of
a run: they are written first, and a failure there ends the run. Trackers are a convenience: one
that fails is reported in one line, and the run continues without it.
"""

from __future__ import annotations

import logging
import secrets
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedddp.section import Section
from fedddp.storage.history import History, flat, plain

if TYPE_CHECKING:
    from rich.console import Console

Row = dict[str, Any]

_USED_IDS: set[str] = set()  # of the wandb runs that this process started

WANDB_INIT_TIMEOUT_S = 30.0
"""Seconds the start of a run waits for the wandb server before it logs offline."""

WANDB_FINISH_TIMEOUT_S = 120.0
"""Seconds the end of a run waits for uploads; what is left stays on disk for `wandb sync`."""


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

    progress: bool = True
    """Show progress: a live bar on a terminal, one line per round elsewhere."""

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
            run_id: the `run_id` that the checkpoint has.
            console: where to write; standard output by default.

        Raises:
            ValueError: a line of the history is corrupt.
            OSError: the run folder cannot be written.
        """
        from fedddp.tracking.progress import QuietConsole, RoundProgress  # rich stays out of `fedddp --help`

        self.run_id = run_id
        self._folder, self._round = folder, resume_round
        self._history = History(folder, resume_round)
        self._console = console or QuietConsole()
        self._clients: list[Row] = []
        self._trackers: dict[str, Any] = {}
        self._sync: str | None = None
        self._finished = False
        for kind in tracking.trackers:
            if kind == "wandb":
                self._attempt(kind, self._start_wandb, tracking, plain(config), name)
            else:
                self._attempt(kind, self._start_other, kind, tracking, plain(config), name)
        self._progress = RoundProgress(
            total_rounds, resume_round, visible=tracking.progress, console=self._console
        )

    def client_done(self, count: int = 1) -> None:
        """Count clients whose local training ended, for clients/s."""
        self._progress.clients_done(count)

    def log(self, row: Row) -> None:
        """Record one round: on disk first, then on the screen and in the trackers."""
        self._history.log(row)
        self._round = row["round"]
        self._progress.round(row)
        for kind, tracker in list(self._trackers.items()):
            self._attempt(kind, tracker.log, _numbers(row), step=self._round)

    def log_clients(self, rows: list[Row]) -> None:
        """Record the metrics of clients; trackers get a table of the last call's rows when the run ends."""
        self._history.log_clients(rows)
        self._clients = rows

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
        for kind, tracker in list(self._trackers.items()):
            if hasattr(tracker, "log_table") and self._clients:
                self._attempt(kind, self._log_table, tracker)
            if kind == "wandb":
                self._attempt(kind, self._finish_wandb, tracker.tracker, model_file, summary, failed)
            else:
                self._attempt(kind, tracker.finish)
        if self._sync:
            self._show(f"To upload the run: {self._sync}")

    def _log_table(self, tracker: Any) -> None:
        columns = list(dict.fromkeys(key for row in self._clients for key in row))
        data = [[plain(row.get(column)) for column in columns] for row in self._clients]
        tracker.log_table("clients", columns=columns, data=data, step=self._round)

    def _start_wandb(self, tracking: TrackingConfig, config: Row, name: str) -> None:
        import wandb

        quiet: dict[str, Any] = {
            "silent": True,
            "console": "off",
        }  # standard output belongs to the progress
        wandb.setup(settings=wandb.Settings(**quiet))
        settings = wandb.Settings(
            **quiet,
            init_timeout=WANDB_INIT_TIMEOUT_S,
            finish_timeout=WANDB_FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
        )
        # WANDB_RUN_ID is for one run: a second one in this process gets an id of its own.
        taken = wandb.setup().settings.run_id
        run_id = self.run_id or (secrets.token_hex(4) if taken in _USED_IDS else None)
        options = {
            "name": name,
            # Not through accelerate's `store_init_configuration`: it writes to wandb's global run.
            "config": config,
            "group": tracking.group,
            "tags": tracking.tags,
            "dir": str(self._folder),
            "id": run_id,
            "resume": "allow" if self.run_id else None,
            "reinit": "create_new",  # a run that the caller's own program has open is not ours
            "settings": settings,
        }
        try:
            mode = _wandb_mode(tracking)
            tracker = _start("wandb", tracking.project, self._folder, mode=mode, **options)
        except Exception as error:
            mode = "offline"
            self._show(f"wandb: {_reason(error)}; the run is logged offline")
            tracker = _start("wandb", tracking.project, self._folder, mode=mode, **options)
        self._trackers["wandb"] = tracker
        if mode == "disabled":
            return
        run = tracker.tracker
        if run.offline:
            self._sync = _sync_line(run, resumed=self.run_id is not None)
        else:
            self._show(f"wandb: {run.url}")
        self.run_id = run.id
        _USED_IDS.add(run.id)

    def _start_other(self, kind: str, tracking: TrackingConfig, config: Row, name: str) -> None:
        if kind == "tensorboard":  # events go to RUN/tensorboard; a resume hides what it repeats
            purge = {"purge_step": self._round + 1} if self._round else {}
            tracker = _start(kind, "tensorboard", self._folder, **purge)
        else:
            tracker = _start(kind, tracking.project, self._folder)
        self._trackers[kind] = tracker
        if not self._round:
            texts = {
                key: value if isinstance(value, int | float) else str(value)
                for key, value in flat(config).items()
            }
            tracker.store_init_configuration({"name": name, **texts})

    def _finish_wandb(self, run: Any, model_file: Path | None, summary: Row | None, failed: bool) -> None:
        if summary:
            run.summary.update(plain(summary))
        if model_file:
            try:
                _log_model(run, model_file, summary or {})
            except Exception as error:  # the run itself is still finished properly
                self._show(f"wandb: {_reason(error)}; the model is not among the run's artifacts")
        try:
            run.finish(exit_code=int(failed))
        except TimeoutError:
            self._sync = _sync_line(run, resumed=False)
            self._show(f"wandb: not all of the run was uploaded in {WANDB_FINISH_TIMEOUT_S:.0f} s")

    def _attempt(self, kind: str, action: Callable[..., object], *args: object, **options: object) -> None:
        try:
            action(*args, **options)
        except Exception as error:  # whatever happens to a tracker, training continues
            self._trackers.pop(kind, None)
            self._show(f"{kind}: {_reason(error)}; the run continues without this tracker")

    def _show(self, line: str) -> None:
        from fedddp.tracking.progress import show

        show(self._console, line)


def _log_model(run: Any, model_file: Path, summary: Row) -> None:
    """Add the final model to a wandb run as an artifact."""
    import wandb

    artifact = wandb.Artifact(f"model-{run.id}", "model", metadata=plain(summary))
    artifact.add_file(str(model_file.resolve()), policy="immutable")  # not copied
    run.log_artifact(artifact)


class _Logger(logging.LoggerAdapter[logging.Logger]):
    def warning_once(self, message: str) -> None:
        self.debug(message)


def _start(kind: str, run_name: str, folder: Path, **options: object) -> Any:
    """Return accelerate's tracker of that kind, started on this rank and on no other."""
    from accelerate import tracking as accelerate_tracking

    # accelerate's trackers ask, and its logger insists on, a `PartialState`, which opens a process
    # group when there is none and otherwise picks a GPU and a thread count: on one rank only.
    accelerate_tracking.logger = _Logger(logging.getLogger("accelerate.tracking"))
    maker: Any = accelerate_tracking.LOGGER_TYPE_TO_CLASS[kind]
    directory = [str(folder)] if maker.requires_logging_directory else []
    tracker = maker(run_name, *directory, **options)
    tracker.main_process_only = False
    tracker.start()
    return tracker


def _wandb_mode(tracking: TrackingConfig) -> str:
    import wandb

    mode: str = wandb.setup().settings.mode  # from WANDB_MODE or `wandb offline`
    if tracking.mode == "offline" and mode != "disabled":
        return "offline"
    if mode != "online" or wandb.login(prompt=False, verify=False):
        return mode
    return "offline"


def _sync_line(run: Any, *, resumed: bool) -> str:
    folder = Path(run.settings.sync_dir)
    if not resumed:
        return f"wandb sync {shlex.quote(str(folder))}"
    # Each session of the run has a folder; wandb uploads them in the order of their start.
    return f"wandb sync {shlex.quote(str(folder.parent))}/offline-run-*-{run.id}*"


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _numbers(row: Row) -> dict[str, int | float]:
    numbers = {key: value for key, value in plain(row).items() if isinstance(value, int | float)}
    numbers.pop("round", None)  # trackers have it as the step
    return numbers
