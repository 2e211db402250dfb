"""The test set of a dataset that comes without one: a fraction of every group of its examples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedddp.rng import stream

Indices = NDArray[np.int64]


def held_out(groups: Indices, fraction: float, owners: Indices | None = None) -> tuple[Indices, Indices]:
    """Return the examples to train on and those to test on, always the same.

    Args:
        groups: (examples,) the group of each, such as its class: each gives its fraction, up to one example.
        fraction: share that is tested, in [0, 1).
        owners: (examples,) the natural owner of each; each keeps at least one to train on. None: none have.

    Returns:
        Two rising lists of indices; together all examples.
    """
    shuffled = stream("test set").permutation(len(groups))
    by_group = shuffled[np.argsort(groups[shuffled], kind="stable")]
    position = np.arange(len(groups))
    tested = np.floor(position * fraction) > np.floor((position - 1) * fraction)
    if owners is not None and tested.any():
        of = owners[by_group]
        for owner in np.setdiff1d(of, of[~tested]):
            tested[np.argmax(of == owner)] = False
    return np.sort(by_group[~tested]), np.sort(by_group[tested])
