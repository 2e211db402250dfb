"""Fair averaging."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedddp.algorithms.algorithm import Contribution, Method, Server, Total, Visit
from fedddp.algorithms.local import Local
from fedddp.models.flat import norm

TINY = 1e-10
"""Losses below count as so much where one is divided by them."""


@dataclass(frozen=True, kw_only=True)
class QFedAvg(Method):
    """Weighs clients by their loss, so that none does much worse (Li et al., 2020, arXiv:1905.10497).

    With L = 1/η: D_k = F_k^q L(x − y_k);  h_k = q F_k^(q−1) ‖L(x − y_k)‖² + L F_k^q;
    x ← x − Σ_S D_k / Σ_S h_k. F_k is the client's mean loss at x before it trains. Both sums are divided
    by L F̄^q here, F̄ the mean F_k of the round before, which keeps them near Σ_S Δ_k and m.
    """

    q: float = 0.1
    """Fairness q, >= 0; 0 is the uniform average, larger is more even; the paper's are 0.1 to 5."""

    sends = ("loss",)
    uniform = True
    mean_only = True
    because = "takes L = 1/η, the step of sgd, for the curvature of the losses"

    def needs(self, local: Local) -> dict[str, object]:
        """Steps whose length η tells: Adam's do not depend on the curvature."""
        return {"optimizer": "sgd"}

    def __post_init__(self) -> None:
        if not self.q >= 0:
            raise ValueError(f"q must be >= 0, got {self.q}; 0 is the uniform average")

    def lengths(self, size: int) -> dict[str, int]:
        """Scaled update, scaled h_k, and F_k."""
        return {"update": size, "h": 1, "loss": 1}

    def start(self, server: Server) -> None:
        """F̄ = 1."""
        server.vectors["loss"] = torch.ones_like(server.params[:1])

    def begin(self, visit: Visit) -> None:
        """F_k at x."""
        visit.scratch["loss"] = torch.full_like(visit.params[:1], visit.mean_loss())

    def finish(self, visit: Visit) -> Contribution:
        """Send (F_k/F̄)^q Δ_k, (F_k/F̄)^q (1 + q‖Δ_k‖²/(η F_k)), and F_k."""
        loss, square = visit.scratch["loss"], norm(visit.update).square()
        weight = (loss / visit.sent["loss"].clamp_min(TINY)) ** self.q
        h = weight * (1 + self.q * square / (visit.lr * loss.clamp_min(TINY)))
        return Contribution({"update": weight * visit.update, "h": h, "loss": loss}, self.weight(visit))

    def step(self, server: Server, total: Total) -> None:
        """X ← x − ΣD_k / Σh_k."""
        server.params.add_(total["update"] / total["h"].clamp_min(TINY))
        server.vectors["loss"].copy_(total["loss"])
