"""What the files of a run show of it, for the commands that look at runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedddp.storage.history import HISTORY, Metric, Row, flat, judged_by, read_config, read_rows
from fedddp.storage.judged import BASELINES, best_of, judged_together
from fedddp.storage.run_record import RunRecord, age_s, read_record, state_of, unchanged_s
from fedddp.tracking.summary import Score, last_value, score_of

CORRUPT = "corrupt"


@dataclass(frozen=True)
class RunInfo:
    """One run directory; what cannot be read of it is empty, and `problem` is why."""

    folder: Path
    name: str
    state: str
    """running, stopped, failed or finished; corrupt where a file cannot be read."""
    rows: list[Row]
    sections: Row
    """The configuration."""
    record: RunRecord | None
    problem: str | None
    judged: Metric | None = None
    """What it is judged by beside other runs; None: as it is alone."""

    @property
    def score(self) -> Score | None:
        """The last and the best value of what it is judged by."""
        judged = self.judged or judged_by(self.rows, best_of(self.sections))
        return None if judged is None else score_of(self.rows, judged.key)

    @property
    def loss(self) -> float | None:
        """The last training loss."""
        return last_value(self.rows, "train/loss")

    @property
    def done(self) -> int:
        """Rounds done."""
        return int(self.rows[-1]["round"]) if self.rows else 0

    @property
    def rounds(self) -> int | None:
        """Rounds that the run was given; None where its configuration cannot be read."""
        rounds = self.sections.get("rounds")
        return rounds if isinstance(rounds, int) else None

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration with dotted keys; a choice's name stands for it, as in `algorithm`."""
        return {key.removesuffix(".name"): value for key, value in flat(self.sections).items()}

    @property
    def algorithm(self) -> str:
        """The name of the algorithm or the baseline; empty where it is not known."""
        settings = self.settings
        baseline = BASELINES.get(str(settings.get("baseline")))
        return baseline or str(settings.get("algorithm", ""))

    @property
    def dataset(self) -> str:
        """The name of the dataset, or the class of the user's own."""
        settings = self.settings
        return str(settings.get("objects.train.class", settings.get("data.dataset", "")))

    @property
    def age_s(self) -> float | None:
        """Seconds since the run ended, or wrote its last row."""
        try:
            if self.record is not None and self.record.sessions and self.record.sessions[-1].ended:
                return age_s(self.record.sessions[-1].ended)
            return unchanged_s(self.folder / HISTORY)
        except (OSError, ValueError):
            return None


def find_runs(output: Path) -> list[RunInfo]:
    """Return the runs in a folder and in the folders inside it, by name.

    Runs of one dataset and task in one folder are judged together, as by `report` and `compare`.
    """
    found = [read_run_info(folder, output) for folder in sorted(_run_folders(output))]
    alike: dict[tuple[Path, str, str], list[int]] = {}
    for place, run in enumerate(found):
        task = str(run.settings.get("task"))
        if run.rows:
            alike.setdefault((run.folder.parent, run.dataset, task), []).append(place)
    for places in alike.values():
        beside = [found[place] for place in places]
        together = judged_together([run.rows for run in beside], [run.sections for run in beside])
        for place, metric in zip(places, together, strict=True):
            found[place] = dataclasses.replace(found[place], judged=metric)
    return found


def _run_folders(output: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(output):
        if HISTORY in files:
            folders.clear()  # checkpoints, trackers
            yield Path(path)
        folders[:] = [name for name in folders if not name.startswith(".")]


def read_run_info(folder: Path, output: Path | None = None) -> RunInfo:
    """Return what the run directory `folder` holds; its name is its path in `output`."""
    rows: list[Row] = []
    sections: Row = {}
    problems = []
    try:
        rows = read_rows(folder / HISTORY)
    except (ValueError, OSError) as error:
        problems.append(str(error))
    try:
        sections = read_config(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    except (ValueError, OSError) as error:
        problems.append(f"{folder / 'config.yaml'} is corrupt: {error}")
    name = folder.name if output is None or folder == output else str(folder.relative_to(output))
    return RunInfo(
        folder=folder,
        name=name or str(folder.resolve().name),
        state=CORRUPT if problems else state_of(folder),
        rows=rows,
        sections=sections,
        record=read_record(folder),
        problem="; ".join(problems) or None,
    )


def ago(seconds: float | None) -> str:
    """Return how long ago something was, such as "3 h ago"."""
    if seconds is None:
        return "–"
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds // unit:.0f} {name} ago"
    return f"{max(seconds, 0):.0f} s ago"
