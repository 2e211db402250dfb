"""A split as rows and as a table, for 10 clients and for a million."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedddp.data.partition import Indices, Split

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Share:
    """What one client holds."""

    client: int
    size: int
    """Number of examples."""
    histogram: tuple[int, ...]
    """Examples of every class, (classes,)."""


def describe(split: Split, labels: Indices, classes: int, limit: int = 20) -> list[Share]:
    """Return what the clients hold: of at most `limit` of them, the first and the last half.

    Args:
        split: the split of the examples.
        labels: class of every example, (examples,), in range(classes).
        classes: number of classes.
        limit: most rows, >= 2.
    """
    clients = range(len(split))
    if len(split) > limit:
        half = limit // 2
        shown = [*clients[: limit - half], *clients[len(split) - half :]]
    else:
        shown = [*clients]
    held = [labels[split.indices(client)] for client in shown]
    return [
        Share(client, len(own), tuple(np.bincount(own, minlength=classes).tolist()))
        for client, own in zip(shown, held, strict=True)
    ]


def summary(split: Split, labels: Indices, classes: int) -> dict[str, float]:
    """Return numbers on the whole split: sizes of clients, and how many classes they see."""
    sizes = split.sizes
    owners = np.repeat(np.arange(len(split)), sizes)
    seen = len(np.unique(owners * classes + labels[split.order]))
    return {
        "clients": len(split),
        "examples": len(split.order),
        "smallest": int(sizes.min()),
        "median": float(np.median(sizes)),
        "largest": int(sizes.max()),
        "empty": int((sizes == 0).sum()),
        "classes_per_client": seen / len(split),
    }


def table(split: Split, labels: Indices, classes: int, limit: int = 20) -> Table:
    """Return a printable table of `describe` with `summary` below it."""
    from rich.table import Table

    total = summary(split, labels, classes)
    result = Table(
        caption=f"{total['clients']:,} clients, {total['examples']:,} examples; a client has "
        f"{total['smallest']:,} to {total['largest']:,} (median {total['median']:,.0f}) of "
        f"{total['classes_per_client']:.1f} classes; {total['empty']:,} are empty"
    )
    narrow = classes <= 10
    names = [f"class {c}" if c == 0 else str(c) for c in range(classes)] if narrow else ["classes"]
    for name in ("client", "examples", *names):
        result.add_column(name, justify="left" if name == "classes" else "right")
    before = -1
    for share in describe(split, labels, classes, limit):
        if share.client != before + 1:
            result.add_row(*["..."] * len(result.columns))
        before = share.client
        cells = [str(count or "") for count in share.histogram]
        histogram = cells if narrow else [_most_frequent(share.histogram)]
        result.add_row(f"{share.client:,}", f"{share.size:,}", *histogram)
    return result


def _most_frequent(histogram: tuple[int, ...], shown: int = 6) -> str:
    """Return the classes with most examples, as `class:examples`, and how many others there are."""
    held = sorted((-count, label) for label, count in enumerate(histogram) if count)
    rest = f" and {len(held) - shown} more" if len(held) > shown else ""
    return " ".join(f"{label}:{-count}" for count, label in held[:shown]) + rest
