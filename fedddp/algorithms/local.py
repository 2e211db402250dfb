"""The local training of a client: epochs, batches, optimizer, precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from fedddp.section import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    find_function,
)

SCHEDULES = ("constant", "cosine", "step")
OWN_SCHEDULE = "f(round_index, rounds)"
"""The form of a user's own schedule."""


class PlainSGD(torch.optim.Optimizer):
    """SGD without momentum in one or two kernels; `torch.optim.SGD` adds 0.1 ms of Python to each step."""

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        """Take the parameters, and `lr` and `weight_decay` as in `torch.optim.SGD`."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the parameters and the defaults; the parent would import torch's compiler, over a second."""
        self.param_groups.append(self.defaults | param_group)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Set w to (1 − lr·weight_decay)·w − lr·g."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(parameter.grad, alpha=-group["lr"])


@dataclass(frozen=True, kw_only=True)
class LocalConfig(Section):
    """The local training of a client in one round: its epochs, batches and optimizer."""

    key = "local"

    epochs: PositiveInt = 1
    """Passes over the client's data, >= 1; ignored when `steps` is set."""

    steps: PositiveInt | None = None
    """Optimizer steps instead of epochs, >= 1; the client's data is repeated as often as needed."""

    batch_size: PositiveInt = 32
    """Examples per step over all ranks of the client, >= 1; the last batch of an epoch may be smaller."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """The local optimizer."""

    lr: PositiveFloat = 0.05
    """Local learning rate, > 0."""

    momentum: Fraction = 0.0
    """Momentum of sgd, in [0, 1)."""

    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty (decoupled with adamw), >= 0."""

    clip_norm: PositiveFloat | None = None
    """Largest Euclidean norm of a step's gradient, > 0; none: not clipped."""

    schedule: Literal["constant", "cosine", "step"] | str = "constant"
    """Learning rate over rounds: constant, cosine to 0, times `decay` every `decay_every` rounds (`step`), or
    the dotted path of your own f(round_index, rounds), which returns a factor of `lr`."""

    decay: Annotated[float, Interval(gt=0, le=1)] = 0.1
    """Factor of the step schedule, in (0, 1]."""

    decay_every: PositiveInt = 10
    """Rounds between the decays of the step schedule, >= 1."""

    optimizer_state: Literal["reset", "keep"] = "reset"
    """Whether a client's optimizer starts from scratch in each round or keeps its state between rounds."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward; fp16 also scales the loss, and skips a step that overflows."""

    accumulate: PositiveInt = 1
    """Micro-batches per batch, to save memory, >= 1; the step is the same."""

    channels_last: bool | Literal["auto"] = "auto"
    """Whether images are stored channels-last; auto: for convolutions on a CPU, where that is faster."""

    engine: Literal["auto", "eager", "traced", "graph"] = "auto"
    """`eager`: passes by autograd; `traced`: without, on a CPU; `graph`: replayed on a GPU from CUDA graphs;
    auto: traced if it can."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            find_function(self.schedule, "schedule", SCHEDULES, OWN_SCHEDULE)
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum={self.momentum} is for sgd, got optimizer={self.optimizer}")

    def lr_at(self, round_index: int, rounds: int) -> float:
        """Return the learning rate of round `round_index` (0-based) of `rounds`.

        Raises:
            ValueError: the user's own schedule returns no positive number.
        """
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * round_index / rounds))
        if self.schedule == "step":
            return self.lr * self.decay ** (round_index // self.decay_every)
        if self.schedule == "constant":
            return self.lr
        factor = find_function(self.schedule, "local.schedule", SCHEDULES, OWN_SCHEDULE)(round_index, rounds)
        if not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise ValueError(
                f"local.schedule={self.schedule} must return a number > 0, got {factor!r} in round "
                f"{round_index}"
            )
        return self.lr * factor

    def steps_on(self, examples: int) -> int:
        """Return the optimizer steps of a local training on so many examples; 0 on none."""
        if not examples:
            return 0
        return self.steps or self.epochs * -(-examples // self.batch_size)

    @property
    def takes_plain_steps(self) -> bool:
        """Whether the optimizer is SGD without momentum: w ← w − lr·(g + weight_decay·w)."""
        return self.optimizer == "sgd" and not self.momentum

    def make_optimizer(self, params: Tensor) -> torch.optim.Optimizer:
        """Return the optimizer over one flat parameter; elementwise, so the same as over many."""
        if self.takes_plain_steps:
            return PlainSGD([params], lr=self.lr, weight_decay=self.weight_decay)
        options: dict[str, Any] = {"sgd": {"momentum": self.momentum}, "adam": {}, "adamw": {}}
        kind: Any = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[
            self.optimizer
        ]
        fused = params.device.type in ("cpu", "cuda")
        optimizer: torch.optim.Optimizer = kind(
            [params], lr=self.lr, weight_decay=self.weight_decay, fused=fused, **options[self.optimizer]
        )
        return optimizer
