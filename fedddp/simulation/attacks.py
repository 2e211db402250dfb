"""Attacks: what malicious (Byzantine) clients do, to test robust aggregation against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from fedddp.algorithms.algorithm import ClientUpdate
from fedddp.models.flat import norm
from fedddp.rng import stream
from fedddp.section import Fraction, PositiveFloat, Section

__all__ = ["Attack", "GaussianNoise", "LabelFlip", "ModelReplacement", "NoAttack", "SignFlip"]


@dataclass(frozen=True, kw_only=True)
class Attack(Section, ABC):
    """What a fraction of the population does, the same clients in every round."""

    key: ClassVar[str] = "attacks"
    chosen_by_name: ClassVar[bool] = True

    changes_updates: ClassVar[bool] = True
    """Whether the attack changes the update that is sent, and not only what the client learns."""

    fraction: Fraction = 0.3
    """Share of the population that attacks, in [0, 1); rounded to a number of clients."""

    @property
    def needs_cohort(self) -> bool:
        """Whether the attack depends on the client's weight in the mean of a round."""
        return False

    def malicious(self, population: int, seed: int) -> NDArray[np.int64]:
        """Return the malicious clients, in ascending order; a function of the arguments only."""
        count = round(self.fraction * population)
        return np.sort(stream("malicious", seed).choice(population, count, replace=False)).astype(np.int64)

    def relabel(self, labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
        """Return the labels (n_k,) that a malicious client trains on instead of `labels`."""
        return labels

    @abstractmethod
    def corrupt(self, update: ClientUpdate, rng: Generator) -> ClientUpdate:
        """Return what a malicious client sends instead of its `update`."""


@dataclass(frozen=True, kw_only=True)
class NoAttack(Attack):
    """All clients are honest."""

    changes_updates = False

    fraction: Fraction = 0.0
    """No client attacks; always 0."""

    def __post_init__(self) -> None:
        if self.fraction:
            raise ValueError(f"fraction={self.fraction} needs an attack; choose attacks.name, e.g. SignFlip")

    def corrupt(self, update: ClientUpdate, rng: Generator) -> ClientUpdate:
        """Return the update as it is."""
        return update


@dataclass(frozen=True, kw_only=True)
class LabelFlip(Attack):
    """Trains on the label classes − 1 − y instead of y (Tolpegin et al., 2020, arXiv:2007.08432)."""

    changes_updates = False

    def relabel(self, labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
        """Return classes − 1 − y."""
        return classes - 1 - labels

    def corrupt(self, update: ClientUpdate, rng: Generator) -> ClientUpdate:
        """Return the update as it is."""
        return update


@dataclass(frozen=True, kw_only=True)
class SignFlip(Attack):
    """Sends −scale·Δ_k instead of Δ_k (as in Li et al., 2019, arXiv:1811.03761)."""

    scale: PositiveFloat = 4.0
    """How much longer than the honest one the flipped update is, > 0; 1 only flips the sign."""

    def corrupt(self, update: ClientUpdate, rng: Generator) -> ClientUpdate:
        """Return −scale·Δ_k."""
        return _with_vector(update, update.vectors["update"] * -self.scale)


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Attack):
    """Sends Gaussian noise instead of Δ_k (as in Blanchard et al., 2017, arXiv:1703.02757)."""

    scale: PositiveFloat = 10.0
    """Norm of the noise, in norms of the honest update, > 0."""

    def corrupt(self, update: ClientUpdate, rng: Generator) -> ClientUpdate:
        """Return noise of `scale` times the norm of Δ_k."""
        honest = update.vectors["update"]
        noise = torch.from_numpy(rng.standard_normal(len(honest), dtype=np.float32)).to(honest)
        return _with_vector(update, noise * (self.scale * norm(honest) / norm(noise)))


@dataclass(frozen=True, kw_only=True)
class ModelReplacement(LabelFlip):
    """Trains on flipped labels and scales Δ_k up, so that the mean becomes its model.

    Bagdasaryan et al., 2020 (arXiv:1807.00459).
    """

    changes_updates = True

    scale: PositiveFloat | None = None
    """Factor of Δ_k, > 0; by default one over the client's weight in the mean, which outweighs all others."""

    @property
    def needs_cohort(self) -> bool:
        """Whether `scale` is left to the client's weight."""
        return self.scale is None

    def corrupt(self, update: ClientUpdate, rng: Generator) -> ClientUpdate:
        """Return scale·Δ_k."""
        scale = self.scale or 1 / max(update.weight, 1e-6)
        return _with_vector(update, update.vectors["update"] * scale)


def _with_vector(update: ClientUpdate, vector: Tensor) -> ClientUpdate:
    return replace(update, vectors={**update.vectors, "update": vector})
