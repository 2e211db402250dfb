"""Federated averaging, with and without server momentum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedddp.algorithms.algorithm import Method, Server, Total


@dataclass(frozen=True, kw_only=True)
class FedAvg(Method):
    """x ← x + η_g Σ_S p_k Δ_k, example-weighted over the cohort (McMahan et al., 2017, arXiv:1602.05629)."""

    lr: float = 1.0
    """Server learning rate η_g, > 0; 1 is the paper's plain average."""

    momentum: float = 0.0
    """Server momentum β, in [0, 1): v ← βv − Σp_kΔ_k, x ← x − η_g v; 0 is the paper's FedAvg."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}; 1 is the plain average")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")

    def start(self, server: Server) -> None:
        """V = 0."""
        if self.momentum:
            server.vectors["v"] = torch.zeros_like(server.params)

    def step(self, server: Server, total: Total) -> None:
        """Step along the mean update, through the momentum buffer when there is one."""
        direction = -total["update"]
        if self.momentum:
            direction = server.vectors["v"].mul_(self.momentum).add_(direction)
        server.params.sub_(direction, alpha=self.lr)


@dataclass(frozen=True, kw_only=True)
class FedAvgM(FedAvg):
    """FedAvg with server momentum: v ← βv − Σp_kΔ_k; x ← x − η_g v (Hsu et al., 2019, arXiv:1909.06335).

    The default β is the paper's. Buffers such as running statistics take no part in the momentum.
    """

    momentum: float = 0.9
    """Server momentum β, in [0, 1); 0 is FedAvg."""
