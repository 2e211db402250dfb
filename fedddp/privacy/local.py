"""Local differential privacy: every client clips its update and adds noise before it sends it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from fedddp.algorithms import ClientUpdate
from fedddp.privacy.clipping import factor_of, joint_norm, sensitivity
from fedddp.privacy.config import LocalDP
from fedddp.privacy.gaussian import epsilon_of, mu_of
from fedddp.privacy.noise import UNIT, check_sigma, grid_noise
from fedddp.privacy.protection import ActiveProtection, Terms

Sample = Callable[[int], NDArray[np.int64]]
"""Returns the clients that are sampled in the round with an index, from 0."""


class Participations:
    """How often each client was sampled: a function of the seed, so that a resumed run counts the same."""

    def __init__(self, population: int, sample: Sample) -> None:
        """Start before the first round."""
        self.counts, self.sample, self.rounds = np.zeros(population, dtype=np.int64), sample, 0

    def after(self, rounds: int) -> NDArray[np.int64]:
        """Return the local trainings of every client in the first `rounds` rounds; (population,)."""
        if rounds < self.rounds:
            self.counts, self.rounds = np.zeros_like(self.counts), 0
        while self.rounds < rounds:
            self.counts[self.sample(self.rounds)] += 1
            self.rounds += 1
        return self.counts.copy()

    def most(self, rounds: int) -> int:
        """Return the most local trainings of a client in the first `rounds` rounds."""
        return int(self.after(rounds).max(initial=0))


def composed_epsilon(privacy: LocalDP, trainings: int) -> float:
    """Return ε of a client's `trainings` local trainings together, for the same δ."""
    return epsilon_of(math.sqrt(trainings) * mu_of(privacy.epsilon, privacy.delta), privacy.delta)


def local_terms(privacy: LocalDP, participations: Participations, rounds: int, repeated: int) -> Terms:
    """Return what a run of `rounds` rounds is held to.

    Raises:
        ValueError: the budget does not allow a first round.
    """
    last = rounds
    if privacy.stop_at_epsilon is not None:
        if composed_epsilon(privacy, 1) > privacy.stop_at_epsilon:
            raise ValueError(
                f"privacy.stop_at_epsilon={privacy.stop_at_epsilon:g} is less than privacy.epsilon="
                f"{privacy.epsilon:g} of one local training; raise it"
            )
        last = 0
        while last < rounds:
            trainings = participations.most(last + 1) + repeated
            if composed_epsilon(privacy, trainings) > privacy.stop_at_epsilon:
                break
            last += 1
    return Terms(mu_of(privacy.epsilon, privacy.delta), last, repeated)


class LocalProtection(ActiveProtection):
    """Clips what every client sends and adds noise to it; all clients weigh the same."""

    def __init__(
        self,
        privacy: LocalDP,
        terms: Terms,
        participations: Participations,
        *,
        seed: int,
    ) -> None:
        """Start before the first round.

        Raises:
            ValueError: the noise does not fit the grid.
        """
        check_sigma(2 * privacy.clip / terms.noise_multiplier)
        super().__init__(terms, noise=privacy.noise, strict=privacy.strict)
        self.privacy, self.participations, self.seed = privacy, participations, seed

    def weights(self, weight: float, clients: int) -> tuple[float, float]:
        """Return 1/m for both: weights by examples would be data too."""
        return 1 / clients, 1 / clients

    def sent(self, client: int, round_index: int, update: ClientUpdate) -> ClientUpdate:
        """Return the clipped, noisy update; one with NaN is left as it is, and refused by its admission."""
        length = joint_norm(update.vectors)
        if math.isnan(length):
            return update
        factor = factor_of(length, self.privacy.clip)
        elements = sum(vector.numel() for vector in update.vectors.values())
        sigma = 2 * sensitivity(self.privacy.clip, elements) / self.terms.noise_multiplier
        noisy = {}
        for name, vector in update.vectors.items():
            stream = ("local noise", self.seed, round_index, client, name)
            noise = grid_noise(vector.numel(), sigma, self.privacy.noise, stream).to(vector.device)
            noise += (vector.double() * (factor / UNIT)).round_().to(torch.int64)
            noisy[name] = (noise.double() * UNIT).to(vector.dtype)
        return ClientUpdate(noisy, update.weight)

    def epsilon(self, rounds: int) -> float:
        """Return the largest ε of a client after `rounds` rounds; repeated ones count for every client."""
        return composed_epsilon(self.privacy, self.participations.most(rounds) + self.terms.repeated)
