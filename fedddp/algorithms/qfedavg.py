"""Fair averaging."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedddp.algorithms.algorithm import (
    AggregatedUpdate,
    ClientContext,
    ClientUpdate,
    ServerState,
    SynchronousAlgorithm,
)
from fedddp.algorithms.local import LocalConfig
from fedddp.models.flat import norm
from fedddp.section import NonNegativeFloat

SMALLEST_LOSS = 1e-10
"""Losses below count as this where they divide."""


@dataclass(frozen=True, kw_only=True)
class QFedAvg(SynchronousAlgorithm):
    """Weighs clients by their loss, so that none does much worse (Li et al., 2020, arXiv:1905.10497).

    With L = 1/η: D_k = F_k^q L(x − y_k);  h_k = q F_k^(q−1) ‖L(x − y_k)‖² + L F_k^q;
    x ← x − Σ_S D_k / Σ_S h_k. F_k is the client's mean loss at x before it trains. Both sums are divided
    by L max_S F_k^q here, so that the largest weight is 1 however far the losses lie apart.
    """

    q: NonNegativeFloat = 0.1
    """Fairness q, >= 0; 0 is the uniform average, larger is more even; the paper's are 0.1 to 5."""

    uniform = True
    mean_only = True
    needs_initial_loss = True
    reads_grad = False
    not_private = "scales every client's update by the largest loss of the cohort, which is of another client"
    because = "takes L = 1/η, the step of sgd, for the curvature of the losses"

    def requires(self, local: LocalConfig) -> dict[str, object]:
        """Require steps whose length is η: Adam's do not depend on the curvature."""
        return {"optimizer": "sgd"}

    def lengths(self, size: int) -> dict[str, int]:
        """Return the lengths of the scaled update and of the scaled h_k."""
        return {"update": size, "h": 1}

    def finish(self, context: ClientContext) -> ClientUpdate:
        """Send (F_k/F_max)^q Δ_k and (F_k/F_max)^q (1 + q‖Δ_k‖²/(η F_k))."""
        loss = max(context.initial_loss, SMALLEST_LOSS)
        weight = (
            0.0
            if self.q and not context.examples
            else (loss / max(context.largest_initial_loss, SMALLEST_LOSS)) ** self.q
        )
        update = context.update
        h = weight * (1 + self.q * float(norm(update)) ** 2 / (context.lr * loss))
        vectors = {"update": weight * update, "h": torch.full_like(context.params[:1], h)}
        return ClientUpdate(vectors, self.weight(context))

    def step(self, server: ServerState, aggregated: AggregatedUpdate) -> None:
        """x ← x − ΣD_k / Σh_k."""
        server.params.add_(aggregated["update"] / aggregated["h"].clamp_min(SMALLEST_LOSS))
