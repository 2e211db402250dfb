"""The parts of a running federation, and what both loops do with them: send, evaluate, record, save."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedddp.aggregation import Accumulator
from fedddp.algorithms import ClientUpdate, ServerState
from fedddp.callbacks import Callbacks
from fedddp.config.loader import digest
from fedddp.config.schema import Config
from fedddp.data.loader import ClientLoader
from fedddp.data.partition import Split, holdout
from fedddp.distributed.world import World
from fedddp.evaluation import Metrics, evaluate, evaluate_clients, measure, spread
from fedddp.models.flat import FlatModel
from fedddp.rng import stream
from fedddp.storage.checkpoint import Checkpoints, Saved, load_into, save_tensors
from fedddp.storage.client_states import ClientStates
from fedddp.storage.run_record import BEST
from fedddp.tracking.tracker import NullTracker
from fedddp.training.best import Best
from fedddp.training.client_trainer import ClientJob, ClientTrainer
from fedddp.training.profiling import NoProfiler

logger = logging.getLogger(__name__)

Indices = NDArray[np.int64]


class Stopped(Exception):
    """The run stopped early, at a safe point, with a checkpoint."""


@dataclass
class Session:
    """The parts of one run on this rank; the same on every rank, but for the placement of client states."""

    config: Config
    world: World
    flat: FlatModel
    server: ServerState
    trainer: ClientTrainer
    states: ClientStates
    train: ClientLoader
    test: ClientLoader | None
    split: Split
    sizes: Indices
    """n_k: training examples of every client, without those held out; (population,)."""
    checkpoints: Checkpoints
    directory: Path
    """The run directory."""
    data_digest: str
    """Of the training examples, without their pixels; what a resume must find again."""
    channels_last: bool = False
    """Whether images and weights are laid out so, flat vectors too."""
    malicious: frozenset[int] = frozenset()
    """The malicious clients."""
    best: Best | None = None
    """Where `checkpoint.best` or `evaluation.stop_after` asks for it."""
    callbacks: Callbacks = field(default_factory=Callbacks)
    """The user's; the coordinator calls them."""
    tracker: NullTracker = field(default_factory=NullTracker)
    profiler: NoProfiler = field(default_factory=NoProfiler)
    rounds_done: int = 0
    partial: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of a round that was stopped before its end; empty between rounds."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The metadata of the checkpoint that the run resumed from; empty in a new run."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of this round, by phase."""
    updates: Accumulator | None = None
    """Of the round before, whose memory the next one uses; None before the first."""
    _sent_version: int = -1
    _row_began: float = 0.0
    """When the last row was recorded; in seconds of `time.perf_counter`."""

    @property
    def keeps_state(self) -> bool:
        """Whether clients keep state between rounds."""
        return self.config.algorithm.stateful or self.config.local.optimizer_state == "keep"

    def indices(self, client: int) -> Indices:
        """Return the training examples of `client`, without those held out; (n_k,)."""
        return self._training_and_held_out(client)[0]

    def _training_and_held_out(self, client: int) -> tuple[Indices, Indices]:
        fraction = self.config.data.holdout
        if not fraction:
            return self.split.indices(client), np.empty(0, dtype=np.int64)
        return holdout(self.split.indices(client), fraction, client, self.config.seed)

    def job(self, client: int, *, number: int, lr: float, weight: float, share: float) -> ClientJob:
        """Return the local training of `client` in the round (or dispatch) with that number."""
        indices = self.indices(client)
        return ClientJob(client=client, round=number, indices=indices, weight=weight, share=share, lr=lr)

    def received(self, client: int, number: int, update: ClientUpdate) -> ClientUpdate:
        """Return `update` as the coordinator receives it from `client`, which may be malicious.

        `number` is the round's index or the dispatch id, which names the random stream of the attack.
        """
        if client not in self.malicious:
            return update
        return self.config.attacks.corrupt(update, stream("attack", self.config.seed, number, client))

    # ---- seconds ----

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to `time/<phase>` of this round."""
        start = time.perf_counter()
        try:
            with self.profiler.phase(phase):
                yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed

    def start_clock(self) -> None:
        """Let the first row's `time/round` begin now."""
        self._row_began = time.perf_counter()

    def training_seconds(self) -> float:
        """Return the seconds of this round so far, evaluation and checkpoints left out."""
        return sum(s for phase, s in self.seconds.items() if phase not in ("evaluate", "checkpoint"))

    # ---- send ----

    def send(self) -> None:
        """Collective. Broadcast the server's model, with the algorithm's `sends`, to all ranks."""
        if self._sent_version != self.server.version:
            with self.timed("send"):
                self.world.broadcast(*self.config.algorithm.dispatch(self.server))
            self._sent_version = self.server.version

    def load_global_model(self) -> None:
        """Copy the server's model into the module."""
        self.flat.load(self.server.params, self.server.buffers, self.server.integer_buffers)

    # ---- evaluate ----

    def evaluate(self, round_number: int) -> Metrics:
        """Collective. Return the metrics due after round `round_number`; empty when none are."""
        evaluation = self.config.evaluation
        if not evaluation.due(round_number, self.config.rounds):
            return {}
        self.send()
        row: Metrics = {}
        with self.timed("evaluate"):
            if self.test is not None:
                self.load_global_model()
                metrics = evaluate(
                    self.world, self.flat.module, self.config.task, self.test, evaluation.batch_size
                )
                row |= {f"eval/{name}": value for name, value in metrics.items()}
            if evaluation.clients:
                row |= self._evaluate_clients(round_number)
        self._compare_with_best(row, round_number)
        return row

    def evaluated_metrics(self) -> list[str]:
        """Return the names of the numbers that `evaluate` measures; the model sees one test example."""
        names = []
        if self.test is not None:
            task = self.config.task
            totals = measure(self.flat.module, task, self.test, np.arange(1), 1)
            names += [
                f"eval/{n}" for n, value in task.summarize(totals).items() if not isinstance(value, list)
            ]
        if self.config.evaluation.clients:
            names += spread([{"accuracy": 0.0}])
        return names

    def _compare_with_best(self, row: Metrics, round_number: int) -> None:
        """Keep the model if it is the best so far."""
        if self.best is None:
            return
        if self.best.update(row, round_number) and self.config.checkpoint.best and self.world.is_coordinator:
            self.load_global_model()
            self.best.keep(self.flat.module)

    @property
    def complete(self) -> bool:
        """Whether no round is left to train."""
        return self.rounds_done >= self.config.rounds or self.stalled

    @property
    def stalled(self) -> bool:
        """Whether `evaluation.stop_after` ends the run here; the same on every rank after an evaluation."""
        after, best = self.config.evaluation.stop_after, self.best
        return best is not None and 0 < after <= best.evaluated - best.round

    def _evaluate_clients(self, round_number: int) -> Metrics:
        chosen = self.config.evaluation.sample(len(self.split), self.config.seed)
        held_out = {}
        for position, client in enumerate(chosen.tolist()):
            home = self.states.homes.get(client)
            rank = position % self.world.size if home is None else self.world.leader(home)
            if rank == self.world.rank:
                held_out[client] = self._training_and_held_out(client)[1]

        def personalize(client: int) -> None:
            self.load_global_model()
            self.config.algorithm.personalize(self.flat, self.states.kept.get(client, {}))

        rows = evaluate_clients(
            self.world,
            self.flat.module,
            self.config.task,
            self.train,
            held_out,
            self.config.evaluation.batch_size,
            personalize,
        )
        self.tracker.log_clients([{"round": round_number, **row} for row in rows])
        return spread(rows) if rows else {}

    # ---- record ----

    def training_metrics(
        self,
        *,
        loss: Sequence[float],
        steps: int,
        counts: Sequence[int],
        received: int,
        dispatched: int,
        busy: Sequence[float],
    ) -> Metrics:
        """Return the training metrics of a round, of either loop.

        Args:
            loss: sum and count of the training loss.
            steps: optimizer steps.
            counts: updates that were aggregated, invalid, clipped.
            received: updates that were sent.
            dispatched: clients that were sent the model.
            busy: seconds that each group trained; (G,).
        """
        up, down = self.config.algorithm.traffic(self.server)
        total, examples = loss
        return {
            "train/loss": total / examples if examples else None,
            "train/examples": int(examples),
            "train/steps": steps,
            "clients/aggregated": counts[0],
            "clients/invalid": counts[1],
            "clients/clipped": counts[2],
            "bytes/up": received * up,
            "bytes/down": dispatched * down,
            "time/idle": [max(0.0, self.training_seconds() - seconds) for seconds in busy],
        }

    def record(self, row: Metrics) -> None:
        """Write one round's line: metrics, bytes, seconds by phase; then call the callbacks."""
        self.call_back(self._write(row))

    def _write(self, row: Metrics) -> Metrics:
        """Write one round's line, and return it."""
        times = {f"time/{phase}": spent for phase, spent in sorted(self.seconds.items())}
        now = time.perf_counter()
        line = {**row, "time/round": now - self._row_began, **times}
        self._row_began = now
        if logger.isEnabledFor(logging.DEBUG):
            spent = ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in self.seconds.items())
            logger.debug("round %d of %d: %s", line["round"], self.config.rounds, spent)
        self.seconds.clear()
        self.tracker.log(line)
        self.profiler.step()
        ended_early = self.stalled and line["round"] < self.config.rounds
        if self.best is not None and ended_early and self.world.is_coordinator:
            logger.info(
                "no better %s for %d rounds; the run ends after round %d (best: %s after round %d)",
                *(self.best.metric, line["round"] - self.best.round, line["round"]),
                *("none" if self.best.value is None else f"{self.best.value:.4g}", self.best.round),
            )
        return line

    def call_back(self, line: Metrics) -> None:
        """Call the callbacks with a round's line and a copy of the model; their time is in no row."""
        if self.callbacks.members:
            began = time.perf_counter()
            self.load_global_model()
            model = copy.deepcopy(self.flat.module).eval()
            self.callbacks = self.callbacks("on_round_end", line["round"], line, model)
            self._row_began += time.perf_counter() - began

    # ---- save and restore ----

    def save(
        self,
        name: str,
        row: Metrics | None = None,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Collective. Record `row`, then save the run with the loop's own `tensors` and `metadata`.

        The line comes first: a line without its checkpoint is cut off at a resume, but a checkpoint
        without its line would leave a hole in the history.
        """
        line = None if row is None else self._write(row)
        self.tracker.sync()
        with self.timed("checkpoint"):
            if self.world.is_coordinator:
                self._write_best()
                self.load_global_model()
            server = {f"server.{n}": tensor for n, tensor in self.server.vectors.items()}
            common = {
                "data": self.data_digest,
                "channels_last": self.channels_last,
                "threads": torch.get_num_threads(),
                "round": self.rounds_done,
                "version": self.server.version,
                "wandb_run_id": self.tracker.run_id,
                "client_rows": self.tracker.client_rows,
                "best": self.best.metadata(kept=self.config.checkpoint.best is not None) if self.best else {},
            }
            self.checkpoints.save(
                name,
                self.flat.module,
                {**server, **(tensors or {})},
                {**common, **(metadata or {})},
                self.states.save,
            )
        if line is not None:  # after the checkpoint: what a callback raises loses no round
            self.call_back(line)

    def _write_best(self) -> None:
        """Write the best model, if it is a new one; before the checkpoint that knows of it."""
        if self.best is not None and self.best.state is not None:
            of_best = {"metric": self.best.metric, "value": self.best.value, "round": self.best.round}
            metadata = self.model_metadata() | {key: str(value) for key, value in of_best.items()}
            save_tensors(self.best.state, self.directory / BEST, metadata)
            self.best.state = None

    def model_metadata(self) -> dict[str, str]:
        """Return what a user of a model must know, for the header of its file."""
        images = self.train.images
        preprocessing = {
            "size": images.shape[1:],
            "channels": images.shape[0],
            "mean": images.mean,
            "std": images.std,
        }
        return {
            "preprocessing": json.dumps(preprocessing),
            "classes": json.dumps(images.class_names or list(map(str, range(images.classes)))),
            "task": type(self.config.task).__name__,
            "config_digest": digest(self.config),
            "fedddp": version("fedddp"),
            "torch": torch.__version__,
        }

    def restore(self, saved: Saved) -> None:
        """Resume from `saved`; each rank reads what it needs."""
        load_into(self.flat.module, saved.tensors("model.safetensors"))
        self.flat.read_buffers()
        self.server.params.copy_(self.flat.params)
        self.server.buffers.copy_(self.flat.buffers)
        self.server.integer_buffers.copy_(self.flat.integer_buffers)
        state = saved.tensors("state.safetensors")
        for name, tensor in state.items():
            if name.startswith("server."):
                self.server.vectors[name.removeprefix("server.")] = tensor.to(self.world.device)
        self.partial = {n: t for n, t in state.items() if not n.startswith("server.")}
        self.states.load(saved.files("clients-*.safetensors"))
        self.metadata = saved.metadata
        if self.best is not None:
            keeps = self.config.checkpoint.best is not None
            self.best.restore(saved.metadata.get("best", {}), needs_file=keeps)
        self.server.version = int(saved.metadata["version"])
        self.rounds_done = int(saved.metadata["round"])
