"""Federated averaging, with and without server momentum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedddp.algorithms.algorithm import AggregatedUpdate, ServerState, SynchronousAlgorithm
from fedddp.section import Fraction, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class FedAvg(SynchronousAlgorithm):
    """x ← x + η_g Σ_S p_k Δ_k, example-weighted over the cohort (McMahan et al., 2017, arXiv:1602.05629)."""

    lr: PositiveFloat = 1.0
    """Server learning rate η_g, > 0; 1 is the paper's plain average."""

    momentum: Fraction = 0.0
    """Server momentum β, in [0, 1): v ← βv − Σp_kΔ_k, x ← x − η_g v; 0 is the paper's FedAvg."""

    def start(self, server: ServerState) -> None:
        """v = 0."""
        if self.momentum:
            server.vectors["v"] = torch.zeros_like(server.params)

    def step(self, server: ServerState, aggregated: AggregatedUpdate) -> None:
        """v ← βv − Σp_kΔ_k; x ← x − η_g v; without momentum v = −Σp_kΔ_k."""
        update = aggregated["update"]
        if self.momentum:
            direction = server.vectors["v"].mul_(self.momentum).sub_(update)
            server.params.sub_(direction, alpha=self.lr)
        else:
            server.params.add_(update, alpha=self.lr)


@dataclass(frozen=True, kw_only=True)
class FedAvgM(FedAvg):
    """FedAvg with server momentum: v ← βv − Σp_kΔ_k; x ← x − η_g v (Hsu et al., 2019, arXiv:1909.06335).

    The default β is the paper's. Buffers such as running statistics take no part in the momentum.
    """

    momentum: Fraction = 0.9
    """Server momentum β, in [0, 1); 0 is FedAvg."""
