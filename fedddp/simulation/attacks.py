"""Opponents: what malicious clients do, so that one can see a rule hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from fedddp.algorithms.algorithm import Contribution
from fedddp.models.flat import norm
from fedddp.rng import stream


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """What a fraction of the population does, the same clients in every round."""

    fraction: float = 0.3
    """Part of the population that attacks, in [0, 1); rounded to whole clients."""

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction must be in [0, 1), got {self.fraction}")

    def malicious(self, population: int, seed: int) -> NDArray[np.int64]:
        """Return the malicious clients, in ascending order; a function of the arguments only."""
        count = round(self.fraction * population)
        return np.sort(stream("malicious", seed).choice(population, count, replace=False)).astype(np.int64)

    def relabel(self, labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
        """Return what a malicious client makes of the `labels` (n_k,) that it trains on."""
        return labels

    @abstractmethod
    def corrupt(self, contribution: Contribution, random: Generator) -> Contribution:
        """Return what a malicious client sends instead of its `contribution`."""


@dataclass(frozen=True, kw_only=True)
class NoAttack(Attack):
    """All clients are honest."""

    fraction: float = 0.0
    """Nobody."""

    def __post_init__(self) -> None:
        if self.fraction:
            raise ValueError(f"fraction={self.fraction} needs an attack; choose attacks.name, e.g. SignFlip")

    def corrupt(self, contribution: Contribution, random: Generator) -> Contribution:
        """Never called."""
        return contribution


@dataclass(frozen=True, kw_only=True)
class LabelFlip(Attack):
    """Trains on the label classes − 1 − y instead of y (Tolpegin et al., 2020, arXiv:2007.08432)."""

    def relabel(self, labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
        """Return classes − 1 − y."""
        return classes - 1 - labels

    def corrupt(self, contribution: Contribution, random: Generator) -> Contribution:
        """Return what was learned."""
        return contribution


@dataclass(frozen=True, kw_only=True)
class SignFlip(Attack):
    """Sends −scale·Δ_k instead of Δ_k (as in Li et al., 2019, arXiv:1811.03761)."""

    scale: float = 4.0
    """How much longer than the honest one the flipped update is, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise ValueError(f"scale must be > 0, got {self.scale}; 1 only flips the sign")

    def corrupt(self, contribution: Contribution, random: Generator) -> Contribution:
        """Return −scale·Δ_k."""
        return _with_update(contribution, contribution.vectors["update"] * -self.scale)


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Attack):
    """Sends Gaussian noise instead of Δ_k (as in Blanchard et al., 2017, arXiv:1703.02757)."""

    scale: float = 10.0
    """Norm of the noise, in norms of the honest update, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise ValueError(f"scale must be > 0, got {self.scale}")

    def corrupt(self, contribution: Contribution, random: Generator) -> Contribution:
        """Return noise of `scale` times the norm of Δ_k."""
        update = contribution.vectors["update"]
        noise = torch.from_numpy(random.standard_normal(len(update), dtype=np.float32)).to(update)
        return _with_update(contribution, noise * (self.scale * norm(update) / norm(noise)))


@dataclass(frozen=True, kw_only=True)
class ModelReplacement(LabelFlip):
    """Trains on flipped labels and scales Δ_k up, so that the mean becomes its model.

    Bagdasaryan et al., 2020 (arXiv:1807.00459).
    """

    scale: float | None = None
    """Factor of Δ_k, > 0; by default one over the client's weight in the mean, which outweighs all others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale must be > 0, got {self.scale}; leave it out to replace the model")

    def corrupt(self, contribution: Contribution, random: Generator) -> Contribution:
        """Return scale·Δ_k."""
        scale = self.scale or 1 / max(contribution.weight, 1e-6)
        return _with_update(contribution, contribution.vectors["update"] * scale)


def _with_update(contribution: Contribution, update: Tensor) -> Contribution:
    return replace(contribution, vectors={**contribution.vectors, "update": update})
