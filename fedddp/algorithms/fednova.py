"""Normalised averaging."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedddp.algorithms.algorithm import Contribution, Server, Total, Visit
from fedddp.algorithms.local import Local
from fedddp.algorithms.proximal import FedProx


@dataclass(frozen=True, kw_only=True)
class FedNova(FedProx):
    """x ← x + η_g τ_eff Σ_S p_k Δ_k/a_k with τ_eff = Σ_S p_k a_k (Wang et al., 2020, arXiv:2007.07481).

    a_k = ‖coefficients of the client's gradients in −Δ_k/η‖₁: K_k for SGD, less K_k for momentum and
    the pull μ. Weight decay counts as part of the loss and its gradient.
    """

    mu: float = 0.0
    """Strength μ of FedProx's pull to the dispatched model, >= 0; 0 is none."""

    mean_only = True
    because = "must know the coefficients of a visit's own gradients"

    def needs(self, local: Local) -> dict[str, object]:
        """Fixed coefficients, of a visit's own gradients: no kept momentum, no clipping of g + μ(w − x)."""
        own = {"optimizer_state": "reset"} if local.momentum else {}
        return {"optimizer": "sgd", **own, **({"clip_norm": None} if self.mu else {})}

    def coefficients(self, visit: Visit) -> float:
        """Return a_k: run the local optimizer with gradients 1, and −(w − x)/η is their coefficients' sum."""
        a = v = 0.0
        for _ in range(visit.steps):
            v = visit.local.momentum * v + 1 - visit.lr * self.mu * a
            a += v
        return a

    def lengths(self, size: int) -> dict[str, int]:
        """Normalised update, and a_k."""
        return {"update": size, "a": 1}

    def finish(self, visit: Visit) -> Contribution:
        """Send Δ_k/a_k and a_k; a client that took no step sends zeros."""
        a = self.coefficients(visit)
        vectors = {"update": visit.update / (a or 1.0), "a": torch.full_like(visit.params[:1], a)}
        return Contribution(vectors, self.weight(visit))

    def step(self, server: Server, total: Total) -> None:
        """X ← x + η_g τ_eff Σ p_k Δ_k/a_k, through the server's momentum if any."""
        super().step(server, Total({"update": total["a"] * total["update"]}, total.clients))
