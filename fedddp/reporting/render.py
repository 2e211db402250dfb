"""Curves side by side: a table, a picture, and a page that needs no other file."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.filesize import decimal

from fedddp.reporting.curves import AXES, Curve, differing, matters

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6914")
"""Distinguishable by colour-blind readers too (Okabe and Ito, 2008); without yellow, faint on white."""

LINES = ("-", (0, (4, 1.5)))
"""In turn, so that two curves on top of each other are both visible."""

WIDE = 120
"""Columns of a terminal in which all columns of the table fit."""

NAME_WIDTH = 24
"""Columns that a run's name may take before other columns are left out for it."""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; }}
body {{ max-width: 1200px; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3em .9em; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }}
th:first-child, td:first-child {{ text-align: left; }}
.scroll {{ overflow-x: auto; }} svg {{ width: 100%; height: auto; }} .small {{ color: #666; }}
</style></head><body>
<h1>{title}</h1>
<div class="scroll">{table}</div>
<p class="small">{note}</p>
{picture}
<h2>What differs</h2>
<div class="scroll">{different}</div>
<details><summary>What is the same in all runs</summary><div class="scroll">{same}</div></details>
</body></html>
"""

Cells = list[list[str]]
UNKNOWN = "–"


def target_of(curves: Sequence[Curve]) -> float:
    """Return the accuracy to race for: 95 % of the best that was measured, in integer percent."""
    return math.floor(95 * max(float(curve.accuracy.max()) for curve in curves)) / 100


def note(target: float, *, totals: bool = True) -> str:
    """Return how the table is read."""
    what = "a / b: to {} / in all" if totals else "to {}"
    race = what.format(f"{100 * target:.0f} % test accuracy")
    return (
        f"{race}. Examples count once per pass over them, bytes both ways; wall time is without "
        "evaluation and checkpoints; stale: mean staleness; idle: share of the wall time in which a "
        "group did not train."
    )


def cells(curves: Sequence[Curve], target: float, *, totals: bool = True) -> Cells:
    """Return the table: its header, and a row for every curve; without `totals` only the race to `target`."""
    shown: dict[str, Callable[[float], str]] = {
        "rounds": "{:,.0f}".format,
        "examples": "{:,.0f}".format,
        "bytes": lambda count: decimal(int(count), precision=2),
        "virtual s": _seconds,
        "wall s": _seconds,
    }
    rows = [["run", "accuracy", *shown, "stale", "idle"]]
    for curve in curves:
        reached = curve.reach(target)
        row = [curve.name, f"{100 * curve.accuracy[-1]:.2f} %"]
        for axis, text in shown.items():
            numbers = [reached[axis], curve.x[axis][-1]] if totals else [reached[axis]]
            row.append(" / ".join(UNKNOWN if math.isnan(number) else text(number) for number in numbers))
        rows.append([*row, _mean_staleness(curve), _mean_idle(curve)])
    return rows


def _mean_staleness(curve: Curve) -> str:
    arrivals = int(curve.staleness.sum())
    total = int((curve.staleness * np.arange(len(curve.staleness))).sum())
    return f"{total / arrivals:.1f}" if arrivals else UNKNOWN


def _mean_idle(curve: Curve) -> str:
    return f"{100 * curve.idle.mean():.0f} %" if len(curve.idle) else UNKNOWN


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def terminal(curves: Sequence[Curve], target: float, width: int) -> Table:
    """Return the table for a terminal of `width` columns.

    A narrow one has no room for the totals, nor for columns that no run has a value in; names are wrapped.
    """
    from rich.table import Table

    totals = width >= WIDE
    header, *rows = cells(curves, target, totals=totals)
    caption = note(target, totals=totals)
    table = Table(box=None, header_style="bold", caption=caption, caption_justify="left", pad_edge=False)
    shown = _fitting([header, *rows], width)
    for index in shown:
        if index:
            table.add_column(header[index], justify="right", no_wrap=True)
        else:
            table.add_column(header[index], overflow="fold")
    for row in rows:
        table.add_row(*(row[index] for index in shown))
    return table


def _fitting(rows: Cells, width: int) -> list[int]:
    """Return the columns of `rows` that fit `width` characters: the least telling ones go first."""
    header, *body = rows
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(header))]
    widths[0] = min(widths[0], NAME_WIDTH + 2)
    empty = [i for i in range(2, len(header)) if all(row[i] in (UNKNOWN, "0 %") for row in body)]
    shown = list(range(len(header)))
    for index in [*empty, *(header.index(name) for name in ("idle", "stale", "examples"))]:
        if index in shown and sum(widths[i] for i in shown) - 2 > width:
            shown.remove(index)
    return shown


def markdown(rows: Cells) -> str:
    """Return `rows` as Markdown."""
    ruler = ["---", *["--:"] * (len(rows[0]) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], ruler, *rows[1:]))


def _html(rows: Cells) -> str:
    head, *body = rows
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in body]
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f"<table><tr>{header}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _settings(curves: Sequence[Curve]) -> tuple[Cells, Cells]:
    """Return what differs, a column a run, and what is the same."""
    keys = differing(list(curves))
    different = [["setting", *(curve.name for curve in curves)]]
    different += [
        [key, *(str(curve.settings.get(key, "–")) for curve in curves)] for key in ("rounds", *keys)
    ]
    different.append(["seeds", *(", ".join(map(str, curve.seeds)) for curve in curves)])
    first = curves[0].settings
    same = [[key, str(value)] for key, value in first.items() if matters(key) and key not in keys]
    return different, [["setting", "value"], *same]


def write(curves: Sequence[Curve], folder: Path, target: float, title: str) -> list[Path]:
    """Write comparison.md, .png, .svg and .html into `folder`; return their paths.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = cells(curves, target)
    pictures = _pictures(curves, target)
    svg = pictures["svg"].decode()
    different, same = _settings(curves)
    page = PAGE.format(
        title=html.escape(title),
        table=_html(rows),
        note=html.escape(note(target)),
        picture=svg[svg.index("<svg") :],
        different=_html(different),
        same=_html(same),
    )
    text = f"{markdown(rows)}\n{note(target)}\n"
    contents = {"md": text.encode(), **pictures, "html": page.encode()}
    paths = [folder / f"comparison.{kind}" for kind in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_bytes(content)
    return paths


def _pictures(curves: Sequence[Curve], target: float) -> dict[str, bytes]:
    """Return the picture as "png" and as "svg": accuracy on every axis, staleness, idle time."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "fedddp", "svg.fonttype": "path"}):
        figure = Figure(figsize=(15, 7.2), layout="constrained")
        panels = figure.subplots(2, 4)
        styles = [
            {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}
            for i in range(len(curves))
        ]
        for panel, axis in zip(panels.flat, AXES, strict=False):
            _accuracy(panel, curves, styles, axis, target)
        _staleness(panels[1, 1], curves, styles)
        _idle(panels[1, 2], curves, styles)
        panels[1, 3].axis("off")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        panels[1, 3].legend(handles, labels, loc="center left", frameon=False, fontsize=11)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=110)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return {"png": png.getvalue(), "svg": svg.getvalue()}


def _accuracy(
    panel: Axes, curves: Sequence[Curve], styles: list[dict[str, Any]], axis: str, target: float
) -> None:
    ends = []
    for curve, style in zip(curves, styles, strict=True):
        x = curve.x[axis]
        if np.isfinite(x).all():
            ends.append(x[-1])
        panel.plot(x, 100 * curve.accuracy, label=curve.name, linewidth=1.8, **style)
        if len(curve.seeds) > 1:
            panel.fill_between(
                x, 100 * curve.low, 100 * curve.high, color=style["color"], alpha=0.15, linewidth=0
            )
    if ends and max(ends) > 8 * max(min(ends), 1e-9):
        panel.set_xscale("log")
    panel.axhline(100 * target, color="0.6", linewidth=0.8, linestyle=(0, (4, 4)), zorder=0)
    labels = {"virtual s": "virtual time in s", "wall s": "wall time in s", "bytes": "bytes moved"}
    panel.set(xlabel=labels.get(axis, axis), ylabel="test accuracy in %")
    if not ends:
        _leave_empty(panel, "not recorded")
    panel.grid(alpha=0.25)


def _staleness(panel: Axes, curves: Sequence[Curve], styles: list[dict[str, Any]]) -> None:
    shown = [(c, s) for c, s in zip(curves, styles, strict=True) if len(c.staleness)]
    for curve, style in shown:
        share = 100 * curve.staleness / max(curve.staleness.sum(), 1)
        panel.stairs(share, np.arange(len(share) + 1) - 0.5, linewidth=1.8, **style)
    panel.set(xlabel="staleness in server versions", ylabel="% of arrivals")
    if max((len(curve.staleness) for curve, _ in shown), default=0) > 20:
        panel.set_xscale("symlog", linthresh=10)  # many arrive soon, a straggler late
        panel.set_xlim(left=-0.5)
    if not shown:
        _leave_empty(panel, "rounds only: nothing is stale")
    panel.grid(alpha=0.25)


def _leave_empty(panel: Axes, why: str) -> None:
    panel.text(0.5, 0.5, why, transform=panel.transAxes, ha="center", color="0.5")


def _idle(panel: Axes, curves: Sequence[Curve], styles: list[dict[str, Any]]) -> None:
    """Bars of the mean, dots of the groups."""
    for position, (curve, style) in enumerate(zip(curves, styles, strict=True)):
        if len(curve.idle):
            panel.bar(position, 100 * curve.idle.mean(), color=style["color"], alpha=0.6, width=0.7)
            panel.plot([position] * len(curve.idle), 100 * curve.idle, "o", color="0.2", markersize=3.5)
    panel.set(ylabel="group idle, % of wall time (dots: groups)", ylim=(0, 100), xticks=[])
    panel.grid(alpha=0.25, axis="y")
