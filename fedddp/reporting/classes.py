"""The metrics of each class: over rounds, and as a table of the last evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from fedddp.reporting.curves import is_number
from fedddp.reporting.figures import Chart, chart, heat, name_ticks
from fedddp.reporting.page import html_table
from fedddp.reporting.runs import RunFiles
from fedddp.reporting.tables import UNKNOWN
from fedddp.storage.history import Metric, Row, class_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 500
"""Points of a curve that are drawn; of a longer one every n-th."""

MOST_CLASSES = 100
"""Rows of a table of classes: the lowest by the first metric."""


def thin(count: int) -> Sequence[int]:
    """Return the positions of at most `MOST_POINTS` + 1 of `count` points, evenly spaced, with the last."""
    every = -(-count // MOST_POINTS)
    return [*range(0, max(count - 1, 0), every or 1), *([count - 1] if count else [])]


def class_name(run: RunFiles, label: int) -> str:
    """Return the name of a class, its number where it has none."""
    return run.class_names[label] if label < len(run.class_names) else str(label)


def per_class(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows that have a list for each key below eval/, with one length for all rows of a key."""
    keys = dict.fromkeys(
        key for row in rows for key, value in row.items() if key.startswith("eval/") and is_list(value)
    )
    found = {key: [row for row in rows if is_list(row.get(key))] for key in keys}
    return {key: some for key, some in found.items() if len({len(row[key]) for row in some}) == 1}


def is_list(value: object) -> bool:
    """Return whether a value of a history is a metric of every class: numbers, null where it has none."""
    return isinstance(value, list) and bool(value) and any(map(is_number, value))


def in_percent(metric: Metric) -> bool:
    """Return whether the values of each class are shown in percent: accuracies, and recall."""
    return metric.in_percent or metric.bare == "recall"


def over_rounds(index: int, run: RunFiles) -> list[Chart]:
    """Return the metrics of every class over rounds."""
    charts = []
    for key, measured in per_class(run.rows).items():
        if len(measured) < 2:
            continue
        metric, kept = class_metric(key), [measured[i] for i in thin(len(measured))]
        factor = 100 if in_percent(metric) else 1
        values = np.array([[float(v) if is_number(v) else np.nan for v in row[key]] for row in kept]).T
        labels = [class_name(run, label) for label in range(len(values))]
        rounds = [str(row["round"]) for row in kept]
        shares = bool(np.nanmin(values) >= 0 and np.nanmax(values) <= 1)
        scale = f"{metric.label} in %" if factor == 100 else metric.label

        def draw(
            axes: Axes,
            matrix: np.ndarray = factor * values,
            labels: list[str] = labels,
            rounds: list[str] = rounds,
            scale: str = scale,
            top: float | None = float(factor) if shares else None,
        ) -> None:
            heat(axes, matrix, xlabel="round", ylabel="class", scale=scale, top=top)
            name_ticks(axes, "y", labels)
            name_ticks(axes, "x", rounds, most=8)

        charts.append(chart(f"{metric.bare} {index}", f"{metric.heading} of each class", draw, run=index))
    return charts


def class_table(index: int, run: RunFiles, names: Sequence[str]) -> list[str]:
    """Return the table of the last evaluation's metrics of each class, as HTML; not of recall alone."""
    lists = per_class(run.rows)
    measured = [row for row in run.rows if any(is_list(row.get(key)) for key in lists)]
    if not measured or [*lists] == ["eval/recall"]:
        return []
    columns = {class_metric(key): measured[-1][key] for key in lists if is_list(measured[-1].get(key))}
    longest = max(map(len, columns.values()))
    columns = {metric: values for metric, values in columns.items() if len(values) == longest}
    first = next(iter(columns.values()))
    shown, title = list(range(longest)), "class"
    if longest > MOST_CLASSES:
        shown = sorted(shown, key=lambda label: (not is_number(first[label]), first[label] or 0.0))
        shown, title = shown[:MOST_CLASSES], f"class ({MOST_CLASSES} lowest of {longest:,})"
    rows = [[title, *(metric.label for metric in columns)]]
    for label in shown:
        rows.append([class_name(run, label), *(_cell(m, values[label]) for m, values in columns.items())])
    of = f" of {escape(names[index])}" if len(names) > 1 else ""
    heading = f"<h3>Classes{of} after round {measured[-1]['round']:,}</h3>"
    return [f'<div class="run-{index}">{heading}{html_table(rows, numbers=True)}</div>']


def _cell(metric: Metric, value: float | None) -> str:
    if value is None or not is_number(value):
        return UNKNOWN
    return f"{100 * value:.2f} %" if in_percent(metric) else metric.text(value)
