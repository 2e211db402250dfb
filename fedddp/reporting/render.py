"""Curves side by side as panels: a picture, a page, a figure for a paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedddp.reporting.curves import AXES, Curve, differing, matters
from fedddp.reporting.figures import (
    COLUMN,
    PAGE_WIDTH,
    Chart,
    Line,
    chart,
    encode,
    idle_bars,
    save,
    stairs,
    style,
)
from fedddp.reporting.figures import (
    curves as draw_curves,
)
from fedddp.reporting.page import PageSection, html_table, page
from fedddp.reporting.tables import UNKNOWN, Cells, cells, goal_text, markdown, note
from fedddp.storage.history import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Literal["rounds", "examples", "bytes", "time", "wall"]
PANELS: tuple[Panel, ...] = ("rounds", "examples", "bytes", "time", "wall")
"""Single panels that `--panel` draws; `time` is virtual where the runs have a virtual clock."""


# ---- panels ----

Panels = dict[str, Callable[["Axes"], None]]


def panels(curves: Sequence[Curve], target: float) -> Panels:
    """Return what draws each panel that has something to show, by title."""
    metric = curves[0].metric
    goal = metric.factor * target, f"target {goal_text(metric, target)}"

    def over(axis: str) -> Callable[[Axes], None]:
        lines = [
            Line(i, c.name, c.x[axis], metric.factor * c.score, metric.factor * c.std if c.members else None)
            for i, c in enumerate(curves)
        ]
        return lambda axes: draw_curves(axes, lines, axis, metric.axis, goal)

    found: Panels = {
        _title(metric, axis): over(axis)
        for axis in AXES
        if any(np.isfinite(curve.x[axis]).all() for curve in curves)
    }
    stale = [(i, c.name, c.staleness) for i, c in enumerate(curves) if c.staleness.sum()]
    if stale:
        found["Staleness"] = lambda axes: stairs(axes, stale)
    idle = [(i, c.name, c.idle) for i, c in enumerate(curves) if len(c.idle)]
    if any(share.max() >= 0.005 for *_, share in idle):
        found["Idle time"] = lambda axes: idle_bars(axes, idle)
    return found


def _title(metric: Metric, axis: str) -> str:
    """Return the title of the panel of a metric over an axis, such as "Accuracy over rounds"."""
    return f"{metric.heading} over {axis}"


def one_panel(curves: Sequence[Curve], target: float, panel: Panel) -> Panels:
    """Return the panel of that name alone.

    Raises:
        ValueError: no run recorded it.
    """
    found = panels(curves, target)
    names = {"time": ("virtual s", "wall s"), "wall": ("wall s",)}.get(panel, (panel,))
    for name in names:
        title = _title(curves[0].metric, name)
        if title in found:
            return {title: found[title]}
    raise ValueError(f"--panel {panel}: no run recorded it; choose one of {', '.join(PANELS)}")


def save_figure(curves: Sequence[Curve], target: float, path: Path, panel: Panel | None = None) -> None:
    """Write a figure for a paper to a .pdf, .png or .svg file: mean and band over seeds.

    Args:
        curves: what it shows.
        target: the score of the dashed line.
        path: the file.
        panel: one panel, as wide as one column (3.4 in); None: all panels, as wide as two (7 in).

    Raises:
        ValueError: no run recorded `panel`.
        OSError: the file cannot be written.
    """
    chosen = panels(curves, target) if panel is None else one_panel(curves, target, panel)
    columns = 1 if panel else min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    width, height, text = (COLUMN, 2.1, 8.0) if columns == 1 else (PAGE_WIDTH, 1.9, 7.0)
    save(_figure(curves, chosen, columns, (width, rows * height), text), path)


def _figure(
    curves: Sequence[Curve], chosen: Panels, columns: int, size: tuple[float, float], text: float
) -> Any:
    """Return the panels in rows, with a legend in a free place or below."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(style(text)):
        rows = -(-len(chosen) // columns)
        free = rows * columns > len(chosen)
        # Inches of the longest entry: a letter is half as wide as high, the key as wide as six.
        entry = 0.5 * text / 72 * (6 + max(len("target 99 %"), *(len(curve.name) for curve in curves)))
        entries = len(curves) + 1  # and the target
        legend_columns = max(1, min(entries, int(size[0] / entry)))
        lines = 0 if free else -(-entries // legend_columns)
        figure = Figure(figsize=(size[0], size[1] + 0.024 * text * lines), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, draw in zip(grid, chosen.values(), strict=False):
            draw(axes)
        handles, labels = grid[0].get_legend_handles_labels()
        for axes in list(grid)[len(chosen) :]:
            axes.axis("off")
        if free:
            grid[len(chosen)].legend(handles, labels, loc="center left")
        elif lines:
            figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns)
    return figure


# ---- files of a comparison ----


def write(curves: Sequence[Curve], folder: Path, target: float, title: str) -> list[Path]:
    """Write comparison.md, .png, .svg and .html into `folder`; return their paths.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{markdown(cells(curves, target))}\n{note(curves, target)}\n"
    found = panels(curves, target)
    columns = min(4, len(found))
    figure = _figure(curves, found, columns, (3.7 * columns, 3.5 * -(-len(found) // columns)), 10.0)
    contents = {
        "md": text.encode(),
        "png": encode(figure, "png", dpi=110),
        "svg": encode(figure, "svg"),
        "html": comparison_page(curves, target, title).encode(),
    }
    paths = [folder / f"comparison.{kind}" for kind in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_bytes(content)
    return paths


def comparison_page(curves: Sequence[Curve], target: float, title: str) -> str:
    """Return the page of a comparison: table, panels, and the settings that differ."""
    from html import escape

    charts: list[Chart | str] = [chart(name, name, draw) for name, draw in panels(curves, target).items()]
    about = f'<p class="small">{escape(note(curves, target))}</p>'
    different, same = _settings(curves)
    rest = f"<details><summary>What is the same in all runs</summary>{html_table(same)}</details>"
    parts = [
        PageSection("Results", [html_table(cells(curves, target), numbers=True), about]),
        PageSection(curves[0].metric.heading, charts),
        PageSection("What differs", [(html_table(different) if different[1:] else "<p>Nothing.</p>") + rest]),
    ]
    return page(title, [curve.name for curve in curves], parts)


def _settings(curves: Sequence[Curve]) -> tuple[Cells, Cells]:
    """Return what differs, a column a run, and what is the same."""
    keys = differing([curve.settings for curve in curves])
    rows = [[key, *(str(curve.settings.get(key, UNKNOWN)) for curve in curves)] for key in ("rounds", *keys)]
    rows.append(["seeds", *(", ".join(map(str, curve.seeds)) for curve in curves)])
    different = [row for row in rows if len(set(row[1:])) > 1]
    same = [row[:2] for row in rows if len(set(row[1:])) == 1]
    first = curves[0].settings
    same += [[key, str(value)] for key, value in first.items() if matters(key) and key not in keys]
    return [["setting", *(curve.name for curve in curves)], *different], [["setting", "value"], *same]
