"""Algorithms that absorb updates one by one, as they arrive, without waiting for any client."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval

from fedddp.algorithms.algorithm import AsynchronousAlgorithm, ClientContext, ClientUpdate, ServerState
from fedddp.algorithms.local import LocalConfig
from fedddp.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


@dataclass(frozen=True, kw_only=True)
class Staleness(Section, ABC):
    """How an update's weight s(τ) falls with its staleness τ, the server versions it missed."""

    key: ClassVar[str] = "algorithm.staleness"
    chosen_by_name: ClassVar[bool] = True

    @abstractmethod
    def weight(self, tau: int) -> float:
        """Return s(τ), in (0, 1]; 1 for a fresh update."""


@dataclass(frozen=True, kw_only=True)
class Constant(Staleness):
    """s(τ) = 1."""

    def weight(self, tau: int) -> float:
        """s(τ) = 1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Polynomial(Staleness):
    """s(τ) = (1 + τ)^−a."""

    exponent: NonNegativeFloat = 0.5
    """a, >= 0; 0.5 is that of FedAsync and FedBuff."""

    def weight(self, tau: int) -> float:
        """s(τ) = (1 + τ)^−a."""
        return float((1 + tau) ** -self.exponent)


@dataclass(frozen=True, kw_only=True)
class Hinge(Staleness):
    """s(τ) = 1 if τ ≤ b, else 1 / (a (τ − b) + 1)."""

    a: NonNegativeFloat = 10.0
    """Slope a after the hinge, >= 0."""

    b: NonNegativeInt = 4
    """Largest staleness b that costs nothing, >= 0."""

    def weight(self, tau: int) -> float:
        """s(τ) = 1 up to the hinge, then 1 / (a (τ − b) + 1)."""
        return 1.0 if tau <= self.b else 1.0 / (self.a * (tau - self.b) + 1)


@dataclass(frozen=True, kw_only=True)
class Inverse(Staleness):
    """s(τ) = 1/τ for τ ≥ 1 (Zhang et al., 2016, arXiv:1511.05950)."""

    def weight(self, tau: int) -> float:
        """s(τ) = 1/τ; 1 for a fresh update."""
        return 1.0 / max(tau, 1)


@dataclass(frozen=True, kw_only=True)
class FedAsync(AsynchronousAlgorithm):
    """x ← (1 − α_τ) x + α_τ y_k with α_τ = α s(τ), at each arrival (Xie et al., 2019, arXiv:1903.03934)."""

    alpha: Annotated[float, Interval(gt=0, le=1)] = 0.6
    """Mixing weight α of a fresh model, in (0, 1]."""

    rho: NonNegativeFloat = 0.005
    """Strength ρ of the clients' pull to the dispatched model, (ρ/2)‖w − x‖², >= 0; 0 is no pull."""

    staleness: Staleness = field(default_factory=Polynomial)
    """s(τ): Polynomial, Hinge or Constant in the paper."""

    def lengths(self, size: int) -> dict[str, int]:
        """Return the length of the client's model."""
        return {"params": size}

    def correct(self, context: ClientContext) -> None:
        """g ← g + ρ(w − x)."""
        if self.rho:
            context.grad.add_(context.params - context.start, alpha=self.rho)

    def finish(self, context: ClientContext) -> ClientUpdate:
        """Send y_k."""
        return ClientUpdate({"params": context.params.clone()}, 1.0)

    def absorb(self, server: ServerState, update: ClientUpdate, staleness: int) -> bool:
        """x ← (1 − α_τ) x + α_τ y_k; running statistics likewise."""
        weight = self.alpha * self.staleness.weight(staleness)
        server.params.lerp_(update.vectors["params"], weight)
        server.buffers.lerp_(update.vectors["buffers"], weight)
        return True


@dataclass(frozen=True, kw_only=True)
class FedBuff(AsynchronousAlgorithm):
    """At every K-th arrival x ← x + (η_g/K) Σ s(τ_k) Δ_k (Nguyen et al., 2022, arXiv:2106.06639)."""

    buffer_size: PositiveInt = 10
    """K, arrivals per server step, >= 1."""

    lr: PositiveFloat = 1.0
    """Server learning rate η_g, > 0; 1 is the paper's."""

    staleness: Staleness = field(default_factory=Polynomial)
    """s(τ); 1/√(1 + τ) in the paper."""

    def start(self, server: ServerState) -> None:
        """Start with an empty buffer: sums of updates and of running statistics, and their number."""
        server.vectors["sum"] = torch.zeros_like(server.params)
        # In float64, in which a sum of float32 constants neither overflows nor is rounded.
        server.vectors["sum_buffers"] = torch.zeros_like(server.buffers, dtype=torch.float64)
        server.vectors["arrived"] = torch.zeros(1, dtype=torch.int64)

    def absorb(self, server: ServerState, update: ClientUpdate, staleness: int) -> bool:
        """Add to the buffer; step when it is full. Running statistics become the mean of the clients'."""
        total, buffers, arrived = (server.vectors[n] for n in ("sum", "sum_buffers", "arrived"))
        total.add_(update.vectors["update"], alpha=self.staleness.weight(staleness))
        buffers.add_(update.vectors["buffers"])
        arrived += 1
        if int(arrived) < self.buffer_size:
            return False
        server.params.add_(total, alpha=self.lr / self.buffer_size)
        server.buffers.copy_(buffers / self.buffer_size)
        for vector in (total, buffers, arrived):
            vector.zero_()
        return True


@dataclass(frozen=True, kw_only=True)
class AsyncSGD(AsynchronousAlgorithm):
    """x ← x − η s(τ) g_k(x_dispatch), a parameter server: pull, gradient of one batch, push, apply.

    η is `local.lr` with its schedule, and a client takes one step (`local.steps=1`).
    """

    staleness: Staleness = field(default_factory=Constant)
    """s(τ): Constant is the classical server, Inverse that of arXiv:1511.05950."""

    because = "applies the gradient of one batch as it is, and keeps no client state"

    def requires(self, local: LocalConfig) -> dict[str, object]:
        """Require one plain step per client."""
        return {**super().requires(local), "steps": 1, "optimizer": "sgd", "momentum": 0.0}

    def finish(self, context: ClientContext) -> ClientUpdate:
        """Send −η (g + λ x), λ the weight decay; zeros from a client without a batch."""
        if not context.steps:
            return ClientUpdate({"update": torch.zeros_like(context.start)}, 1.0)
        gradient = context.grad.add(context.start, alpha=context.local.weight_decay)
        return ClientUpdate({"update": gradient.mul_(-context.lr)}, 1.0)

    def absorb(self, server: ServerState, update: ClientUpdate, staleness: int) -> bool:
        """x ← x − η s(τ) g. Running statistics mix in by 1/(1 + τ): a fresh client's replace the server's."""
        server.params.add_(update.vectors["update"], alpha=self.staleness.weight(staleness))
        server.buffers.lerp_(update.vectors["buffers"], 1 / (1 + staleness))
        return True
