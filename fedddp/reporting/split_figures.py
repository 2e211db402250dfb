"""Figures of a split: which client holds how many examples of which classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedddp.data.description import Description
from fedddp.reporting.figures import COLUMN, PAGE_WIDTH, heat, name_ticks, save, shorten, style
from fedddp.tasks.segmentation import is_background

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

SHOWN = 100
"""Most clients of a figure; of more, the first and the last."""

MARKED = 12
"""Most classes of a confusion matrix with its numbers in the cells."""

STACKED = 20
"""Most classes that have a colour each in the bars."""


def holdings(axes: Axes, split: Description, names: Sequence[str]) -> None:
    """Draw the examples of each class at each client, as a matrix of clients and classes."""
    counts = np.array([share.histogram for share in split.shares], dtype=float)
    heat(axes, counts, xlabel="class", ylabel="client")
    name_ticks(axes, "x", held_names(split, names))
    name_ticks(axes, "y", [share.label for share in split.shares])
    if counts.size <= 200:
        mark(axes, counts)


def mark(axes: Axes, counts: np.ndarray) -> None:
    """Write the numbers of a matrix into its cells, 0 left out."""
    for row, column in np.argwhere(counts > 0):
        text = _short(counts[row, column])
        axes.text(column, row, text, ha="center", va="center", fontsize=8 if len(text) < 4 else 6)


def _short(count: float) -> str:
    """Return a number in at most five letters: 12345 as 12k."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= max(unit, 1e4):
            return f"{count / unit:.{1 if count < 10 * unit else 0}f}{letter}"
    return f"{count:.0f}"


def confusion(axes: Axes, counts: np.ndarray, names: Sequence[str]) -> None:
    """Draw a confusion matrix of counts, (K, K): its colours are the shares of each true class."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    heat(axes, shares, xlabel="predicted class", ylabel="true class")
    name_ticks(axes, "x", names)
    name_ticks(axes, "y", names)
    if len(counts) <= MARKED:
        mark(axes, counts)


def save_confusion(counts: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Write a confusion matrix, (K, K), to a .pdf, .png or .svg file, as wide as one column of a paper.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(style(8)):
        figure = Figure(figsize=(COLUMN, COLUMN), layout="constrained")
        confusion(figure.subplots(), counts, names)
        save(figure, path)


def sizes(axes: Axes, split: Description, names: Sequence[str], *, legend: bool = True) -> None:
    """Draw the examples of each client as a bar, stacked by class where the classes are few."""
    from matplotlib import colormaps

    counts = np.array([share.histogram for share in split.shares], dtype=float)
    places, bottom = np.arange(len(counts)), np.zeros(len(counts))
    few = counts.shape[1] <= STACKED
    colours = colormaps["tab10" if counts.shape[1] <= 10 else "tab20"]
    for label, held in enumerate(counts.T if few else counts.sum(1)[None]):
        some = held > 0
        axes.bar(places[some], held[some], bottom=bottom[some], width=0.85, color=colours(label))
        bottom += held
    if legend and few:
        short = [shorten(name) for name in held_names(split, names)]
        where: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.1, 1), "borderaxespad": 0}
        columns = max(1, min(10, 70 // (6 + max(map(len, short)))))
        look: dict[str, Any] = {"handlelength": 0.8, "columnspacing": 0.8, "handletextpad": 0.3}
        axes.legend(_keys(short), short, ncols=columns, **where, **look)
    axes.set(xlabel="client", ylabel="examples", xlim=(-0.6, len(counts) - 0.4))
    axes.grid(visible=False, axis="x")
    name_ticks(axes, "x", [share.label for share in split.shares], most=20)


def _keys(names: Sequence[str]) -> list[Patch]:
    """Return the keys of a legend of the classes."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    colours = colormaps["tab10" if len(names) <= 10 else "tab20"]
    return [Patch(color=colours(label)) for label in range(len(names))]


def held_names(split: Description, names: Sequence[str]) -> list[str]:
    """Return the `names` of the classes by which a split counts images: of masks the first is that alone."""
    if split.target != "mask" or not names:
        return list(names)
    return ["no foreground" if is_background(names[0]) else f"only {names[0]}", *names[1:]]


COUNTED = {
    "mask": "an image counts as the class with most pixels other than {0}",
    "multilabel": "an image counts as its first label, and as {0} where it has none",
    "boxes": "an image counts as the class of its largest box, and as {0} where it has none",
}
"""As which class an image counts, by what the data give for it; {0} is the first class."""


def caption(split: Description, names: Sequence[str]) -> str:
    """Return what a split is, in one line; `names` are those of the classes."""
    shown = (
        "" if len(split.shares) == split.clients else f"; shown: the first and last {len(split.shares) // 2}"
    )
    empty = f"; {split.empty:,} clients have none" if split.empty else ""
    counted = f"; {COUNTED[split.target].format(*names[:1])}" if split.target in COUNTED else ""
    return (
        f"{split.clients:,} clients hold {split.examples:,} examples: {split.smallest:,} to "
        f"{split.largest:,} each (median {split.median:,.0f}) of {split.classes_per_client:.1f} classes"
        f"{empty}{counted}{shown}"
    )


def save_split(split: Description, names: Sequence[str], path: Path) -> None:
    """Write the figures of a split to a .pdf, .png or .svg file, as wide as two columns of a paper.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    height = min(max(2.6, 0.14 * len(split.shares) + 1.2), 7.5)
    with rc_context(style(8)):
        figure = Figure(figsize=(PAGE_WIDTH, height), layout="constrained")
        left, right = figure.subplots(1, 2)
        holdings(left, split, names)
        sizes(right, split, names, legend=False)
        if len(names) <= STACKED:
            where: dict[str, Any] = {"loc": "outside right center", "title": "class"}
            figure.legend(_keys(names), held_names(split, names), **where)
        figure.suptitle(caption(split, names).replace("; an image", "\nan image"), fontsize=8)
        save(figure, path)
