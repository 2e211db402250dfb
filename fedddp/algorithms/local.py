"""The local training of a client: epochs, batches, optimizer, precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Local:
    """What a client does in one visit: its epochs, batches and optimizer."""

    epochs: int = 1
    """Passes over the client's data, >= 1; ignored when `steps` is set."""

    steps: int | None = None
    """Optimizer steps instead of epochs, >= 1; data is gone through again as often as needed."""

    batch_size: int = 32
    """Examples per step over all ranks of the client, >= 1; the last batch of an epoch may be smaller."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """The local optimizer."""

    lr: float = 0.05
    """Local learning rate, > 0."""

    momentum: float = 0.0
    """Momentum of sgd, in [0, 1)."""

    weight_decay: float = 0.0
    """L2 penalty (decoupled with adamw), >= 0."""

    clip_norm: float | None = None
    """Largest Euclidean norm of a step's gradient, > 0; none: not clipped."""

    schedule: Literal["constant", "cosine", "step"] = "constant"
    """Learning rate over rounds: constant, cosine to 0, or times `decay` every `decay_every` rounds."""

    decay: float = 0.1
    """Factor of the step schedule, in (0, 1]."""

    decay_every: int = 10
    """Rounds between the decays of the step schedule, >= 1."""

    optimizer_state: Literal["reset", "keep"] = "reset"
    """Whether a client's optimizer starts anew at each visit or goes on from its last one."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward; fp16 also scales the loss, and leaves out a step that overflows."""

    accumulate: int = 1
    """Micro-batches a batch is computed in, to save memory, >= 1; the step is the same."""

    channels_last: bool = False
    """Store images channels-last, which is faster for convolutions on most devices."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "decay_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}; leave it out to train by epochs")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be > 0 and finite, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum={self.momentum} is for sgd, got optimizer={self.optimizer}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be >= 0, got {self.weight_decay}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be > 0, got {self.clip_norm}; leave it out for no clipping")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {self.decay}")

    def lr_at(self, round_index: int, rounds: int) -> float:
        """Return the learning rate of round `round_index` (0-based) of `rounds`."""
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * round_index / rounds))
        if self.schedule == "step":
            return self.lr * self.decay ** (round_index // self.decay_every)
        return self.lr

    def make_optimizer(self, params: Tensor) -> torch.optim.Optimizer:
        """Return the optimizer over one flat parameter; elementwise, so the same as over many."""
        fused = params.device.type in ("cpu", "cuda")
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                [params],
                lr=self.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                fused=fused,
            )
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind([params], lr=self.lr, weight_decay=self.weight_decay, fused=fused)
