"""The asynchronous loop: dispatch, arrive, absorb. Groups wait only at synchronization points."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from fedddp.algorithms import AsynchronousAlgorithm, ClientUpdate
from fedddp.evaluation import Metrics
from fedddp.training.asynchronous.mailbox import Mailbox
from fedddp.training.asynchronous.scheduler import (
    ArrivalLog,
    InFlightClient,
    VirtualScheduler,
    make_scheduler,
)
from fedddp.training.asynchronous.worker import (
    REPORT_LENGTH,
    Dispatch,
    Report,
    SyncPoint,
    TrainedUpdate,
    Worker,
    pack,
    synchronize,
)
from fedddp.training.exchange import received
from fedddp.training.session import Session

logger = logging.getLogger(__name__)


def run_asynchronous(s: Session) -> None:
    """Collective. Train until `rounds` × `cohort.size` updates have arrived.

    Raises:
        Stopped: a rank was asked to stop; `Checkpoints.finish` waits for its checkpoint.
    """
    if s.complete:  # killed after its last checkpoint: no synchronization point is left
        return
    if s.world.is_coordinator:
        Coordinator(s).run()
    else:
        Worker(s).serve()


@dataclass
class RoundStatistics:
    """What has happened since the end of the last round."""

    cohort: list[int] = field(default_factory=list)
    """Clients by arrival."""
    staleness: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Sum and count of the training loss."""
    steps: int = 0
    counts: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Updates absorbed, invalid, clipped."""
    bytes_up: int = 0
    """Bytes that the clients sent."""
    dispatched: int = 0
    """Dispatches before it."""
    now: float = 0.0
    """Virtual time at its start."""


class Coordinator:
    """The coordinator's side: sends models out, absorbs updates in the order of the scheduler."""

    def __init__(self, s: Session) -> None:
        """Resume from the session's checkpoint, or start."""
        assert isinstance(s.config.algorithm, AsynchronousAlgorithm)
        self.s, self.world, self.algorithm = s, s.world, s.config.algorithm
        self.worker = Worker(s) if s.world.group is not None else None
        self.mailbox = Mailbox(s.world)
        self.scheduler = make_scheduler(s)
        self.statistics = RoundStatistics()
        self.models: dict[int, list[Tensor]] = {}  # by version, as long as a client has yet to train it
        self.updates: dict[int, TrainedUpdate] = {}  # by dispatch id, until they are due
        self.running: dict[int, int] = {}  # group -> dispatch id
        self.began: dict[int, float] = {}  # group -> when it was last sent a client
        self.busy = [0.0] * self.world.groups  # seconds that each trained, not yet in a row
        self.integer_buffers = s.server.integer_buffers.clone()  # their maximum over the arrivals
        self.infinite = ~torch.isfinite(s.server.buffers)  # constant masks, which no mean can hold
        self.infinite_values = s.server.buffers[self.infinite].clone()
        if s.metadata:
            self._restore()
        arrivals = s.rounds_done * s.config.cohort.size + len(self.statistics.cohort)
        self.log = ArrivalLog(s.directory, arrivals)

    def run(self) -> None:
        """Absorb one update after another; raises as `run_asynchronous`."""
        s, size = self.s, self.s.config.cohort.size
        s.tracker.begin_round(size, self.world.groups)
        try:
            while not s.complete:
                if self.statistics.cohort and self.world.stop_requested():
                    self._synchronize(None, evaluate=False, save=True, stop=True)
                with s.timed("train"):
                    client, trained = self._next_arrival()
                with s.timed("step"):
                    self._absorb(client, trained)
                if len(self.statistics.cohort) == size:
                    self._end_round()
        finally:
            self.log.close()

    # ---- dispatch and arrive ----

    def _next_arrival(self) -> tuple[InFlightClient, TrainedUpdate]:
        """Return the next update, after dispatching what can be trained in the meantime."""
        due = self.scheduler.next(self.s.server.version)
        version = self.s.server.version
        if version not in self.models and any(c.version == version for c in self._untrained()):
            self.models[version] = [
                tensor.clone() for tensor in self.algorithm.dispatch(self.s.server) if tensor.numel()
            ]
        self._dispatch()
        while True:
            dispatch_id = due.dispatch_id if due else next(iter(self.updates), None)
            if dispatch_id in self.updates:
                return self.scheduler.in_flight[dispatch_id], self.updates.pop(dispatch_id)
            self._advance()
            self._dispatch()

    def _advance(self) -> None:
        """Train a client in this rank's own group, unless it has none or a message waits; else receive."""
        waiting = self._wanted() if self.worker is not None else []
        if self.worker is not None and waiting and not self.mailbox.has_message():
            self._train_here(self.worker, waiting[0])
        else:
            self._receive()

    def _untrained(self, most: int | None = None) -> list[InFlightClient]:
        """Return those of the first `most` clients to arrive that no group trains yet, in that order."""
        begun = {*self.updates, *self.running.values()}
        return [client for client in self.scheduler.upcoming()[:most] if client.dispatch_id not in begun]

    def _wanted(self) -> list[InFlightClient]:
        """Return the untrained clients that arrive before the end of the last round."""
        left = (self.s.config.rounds - self.s.rounds_done) * self.s.config.cohort.size
        return self._untrained(left - len(self.statistics.cohort))

    def _dispatch(self) -> None:
        """Send each of the other groups that is idle a client and a model."""
        own = self.world.group
        idle = [g for g in range(self.world.groups) if g not in self.running and g != own]
        for group, client in zip(idle, self._wanted(), strict=False):
            rank = self.world.leader(group)
            self.world.post(pack(Dispatch(client.dispatch_id, client.client)), rank)
            for tensor in self.models[client.version]:
                self.world.send(tensor, rank)
            self.running[group], self.began[group] = client.dispatch_id, time.perf_counter()
            work = f"the leader of client group {group}, which trains client {client.client}"
            self.mailbox.expect(rank, REPORT_LENGTH, work)
            self._drop_models()

    def _receive(self) -> None:
        """Wait for the next update of another group."""
        rank, numbers = self.mailbox.next()
        dispatch_id, loss_sum, loss_count, steps, seconds, group = numbers
        report = Report(int(dispatch_id), loss_sum, loss_count, int(steps), seconds, int(group))
        tensors = self._empty_update()
        for tensor in tensors:
            if tensor.numel():
                self.world.receive(tensor, rank)
        del self.running[report.group]
        self._keep(TrainedUpdate(report, tensors))

    def _train_here(self, worker: Worker, client: InFlightClient) -> None:
        """Train a client in this rank's own group."""
        order = Dispatch(client.dispatch_id, client.client)
        self.world.group_broadcast(self._numbers(order))
        for target, tensor in zip(worker.model_tensors(), self.models[client.version], strict=True):
            target.copy_(tensor)
        self._keep(worker.train(order))
        self._drop_models()

    def _numbers(self, order: Dispatch | SyncPoint) -> Tensor:
        return torch.tensor(pack(order), dtype=torch.float64, device=self.world.device)

    def _keep(self, trained: TrainedUpdate) -> None:
        """Keep an update until it is due."""
        self.updates[trained.report.dispatch_id] = trained
        self.busy[trained.report.group] += trained.report.seconds
        self.s.tracker.client_done()

    def _empty_update(self) -> list[Tensor]:
        """Return empty tensors for an update."""
        server = self.s.server
        lengths = self.algorithm.lengths(server.params.numel()).values()
        vectors = [server.params.new_empty(length) for length in lengths]
        return [*vectors, torch.empty_like(server.buffers), torch.empty_like(server.integer_buffers)]

    def _drop_models(self) -> None:
        """Drop the model versions that no client has yet to train."""
        needed = {client.version for client in self._untrained()}
        self.models = {version: model for version, model in self.models.items() if version in needed}

    # ---- absorb ----

    def _absorb(self, client: InFlightClient, trained: TrainedUpdate) -> None:
        s, statistics, server, report = self.s, self.statistics, self.s.server, trained.report
        staleness = server.version - client.version
        *vectors, buffers, integer_buffers = trained.tensors
        buffers[self.infinite & (buffers == server.buffers)] = 0.0
        names = self.algorithm.lengths(server.params.numel())
        update = ClientUpdate(dict(zip(names, vectors, strict=True)), 1.0)
        update, sent = received(s, client.client, client.dispatch_id, update, {})
        statistics.bytes_up += sent
        admitted = s.config.aggregation.admit(client.client, update, buffers, loss=report.loss_sum)
        if admitted.vectors is not None:
            torch.maximum(self.integer_buffers, integer_buffers, out=self.integer_buffers)
            if self.algorithm.absorb(server, ClientUpdate(admitted.vectors, 1.0), staleness):
                server.version += 1
                server.integer_buffers.copy_(self.integer_buffers)
            server.buffers[self.infinite] = self.infinite_values
        if not admitted.valid:
            logger.warning("NaN, infinity or overflow in the update of client %d", client.client)
        for index, one in enumerate((admitted.vectors is not None, not admitted.valid, admitted.clipped)):
            statistics.counts[index] += int(one)
        if admitted.valid:
            loss = (report.loss_sum, report.loss_count)
            statistics.loss = [a + b for a, b in zip(statistics.loss, loss, strict=True)]
        statistics.steps += report.steps
        statistics.cohort.append(client.client)
        statistics.staleness.append(staleness)
        self.scheduler.complete(client)
        self.log.add(
            {
                "round": s.rounds_done + 1,
                "staleness": staleness,
                "group": report.group,
                "dispatch_id": client.dispatch_id,
                "client": client.client,
                "version": client.version,
                "virtual": self.scheduler.now,
            }
        )

    # ---- rounds, synchronization points, checkpoints ----

    def _end_round(self) -> None:
        """Record a row after every `cohort.size` arrivals; synchronize when something is due."""
        s = self.s
        s.rounds_done += 1
        last = s.rounds_done == s.config.rounds
        stop = last or self.world.stop_requested()
        evaluate = s.config.evaluation.due(s.rounds_done, s.config.rounds)
        save = stop or s.rounds_done % s.config.checkpoint.every == 0
        if evaluate or save:
            self._finish_running()
        row = self._metrics()
        self.statistics = RoundStatistics(dispatched=self.scheduler.dispatched, now=self.scheduler.now)
        if evaluate or save:
            self._synchronize(row, evaluate=evaluate, save=save, stop=stop)
        else:
            s.record({"round": s.rounds_done, **row})

    def _metrics(self) -> Metrics:
        statistics, s = self.statistics, self.s
        dispatched = self.scheduler.dispatched - statistics.dispatched
        seen, now = Counter(statistics.staleness), time.perf_counter()
        running = [now - self.began[g] if g in self.running else 0.0 for g in range(self.world.groups)]
        row: Metrics = {
            **s.training_metrics(
                loss=statistics.loss,
                steps=statistics.steps,
                counts=statistics.counts,
                bytes_up=statistics.bytes_up,
                bytes_down=dispatched * s.links.model_bytes(s.server),
                busy=[done + current for done, current in zip(self.busy, running, strict=True)],
            ),
            "staleness/mean": sum(statistics.staleness) / len(statistics.staleness),
            "staleness/max": max(statistics.staleness),
            "staleness/histogram": [seen[tau] for tau in range(max(seen) + 1)],
            "server/version": s.server.version,
            "cohort": statistics.cohort,
        }
        if isinstance(self.scheduler, VirtualScheduler):
            row["time/virtual"] = self.scheduler.now - statistics.now
        self.busy = [-seconds for seconds in running]  # what these rows count is not counted again
        return row

    def _finish_running(self) -> None:
        """Wait until no group trains."""
        with self.s.timed("train"):
            while self.running:
                self._receive()

    def _synchronize(self, row: Metrics | None, *, evaluate: bool, save: bool, stop: bool) -> None:
        """Call all ranks to a synchronization point, when no group trains."""
        s = self.s
        self._finish_running()
        if save or s.config.evaluation.stop_after:
            self.log.sync()
        arrived = len(self.statistics.cohort)
        point = SyncPoint(s.rounds_done, arrived, s.server.version, evaluate, save, stop)
        for group in range(self.world.groups):
            if group != self.world.group:
                self.world.post(pack(point), self.world.leader(group))
        if self.worker is not None:
            self.world.group_broadcast(self._numbers(point))
        may_save = save or (evaluate and s.config.evaluation.stop_after)
        tensors, metadata = self._state() if may_save else (None, None)
        synchronize(s, point, row, tensors, metadata)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return all that is in flight: models, updates, and the scheduler's state."""
        tensors = {"integer_buffers": self.integer_buffers}
        for version, model in self.models.items():
            tensors |= {f"model.{version}.{i}": tensor for i, tensor in enumerate(model)}
        for dispatch_id, update in self.updates.items():
            tensors |= {f"update.{dispatch_id}.{i}": tensor for i, tensor in enumerate(update.tensors)}
        metadata: dict[str, object] = {
            "scheduler": self.scheduler.state(),
            "statistics": asdict(self.statistics),
            "updates": [update.report for update in self.updates.values()],
            "models": list(self.models),
        }
        return tensors, metadata

    def _restore(self) -> None:
        """Restore the `_state` of a stopped run."""
        metadata, saved, device = self.s.metadata, self.s.partial, self.world.device
        self.scheduler.load(metadata["scheduler"])
        self.statistics = RoundStatistics(**metadata["statistics"])
        self.integer_buffers.copy_(saved["integer_buffers"])
        parts = sum(1 for tensor in self.algorithm.dispatch(self.s.server) if tensor.numel())
        for version in metadata["models"]:
            self.models[version] = [saved[f"model.{version}.{i}"].to(device) for i in range(parts)]
        for values in metadata["updates"]:
            report, count = Report(*values), len(self._empty_update())
            tensors = [saved[f"update.{report.dispatch_id}.{i}"].to(device) for i in range(count)]
            self.updates[report.dispatch_id] = TrainedUpdate(report, tensors)
        self.s.partial = {}
