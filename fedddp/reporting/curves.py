"""Curves of finished runs, read from their directories."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedddp.config.loader import OBJECTS
from fedddp.config.schema import execution_settings, fields_with
from fedddp.section import RENAMED
from fedddp.storage.history import Row, flat, read_config, read_rows

AXES = ("rounds", "examples", "bytes", "virtual s", "wall s")
"""What accuracy is drawn against. Examples are counted as often as they are trained on, bytes in both
directions; wall seconds leave out evaluation and checkpoints."""

COMPARED = (*fields_with("experiment", "common"), OBJECTS)
"""Settings that distinguish algorithms; others belong to one run."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A run, or the mean of runs that differ in their seed alone."""

    name: str
    x: Mapping[str, Floats]
    """Each of `AXES` at the E evaluations, (E,); NaN where the run did not record it."""
    accuracy: Floats
    """In [0, 1], (E,)."""
    low: Floats
    """The lowest of the seeds', (E,)."""
    high: Floats
    staleness: NDArray[np.int64]
    """Arrivals by their staleness 0, 1, ...; empty for rounds."""
    idle: Floats
    """Share of the wall time in which each group did not train, (G,); empty where it is not known."""
    settings: Mapping[str, Any]
    """The configuration, with dotted keys."""
    seeds: tuple[int, ...] = ()

    def reach(self, accuracy: float) -> dict[str, float]:
        """Return each axis where `accuracy` is first measured; NaN if it never is."""
        there = np.flatnonzero(self.accuracy >= accuracy)
        return {axis: float(x[there[0]]) if len(there) else float("nan") for axis, x in self.x.items()}


def read(folder: Path) -> Curve:
    """Return the curve of the run in `folder`.

    Raises:
        ValueError: it is no run, is corrupt, or was never evaluated.
    """
    try:
        config, rows = _config(folder / "config.yaml"), read_rows(folder / "history.jsonl")
    except OSError as error:
        raise ValueError(
            f"{folder} is no run directory: cannot read {error.filename}: {error.strerror}"
        ) from None
    measured = [i for i, row in enumerate(rows) if row.get("eval/accuracy") is not None]
    if not measured:
        raise ValueError(
            f"{folder} has no eval/accuracy in its history; compare runs that were evaluated on test data"
        )
    steps, accuracy = _steps(rows), np.array([rows[i]["eval/accuracy"] for i in measured])
    # A choice's name stands for it: `algorithm`, beside `algorithm.mu`.
    settings = {_key_now(key.removesuffix(".name")): value for key, value in flat(config).items()}
    idle = _added(row.get("time/idle", []) for row in rows) / max(float(steps["wall s"].sum()), 1e-9)
    return Curve(
        name=folder.name + ("" if (folder / "model.safetensors").exists() else " (unfinished)"),
        x={axis: np.cumsum(step)[measured] for axis, step in steps.items()},
        accuracy=accuracy,
        low=accuracy,
        high=accuracy,
        staleness=_added(row.get("staleness/histogram", []) for row in rows).astype(np.int64),
        idle=np.minimum(idle, 1.0),
        settings=settings,
        seeds=(int(settings.get("seed", 0)),),
    )


def _key_now(key: str) -> str:
    """Return what a setting of an earlier version is called now."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def _config(path: Path) -> Row:
    try:
        return read_config(path)
    except ValueError as error:
        raise ValueError(f"{path} is corrupt: {error}") from None


def _steps(rows: list[Row]) -> dict[str, Floats]:
    """Return the step of every round along each axis."""

    def column(*keys: str) -> Floats:
        values = [[row.get(key) for key in keys] for row in rows]
        return np.array([sum(np.nan if value is None else float(value) for value in row) for row in values])

    pauses = [row.get("time/evaluate", 0.0) + row.get("time/checkpoint", 0.0) for row in rows]
    return {
        "rounds": np.ones(len(rows)),
        "examples": column("train/examples"),
        "bytes": column("bytes/up", "bytes/down"),
        "virtual s": column("time/virtual"),
        "wall s": column("time/round") - np.array(pauses),
    }


def _added(lists: Iterable[list[float]]) -> Floats:
    """Return the sums of lists of different lengths, element by element."""
    lists = list(lists)
    total = np.zeros(max(map(len, lists), default=0))
    for values in lists:
        total[: len(values)] += values
    return total


def matters(setting: str) -> bool:
    """Return whether a `setting`, with its dotted key, distinguishes algorithms."""
    return setting.split(".", maxsplit=1)[0] in COMPARED and setting not in execution_settings()


def differing(curves: list[Curve]) -> list[str]:
    """Return the settings that matter in which the curves differ."""
    keys = dict.fromkeys(key for curve in curves for key in curve.settings)
    values = {key: [curve.settings.get(key) for curve in curves] for key in keys}
    return [key for key, seen in values.items() if matters(key) and seen.count(seen[0]) < len(seen)]


def over_seeds(curves: list[Curve]) -> list[Curve]:
    """Return one curve for all runs that differ in the seed alone, in the order of the first of each.

    Of several runs with one seed the last counts; runs that are all of one seed stay apart.
    """
    keys = differing(curves)
    alike: dict[str, list[Curve]] = {}
    for curve in curves:
        alike.setdefault(repr([curve.settings.get(key) for key in keys]), []).append(curve)
    merged: list[Curve] = []
    for runs in alike.values():
        by_seed = {run.seeds: run for run in runs}
        merged += [_mean([*by_seed.values()], keys)] if len(by_seed) > 1 else runs
    return merged


def _mean(runs: list[Curve], keys: list[str]) -> Curve:
    first = runs[0]
    length = min(len(run.accuracy) for run in runs)
    accuracies = np.array([run.accuracy[:length] for run in runs])
    named = [f"{key}={first.settings[key]}" for key in keys if key != "algorithm" and key in first.settings]
    return Curve(
        name=" ".join([str(first.settings.get("algorithm", first.name)), *named]),
        x={axis: np.mean([run.x[axis][:length] for run in runs], axis=0) for axis in AXES},
        accuracy=accuracies.mean(0),
        low=accuracies.min(0),
        high=accuracies.max(0),
        staleness=_added(run.staleness.tolist() for run in runs).astype(np.int64),
        idle=_added(run.idle.tolist() for run in runs) / len(runs),
        settings=first.settings,
        seeds=tuple(seed for run in runs for seed in run.seeds),
    )
