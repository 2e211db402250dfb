"""What a running federation holds, and what both loops do with it: send, measure, record, save."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedddp.algorithms.algorithm import Contribution, Server
from fedddp.config.schema import Run
from fedddp.data.loader import Feed
from fedddp.data.partition import Split, holdout
from fedddp.distributed.world import World
from fedddp.evaluation import Metrics, evaluate, evaluate_clients, spread
from fedddp.models.flat import FlatModel
from fedddp.rng import stream
from fedddp.storage.checkpoint import Checkpoints, Saved, load_into
from fedddp.storage.client_states import ClientStates
from fedddp.tracking.tracker import NullTracker
from fedddp.training.client_trainer import Trainer

Indices = NDArray[np.int64]


class Stopped(Exception):
    """The run stopped early, at its own safe point, with a checkpoint."""


@dataclass
class Session:
    """The parts of one run on this rank; every rank has the same, but for data placement."""

    run: Run
    world: World
    flat: FlatModel
    server: Server
    trainer: Trainer
    states: ClientStates
    train: Feed
    test: Feed | None
    split: Split
    sizes: Indices
    """n_k: training examples of every client, without those held out; (population,)."""
    tracker: NullTracker
    checkpoints: Checkpoints
    folder: Path
    liars: frozenset[int] = frozenset()
    """The malicious clients."""
    rounds_done: int = 0
    partial: Mapping[str, Tensor] = field(default_factory=dict)
    """Sums of a round that was stopped in the middle; empty between rounds."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The facts of the checkpoint that the run goes on from; empty in a new run."""
    history: list[Metrics] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    _sent: int = -1

    @property
    def keeps_state(self) -> bool:
        """Whether clients keep anything between their visits."""
        return self.run.algorithm.stateful or self.run.local.optimizer_state == "keep"

    def indices(self, client: int) -> Indices:
        """Return the training examples of `client` (those held out are not among them)."""
        return self._shares(client)[0]

    def _shares(self, client: int) -> tuple[Indices, Indices]:
        data = self.run.data
        if not data.holdout:
            return self.split.indices(client), np.empty(0, dtype=np.int64)
        return holdout(self.split.indices(client), data.holdout, client, self.run.seed)

    def received(self, client: int, visit: int, contribution: Contribution) -> Contribution:
        """Return what arrives of the `contribution` of `client`, which may be malicious.

        `visit` is what else names its random streams: the round's index, or the dispatch's number.
        """
        if client not in self.liars:
            return contribution
        return self.run.attacks.corrupt(contribution, stream("attack", self.run.seed, visit, client))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to `time/<phase>` of this round."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    def spent(self) -> float:
        """Return the seconds of this round so far, evaluation and checkpoints left out."""
        return sum(spent for phase, spent in self.seconds.items() if phase not in ("evaluate", "checkpoint"))

    def send(self) -> None:
        """Collective. Bring the server's model, and what the method sends along, to all ranks."""
        if self._sent != self.server.version:
            with self.timed("send"):
                self.world.broadcast(*self.run.algorithm.dispatch(self.server))
            self._sent = self.server.version

    def summary(
        self,
        *,
        loss: Sequence[float],
        steps: int,
        counts: Sequence[int],
        received: int,
        dispatched: int,
        busy: Sequence[float],
    ) -> Metrics:
        """Return what a round says of its training, in either loop.

        Args:
            loss: sum and count of the training loss.
            steps: optimizer steps.
            counts: contributions that were combined, invalid, clipped.
            received: contributions that were sent.
            dispatched: clients that were sent the model.
            busy: seconds that each group trained; (G,).
        """
        up, down = self.run.algorithm.traffic(self.server)
        total, examples = loss
        return {
            "train/loss": total / examples if examples else None,
            "train/examples": int(examples),
            "train/steps": steps,
            "clients/contributed": counts[0],
            "clients/invalid": counts[1],
            "clients/clipped": counts[2],
            "bytes/up": received * up,
            "bytes/down": dispatched * down,
            "time/idle": [max(0.0, self.spent() - seconds) for seconds in busy],
        }

    def load_global_model(self) -> None:
        """Put the server's model into the module."""
        self.flat.params.copy_(self.server.params)
        self.flat.buffers.copy_(self.server.buffers)
        self.flat.counters.copy_(self.server.counters)

    def measure(self, round_number: int) -> Metrics:
        """Collective. Return the metrics due after round `round_number`; empty when none are."""
        if not self.run.evaluation.due(round_number, self.run.rounds):
            return {}
        self.send()
        row: Metrics = {}
        with self.timed("evaluate"):
            if self.test is not None:
                self.load_global_model()
                metrics = evaluate(
                    self.world,
                    self.flat.module,
                    self.run.task,
                    self.test,
                    self.run.evaluation.batch_size,
                )
                row |= {f"eval/{name}": value for name, value in metrics.items()}
            if self.run.evaluation.clients:
                row |= self._measure_clients(round_number)
        return row

    def _measure_clients(self, round_number: int) -> Metrics:
        chosen = self.run.evaluation.sample(len(self.split), self.run.seed)
        mine = {}
        for position, client in enumerate(chosen.tolist()):
            home = self.states.homes.get(client)
            rank = position % self.world.size if home is None else self.world.leader(home)
            if rank == self.world.rank:
                mine[client] = self._shares(client)[1]

        def personalise(client: int) -> None:
            self.load_global_model()
            self.run.algorithm.personal(self.flat, self.states.kept.get(client, {}))

        rows = evaluate_clients(
            self.world,
            self.flat.module,
            self.run.task,
            self.train,
            mine,
            self.run.evaluation.batch_size,
            personalise,
        )
        self.tracker.log_clients([{"round": round_number, **row} for row in rows])
        return spread(rows) if rows else {}

    def record(self, row: Metrics) -> None:
        """Write one round's line: metrics, bytes, seconds by phase."""
        times = {f"time/{phase}": spent for phase, spent in sorted(self.seconds.items())}
        line = {**row, "time/round": sum(self.seconds.values()), **times}
        self.seconds.clear()
        self.history.append(line)
        self.tracker.log(line)

    def save(
        self,
        name: str,
        row: Metrics | None = None,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Collective. Record `row`, then save the run with the loop's own `tensors` and `facts`.

        The line comes first: a line without its checkpoint is cut off at a resume, but a checkpoint
        without its line would leave a hole.
        """
        if row is not None:
            self.record(row)
        self.tracker.sync()
        with self.timed("checkpoint"):
            if self.world.is_coordinator:
                self.load_global_model()
            server = {f"server.{n}": tensor for n, tensor in self.server.vectors.items()}
            common = {
                "round": self.rounds_done,
                "version": self.server.version,
                "wandb_run_id": self.tracker.run_id,
            }
            self.checkpoints.save(
                name,
                self.flat.module,
                {**server, **(tensors or {})},
                {**common, **(facts or {})},
                self.states.save,
            )

    def restore(self, saved: Saved) -> None:
        """Take the run up where `saved` left it; each rank reads what it needs."""
        load_into(self.flat.module, saved.tensors("model.safetensors"))
        self.server.params.copy_(self.flat.params)
        self.server.buffers.copy_(self.flat.buffers)
        self.server.counters.copy_(self.flat.counters)
        state = saved.tensors("state.safetensors")
        for name, tensor in state.items():
            if name.startswith("server."):
                self.server.vectors[name.removeprefix("server.")] = tensor.to(self.world.device)
        self.partial = {n: t for n, t in state.items() if not n.startswith("server.")}
        self.states.load(saved.files("clients-*.safetensors"))
        self.facts = saved.facts
        self.server.version = int(saved.facts["version"])
        self.rounds_done = int(saved.facts["round"])
