"""Randomness as an argument: every draw comes from a stream that is named by its purpose.

A stream depends on its name only, e.g. ``("batches", seed, round, client, epoch)``; never on the rank, the
number of ranks or the order of other draws. That is what makes results equal for any world.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

# The purpose is part of the hash: another word would draw other numbers, so these two keep their old ones.
DROPOUT = "visit"
FEATURE_SHIFT = "look"


def stream_seed(*name: int | str) -> int:
    """Return the 63-bit seed of the stream `name`; equal names give equal seeds on every machine."""
    digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextlib.contextmanager
def drawing_from(*name: int | str) -> Iterator[None]:
    """Seed the global generators by a stream, for the block."""
    with generators_kept():
        seed_global(stream_seed(*name))
        yield


def seed_global(seed: int) -> None:
    """Seed the global generators: Python's, NumPy's, and torch's, of a GPU too where one is in use."""
    import torch  # here: what splits data needs NumPy only

    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not `torch.manual_seed`, which without a GPU keeps a stack trace of every call for good.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Put the global generators, all that `seed_global` seeds, back after the block."""
    import torch

    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)


def stream(*name: int | str) -> np.random.Generator:
    """Return a fresh NumPy generator (PCG64) for the stream `name`."""
    return np.random.Generator(np.random.PCG64(stream_seed(*name)))


def global_states() -> tuple[object, ...]:
    """Return the states of the global generators: they differ once something is drawn."""
    import torch

    state: Any = np.random.get_state()
    _, words, *position = state
    on_gpu = torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_initialized() else b""  # type: ignore[no-untyped-call]
    return torch.get_rng_state().numpy().tobytes(), on_gpu, random.getstate(), words.tobytes(), position
