"""Curves of finished runs, read from their directories."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedddp.config.files import OBJECTS
from fedddp.config.schema import execution_settings, fields_with
from fedddp.reporting.labels import distinguish
from fedddp.reporting.runs import read_settings
from fedddp.storage.history import Metric, Row, judged_by, number
from fedddp.storage.judged import BASELINES, best_of, judged_together
from fedddp.storage.run_record import MODEL

AXES = ("rounds", "examples", "bytes", "virtual s", "wall s")
"""What a score is drawn against. Examples are counted as often as they are trained on, bytes in both
directions; wall seconds leave out evaluation and checkpoints."""

COMPARED = (*fields_with("experiment", "common"), OBJECTS)
"""Settings that distinguish algorithms; others belong to one run."""

UNFINISHED = " (unfinished)"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A run, or the mean of runs that differ in their seed alone."""

    name: str
    x: Mapping[str, Floats]
    """Each of `AXES` at the E evaluations, (E,); NaN where the run did not record it."""
    metric: Metric
    """What the run is judged by."""
    score: Floats
    """The metric at the E evaluations, (E,); accuracies in [0, 1]."""
    std: Floats
    """Sample standard deviation of the score over seeds, (E,); 0 for one run."""
    staleness: NDArray[np.int64]
    """Arrivals by their staleness 0, 1, ...; empty for rounds."""
    idle: Floats
    """Share of the wall time in which each group did not train, (G,); empty where it is not known."""
    settings: Mapping[str, Any]
    """The configuration, with dotted keys."""
    last: Mapping[str, float]
    """The last value of every number below eval/ and clients/, by its key; of one run."""
    members: tuple[Curve, ...] = ()
    """The runs of a mean; empty for one run."""

    @property
    def runs(self) -> tuple[Curve, ...]:
        """The runs of a mean, or the run itself."""
        return self.members or (self,)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each run."""
        return tuple(int(run.settings.get("seed", 0)) for run in self.runs)

    @property
    def best(self) -> float:
        """The best score: the highest, of a loss the lowest."""
        return float(self.metric.sign * (self.metric.sign * self.score).max())

    def reach(self, target: float) -> dict[str, float]:
        """Return each axis where a score as good as `target` is first measured; NaN if it never is.

        Of a mean over seeds it is the mean of its runs, NaN where one of them never reaches it.
        """
        if self.members:
            reached = [run.reach(target) for run in self.members]
            return {axis: float(np.mean([one[axis] for one in reached])) for axis in self.x}
        there = np.flatnonzero(self.metric.sign * (self.score - target) >= 0)
        return {axis: float(x[there[0]]) if len(there) else float("nan") for axis, x in self.x.items()}


def read(folder: Path, metric: Metric | None = None) -> Curve:
    """Return the curve of the run in `folder`: a metric, by default that which it is judged by.

    Raises:
        ValueError: it is no run, is corrupt, or was never evaluated.
    """
    settings, sections, rows = read_settings(folder)
    metric = judged_by(rows, best_of(sections)) if metric is None else metric
    if metric is None:
        raise ValueError(
            f"{folder} has no metric below eval/ in its history; compare runs evaluated on test data"
        )
    measured, score = series(rows, metric.key)
    passed = steps(rows)
    idle = added(lists_of(rows, "time/idle")) / max(float(passed["wall s"].sum()), 1e-9)
    return Curve(
        name=folder.name + ("" if (folder / MODEL).exists() else UNFINISHED),
        x={axis: np.cumsum(step)[measured] for axis, step in passed.items()},
        metric=metric,
        score=score,
        std=np.zeros(len(score)),
        staleness=added(lists_of(rows, "staleness/histogram")).astype(np.int64),
        idle=np.minimum(idle, 1.0),
        settings=settings,
        last={
            key: value
            for row in rows
            for key in row
            if key.startswith(("eval/", "clients/")) and (value := number(row, key)) is not None
        },
    )


def read_all(folders: Iterable[Path]) -> list[Curve]:
    """Return the curves of runs that are compared, one for all that differ in the seed alone.

    Beside clients that trained alone, and have no test of a model of all, the others are judged by the mean
    over clients too; see `judged_together`.

    Raises:
        ValueError: one is no run, is corrupt, or was never evaluated; or they are judged by several metrics.
    """
    folders = list(folders)
    read_before = [read_settings(folder) for folder in folders]
    judged = judged_together([rows for *_, rows in read_before], [sections for _, sections, _ in read_before])
    curves = [read(folder, metric) for folder, metric in zip(folders, judged, strict=True)]
    other = next((curve for curve in curves if curve.metric != curves[0].metric), None)
    if other is not None:
        first = curves[0]
        fix = "runs of one task"
        if first.metric.of_clients or other.metric.of_clients:
            fix += ", all with data.holdout or clients that own test data, and with evaluation.clients"
        raise ValueError(
            f"{first.name} is judged by {first.metric.key}, but {other.name} by {other.metric.key}; compare "
            f"{fix}"
        )
    return over_seeds(curves)


def series(rows: Sequence[Row], key: str) -> tuple[NDArray[np.int64], Floats]:
    """Return the positions of the rows that have a number at `key`, and these numbers."""
    values = numbers(rows, key)
    found = np.flatnonzero(np.isfinite(values))
    return found, values[found]


def numbers(rows: Sequence[Row], key: str) -> Floats:
    """Return what every row has at `key`, (rows,); NaN where that is no number."""
    values = [row.get(key) for row in rows]
    return np.array([float(value) if is_number(value) else np.nan for value in values])  # type: ignore[arg-type]


def steps(rows: Sequence[Row]) -> dict[str, Floats]:
    """Return the step of every round along each axis."""
    pauses = [np.nan_to_num(numbers(rows, f"time/{phase}")) for phase in ("evaluate", "checkpoint")]
    return {
        "rounds": np.ones(len(rows)),
        "examples": numbers(rows, "train/examples"),
        "bytes": numbers(rows, "bytes/up") + numbers(rows, "bytes/down"),
        "virtual s": numbers(rows, "time/virtual"),
        "wall s": numbers(rows, "time/round") - pauses[0] - pauses[1],
    }


def lists_of(rows: Sequence[Row], key: str) -> list[list[float]]:
    """Return the lists of numbers that the rows have at `key`; what is none is left out."""
    return [row[key] for row in rows if isinstance(row.get(key), list) and all(map(is_number, row[key]))]


def is_number(value: object) -> bool:
    """Return whether a value of a history is a number; null and truth are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def added(lists: Iterable[list[float]]) -> Floats:
    """Return the sums of lists of different lengths, element by element."""
    lists = list(lists)
    total = np.zeros(max(map(len, lists), default=0))
    for values in lists:
        total[: len(values)] += values
    return total


def matters(setting: str) -> bool:
    """Return whether a `setting`, with its dotted key, distinguishes algorithms."""
    return setting.split(".", maxsplit=1)[0] in COMPARED and setting not in execution_settings()


def differing(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the settings that matter in which the runs of these settings differ."""
    keys = dict.fromkeys(key for settings in runs for key in settings)
    values = {key: [settings.get(key) for settings in runs] for key in keys}
    return [key for key, seen in values.items() if matters(key) and seen.count(seen[0]) < len(seen)]


def over_seeds(curves: list[Curve]) -> list[Curve]:
    """Return one curve for all runs that differ in the seed alone, in the order of the first of each.

    Runs of other rounds, or evaluated in other rounds, stay apart: points of a mean are of the same rounds.
    Of several runs with one seed the last counts; runs that are all of one seed stay apart. A mean is named
    by its settings, or as its runs are but for the seed. Runs that have only numbered names are too.
    """
    keys = differing([curve.settings for curve in curves])
    alike: dict[str, list[Curve]] = {}
    for curve in curves:
        same = [curve.settings.get(key) for key in (*keys, "rounds", "evaluation.every")]
        alike.setdefault(repr(same), []).append(curve)
    merged: list[Curve] = []
    for runs in alike.values():
        by_seed = {run.seeds: run for run in runs}
        merged += [_mean([*by_seed.values()])] if len(by_seed) > 1 else runs
    return _named(merged, keys)


def _mean(runs: list[Curve]) -> Curve:
    first = runs[0]
    length = min(len(run.score) for run in runs)
    scores = np.array([run.score[:length] for run in runs])
    return Curve(
        name=first.name,
        x={axis: np.mean([run.x[axis][:length] for run in runs], axis=0) for axis in AXES},
        metric=first.metric,
        score=scores.mean(0),
        std=scores.std(0, ddof=1),
        staleness=added(run.staleness.tolist() for run in runs).astype(np.int64),
        idle=added(run.idle.tolist() for run in runs) / len(runs),
        settings=first.settings,
        last={},
        members=tuple(runs),
    )


def _named(curves: list[Curve], keys: list[str]) -> list[Curve]:
    """Return the curves with readable names, which differ."""
    labels = distinguish([curve.settings for curve in curves], keys)
    own = [curve.name.removesuffix(UNFINISHED) for curve in curves]
    numbered = len(curves) > 1 and len({re.sub(r"-\d+$", "", name) for name in own}) == 1
    names = []
    for curve, label, name in zip(curves, labels, own, strict=True):
        stems = {
            re.sub(rf"-seed={seed}$", "", run.name) for seed, run in zip(curve.seeds, curve.runs, strict=True)
        }
        suffix = UNFINISHED if any(run.name.endswith(UNFINISHED) for run in curve.runs) else ""
        if curve.members:
            names.append((stems.pop() if len(stems) == 1 else label) + suffix)
        else:
            names.append((label if numbered and labels.count(label) == 1 else name) + suffix)
    names = [_spoken(name, curve) for name, curve in zip(names, curves, strict=True)]
    return [
        replace(curve, name=name if names.count(name) == 1 else f"{name} [{curve.name}]")
        for curve, name in zip(curves, names, strict=True)
    ]


def _spoken(name: str, curve: Curve) -> str:
    """Return the label of a baseline where the run's `name` is that of its folder: "local only"."""
    label = BASELINES.get(str(curve.settings.get("baseline")), "")
    folder = label.replace(" ", "-")
    return (
        f"{label}{name.removeprefix(folder)}" if label and name.removesuffix(UNFINISHED) == folder else name
    )
