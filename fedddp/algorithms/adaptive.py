"""Adaptive server optimizers, in the paper's form, and any optimizer of torch in its place."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedddp.algorithms.algorithm import AggregatedUpdate, ServerState, SynchronousAlgorithm
from fedddp.section import Fraction, PositiveFloat

STATE = "optimizer."


@dataclass(frozen=True, kw_only=True)
class Adaptive(SynchronousAlgorithm):
    """m ← β1 m + (1−β1)Δ, then v, then x ← x + η_g m/(√v + τ), Δ = Σ_S p_k Δ_k.

    Reddi et al., 2021 (arXiv:2003.00295), algorithm 2, whose β and τ are the defaults; η_g is tuned there.
    It starts from m = 0, v = τ² and has no bias correction: torch's Adam on −Δ is another algorithm
    (`ServerOptimizer`).
    """

    lr: PositiveFloat = 0.1
    """Server learning rate η_g, > 0."""

    beta1: Fraction = 0.9
    """Decay β1 of the mean update, in [0, 1)."""

    tau: PositiveFloat = 1e-3
    """Degree of adaptivity τ, > 0; small is very adaptive."""

    def start(self, server: ServerState) -> None:
        """m = 0, v = τ²."""
        server.vectors["m"] = torch.zeros_like(server.params)
        server.vectors["v"] = torch.full_like(server.params, self.tau**2)

    @abstractmethod
    def second_moment(self, v: Tensor, square: Tensor) -> None:
        """Change v in place by Δ²; both (P,)."""

    def step(self, server: ServerState, aggregated: AggregatedUpdate) -> None:
        """x ← x + η_g m/(√v + τ)."""
        update, m, v = aggregated["update"], server.vectors["m"], server.vectors["v"]
        m.mul_(self.beta1).add_(update, alpha=1 - self.beta1)
        self.second_moment(v, update.square())
        server.params.addcdiv_(m, v.sqrt().add_(self.tau), value=self.lr)


@dataclass(frozen=True, kw_only=True)
class FedAdam(Adaptive):
    """Adam on the server: v ← β2 v + (1−β2)Δ² (Reddi et al., 2021, arXiv:2003.00295)."""

    beta2: Fraction = 0.99
    """Decay β2 of the squared update, in [0, 1)."""

    def second_moment(self, v: Tensor, square: Tensor) -> None:
        """v ← β2 v + (1−β2)Δ²."""
        v.mul_(self.beta2).add_(square, alpha=1 - self.beta2)


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdam):
    """Yogi on the server: v ← v − (1−β2)Δ² sign(v − Δ²) (Reddi et al., 2021, arXiv:2003.00295)."""

    def second_moment(self, v: Tensor, square: Tensor) -> None:
        """v ← v − (1−β2)Δ² sign(v − Δ²)."""
        v.addcmul_(square, (v - square).sign(), value=-(1 - self.beta2))


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(Adaptive):
    """Adagrad on the server: v ← v + Δ² (Reddi et al., 2021, arXiv:2003.00295)."""

    beta1: Fraction = 0.0
    """Decay β1 of the mean update, in [0, 1); the paper uses none with Adagrad."""

    def second_moment(self, v: Tensor, square: Tensor) -> None:
        """v ← v + Δ²."""
        v.add_(square)


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer(SynchronousAlgorithm):
    """Any optimizer of `torch.optim` on the server, with the pseudo-gradient −Σ_S p_k Δ_k as gradient.

    The general form of Reddi et al., 2021 (arXiv:2003.00295), algorithm 1, with torch's own rules and
    defaults, such as Adam's bias correction. The optimizer sees one flat vector (P,).
    """

    optimizer: str = "Adam"
    """Name of a class in `torch.optim`, such as Adam, AdamW, SGD, RMSprop or NAdam."""

    lr: PositiveFloat = 0.01
    """Server learning rate, > 0."""

    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of that class, such as `{betas: [0.9, 0.99]}`; by default torch's own."""

    def __post_init__(self) -> None:
        kind = getattr(torch.optim, self.optimizer, None)
        if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
            raise ValueError(f"optimizer={self.optimizer} is not a class in torch.optim; try Adam or SGD")
        trial = ServerState(torch.ones(3), torch.empty(0), torch.empty(0), 1)
        try:
            for _ in range(2):
                self.step(trial, AggregatedUpdate({"update": torch.ones(3)}, 1))
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"optimizer={self.optimizer} cannot step a flat vector with options={self.options}: "
                f"{reason}; correct options or choose another"
            ) from error

    def step(self, server: ServerState, aggregated: AggregatedUpdate) -> None:
        """Step the optimizer on −Δ; its state lies in the server's vectors between rounds."""
        weights = torch.nn.Parameter(server.params)
        weights.grad = -aggregated["update"]
        optimizer = getattr(torch.optim, self.optimizer)([weights], lr=self.lr, **self.options)
        kept = {n.removeprefix(STATE): t for n, t in server.vectors.items() if n.startswith(STATE)}
        if kept:
            # Step counters are scalars, which torch wants on the CPU.
            optimizer.state[weights] = {n: t if t.dim() else t.cpu() for n, t in kept.items()}
        optimizer.step()
        for name, value in optimizer.state[weights].items():
            if value is not None and not isinstance(value, Tensor):
                raise ValueError(f"it keeps {name}={value!r}, which is not a tensor")
            if value is not None:
                server.vectors[STATE + name] = value
