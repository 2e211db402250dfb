"""The best models so far, by one metric or several: kept beside the last one, and the reason to end early."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from fedddp.evaluation import Metrics
from fedddp.storage.checkpoint import distinct_state, save_tensors
from fedddp.storage.client_states import ClientStates, State, prune_best
from fedddp.storage.history import direction
from fedddp.storage.run_record import BEST


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
    clients: dict[int, State] | None = None
    """What the clients of this rank kept then, until it is written; None where they have no own models."""

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


class BestModels:
    """The best models by several metrics, of which the first decides when a run ends early."""

    def __init__(self, metrics: Sequence[str], *, kept: bool) -> None:
        """Begin without a model.

        Args:
            metrics: one or more.
            kept: whether models are kept in files, and not only compared.
        """
        self.decisive, *self.others = map(Best, metrics)
        self.kept = kept

    def update(self, metrics: Metrics, round_number: int) -> list[Best]:
        """Take the metrics of an evaluation; return those by which the model is the best so far."""
        return [best for best in (self.decisive, *self.others) if best.update(metrics, round_number)]

    def keep(self, module: nn.Module, better: Sequence[Best]) -> None:
        """Copy the state of `module`, the best model by each of `better`."""
        state = {n: t.detach().to("cpu", copy=True) for n, t in distinct_state(module).items()}
        for best in better:
            best.state = state

    def keep_clients(self, states: ClientStates, better: Sequence[Best]) -> None:
        """Remember what clients keep now; a client's next training replaces its tensors, and changes none."""
        for best in better:
            best.clients = dict(states.kept)

    def write(self, directory: Path, states: ClientStates, metadata: Mapping[str, str]) -> None:
        """Collective. Write the models that are new, and what clients kept in their rounds.

        Whenever it is interrupted, each model has its clients beside it: theirs are written before it, and
        those of the model before are deleted after it.

        Args:
            directory: the run directory.
            states: of the clients.
            metadata: goes into the headers of the files, with the metrics.
        """
        new = [best for best in (self.decisive, *self.others) if best.clients is not None]
        for best in new:
            assert best.clients is not None
            states.save_best(directory, best.metric, best.round, best.clients)
        if new:
            states.world.barrier()
        if states.world.is_coordinator:
            self._write_models(directory, metadata)
            for best in new:
                prune_best(directory, best.metric, best.round)
        for best in new:
            best.clients = None

    def _write_models(self, directory: Path, metadata: Mapping[str, str]) -> None:
        for best in (self.decisive, *self.others):
            if best.state is not None:
                of_best = {"metric": best.metric, "value": best.value, "round": best.round}
                file = BEST if best is self.decisive else best_file(best.metric)
                save_tensors(
                    best.state, directory / file, {**metadata, **{k: str(v) for k, v in of_best.items()}}
                )
                best.state = None

    def metadata(self) -> dict[str, Any]:
        """Return what a checkpoint records."""
        others = [best.metadata(kept=self.kept) for best in self.others]
        return {**self.decisive.metadata(kept=self.kept), **({"others": others} if others else {})}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        """Resume from what a checkpoint recorded; a metric without a file of its own has none yet."""
        self.decisive.restore(metadata, needs_file=self.kept)
        recorded = {other["metric"]: other for other in metadata.get("others", [])}
        for best in self.others:
            best.restore(recorded.get(best.metric, {}), needs_file=self.kept)


def drop_newer(directory: Path, round_number: int) -> None:
    """Delete the best models of rounds after `round_number`, from which the run resumes without them.

    They were written shortly before the process was killed; their rounds may never come again.
    """
    for file in directory.glob("best*.safetensors"):
        with safe_open(file, framework="pt") as saved:
            if int((saved.metadata() or {}).get("round", 0)) > round_number:
                file.unlink()


def best_file(metric: str) -> str:
    """Return the name of the file with the best model by a `metric` that is not the first of several."""
    return f"best-{metric.replace('/', '-')}.safetensors"
