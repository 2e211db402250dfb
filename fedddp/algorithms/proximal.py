"""Algorithms that hold clients near the dispatched model."""

from __future__ import annotations

from dataclasses import dataclass

from fedddp.algorithms.algorithm import ClientContext
from fedddp.algorithms.fedavg import FedAvg
from fedddp.section import NonNegativeFloat


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg with a pull to the dispatched model: g ← g + μ(w − x) (Li et al., 2020, arXiv:1812.06127).

    The gradient of (μ/2)‖w − x‖² over trainable parameters. The default μ is among the paper's.
    """

    mu: NonNegativeFloat = 0.01
    """Strength of the pull μ, >= 0; 0 is FedAvg."""

    def correct(self, context: ClientContext) -> None:
        """g ← g + μ(w − x)."""
        context.grad.add_(context.params - context.start, alpha=self.mu)
