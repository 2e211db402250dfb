"""Distributed training as rounds: synchronous SGD, local SGD, DiLoCo."""

from __future__ import annotations

from dataclasses import dataclass

from fedddp.algorithms.algorithm import AggregatedUpdate, ClientContext, ServerState
from fedddp.algorithms.fedavg import FedAvg
from fedddp.algorithms.local import LocalConfig
from fedddp.section import Fraction, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class SyncSGD(FedAvg):
    """Synchronous SGD: every round is one step x ← x − η Σ_S p_k g_k(x) on one batch of each client.

    p_k is by the examples of the batches, so the step is that of one batch of them all, uneven ones
    included. η is `local.lr`; momentum is the server's. With one client on R ranks (`data.clients=1`,
    FedAvg) DDP takes the same steps without a coordinator in between.
    """

    because = "takes one plain step per client, and has its momentum on the server (algorithm.momentum)"

    def requires(self, local: LocalConfig) -> dict[str, object]:
        """Require one plain step: only that is a gradient."""
        return {"steps": 1, "optimizer": "sgd", "momentum": 0.0}

    def weight(self, context: ClientContext) -> float:
        """Return the examples of the batch, in units that keep the cohort's sum below 1."""
        batch = min(context.examples, context.local.batch_size)
        return batch / context.local.batch_size * context.share


@dataclass(frozen=True, kw_only=True)
class LocalSGD(FedAvg):
    """x ← x + η_g mean_S Δ_k, clients counting equally, with Nesterov momentum if any.

    Stich, 2019 (arXiv:1805.09767): workers average their parameters every H steps; H is `local.steps`.
    g = −mean_S Δ_k;  v ← βv + g;  x ← x − η_g (g + βv), as torch's SGD with nesterov.
    """

    lr: PositiveFloat = 1.0
    """Outer learning rate η_g, > 0; 1 is the paper's average."""

    momentum: Fraction = 0.0
    """Outer Nesterov momentum β, in [0, 1); 0 is the paper's average."""

    uniform = True

    def step(self, server: ServerState, aggregated: AggregatedUpdate) -> None:
        """x ← Nesterov(x, −mean Δ_k)."""
        gradient = -aggregated["update"]
        if self.momentum:
            v = server.vectors["v"].mul_(self.momentum).add_(gradient)
            gradient.add_(v, alpha=self.momentum)
        server.params.sub_(gradient, alpha=self.lr)


@dataclass(frozen=True, kw_only=True)
class DiLoCo(LocalSGD):
    """Local AdamW inside, Nesterov outside (Douillard et al., 2023, arXiv:2311.08105).

    Requires `local.optimizer=adamw` and `local.optimizer_state=keep`: the inner optimizer keeps its state
    between rounds. The defaults of the outer one are the paper's.
    """

    lr: PositiveFloat = 0.7
    """Outer learning rate η_g, > 0."""

    momentum: Fraction = 0.9
    """Outer Nesterov momentum β, in [0, 1)."""

    because = "has an inner AdamW that keeps its state between rounds, unlike LocalSGD"

    def requires(self, local: LocalConfig) -> dict[str, object]:
        """Require AdamW with kept state."""
        return {"optimizer": "adamw", "optimizer_state": "keep"}
