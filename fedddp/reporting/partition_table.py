"""A split as rows and as a table, for 10 clients and for a million."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedddp.data.description import Description

if TYPE_CHECKING:
    from rich.table import Table


def table(description: Description) -> Table:
    """Return `description` as a printable table: a row per client, the summary below."""
    from rich.table import Table

    d = description
    classes = len(d.shares[0].histogram)
    columns = [str(label) for label in range(classes)] if classes <= 10 else ["class:examples"]
    result = Table(
        caption=f"{d.clients:,} clients hold {d.examples:,} examples: {d.smallest:,} to "
        f"{d.largest:,} each (median {d.median:,.0f}) of {d.classes_per_client:.1f} classes; "
        f"{d.empty:,} are empty"
    )
    for name in ("client", "examples", *columns):
        result.add_column(name, justify="right" if name != "class:examples" else "left")
    expected = 0
    for share in d.shares:
        if share.client != expected:
            result.add_row(*["…"] * (2 + len(columns)))
        expected = share.client + 1
        counts = [str(count) if count else "" for count in share.histogram]
        cells = counts if classes <= 10 else [_most_frequent(share.histogram)]
        result.add_row(f"{share.client:,}", f"{share.size:,}", *cells)
    return result


def _most_frequent(histogram: tuple[int, ...], shown: int = 6) -> str:
    """Return the classes with most examples, and how many others there are."""
    held = sorted((-count, label) for label, count in enumerate(histogram) if count)
    rest = f" and {len(held) - shown} more" if len(held) > shown else ""
    return " ".join(f"{label}:{-count}" for count, label in held[:shown]) + rest
