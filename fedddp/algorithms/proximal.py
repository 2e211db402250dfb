"""Methods that hold clients near the dispatched model."""

from __future__ import annotations

from dataclasses import dataclass

from fedddp.algorithms.algorithm import Visit
from fedddp.algorithms.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg with a pull to the dispatched model: g ← g + μ(w − x) (Li et al., 2020, arXiv:1812.06127).

    The gradient of (μ/2)‖w − x‖² over trainable parameters. The default μ is among the paper's.
    """

    mu: float = 0.01
    """Strength of the pull μ, >= 0; 0 is FedAvg."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mu >= 0:
            raise ValueError(f"mu must be >= 0, got {self.mu}; 0 is FedAvg")

    def correct(self, visit: Visit) -> None:
        """G ← g + μ(w − x)."""
        visit.grad.add_(visit.params - visit.start, alpha=self.mu)
