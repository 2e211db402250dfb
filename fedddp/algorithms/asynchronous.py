"""Methods that absorb contributions one by one, as they arrive, without waiting for anybody."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedddp.algorithms.algorithm import Contribution, Method, Server, Total, Visit
from fedddp.algorithms.local import Local


@dataclass(frozen=True, kw_only=True)
class Staleness(ABC):
    """How a contribution's weight s(τ) falls with its staleness τ, the server versions it missed."""

    @abstractmethod
    def weight(self, tau: int) -> float:
        """Return s(τ), in (0, 1]; 1 for a fresh contribution."""


@dataclass(frozen=True, kw_only=True)
class Constant(Staleness):
    """s(τ) = 1."""

    def weight(self, tau: int) -> float:
        """One."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Polynomial(Staleness):
    """s(τ) = (1 + τ)^−a."""

    exponent: float = 0.5
    """a, >= 0; 0.5 is that of FedAsync and FedBuff."""

    def __post_init__(self) -> None:
        if self.exponent < 0:
            raise ValueError(f"exponent must be >= 0, got {self.exponent}")

    def weight(self, tau: int) -> float:
        """(1 + τ)^−a."""
        return float((1 + tau) ** -self.exponent)


@dataclass(frozen=True, kw_only=True)
class Hinge(Staleness):
    """s(τ) = 1 if τ ≤ b, else 1 / (a (τ − b) + 1)."""

    a: float = 10.0
    """Slope a after the hinge, >= 0."""

    b: int = 4
    """Largest staleness b that costs nothing, >= 0."""

    def __post_init__(self) -> None:
        if self.a < 0 or self.b < 0:
            raise ValueError(f"a and b must be >= 0, got a={self.a}, b={self.b}")

    def weight(self, tau: int) -> float:
        """1 up to the hinge, then 1 / (a (τ − b) + 1)."""
        return 1.0 if tau <= self.b else 1.0 / (self.a * (tau - self.b) + 1)


@dataclass(frozen=True, kw_only=True)
class Inverse(Staleness):
    """s(τ) = 1/τ for τ ≥ 1 (Zhang et al., 2016, arXiv:1511.05950)."""

    def weight(self, tau: int) -> float:
        """1/τ; 1 for a fresh contribution."""
        return 1.0 / max(tau, 1)


@dataclass(frozen=True, kw_only=True)
class AsynchronousMethod(Method):
    """A method whose server takes contributions one at a time; subclasses say how (`absorb`)."""

    asynchronous: ClassVar[bool] = True

    because: ClassVar[str] = "lets clients keep nothing between visits"

    def needs(self, local: Local) -> dict[str, object]:
        """Clients that hand over nothing but contributions."""
        return {"optimizer_state": "reset"}

    @abstractmethod
    def absorb(self, server: Server, contribution: Contribution, staleness: int) -> bool:
        """Take in what one client sent; the loop counts versions.

        Args:
            server: changed in place; its integer buffers are the loop's business.
            contribution: vectors of the method, and "buffers": the client's float buffers, (B,).
            staleness: τ, server versions since the client was sent the model; 0 for a fresh one.

        Returns:
            Whether the global model changed, which makes a new version. Until then neither the
            parameters nor the buffers may change.
        """

    def step(self, server: Server, total: Total) -> None:
        """Never called: there are no rounds."""
        raise AssertionError("asynchronous methods absorb")


@dataclass(frozen=True, kw_only=True)
class FedAsync(AsynchronousMethod):
    """x ← (1 − α_τ) x + α_τ y_k with α_τ = α s(τ), at each arrival (Xie et al., 2019, arXiv:1903.03934)."""

    alpha: float = 0.6
    """Mixing weight α of a fresh model, in (0, 1]."""

    rho: float = 0.005
    """Strength ρ of the clients' pull to the dispatched model, (ρ/2)‖w − x‖², >= 0."""

    staleness: Staleness = field(default_factory=Polynomial)
    """s(τ): Polynomial, Hinge or Constant in the paper."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {self.alpha}")
        if self.rho < 0:
            raise ValueError(f"rho must be >= 0, got {self.rho}; 0 is no pull")

    def lengths(self, size: int) -> dict[str, int]:
        """The client sends its model."""
        return {"params": size}

    def correct(self, visit: Visit) -> None:
        """Gradient of (ρ/2)‖w − x‖²."""
        if self.rho:
            visit.grad.add_(visit.params - visit.start, alpha=self.rho)

    def finish(self, visit: Visit) -> Contribution:
        """y_k."""
        return Contribution({"params": visit.params.clone()}, 1.0)

    def absorb(self, server: Server, contribution: Contribution, staleness: int) -> bool:
        """Mix the client's model in; its running statistics likewise."""
        weight = self.alpha * self.staleness.weight(staleness)
        server.params.lerp_(contribution.vectors["params"], weight)
        server.buffers.lerp_(contribution.vectors["buffers"], weight)
        return True


@dataclass(frozen=True, kw_only=True)
class FedBuff(AsynchronousMethod):
    """At every K-th arrival x ← x + (η_g/K) Σ s(τ_k) Δ_k (Nguyen et al., 2022, arXiv:2106.06639)."""

    buffer_size: int = 10
    """K, arrivals that make a server step, >= 1."""

    lr: float = 1.0
    """Server learning rate η_g, > 0."""

    staleness: Staleness = field(default_factory=Polynomial)
    """s(τ); 1/√(1 + τ) in the paper."""

    def __post_init__(self) -> None:
        if self.buffer_size < 1:
            raise ValueError(f"buffer_size must be >= 1, got {self.buffer_size}")
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}; 1 is the paper's")

    def start(self, server: Server) -> None:
        """An empty buffer: sums of updates and of running statistics, and how many there are."""
        server.vectors["sum"] = torch.zeros_like(server.params)
        server.vectors["sum_buffers"] = torch.zeros_like(server.buffers)
        server.vectors["arrived"] = torch.zeros(1, dtype=torch.int64)

    def absorb(self, server: Server, contribution: Contribution, staleness: int) -> bool:
        """Add to the buffer; step when it is full. Running statistics become the mean of the clients'."""
        total, buffers, arrived = (server.vectors[n] for n in ("sum", "sum_buffers", "arrived"))
        total.add_(contribution.vectors["update"], alpha=self.staleness.weight(staleness))
        buffers.add_(contribution.vectors["buffers"])
        arrived += 1
        if int(arrived) < self.buffer_size:
            return False
        server.params.add_(total, alpha=self.lr / self.buffer_size)
        server.buffers.copy_(buffers / self.buffer_size)
        for vector in (total, buffers, arrived):
            vector.zero_()
        return True


@dataclass(frozen=True, kw_only=True)
class AsyncSGD(AsynchronousMethod):
    """x ← x − η s(τ) g_k(x_dispatch), a parameter server: pull, gradient of one batch, push, apply.

    η is `local.lr` with its schedule, and a visit is one step (`local.steps=1`).
    """

    staleness: Staleness = field(default_factory=Constant)
    """s(τ): Constant is the classical server, Inverse that of arXiv:1511.05950."""

    because = "applies the gradient of one batch as it is, and lets clients keep nothing"

    def needs(self, local: Local) -> dict[str, object]:
        """One plain step a visit."""
        return {**super().needs(local), "steps": 1, "optimizer": "sgd", "momentum": 0.0}

    def finish(self, visit: Visit) -> Contribution:
        """−η (g + λ x), λ the weight decay; nothing from a client without a batch."""
        if not visit.steps:
            return Contribution({"update": torch.zeros_like(visit.start)}, 1.0)
        gradient = visit.grad.add(visit.start, alpha=visit.local.weight_decay)
        return Contribution({"update": gradient.mul_(-visit.lr)}, 1.0)

    def absorb(self, server: Server, contribution: Contribution, staleness: int) -> bool:
        """Step. Running statistics are mixed in by 1/(1 + τ): those of a fresh client replace the old."""
        server.params.add_(contribution.vectors["update"], alpha=self.staleness.weight(staleness))
        server.buffers.lerp_(contribution.vectors["buffers"], 1 / (1 + staleness))
        return True
