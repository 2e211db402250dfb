"""A split as rows and as a table, for 10 clients and for a million."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedddp.data.partition import Split

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


@dataclass(frozen=True)
class Description:
    """What the clients hold."""

    shares: list[Share]
    """All clients, or the first and the last of them, by client."""
    clients: int
    examples: int
    smallest: int
    median: float
    largest: int
    empty: int
    """Clients without examples."""
    classes_per_client: float
    """Mean number of classes of which a client has an example."""


def describe(split: Split, labels: NDArray[np.int64], classes: int, limit: int = 20) -> Description:
    """Return what the clients hold; if they are more than `limit`, shares of the first and last.

    Args:
        split: the split of the examples.
        labels: class of every example, (examples,), in range(classes).
        classes: number of classes.
        limit: most shares, >= 1.
    """
    clients, sizes = len(split), split.sizes
    last = min(clients, limit) // 2
    shown = [*range(min(clients, limit) - last), *range(clients - last, clients)]
    held = [labels[split.indices(client)] for client in shown]
    owners = np.repeat(np.arange(clients), sizes)
    pairs = np.sort(owners * classes + labels[split.permutation])
    return Description(
        shares=[
            Share(client, len(own), tuple(np.bincount(own, minlength=classes).tolist()))
            for client, own in zip(shown, held, strict=True)
        ],
        clients=clients,
        examples=len(labels),
        smallest=int(sizes.min()),
        median=float(np.median(sizes)),
        largest=int(sizes.max()),
        empty=int((sizes == 0).sum()),
        classes_per_client=(1 + np.count_nonzero(np.diff(pairs))) / clients,
    )


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
