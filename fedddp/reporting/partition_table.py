"""A split as rows and as a table, for 10 clients and for a million."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedddp.data.description import Description
from fedddp.reporting.split_figures import caption, held_names

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 80
"""Columns of the terminal that names of classes have to fit."""

MOST = "class:examples"
"""The only column of a split over many classes, or of too large numbers: the most frequent classes."""


def table(description: Description, names: Sequence[str] = ()) -> Table:
    """Return `description` as a printable table: a row per client, the summary below.

    Args:
        description: what is shown.
        names: the name of every class; where they are too long, the caption has them.
    """
    from rich.console import Console

    numbers = list(map(str, range(len(description.shares[0].histogram))))
    known = list(names) if len(names) == len(numbers) else numbers
    about, names = caption(description, known), held_names(description, known)
    if len(numbers) > 10:
        return _table(description, [MOST], about)
    legend = ""
    choices = [(numbers, 2), (numbers, 1)]
    if known != numbers:
        choices = [(names, 2), (names, 1), *choices]
        legend = "\nclasses: " + ", ".join(f"{n} {name}" for n, name in zip(numbers, names, strict=True))
    for columns, gap in choices:
        result = _table(description, columns, about + (legend if columns == numbers else ""), gap)
        if Console(width=1000).measure(result).maximum <= WIDTH:
            return result
    return _table(description, [MOST], about + legend)


def _table(description: Description, columns: Sequence[str], about: str, gap: int = 2) -> Table:
    from rich.table import Table
    from rich.text import Text

    d = description
    many = len(columns) < len(d.shares[0].histogram)
    result = Table(
        box=None,
        header_style="bold",
        padding=(0, gap, 0, 0),
        caption=Text(about, "table.caption"),
        caption_justify="left",
    )
    named = any(share.name is not None for share in d.shares)
    result.add_column("client", justify="left" if named else "right", overflow="fold")
    result.add_column("examples", justify="right")
    for name in columns:
        result.add_column(Text(name), justify="left" if many else "right")
    expected = 0
    for share in d.shares:
        if share.client != expected:
            result.add_row(*["…"] * (2 + len(columns)))
        expected = share.client + 1
        counts = [str(count) if count else "" for count in share.histogram]
        cells = [_most_frequent(share.histogram)] if many else counts
        result.add_row(Text(share.label), f"{share.size:,}", *cells)
    return result


def _most_frequent(histogram: tuple[int, ...], shown: int = 6) -> str:
    """Return the classes with most examples, and how many others there are."""
    held = sorted((-count, label) for label, count in enumerate(histogram) if count)
    rest = f" and {len(held) - shown} more" if len(held) > shown else ""
    return " ".join(f"{label}:{-count}" for count, label in held[:shown]) + rest
