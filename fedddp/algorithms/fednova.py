"""Normalised averaging."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedddp.algorithms.algorithm import AggregatedUpdate, ClientContext, ClientUpdate, ServerState
from fedddp.algorithms.local import LocalConfig
from fedddp.algorithms.proximal import FedProx
from fedddp.section import NonNegativeFloat


@dataclass(frozen=True, kw_only=True)
class FedNova(FedProx):
    """x ← x + η_g τ_eff Σ_S p_k Δ_k/a_k with τ_eff = Σ_S p_k a_k (Wang et al., 2020, arXiv:2007.07481).

    a_k = ‖coefficients of the client's gradients in −Δ_k/η‖₁: K_k for SGD, less K_k for momentum and
    the pull μ. Weight decay counts as part of the loss and its gradient.
    """

    mu: NonNegativeFloat = 0.0
    """Strength μ of FedProx's pull to the dispatched model, >= 0; 0 is none."""

    mean_only = True
    because = "must know the coefficients of the gradients of one local training"

    def requires(self, local: LocalConfig) -> dict[str, object]:
        """Require fixed coefficients: no momentum from earlier rounds, no clipping of g + μ(w − x)."""
        own = {"optimizer_state": "reset"} if local.momentum else {}
        return {"optimizer": "sgd", **own, **({"clip_norm": None} if self.mu else {})}

    def coefficients(self, context: ClientContext) -> float:
        """Return a_k, the sum of the coefficients' absolute values: momentum and μ make some negative.

        The coefficient of a gradient is by how much it has moved −w/η at the end: the response of the local
        optimizer to a gradient of 1, after as many steps as follow it.
        """
        a = moved = 0.0
        v = 1.0
        for _ in range(context.steps):
            moved += v
            a += abs(moved)
            v = context.local.momentum * v - context.lr * self.mu * moved
        return a

    def lengths(self, size: int) -> dict[str, int]:
        """Return the lengths of the normalised update and of a_k."""
        return {"update": size, "a": 1}

    def finish(self, context: ClientContext) -> ClientUpdate:
        """Send Δ_k/a_k and a_k; a client that took no step sends zeros."""
        a = self.coefficients(context)
        vectors = {"update": context.update / (a or 1.0), "a": torch.full_like(context.params[:1], a)}
        return ClientUpdate(vectors, self.weight(context))

    def step(self, server: ServerState, aggregated: AggregatedUpdate) -> None:
        """x ← x + η_g τ_eff Σ p_k Δ_k/a_k, through the server's momentum if any."""
        update = aggregated["a"] * aggregated["update"]
        super().step(server, AggregatedUpdate({"update": update}, aggregated.clients))
