"""What several runs are judged by together, and what they are called."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedddp.storage.history import Metric, is_mean, judged_by

BASELINES = {"local": "local only", "pooled": "pooled"}
"""What runs of a baseline are called."""


def best_of(sections: Mapping[str, Any]) -> str | None:
    """Return the first metric of `checkpoint.best` of a configuration, nested; None where it has none."""
    checkpoint = sections.get("checkpoint")
    best = checkpoint.get("best") if isinstance(checkpoint, Mapping) else None
    first = best[0] if isinstance(best, list) and best else best
    return first if isinstance(first, str) else None


def judged_together(
    histories: Sequence[Sequence[Mapping[str, Any]]], configs: Sequence[Mapping[str, Any]]
) -> list[Metric | None]:
    """Return the metric that each of several runs is judged by, beside the others.

    It is one for all where that is possible: what each is judged by alone, or a mean over clients that all of
    them have; else the same without `checkpoint.best`. Else it is that of each alone.

    Args:
        histories: the rows of each run.
        configs: the configuration of each, nested.
    """
    alone = list(map(judged_by, histories, map(best_of, configs)))
    for judged in (alone, list(map(judged_by, histories))):
        if len({*judged}) <= 1:
            return judged
        for metric in dict.fromkeys(judged):
            key = metric.key if metric is not None and metric.of_clients else None
            if key and all(any(is_mean(row, key) for row in rows) for rows in histories):
                return [metric] * len(judged)
    return alone


def algorithm_of(settings: Mapping[str, Any]) -> str | None:
    """Return what a run trains by, of its settings with dotted keys: a baseline, or the class's name."""
    baseline = BASELINES.get(str(settings.get("baseline")))
    algorithm = settings.get("algorithm")
    return baseline or (None if algorithm is None else str(algorithm).rpartition(".")[2])


def averages_note(names: Collection[str], sections: Mapping[str, Any]) -> str | None:
    """Return which classes the mean IoU and the mean Dice are of; None where these do not stand together.

    Args:
        names: what is shown, without eval/.
        sections: the configuration, nested; `task.background` is true by default.
    """
    task = sections.get("task")
    if not {"iou", "dice"} <= {*names} or (isinstance(task, Mapping) and task.get("background") is False):
        return None
    return "IoU is the mean of all classes, Dice leaves out background (class 0)."
