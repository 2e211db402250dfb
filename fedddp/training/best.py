"""The best model so far by a metric: kept beside the last one, and the reason to end a run early."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fedddp.evaluation import Metrics
from fedddp.storage.checkpoint import distinct_state
from fedddp.storage.history import direction


@dataclass
class Best:
    """The best value of `metric` and its round; lower is better for a loss, else higher."""

    metric: str
    value: float | None = None
    """None before the first evaluation that has one."""
    round: int = 0
    """The round of the best value, from 1."""
    evaluated: int = 0
    """The round of the last evaluation."""
    state: dict[str, Tensor] | None = None
    """The state dict of the best model, on the CPU, until it is written."""

    def update(self, metrics: Metrics, round_number: int) -> bool:
        """Take the metrics of an evaluation; return whether they are the best so far."""
        if self.metric not in metrics:
            return False
        value, self.evaluated = metrics[self.metric], round_number
        if value is None or math.isnan(value):  # no better one, and so a reason to stop
            return False
        sign = direction(self.metric)
        better = self.value is None or sign * value > sign * self.value
        if better:
            self.value, self.round = value, round_number
        return better

    def keep(self, module: nn.Module) -> None:
        """Copy the state of `module`, the best model."""
        self.state = {n: t.detach().to("cpu", copy=True) for n, t in distinct_state(module).items()}

    def metadata(self, *, kept: bool) -> dict[str, Any]:
        """Return what a checkpoint records; `kept`: whether the best model is in a file."""
        return {
            "metric": self.metric,
            "value": self.value,
            "round": self.round,
            "evaluated": self.evaluated,
            "kept": kept,
        }

    def restore(self, metadata: Mapping[str, Any], *, needs_file: bool) -> None:
        """Resume from what a checkpoint recorded, unless of another metric or without the file it needs."""
        if metadata.get("metric") == self.metric and (metadata["kept"] or not needs_file):
            self.value, self.round = metadata["value"], metadata["round"]
            self.evaluated = metadata["evaluated"]
