"""The section of a report on what each client's own model does on the data of the others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fedddp.reporting.cross_site_file import CrossSite
from fedddp.reporting.figures import Chart, chart, heat, name_ticks, tall
from fedddp.reporting.page import PageSection
from fedddp.reporting.runs import RunFiles
from fedddp.storage.history import capital

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NUMBERS = 8
"""Clients of a matrix whose cells have their numbers in them."""


def cross_site(runs: Sequence[RunFiles]) -> PageSection:
    """Return a heat map for each run that has a cross-site matrix."""
    blocks: list[Chart | str] = []
    for index, run in enumerate(runs):
        if run.cross_site is not None:
            found = run.cross_site
            name = found.metric.heading.removeprefix("Test ")
            title = f"{capital(name)} of each client's model on the data of each"
            draw, size = partial(_draw, found=found), tall(2 * len(found.names))
            blocks.append(chart(f"cross-site {index}", title, draw, size, run=index))
    missing = "" if blocks else "the cross-site matrix: fedddp eval RUN --cross-site, of clients' own models"
    return PageSection("Across clients", blocks, missing)


def _draw(axes: Axes, found: CrossSite) -> None:
    metric, rows = found.metric, list(found.names)
    matrix = metric.factor * found.matrix
    if found.global_row is not None:
        matrix = np.vstack([matrix, metric.factor * found.global_row])
        rows.append("global")
    known = matrix[np.isfinite(matrix)]
    shares = metric.sign > 0 and bool(((known >= 0) & (known <= metric.factor)).all())
    top = float(metric.factor) if shares else None
    label = metric.axis.removeprefix("test ")
    heat(axes, matrix, xlabel="data of", ylabel="model of", scale=label, top=top)
    name_ticks(axes, "y", rows)
    name_ticks(axes, "x", found.names)
    if len(rows) <= MOST_NUMBERS + 1:
        largest = metric.factor if shares else max(float(known.max(initial=0.0)), 1e-9)
        for (row, column), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                text = f"{value:.0f}" if metric.in_percent else f"{value:.2f}"
                # Dark where the colour is bright.
                colour = "black" if value > 0.6 * largest else "white"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize="small")
