"""A split as rows and as a table, for 10 clients and for a million."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedddp.data.description import Description
from fedddp.reporting.split_figures import caption

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
    if len(numbers) > 10:
        return _table(description, [MOST])
    legend = ""
    choices = [(numbers, 2), (numbers, 1)]
    if len(names) == len(numbers) and list(names) != numbers:
        choices = [(list(names), 2), (list(names), 1), *choices]
        legend = "\nclasses: " + ", ".join(f"{n} {name}" for n, name in zip(numbers, names, strict=True))
    for columns, gap in choices:
        result = _table(description, columns, legend if columns == numbers else "", gap)
        if Console(width=1000).measure(result).maximum <= WIDTH:
            return result
    return _table(description, [MOST], legend)


def _table(description: Description, columns: Sequence[str], legend: str = "", gap: int = 2) -> Table:
    from rich.table import Table
    from rich.text import Text

    d = description
    many = len(columns) < len(d.shares[0].histogram)
    result = Table(
        box=None,
        header_style="bold",
        padding=(0, gap, 0, 0),
        caption=Text(f"{caption(d)}{legend}", "table.caption"),
        caption_justify="left",
    )
    result.add_column("client", justify="right")
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
        result.add_row(f"{share.client:,}", f"{share.size:,}", *cells)
    return result


def _most_frequent(histogram: tuple[int, ...], shown: int = 6) -> str:
    """Return the classes with most examples, and how many others there are."""
    held = sorted((-count, label) for label, count in enumerate(histogram) if count)
    rest = f" and {len(held) - shown} more" if len(held) > shown else ""
    return " ".join(f"{label}:{-count}" for count, label in held[:shown]) + rest
