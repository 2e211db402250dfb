"""Batches by Poisson sampling, which amplifies the privacy of single examples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.random import Generator

from fedddp.data.loader import Batch, ClientLoader, Indices, blank_batch


def poisson_batches(
    loader: ClientLoader,
    indices: Indices,
    rate: float,
    steps: int,
    *,
    client: int,
    rng: Generator,
    shard: tuple[int, int],
) -> Iterator[Batch]:
    """Yield `steps` batches to train on, in each of which an example is with probability `rate`.

    All these draws are independent. An empty batch has a `total` of 0, and a blank example as padding.

    Args:
        loader: of the images.
        indices: the client's examples; (n,).
        rate: q, in (0, 1].
        steps: number of batches.
        client: the client.
        rng: draws the batches, then the augmentation; the same on all ranks of the group.
        shard: (rank, ranks) of the group; rank r takes every ranks-th example of a batch from its r-th on.
    """
    chosen = [indices[rng.random(len(indices)) < rate] for _ in range(steps)]
    sizes = [len(batch) for batch in chosen]
    some = loader.take(np.concatenate(chosen), [n for n in sizes if n], client, rng, shard, train=True)
    blank = blank_batch(loader.images, loader.device)
    for size in sizes:
        yield next(some) if size else Batch(blank.images[:1], blank.targets[:1], 0, 0)
