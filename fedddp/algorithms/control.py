"""Methods that correct each client's drift by what it has seen before."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedddp.algorithms.algorithm import Contribution, Method, Server, Total, Visit
from fedddp.algorithms.local import Local


@dataclass(frozen=True, kw_only=True)
class SCAFFOLD(Method):
    """Steps g + c − c_k with control variates (Karimireddy et al., 2020, arXiv:1910.06378), option II.

    c_k⁺ = c_k − c + (x − y_k)/(K_k η);  Δc_k = c_k⁺ − c_k;  x ← x + η_g mean_S Δ_k;
    c ← c + (m/N) mean_S Δc_k. Means are uniform, as in the paper; c = c_k = 0 at first. K_k η is the sum
    of the learning rates of the steps that were taken. Clients keep c_k (P,), and c travels with x.
    """

    lr: float = 1.0
    """Server learning rate η_g, > 0; 1 is the paper's."""

    sends = ("c",)
    uniform = True
    stateful = True
    mean_only = True
    because = "reads the mean gradient off x − y_k, which only plain sgd leaves there"

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}; the paper's is 1")

    def needs(self, local: Local) -> dict[str, object]:
        """Plain steps: else (x − y_k)/(K_k η) is not the mean of the corrected gradients."""
        return {"optimizer": "sgd", "momentum": 0.0, "clip_norm": None}

    def lengths(self, size: int) -> dict[str, int]:
        """Update and control variate."""
        return {"update": size, "control": size}

    def start(self, server: Server) -> None:
        """C = 0."""
        server.vectors["c"] = torch.zeros_like(server.params)

    def begin(self, visit: Visit) -> None:
        """Bring c_k to the device."""
        visit.scratch["c_k"] = visit.remembered("c_k")

    def correct(self, visit: Visit) -> None:
        """G ← g + c − c_k."""
        visit.grad.add_(visit.sent["c"]).sub_(visit.scratch["c_k"])

    def finish(self, visit: Visit) -> Contribution:
        """Renew c_k; send Δ_k and Δc_k. A client that took no step changes nothing."""
        change = torch.zeros_like(visit.params)
        if visit.steps:
            change = (visit.start - visit.params) / visit.lr_sum - visit.sent["c"]
            visit.remember("c_k", visit.scratch["c_k"] + change)
        return Contribution({"update": visit.update, "control": change}, self.weight(visit))

    def step(self, server: Server, total: Total) -> None:
        """X ← x + η_g mean Δ_k; c ← c + (m/N) mean Δc_k."""
        server.params.add_(total["update"], alpha=self.lr)
        server.vectors["c"].add_(total["control"], alpha=total.clients / server.population)


@dataclass(frozen=True, kw_only=True)
class FedDyn(Method):
    """Local loss − ⟨λ_k, w⟩ + (α/2)‖w − x‖² (Acar et al., 2021, arXiv:2111.04263).

    λ_k ← λ_k − αΔ_k;  h ← h − (α/N) Σ_S Δ_k;  x ← mean_S y_k − h/α, with uniform means; λ_k = h = 0 at
    first. Clients keep λ_k (P,). The default α is among the paper's.
    """

    alpha: float = 0.1
    """Strength of the regularisation α, > 0."""

    uniform = True
    stateful = True
    mean_only = True

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha must be > 0, got {self.alpha}; the paper's are 0.01 and 0.1")

    def start(self, server: Server) -> None:
        """H = 0."""
        server.vectors["h"] = torch.zeros_like(server.params)

    def begin(self, visit: Visit) -> None:
        """Bring λ_k to the device."""
        visit.scratch["lambda"] = visit.remembered("lambda")

    def correct(self, visit: Visit) -> None:
        """G ← g − λ_k + α(w − x)."""
        visit.grad.sub_(visit.scratch["lambda"]).add_(visit.params - visit.start, alpha=self.alpha)

    def finish(self, visit: Visit) -> Contribution:
        """λ_k ← λ_k − αΔ_k; send Δ_k."""
        visit.remember("lambda", visit.scratch["lambda"] - self.alpha * visit.update)
        return Contribution({"update": visit.update}, self.weight(visit))

    def step(self, server: Server, total: Total) -> None:
        """H ← h − α (m/N) mean Δ_k; x ← x + mean Δ_k − h/α."""
        h = server.vectors["h"]
        h.sub_(total["update"], alpha=self.alpha * total.clients / server.population)
        server.params.add_(total["update"]).sub_(h, alpha=1 / self.alpha)
