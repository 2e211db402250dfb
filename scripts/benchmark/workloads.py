"""What the benchmarks train, in numbers; `inputs.py` has the models and images."""

from __future__ import annotations

import math
from typing import NamedTuple

LR = 0.05
"""Learning rate of SGD in all workloads."""

WARM_UP = 2
"""Rounds that are not counted."""

SIDE, CLASSES = 8, 10
"""Height and width in pixels, and classes, of the images that models of any size are trained on."""


class Workload(NamedTuple):
    """A federation: IID clients of equal size, one local epoch of SGD, FedAvg."""

    model: str
    """The model's name or dotted path for fedddp."""
    title: str
    clients: int
    cohort: int
    examples: int
    """Training images per client."""
    batch: int
    rounds: int
    """By default; the first two and the last are not counted."""
    ddp: bool = False
    """Whether the processes share every batch of a client, by DDP, and not the clients."""


WORKLOADS = {
    "cnn": Workload("lenet", "lenet, 431,080 parameters", 100, 10, 600, 32, 20),
    "tiny": Workload("inputs.mlp", "784-200-10 perceptron, 159,010 parameters", 1000, 100, 60, 20, 10),
    "ddp": Workload("lenet", "lenet, 431,080 parameters", 1, 1, 2000, 128, 20, ddp=True),
    "trial": Workload("inputs.mlp", "784-200-10 perceptron, 159,010 parameters", 20, 10, 20, 20, 4),
}

MEASURED = ("cnn", "tiny")
"""The workloads of the tables; `trial` tries the scripts."""


def describe(name: str) -> str:
    """Return a workload in one line."""
    w = WORKLOADS[name]
    return (
        f"{name}: {w.title}; {w.cohort} of {w.clients:,} clients per round, {w.examples} images each, "
        f"batches of {w.batch}"
    )


def hidden_width(parameters: int) -> int:
    """Return the width of two hidden layers with which a perceptron has about so many parameters."""
    linear, constant = SIDE**2 + 2 + CLASSES, CLASSES - parameters
    return max(1, round((math.sqrt(linear**2 - 4 * constant) - linear) / 2))


def exact_size(parameters: int) -> int:
    """Return the parameters of the perceptron that is to have about so many."""
    width = hidden_width(parameters)
    return width**2 + (SIDE**2 + 2 + CLASSES) * width + CLASSES
