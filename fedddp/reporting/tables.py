"""Curves side by side as tables: for a terminal, a README, a paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.filesize import decimal

from fedddp.reporting.curves import AXES, Curve
from fedddp.storage.history import Metric

if TYPE_CHECKING:
    from rich.table import Table

Cells = list[list[str]]

WIDE = 120
"""Columns of a terminal in which all columns of the table fit."""

NAME_WIDTH = 24
"""Columns that a run's name may take before other columns are left out for it."""

UNKNOWN = "–"


def target_of(curves: Sequence[Curve]) -> float:
    """Return the score to race for: 95 % of the best, rounded down to whole percent, or to two digits.

    The best is the highest that one of the curves reaches with each of its seeds. Of a loss it is the lowest,
    and the score to race for lies 5 % above it.
    """
    metric = curves[0].metric
    best = max(min(metric.sign * run.best for run in curve.runs) for curve in curves)
    goal = best - 0.05 * abs(best)
    small = 0 < abs(goal) < 0.1 and not metric.in_percent
    scale = 10.0 ** (1 - math.floor(math.log10(abs(goal)))) if small else 100.0
    return metric.sign * math.floor(scale * goal + 1e-9) / scale


def goal_text(metric: Metric, target: float) -> str:
    """Return a score to race for as text, with all the digits that it was given with."""
    return f"{metric.factor * target:.10g}{metric.unit}"


MEANINGS = {
    "examples": "examples count once per pass over them",
    "bytes": "bytes both ways",
    "wall s": "wall time is without evaluation and checkpoints",
    "stale": "stale: mean staleness",
    "idle": "idle: share of the wall time in which a group did not train",
}
"""How columns of the table are read."""


def note(
    curves: Sequence[Curve], target: float, *, columns: Sequence[str] = tuple(MEANINGS), totals: bool = True
) -> str:
    """Return how the table is read, of which `columns` are shown."""
    metric, spread = curves[0].metric, any(curve.members for curve in curves)
    goal = f"to {goal_text(metric, target)} {metric.title}"
    goal = goal if metric.in_percent else f"to a {metric.title} of {goal_text(metric, target)}"
    meanings = "; ".join(text for column, text in MEANINGS.items() if column in columns)
    return " ".join(
        [
            f"a / b: {goal} / in all." if totals else f"{goal}.",
            *([f"{meanings[0].upper()}{meanings[1:]}."] if meanings else []),
            *(["±: sample standard deviation over seeds; –: a seed did not get there."] if spread else []),
        ]
    )


def cells(curves: Sequence[Curve], target: float, *, totals: bool = True) -> Cells:
    """Return the table: its header, and a row for every curve; without `totals` only the race to `target`."""
    shown: dict[str, Callable[[float], str]] = {
        "rounds": lambda count: f"{count:,.{0 if count == int(count) else 1}f}",  # a mean over seeds
        "examples": "{:,.0f}".format,
        "bytes": lambda count: decimal(int(count), precision=2),
        "virtual s": seconds,
        "wall s": seconds,
    }
    metric, other = curves[0].metric, beside(curves)
    rows = [["run", metric.label, *([other.label] if other else []), *shown, "stale", "idle"]]
    for curve in curves:
        reached = curve.reach(target)
        row = [curve.name, scores(metric, [run.score[-1] for run in curve.runs]) + metric.unit]
        row += [_last(other, curve, other.unit)] if other else []
        for axis, text in shown.items():
            numbers = [reached[axis], curve.x[axis][-1]] if totals else [reached[axis]]
            row.append(" / ".join(UNKNOWN if math.isnan(number) else text(number) for number in numbers))
        rows.append([*row, _mean_staleness(curve), _mean_idle(curve)])
    return rows


def beside(curves: Sequence[Curve]) -> Metric | None:
    """Return the metric of a second column: the mean over clients beside the test, or the other way round.

    The mean is shown where all runs have it, the test where one has it; None: neither.
    """
    metric = curves[0].metric
    other = Metric(f"eval/{metric.bare}" if metric.of_clients else metric.on_clients("mean"))
    has = [other.key in run.last for curve in curves for run in curve.runs]
    return other if (any(has) if metric.of_clients else all(has)) else None


def _last(metric: Metric, curve: Curve, unit: str = "") -> str:
    """Return the last value of a metric, the mean over seeds where they are several; a dash without one."""
    values = [run.last[metric.key] for run in curve.runs if metric.key in run.last]
    return UNKNOWN if len(values) < len(curve.runs) else scores(metric, values) + unit


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean of `values` as text, with ± their sample standard deviation where they are several."""
    mean = f"{np.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):,.{digits}f}"


def scores(metric: Metric, values: Sequence[float]) -> str:
    """Return the mean of a metric's `values` as `spread` does, without the unit."""
    return spread([metric.factor * value for value in values], metric.digits)


def _mean_staleness(curve: Curve) -> str:
    arrivals = int(curve.staleness.sum())
    total = int((curve.staleness * np.arange(len(curve.staleness))).sum())
    return f"{total / arrivals:.1f}" if arrivals else UNKNOWN


def _mean_idle(curve: Curve) -> str:
    return f"{100 * curve.idle.mean():.0f} %" if len(curve.idle) else UNKNOWN


def seconds(value: float) -> str:
    """Return seconds with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# ---- for a terminal ----


def terminal(curves: Sequence[Curve], target: float, width: int) -> Table:
    """Return the table for a terminal of `width` columns.

    A narrow one cannot hold the totals, nor columns that no run has a value in. Then the least telling
    columns are left out, and the caption names them. Names are wrapped, numbers are not.
    """
    from rich.table import Table
    from rich.text import Text

    totals = width >= WIDE
    header, *rows = cells(curves, target, totals=totals)
    shown, widths = _fitting([header, *rows], width)
    left_out = [
        name for i, name in enumerate(header) if i not in shown and any(_tells(row[i]) for row in rows)
    ]
    columns = [header[index] for index in shown]
    caption = note(curves, target, columns=columns, totals=totals)
    caption += f" Left out: {', '.join(left_out)}; comparison.md has all columns." if left_out else ""
    table = Table(box=None, header_style="bold", caption=caption, caption_justify="left", pad_edge=False)
    for index in shown:
        fixed: dict[str, Any] = {"min_width": widths[index], "max_width": widths[index]}
        if index:
            table.add_column(header[index], justify="right", no_wrap=True, **fixed)
        else:
            table.add_column(header[index], overflow="fold", **fixed)
    for row in rows:
        table.add_row(*(Text(row[index]) for index in shown))  # a run's name may look like markup
    return table


def _tells(cell: str) -> bool:
    return cell != "0 %" and bool(cell.strip(f" /{UNKNOWN}"))


def _fitting(rows: Cells, width: int) -> tuple[list[int], list[int]]:
    """Return the columns of `rows` that fit `width` characters, and the width of each column."""
    header, *body = rows
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    shown = list(range(len(header)))

    def rest() -> int:
        """Return the width that is left for the names."""
        return width - sum(widths[i] + 2 for i in shown if i)

    empty = [i for i in range(2, len(header)) if not any(_tells(row[i]) for row in body)]
    scored = header[2 : header.index("rounds")]
    least_telling = ("idle", "stale", "examples", "virtual s", "bytes", "wall s", "rounds", *scored)
    for index in [*empty, *(header.index(name) for name in least_telling)]:
        if index in shown and rest() < min(widths[0], NAME_WIDTH):
            shown.remove(index)
    widths[0] = max(min(widths[0], rest()), 1)
    return shown, widths


# ---- for a README and for a paper ----


def markdown(rows: Cells) -> str:
    """Return `rows` as Markdown."""
    ruler = ["---", *["--:"] * (len(rows[0]) - 1)]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (rows[0], ruler, *rows[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
}


def latex(rows: Cells) -> str:
    """Return `rows` as a LaTeX table, which needs the package booktabs."""
    lines = [" & ".join("".join(LATEX.get(c, c) for c in cell) for cell in row) + r" \\" for row in rows]
    kinds = "l" + "r" * (len(rows[0]) - 1)
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            rf"\begin{{tabular}}{{{kinds}}}",
            *(r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", ""),
        ]
    )


def paper_cells(curves: Sequence[Curve], target: float) -> Cells:
    """Return the table of a paper: mean ± sample standard deviation over seeds of each curve.

    Columns: seeds, final and best score, and each axis at the first evaluation that reaches `target`; a
    dash where a seed does not reach it. Columns of dashes alone are left out.
    """
    metric = curves[0].metric
    goal = f"to {goal_text(metric, target)}"
    largest = max((float(np.nanmax(c.x["bytes"], initial=0.0)) for c in curves), default=0.0)
    unit, divisor = ("GB", 1e9) if largest >= 1e10 else ("MB", 1e6)
    scales = {"rounds": ("rounds", 1.0, 1), "examples": ("examples", 1.0, 0)}
    scales |= {"bytes": (unit, divisor, 1), "virtual s": ("virtual s", 1.0, 1), "wall s": ("wall s", 1.0, 1)}
    axes = [axis for axis in AXES if any(np.isfinite(curve.x[axis]).all() for curve in curves)]
    other, label = beside(curves), metric.label
    titles = [f"{label} in %", "best in %"] if metric.in_percent else [label, f"best {label}"]
    titles += [other.label + " in %" * other.in_percent] if other else []
    rows = [["", "seeds", *titles, *(f"{scales[axis][0]} {goal}" for axis in axes)]]
    for curve in curves:
        reached = [run.reach(target) for run in curve.runs]
        row = [curve.name, str(len(curve.runs))]
        row.append(scores(metric, [run.score[-1] for run in curve.runs]))
        row.append(scores(metric, [run.best for run in curve.runs]))
        row += [_last(other, curve)] if other else []
        for axis in axes:
            _, by, digits = scales[axis]
            values = [numbers[axis] / by for numbers in reached]
            row.append(spread(values, digits) if np.isfinite(values).all() else UNKNOWN)
        rows.append(row)
    kept = [i for i in range(len(rows[0])) if any(row[i] != UNKNOWN for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def write_table(curves: Sequence[Curve], target: float, path: Path) -> None:
    """Write the table of a paper to a .tex or .md file.

    Raises:
        OSError: it cannot be written.
    """
    rows = paper_cells(curves, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(latex(rows) if path.suffix.lower() == ".tex" else markdown(rows), encoding="utf-8")
