"""What several runs are judged by together, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedddp.storage.history import Metric, is_mean, judged_by

BASELINES = {"local": "local only", "pooled": "pooled"}
"""What runs of a baseline are called."""


def judged_together(histories: Sequence[Sequence[Mapping[str, Any]]]) -> list[Metric | None]:
    """Return the metric that each of several runs is judged by, beside the others.

    It is that of the run alone, unless a run has none but a mean over clients that all of them have: then it
    is this mean for all.
    """
    judged = [judged_by(rows) for rows in histories]
    for metric in {*judged}:
        key = metric.key if metric is not None and metric.of_clients else None
        if key and all(any(is_mean(row, key) for row in rows) for rows in histories):
            return [metric] * len(judged)
    return judged


def algorithm_of(settings: Mapping[str, Any]) -> str | None:
    """Return what a run trains by, of its settings with dotted keys: a baseline, or the class's name."""
    baseline = BASELINES.get(str(settings.get("baseline")))
    algorithm = settings.get("algorithm")
    return baseline or (None if algorithm is None else str(algorithm).rpartition(".")[2])
