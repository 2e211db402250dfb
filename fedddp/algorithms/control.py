"""Algorithms that correct each client's drift by its own past updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge

from fedddp.algorithms.algorithm import (
    AggregatedUpdate,
    ClientContext,
    ClientUpdate,
    ServerState,
    SynchronousAlgorithm,
)
from fedddp.algorithms.local import LocalConfig
from fedddp.section import PositiveFloat


@dataclass(frozen=True, kw_only=True)
class SCAFFOLD(SynchronousAlgorithm):
    """Steps g + c − c_k with control variates (Karimireddy et al., 2020, arXiv:1910.06378), option II.

    c_k⁺ = c_k − c + (x − y_k)/(K_k η);  Δc_k = c_k⁺ − c_k;  x ← x + η_g mean_S Δ_k;
    c ← c + (m/N) mean_S Δc_k. Means are uniform, as in the paper; c = c_k = 0 at first. K_k η is the sum
    of the learning rates of the steps that were taken. Clients keep c_k (P,), and c travels with x.
    """

    lr: PositiveFloat = 1.0
    """Server learning rate η_g, > 0; 1 is the paper's."""

    sends = ("c",)
    uniform = True
    stateful = True
    mean_only = True
    because = "reads the mean gradient off x − y_k, which only plain sgd leaves there"

    def requires(self, local: LocalConfig) -> dict[str, object]:
        """Require plain steps: else (x − y_k)/(K_k η) is not the mean of the corrected gradients."""
        return {"optimizer": "sgd", "momentum": 0.0, "clip_norm": None}

    def lengths(self, size: int) -> dict[str, int]:
        """Return the lengths of the update and of the change of the control variate."""
        return {"update": size, "control": size}

    def start(self, server: ServerState) -> None:
        """c = 0."""
        server.vectors["c"] = torch.zeros_like(server.params)

    def begin(self, context: ClientContext) -> None:
        """Bring c_k to the device."""
        context.scratch["c_k"] = context.load("c_k")

    def correct(self, context: ClientContext) -> None:
        """g ← g + c − c_k."""
        context.grad.add_(context.server_vectors["c"]).sub_(context.scratch["c_k"])

    def finish(self, context: ClientContext) -> ClientUpdate:
        """Renew c_k; send Δ_k and Δc_k. A client that took no step changes nothing."""
        change = torch.zeros_like(context.params)
        if context.steps:
            change = (context.start - context.params) / context.lr_sum - context.server_vectors["c"]
            context.store("c_k", context.scratch["c_k"] + change)
        return ClientUpdate({"update": context.update, "control": change}, self.weight(context))

    def step(self, server: ServerState, aggregated: AggregatedUpdate) -> None:
        """x ← x + η_g mean Δ_k; c ← c + (m/N) mean Δc_k."""
        server.params.add_(aggregated["update"], alpha=self.lr)
        server.vectors["c"].add_(aggregated["control"], alpha=aggregated.clients / server.population)


@dataclass(frozen=True, kw_only=True)
class FedDyn(SynchronousAlgorithm):
    """Local loss − ⟨λ_k, w⟩ + (α/2)‖w − x‖² (Acar et al., 2021, arXiv:2111.04263).

    λ_k ← λ_k − αΔ_k;  h ← h − (α/N) Σ_S Δ_k;  x ← mean_S y_k − h/α, with uniform means; λ_k = h = 0 at
    first. Clients keep λ_k (P,). The default α is among the paper's.
    """

    alpha: Annotated[float, Ge(1e-8), "the paper's are 0.01 and 0.1"] = 0.1
    """Strength of the regularisation α, >= 1e-08."""

    uniform = True
    stateful = True
    mean_only = True
    not_private = "adds the sum of all earlier noise to the model in every round"

    def start(self, server: ServerState) -> None:
        """h = 0."""
        server.vectors["h"] = torch.zeros_like(server.params)

    def begin(self, context: ClientContext) -> None:
        """Bring λ_k to the device."""
        context.scratch["lambda"] = context.load("lambda")

    def correct(self, context: ClientContext) -> None:
        """g ← g − λ_k + α(w − x)."""
        context.grad.sub_(context.scratch["lambda"]).add_(context.params - context.start, alpha=self.alpha)

    def finish(self, context: ClientContext) -> ClientUpdate:
        """λ_k ← λ_k − αΔ_k; send Δ_k."""
        context.store("lambda", context.scratch["lambda"] - self.alpha * context.update)
        return ClientUpdate({"update": context.update}, self.weight(context))

    def step(self, server: ServerState, aggregated: AggregatedUpdate) -> None:
        """h ← h − α (m/N) mean Δ_k; x ← x + mean Δ_k − h/α."""
        h = server.vectors["h"]
        h.sub_(aggregated["update"], alpha=self.alpha * aggregated.clients / server.population)
        server.params.add_(aggregated["update"]).sub_(h, alpha=1 / self.alpha)
