"""Models and images of the benchmarks.

It needs torch alone, so that the hand-written loop and the peers train exactly what fedddp trains. fedddp
gets models and images by their dotted paths, such as `inputs.mlp`, since every program here runs from this
folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from workloads import SIDE, WORKLOADS, hidden_width

TRAIN, TEST = 60_000, 10_000
"""Images of MNIST; as many are made where it is missing."""

# ---- models ----


def mlp(num_classes: int = 10) -> nn.Module:
    """Make the perceptron 784-200-10: 159,010 parameters for 10 classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, num_classes))


def lenet(num_classes: int = 10) -> nn.Module:
    """Make the layers of fedddp's `lenet` for 28 x 28 grey images: 431,080 parameters for 10 classes."""
    features = [nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU()]
    head = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, num_classes)]
    return nn.Sequential(*features, *head)


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": lenet, "tiny": mlp, "ddp": lenet, "trial": mlp}
"""The model of each workload, for the programs that do without fedddp."""


def sized(parameters: int, num_classes: int = 10) -> nn.Module:
    """Make a perceptron with two hidden layers and about `parameters` parameters, for 8 x 8 grey images."""
    width = hidden_width(parameters)
    hidden = [nn.Linear(SIDE**2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))


# ---- images ----


def images(root: str, train: bool) -> TensorDataset:
    """Return MNIST from torchvision's files in `root`, else as many made images of the same shape."""
    if not (Path(root) / "MNIST").is_dir():
        return made(TRAIN if train else TEST, 28)
    from torchvision.datasets import MNIST

    dataset = MNIST(root, train=train)
    return TensorDataset(dataset.data.unsqueeze(1), dataset.targets)


def made(count: int, side: int, train: bool = True, root: str = "") -> TensorDataset:
    """Return `count` uint8 images of 10 noisy patterns, always the same; a tenth of them to test on."""
    count = count if train else max(10, count // 10)
    rng = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 10
    patterns = torch.randint(128, (10, 1, side, side), generator=rng, dtype=torch.uint8)
    pixels = torch.randint(128, (count, 1, side, side), generator=rng, dtype=torch.uint8)
    return TensorDataset(pixels.add_(patterns[labels]), labels)


def clients(name: str, root: str) -> tuple[Tensor, Tensor]:
    """Return normalised images, (clients, examples, 1, 28, 28), and labels, (clients, examples)."""
    w = WORKLOADS[name]
    pixels, labels = images(root, train=True).tensors
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    chosen = chosen[: w.clients * w.examples]
    x = pixels.float().div_(255)
    x.sub_(x.mean()).div_(x.std())
    return x[chosen].view(w.clients, w.examples, *x.shape[1:]), labels[chosen].view(w.clients, w.examples)


def __getattr__(name: str) -> Any:
    """Return the model `p1000` with about 1,000 parameters, or the dataset `n1000` with 1,000 images.

    A dotted path has no arguments, so the size is part of the name.
    """
    found = re.fullmatch(r"([pn])(\d+)", name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    size = int(found[2])
    return partial(sized, size) if found[1] == "p" else partial(made, size, SIDE)
