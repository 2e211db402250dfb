"""What the clients of a split hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedddp.data.partition import Split
from fedddp.data.targets import Target


@dataclass(frozen=True)
class Share:
    """What one client holds."""

    client: int
    size: int
    """Number of examples."""
    histogram: tuple[int, ...]
    """Examples of every class, (classes,)."""
    name: str | None = None
    """Of the natural owner that the client is; None where it has no name."""

    @property
    def label(self) -> str:
        """The client's name, or its number."""
        return f"{self.client:,}" if self.name is None else self.name


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
    target: Target = "class"
    """What the data give for each image; other than a class, an image counts as one of its classes."""


def describe(
    split: Split,
    labels: NDArray[np.int64],
    classes: int,
    limit: int = 20,
    *,
    names: Sequence[str] = (),
    target: Target = "class",
) -> Description:
    """Return what the clients hold; if they are more than `limit`, shares of the first and last.

    Args:
        split: the split of the examples.
        labels: class of every example, (examples,), in range(classes).
        classes: number of classes.
        limit: most shares, >= 1.
        names: of all clients; empty where they have none.
        target: what the data give for each image.
    """
    clients, sizes = len(split), split.sizes
    last = min(clients, limit) // 2
    shown = [*range(min(clients, limit) - last), *range(clients - last, clients)]
    held = [labels[split.indices(client)] for client in shown]
    owners = np.repeat(np.arange(clients), sizes)
    pairs = np.sort(owners * classes + labels[split.permutation])
    return Description(
        shares=[
            Share(
                client,
                len(own),
                tuple(np.bincount(own, minlength=classes).tolist()),
                names[client] if names else None,
            )
            for client, own in zip(shown, held, strict=True)
        ],
        clients=clients,
        examples=len(labels),
        smallest=int(sizes.min()),
        median=float(np.median(sizes)),
        largest=int(sizes.max()),
        empty=int((sizes == 0).sum()),
        classes_per_client=(1 + np.count_nonzero(np.diff(pairs))) / clients,
        target=target,
    )
