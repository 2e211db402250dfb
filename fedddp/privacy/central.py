"""Central differential privacy: clipped updates are summed exactly, and noise is added once, to the sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedddp.aggregation import Accumulator, Aggregation, Mean
from fedddp.aggregation.mean import FRACTION_BITS, Sums
from fedddp.algorithms import AggregatedUpdate, ClientUpdate, ServerState
from fedddp.privacy.accountant import Account
from fedddp.privacy.clipping import adapted, factor_of, joint_norm, sensitivity
from fedddp.privacy.config import CentralDP
from fedddp.privacy.noise import LARGEST_SIGMA, UNIT, check_sigma, grid_noise
from fedddp.privacy.protection import ActiveProtection, Terms

CLIP = "privacy.clip"
"""Name of C among the server's vectors, where it adapts; (1,) float64."""


def largest_clip(population: int) -> float:
    """Return the largest C with which the updates of all `population` clients fit into exact sums."""
    return 2.0 ** (60 - FRACTION_BITS) / population


class CentralProtection(ActiveProtection):
    """Clips what every client sends, and adds noise to the sum of the cohort."""

    def __init__(
        self,
        privacy: CentralDP,
        account: Account,
        terms: Terms,
        server: ServerState,
        *,
        seed: int,
    ) -> None:
        """Start with the first C.

        Raises:
            ValueError: the noise on the count, or C, does not fit the run.
        """
        super().__init__(terms, noise=privacy.noise, strict=privacy.strict)
        self.privacy, self.account, self.seed = privacy, account, seed
        self.update_noise = privacy.noise_of_update(terms.noise_multiplier, account.cohort)
        """z_Δ, the noise on the sum of updates in C."""
        check_sigma(self.update_noise * privacy.first_clip)
        # C adapts up to what noise can be added for; a little is left for the sensitivity of rounding.
        noise_bound = 0.999 * LARGEST_SIGMA / self.update_noise
        self.largest_clip = min(largest_clip(account.population), noise_bound)
        if privacy.first_clip > self.largest_clip:
            raise ValueError(
                f"privacy.clip={privacy.first_clip:g} is more than the {self.largest_clip:.4g} with which "
                f"exact sums hold {account.population:,} updates and their noise; lower it"
            )
        if privacy.adaptive:
            server.vectors[CLIP] = server.params.new_full((1,), privacy.first_clip, dtype=torch.float64)
        self.used_clip = privacy.first_clip
        """C of the last round that was released; on the coordinator."""

    def clip(self, server: ServerState) -> float:
        """Return C."""
        return float(server.vectors[CLIP]) if self.privacy.adaptive else self.privacy.first_clip

    def weights(self, weight: float, clients: int) -> tuple[float, float]:
        """Return 1/(qN) for both, of any cohort: weights by examples would be data too."""
        return 1 / self.account.cohort, 1 / self.account.cohort

    def accumulator(
        self, rule: Aggregation, lengths: Mapping[str, int], clients: int, server: ServerState
    ) -> Accumulator:
        """Return empty sums that clip what they add."""
        assert isinstance(rule, Mean)
        return PrivateSums(rule, lengths, clients, server, self)

    def vectors(self, server: ServerState) -> list[Tensor]:
        """Return C, where it adapts."""
        return [server.vectors[CLIP]] if self.privacy.adaptive else []

    def epsilon(self, rounds: int) -> float:
        """Return ε after `rounds` rounds, those that were charged again included."""
        return self.account.epsilon(self.terms.noise_multiplier, rounds + self.terms.repeated)

    def metrics(self, rounds: int) -> dict[str, Any]:
        """Return ε so far, and C where it adapts."""
        clip = {"privacy/clip": self.used_clip} if self.privacy.adaptive else {}
        return super().metrics(rounds) | clip

    # ---- the release of a round ----

    def noise_for(self, name: str, length: int, elements: int, server: ServerState) -> Tensor:
        """Return the noise on the sum of the vectors `name`, in units of the grid; (length,) int64.

        `elements` is d, the length of all vectors of an update together.
        """
        sigma = self.update_noise * sensitivity(self.clip(server), elements)
        return grid_noise(
            length, sigma, self.privacy.noise, ("privacy noise", self.seed, server.version, name)
        )

    def adapt(self, server: ServerState, clients: int, clipped: int) -> None:
        """Adapt C to the noisy share of `clients` updates of which `clipped` were longer than C."""
        self.used_clip = self.clip(server)
        if not self.privacy.adaptive:
            return
        cohort, privacy = self.account.cohort, self.privacy
        name = ("privacy count", self.seed, server.version)
        noise = grid_noise(1, privacy.noise_of_count(cohort), privacy.noise, name)
        # The sum of b_k − ½, b_k = 1 for a client that was not clipped: one client changes it by ½.
        share = 0.5 + (clients / 2 - clipped + int(noise) * UNIT) / cohort
        clip = adapted(
            self.used_clip, share, quantile=privacy.quantile, lr=privacy.clip_lr, largest=self.largest_clip
        )
        server.vectors[CLIP].fill_(clip)


class PrivateSums(Sums):
    """Exact sums of clipped updates, every client weighing 1; their means are noisy and over qN clients."""

    def __init__(
        self,
        rule: Mean,
        lengths: Mapping[str, int],
        clients: int,
        server: ServerState,
        protection: CentralProtection,
    ) -> None:
        """Start at zero; arguments as for `Protection.accumulator`."""
        super().__init__(rule, lengths, clients, server.params, server.integer_buffers)
        self.server, self.protection = server, protection
        self.lengths = {name: length for name, length in lengths.items() if name != "buffers"}

    def min_clients(self) -> int:
        """Return 0: an empty cohort is released with noise too, or its absence would be data."""
        return 0

    def add(
        self,
        client: int,
        update: ClientUpdate,
        buffers: Tensor,
        example_weight: float,
        integer_buffers: Tensor,
        loss: float = 0.0,
        trained: tuple[float, int] = (0.0, 0),
        *,
        clipped: bool = False,
    ) -> bool:
        """Clip and add one client's update; its weights and its buffers are left out.

        The norm is over all vectors of the update. They are multiplied by min(1, C/norm) in float64, as they
        enter the sums. See `Accumulator.add`.
        """
        length, clip = joint_norm(update.vectors), self.protection.clip(self.server)
        factor = 1.0 if math.isnan(length) else factor_of(length, clip)  # NaN is not admitted
        weighted, still = ClientUpdate(update.vectors, factor), torch.zeros_like(buffers)
        return super().add(
            client, weighted, still, 0.0, integer_buffers, loss, trained, clipped=length > clip
        )

    def result(self) -> AggregatedUpdate:
        """Return the noisy means over qN clients, and adapt C; to be called once per round."""
        self._remove_shifts()
        elements, cohort = sum(self.lengths.values()), self.protection.account.cohort
        means = {}
        for name, length in self.lengths.items():
            summed = self.sums[name]
            noisy = self.protection.noise_for(name, length, elements, self.server).to(summed.device)
            noisy += summed
            means[name] = (noisy.double() / (cohort / UNIT)).to(self.like.dtype)
        self.protection.adapt(self.server, int(self.counts[0]), int(self.counts[2]))
        self.integer_buffers.copy_(self.server.integer_buffers)
        return AggregatedUpdate(means, cohort)
