"""The trackers but wandb: any that accelerate knows, started on the coordinator alone."""

from __future__ import annotations

import importlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedddp.storage.checkpoint import write_text
from fedddp.storage.examined import Examined, parse_examined
from fedddp.storage.history import flat, plain, read_config, read_json, read_text
from fedddp.storage.run_record import EVALUATION, SPLIT
from fedddp.tracking import overlays

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedddp.tracking.tracker import TrackingConfig

Row = dict[str, Any]

MLFLOW_RUN = ".mlflow-run"
"""File of the run directory with the id of its MLflow run."""


@dataclass(frozen=True)
class RunDescription:
    """What a tracker is given of a run when it starts."""

    tracking: TrackingConfig
    folder: Path
    """The run directory."""
    config: Row
    """The resolved configuration, nested, as JSON has it."""
    name: str
    resume_round: int
    """Rounds that earlier launches have done."""


@dataclass(frozen=True)
class Ending:
    """What a tracker is given of a run when it ends."""

    round: int
    """The last round that was recorded."""
    clients: list[Row]
    """The metrics of clients in the last evaluation of clients; may be empty."""
    model_file: Path | None
    """The final model; None if the run was stopped or failed."""
    summary: Row
    failed: bool


class AccelerateTracker:
    """One of accelerate's trackers."""

    def __init__(self, kind: str, run: RunDescription) -> None:
        """Start it, and store the configuration unless the run is resumed."""
        self._kind, self._folder, self._pictures = kind, run.folder, run.tracking.pictures
        if kind == "tensorboard":  # events go to RUN/tensorboard; a resume hides what it repeats
            purge = {"purge_step": run.resume_round + 1} if run.resume_round else {}
            self._tracker = start(kind, "tensorboard", run.folder, **purge)
        elif kind == "mlflow":
            earlier = _mlflow_run(run.folder) if run.resume_round else None
            self._tracker = start(kind, run.tracking.project, run.folder, run_name=run.name, run_id=earlier)
            write_text(run.folder / MLFLOW_RUN, self._tracker.tracker.info.run_id)
        else:
            self._tracker = start(kind, run.tracking.project, run.folder)
        if not run.resume_round:
            texts = {
                key: value if isinstance(value, int | float) else str(value)
                for key, value in flat(run.config).items()
            }
            self._tracker.store_init_configuration({"name": run.name, **texts})

    def log(self, numbers: Row, row: Row) -> None:
        """Log the numbers of one round; its "round" is the step."""
        self._tracker.log(numbers, step=row["round"])

    def finish(self, ending: Ending) -> None:
        """Log the table of clients and, for TensorBoard, the pictures; end the tracker."""
        try:
            if ending.clients and hasattr(self._tracker, "log_table"):
                columns, data = table(ending.clients)
                self._tracker.log_table("clients/table", columns=columns, data=data, step=ending.round)
            classes = class_table(self._folder, ending)
            if classes and hasattr(self._tracker, "log_table"):
                columns, data = classes
                self._tracker.log_table("eval/classes", columns=columns, data=data, step=ending.round)
            if self._kind == "tensorboard" and not ending.failed:
                for key, picture in pictures(self._folder, ending, of_images=self._pictures).items():
                    images = {key: picture[None]}
                    self._tracker.log_images(images, step=ending.round, dataformats="NHWC")
        finally:
            if self._kind == "mlflow" and ending.failed:
                importlib.import_module("mlflow").end_run("FAILED")
            self._tracker.finish()


def start(kind: str, project: str, folder: Path, /, **options: object) -> Any:
    """Return accelerate's tracker of that kind, started on this rank and on no other."""
    from accelerate import tracking as accelerate_tracking

    # accelerate's trackers ask, and its logger insists on, a `PartialState`, which opens a process
    # group when there is none and otherwise picks a GPU and a thread count: on one rank only.
    accelerate_tracking.logger = _Logger(logging.getLogger("accelerate.tracking"))
    maker: Any = accelerate_tracking.LOGGER_TYPE_TO_CLASS[kind]
    directory = [str(folder)] if maker.requires_logging_directory else []
    tracker = maker(project, *directory, **options)
    tracker.main_process_only = False
    tracker.start()
    return tracker


class _Logger(logging.LoggerAdapter[logging.Logger]):
    def warning_once(self, message: str) -> None:
        self.debug(message)


def _mlflow_run(folder: Path) -> str | None:
    try:
        text = read_text(folder / MLFLOW_RUN)
    except (OSError, ValueError):
        return None
    return text if re.fullmatch(r"\w+", text) else None


# ---- tables and pictures of the end of a run ----


def table(rows: list[Row]) -> tuple[list[str], list[list[Any]]]:
    """Return the columns of `rows`, and a list of values for each row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return columns, [[plain(row.get(column)) for column in columns] for row in rows]


def confusion(folder: Path, ending: Ending) -> tuple[list[list[int]], list[str]] | None:
    """Return the confusion matrix of a finished run (row: true class) and its classes' names, if any."""
    counts = read_json(folder / EVALUATION).get("confusion") if ending.model_file else None
    if not counts:
        return None
    names = read_json(folder / SPLIT).get("class_names") or []
    return counts, names if len(names) == len(counts) else [str(index) for index in range(len(counts))]


def pictures(
    folder: Path, ending: Ending, *, of_images: bool = True, of_confusion: bool = True
) -> dict[str, NDArray[np.uint8]]:
    """Return the pictures of a run directory by key, (H, W, 3) each.

    `clients/split`, with `of_confusion` `eval/confusion`, and with `of_images` of masks and boxes
    `eval/worst`: the test examples of highest loss.
    """
    from fedddp.tracking.heat_map import heat_map

    found = {}
    split = read_json(folder / SPLIT)
    if split.get("shares"):
        rows = [str(share.get("name") or share["client"]) for share in split["shares"]]
        counts = [share["histogram"] for share in split["shares"]]
        axes = ("class", "client")
        found["clients/split"] = heat_map(counts, rows, split["class_names"], axes, "Training examples")
    matrix = confusion(folder, ending)
    examined = worst_examples(folder, ending)
    if matrix and of_confusion:
        counts, names = matrix
        axes = ("predicted class", "true class")
        title = "Test pixels" if examined is not None and examined.target == "mask" else "Test examples"
        found["eval/confusion"] = heat_map(counts, names, names, axes, title)
    if examined is not None and of_images:
        worst = overlays.sheet(examined, split.get("class_names") or [], background=has_background(folder))
        if worst is not None:
            found["eval/worst"] = worst
    return found


def worst_examples(folder: Path, ending: Ending) -> Examined | None:
    """Return the worst test examples of a finished run with masks or boxes; None of others."""
    content = read_json(folder / EVALUATION) if ending.model_file else {}
    return parse_examined(folder, content) if content.get("target") in ("mask", "boxes") else None


def has_background(folder: Path) -> bool:
    """Return whether class 0 of the masks is background: `task.background`, by default true."""
    task = read_config(folder / "config.yaml").get("task") if (folder / "config.yaml").exists() else None
    return not isinstance(task, dict) or task.get("background") is not False


def class_table(folder: Path, ending: Ending) -> tuple[list[str], list[list[Any]]] | None:
    """Return columns and rows of the metrics of each class in the last evaluation; None of recall alone."""
    lists = {key: values for key, values in ending.summary.items() if is_per_class(key, values)}
    lists = {key: values for key, values in lists.items() if len(values) == max(map(len, lists.values()))}
    if not lists or [*lists] == ["eval/recall"]:
        return None
    columns = [key.removeprefix("eval/").removesuffix("_per_class") for key in lists]
    names = read_json(folder / SPLIT).get("class_names") or []
    count = len(next(iter(lists.values())))
    names = names if len(names) == count else [str(label) for label in range(count)]
    return ["class", *columns], [list(row) for row in zip(names, *lists.values(), strict=True)]


def is_per_class(key: str, values: object) -> bool:
    """Return whether what a row has at `key` are the values of a metric for each class."""
    return key.startswith("eval/") and isinstance(values, list) and bool(values)
