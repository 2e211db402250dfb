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
from fedddp.algorithms import ServerState
from fedddp.callbacks import Callbacks
from fedddp.config.baselines import without_global_model
from fedddp.config.loader import digest
from fedddp.config.schema import Config
from fedddp.data.loader import ClientLoader
from fedddp.data.partition import Split
from fedddp.distributed.world import World
from fedddp.evaluation import Metrics, evaluate, evaluate_clients, measure, spread
from fedddp.models.flat import FlatModel
from fedddp.privacy.protection import Protection
from fedddp.simulation.cohort import Assigner
from fedddp.storage.checkpoint import Checkpoints, Saved, load_into
from fedddp.storage.client_states import ClientStates
from fedddp.storage.run_record import ALONE
from fedddp.tracking.tracker import NullTracker
from fedddp.training.best import BestModels, drop_newer
from fedddp.training.client_trainer import ClientJob, ClientTrainer
from fedddp.training.clients import Clients
from fedddp.training.profiling import NoProfiler
from fedddp.transport.links import Links

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
    links: Links
    trainer: ClientTrainer
    states: ClientStates
    assigner: Assigner
    train: ClientLoader
    test: ClientLoader | None
    clients: Clients
    """The population: what each client trains on, and what it is evaluated on."""
    split: Split
    """The training set over the clients that train: the population, or one that holds the data of all."""
    sizes: Indices
    """n_k: training examples of every client that trains, without those held out; (its length,)."""
    checkpoints: Checkpoints
    directory: Path
    """The run directory."""
    data_digest: str
    """Of the training examples, without their pixels; what a resume must find again."""
    channels_last: bool = False
    """Whether images and weights are laid out so, flat vectors too."""
    malicious: frozenset[int] = frozenset()
    """The malicious clients."""
    protection: Protection = field(default_factory=Protection)
    """What is done for `config.privacy`."""
    best: BestModels | None = None
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
        c = self.config
        return c.algorithm.stateful or c.local.optimizer_state == "keep" or c.transport.stateful

    def indices(self, client: int) -> Indices:
        """Return the training examples of `client`, without those held out; (n_k,)."""
        pooled = self.config.baseline == "pooled"
        return self.split.indices(client) if pooled else self.clients.training(client)

    def job(self, client: int, *, number: int, lr: float, weight: float, share: float) -> ClientJob:
        """Return the local training of `client` in the round (or dispatch) with that number."""
        indices = self.indices(client)
        return ClientJob(client=client, round=number, indices=indices, weight=weight, share=share, lr=lr)

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
                along = self.protection.vectors(self.server)
                self.world.broadcast(*self.config.algorithm.dispatch(self.server), *along)
            self._sent_version = self.server.version

    def load_global_model(self) -> None:
        """Copy the server's model into the module."""
        self.flat.load(self.server.params, self.server.buffers, self.server.integer_buffers)

    # ---- evaluate ----

    @property
    def central(self) -> ClientLoader | None:
        """The examples that the global model is evaluated on; None where there are none, or no such model."""
        return self.test if self.config.algorithm.has_global_model else None

    def evaluate(self, round_number: int) -> Metrics:
        """Collective. Return the metrics due after round `round_number`; empty when none are."""
        evaluation = self.config.evaluation
        if not evaluation.due(round_number, self.last_round):
            return {}
        self.send()
        row: Metrics = {}
        with self.timed("evaluate"):
            central = self.central
            if central is not None:
                self.load_global_model()
                metrics = evaluate(
                    self.world, self.flat.module, self.config.task, central, evaluation.batch_size
                )
                row |= {f"eval/{name}": value for name, value in metrics.items()}
            if evaluation.clients:
                row |= self._evaluate_clients(round_number)
        self._compare_with_best(row, round_number)
        return row

    def evaluated_metrics(self) -> list[str]:
        """Return the names of the numbers that `evaluate` measures; the model sees one test example."""
        task, loader = self.config.task, self.test or self.train
        metrics = measure(self.flat.module, task, loader, np.arange(1), 1).summarize(task)
        numbers = [name for name, value in metrics.items() if not isinstance(value, list)]
        names = [] if self.central is None else [f"eval/{name}" for name in numbers]
        if self.config.evaluation.clients and self.clients.evaluated_sizes().any():
            names += spread([dict.fromkeys(numbers, 0.0)])
        return names

    def _compare_with_best(self, row: Metrics, round_number: int) -> None:
        """Keep the model if it is the best so far."""
        better = [] if self.best is None else self.best.update(row, round_number)
        if self.best is not None and better and self.best.kept:
            if self.world.is_coordinator:
                self.load_global_model()
                self.best.keep(self.flat.module, better)
            if self.config.algorithm.personalizes:
                self.best.keep_clients(self.states, better)

    @property
    def complete(self) -> bool:
        """Whether no round is left to train."""
        return self.rounds_done >= self.last_round or self.stalled

    @property
    def last_round(self) -> int:
        """The last round to train: of `rounds`, or that in which the budget of `privacy` ends."""
        return min(self.config.rounds, self.protection.last_round)

    @property
    def stalled(self) -> bool:
        """Whether `evaluation.stop_after` ends the run here; the same on every rank after an evaluation."""
        after, best = self.config.evaluation.stop_after, None if self.best is None else self.best.decisive
        return best is not None and 0 < after <= best.evaluated - best.round

    def _evaluate_clients(self, round_number: int) -> Metrics:
        chosen = self.config.evaluation.sample(len(self.clients), self.config.seed)
        examples = {}
        for position, client in enumerate(chosen.tolist()):
            home = self.states.homes.get(client)
            rank = position % self.world.size if home is None else self.world.leader(home)
            # One that was not trained yet, too: else rounds would be judged by means over other clients.
            if rank == self.world.rank:
                examples[client] = self.clients.evaluated(client)
        loader = self.train if self.clients.tests is None else self.test
        assert loader is not None

        def personalize(client: int) -> None:
            self.load_global_model()
            self.config.algorithm.personalize(self.flat, self.states.kept.get(client, {}))

        task, batch_size = self.config.task, self.config.evaluation.batch_size
        rows = evaluate_clients(self.world, self.flat.module, task, loader, examples, batch_size, personalize)
        named = [{"client": row["client"], **self.clients.label(row["client"]), **row} for row in rows]
        known = [{name: value for name, value in row.items() if value is not None} for row in named]
        self.tracker.log_clients([{"round": round_number, **row} for row in known])
        return spread(rows) if rows else {}

    # ---- record ----

    def training_metrics(
        self,
        *,
        loss: Sequence[float],
        steps: int,
        counts: Sequence[int],
        bytes_up: int,
        bytes_down: int,
        busy: Sequence[float],
    ) -> Metrics:
        """Return the training metrics of a round, of either loop.

        Args:
            loss: sum and count of the training loss.
            steps: optimizer steps.
            counts: updates that were aggregated, invalid, clipped.
            bytes_up: what clients sent.
            bytes_down: what they were sent.
            busy: seconds that each group trained; (G,).
        """
        total, examples = loss
        return {
            "train/loss": total / examples if examples else None,
            "train/examples": int(examples),
            "train/steps": steps,
            "clients/aggregated": counts[0],
            "clients/invalid": counts[1],
            "clients/clipped": counts[2],
            "bytes/up": bytes_up,
            "bytes/down": bytes_down,
            "time/idle": [max(0.0, self.training_seconds() - seconds) for seconds in busy],
        }

    def record(self, row: Metrics) -> None:
        """Write one round's line: metrics, bytes, seconds by phase; then call the callbacks."""
        self.call_back(self._write(row))

    def _write(self, row: Metrics) -> Metrics:
        """Write one round's line, and return it."""
        times = {f"time/{phase}": spent for phase, spent in sorted(self.seconds.items())}
        now = time.perf_counter()
        line = self.protection.released({**row, "time/round": now - self._row_began, **times})
        self._row_began = now
        if logger.isEnabledFor(logging.DEBUG):
            spent = ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in self.seconds.items())
            logger.debug("round %d of %d: %s", line["round"], self.config.rounds, spent)
        self.seconds.clear()
        self.tracker.log(line)
        self.profiler.step()
        ended_early = self.stalled and line["round"] < self.config.rounds
        if self.best is not None and ended_early and self.world.is_coordinator:
            best = self.best.decisive
            logger.info(
                "no better %s for %d rounds; the run ends after round %d (best: %s after round %d)",
                *(best.metric, line["round"] - best.round, line["round"]),
                *("none" if best.value is None else f"{best.value:.4g}", best.round),
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
            if self.best is not None:  # before the checkpoint that knows of them
                self.best.write(self.directory, self.states, self.model_metadata())
            if self.world.is_coordinator:
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
                "best": self.best.metadata() if self.best else {},
                "privacy": self.protection.metadata(),
            }
            self.checkpoints.save(
                name,
                self.flat.module,
                {**server, **(tensors or {})},
                {**common, **(metadata or {})},
                self.states.save,
            )
        if line is not None:  # where a callback raises, the end of the run waits for the checkpoint
            self.call_back(line)

    def model_metadata(self) -> dict[str, str]:
        """Return what a user of a model must know, for the header of its file."""
        images, alone = self.train.images, without_global_model(self.config)
        preprocessing = {
            "size": images.shape[1:],
            "channels": images.shape[0],
            "mean": images.mean,
            "std": images.std,
            "resize": self.config.data.resizing(images.target),
        }
        return {
            "preprocessing": json.dumps(preprocessing),
            "classes": json.dumps(images.class_names or list(map(str, range(images.classes)))),
            "task": type(self.config.task).__name__,
            "target": self.config.task.target,
            **({} if self.config.baseline == "none" else {"baseline": self.config.baseline}),
            **({} if alone is None else {ALONE: alone}),
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
            self.best.restore(saved.metadata.get("best", {}))
            if self.world.is_coordinator:
                drop_newer(self.directory, int(saved.metadata["round"]))
        self.server.version = int(saved.metadata["version"])
        self.rounds_done = int(saved.metadata["round"])
