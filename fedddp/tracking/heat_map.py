"""A heat map of counts as a picture, for trackers that show pictures."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_TICKS = 25
"""Names that fit beside an axis; of more, some are left out."""


def heat_map(
    counts: Sequence[Sequence[int]],
    rows: Sequence[str],
    columns: Sequence[str],
    axes: tuple[str, str],
    title: str,
) -> NDArray[np.uint8]:
    """Draw a heat map.

    Args:
        counts: (R, C), >= 0; the first row is drawn at the top.
        rows: names of the rows, (R,).
        columns: names of the columns, (C,).
        axes: label of the horizontal and of the vertical axis.
        title: of the picture.

    Returns:
        The picture, (H, W, 3).
    """
    return _draw(tuple(map(tuple, counts)), tuple(rows), tuple(columns), axes, title).copy()


@functools.lru_cache(maxsize=2)  # of the run that ends, whose next tracker shows the same
def _draw(
    counts: tuple[tuple[int, ...], ...],
    rows: tuple[str, ...],
    columns: tuple[str, ...],
    axes: tuple[str, str],
    title: str,
) -> NDArray[np.uint8]:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):  # names of classes may hold any character
        figure = Figure(figsize=(7, 6), dpi=100, layout="constrained")
        canvas: Any = FigureCanvasAgg(figure)
        plot = figure.add_subplot()
        values = np.asarray(counts, dtype=np.float64)
        # The root, so that small counts differ from zero.
        norm = PowerNorm(0.5, vmin=0, vmax=max(values.max(), 1))
        image = plot.imshow(values, cmap="Blues", norm=norm, aspect="auto", interpolation="nearest")
        for axis, names in ((plot.xaxis, columns), (plot.yaxis, rows)):
            positions = range(0, len(names), -(-len(names) // MOST_TICKS))
            axis.set_ticks(list(positions), [names[position][:20] for position in positions])
        if max(map(len, columns), default=0) > 3:
            plot.tick_params(axis="x", rotation=45)
        plot.set(xlabel=axes[0], ylabel=axes[1], title=title)
        figure.colorbar(image, ax=plot)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
