"""The asynchronous loop: dispatch, arrive, absorb. Between two meetings groups never wait for each other."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fedddp.algorithms.algorithm import Contribution
from fedddp.algorithms.asynchronous import AsynchronousMethod
from fedddp.evaluation import Metrics
from fedddp.simulation.clock import Virtual, examples_trained
from fedddp.training.asynchronous.mailbox import Inbox
from fedddp.training.asynchronous.scheduler import (
    Flight,
    Order,
    Record,
    RecordedOrder,
    SampledOrder,
    VirtualOrder,
)
from fedddp.training.asynchronous.worker import MEET, VISIT, WORDS, Crew, Meeting, Update, meet
from fedddp.training.session import Session


def run_events(s: Session) -> None:
    """Collective. Train until `rounds` × `cohort.size` contributions have arrived.

    Raises:
        Stopped: a rank was asked to stop; a checkpoint was written first.
    """
    if s.rounds_done == s.run.rounds:  # killed after its last checkpoint: there is no meeting to end it
        return
    if s.world.is_coordinator:
        Coordinator(s).run()
    else:
        Crew(s).serve()


def make_order(s: Session) -> Order:
    """Return who is dispatched and who arrives when in this run.

    Raises:
        ValueError: no client has an example, or a record cannot be replayed.
    """
    run = s.run
    if run.replay is not None:
        return RecordedOrder(Path(run.replay), run.rounds * run.cohort.size)
    clients = np.flatnonzero(s.sizes)
    if not len(clients):
        raise ValueError("data: no client has a training example; choose another data.partition")
    if not isinstance(run.clock, Virtual):
        return SampledOrder(clients, s.world.groups, run.seed)
    work = examples_trained(run.local, s.sizes)
    in_flight = run.clock.in_flight or run.cohort.size
    return VirtualOrder(clients, in_flight, run.seed, run.clock, lambda client: int(work[client]))


@dataclass
class Tally:
    """What has happened since the last round's end."""

    cohort: list[int] = field(default_factory=list)
    """Clients by arrival."""
    staleness: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=lambda: [0.0, 0.0])
    steps: int = 0
    counts: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Contributions absorbed, invalid, clipped."""
    dispatched: int = 0
    """Dispatches before."""
    now: float = 0.0
    """Virtual time at its start."""


class Coordinator:
    """The coordinator's side: hands models out, takes contributions in the order that is due."""

    def __init__(self, s: Session) -> None:
        """Go on from the session's checkpoint, or start."""
        self.s, self.world = s, s.world
        self.method = cast(AsynchronousMethod, s.run.algorithm)
        self.crew = Crew(s) if s.world.group is not None else None
        self.inbox = Inbox(s.world)
        self.order = make_order(s)
        self.tally = Tally()
        self.models: dict[int, list[Tensor]] = {}  # by version, as long as somebody waits to train it
        self.updates: dict[int, Update] = {}  # by ticket, until they are due
        self.running: dict[int, int] = {}  # group -> ticket
        self.began: dict[int, float] = {}  # group -> when it was last handed a client
        self.busy = [0.0] * self.world.groups  # seconds that each trained, and that no row has told yet
        self.counters = s.server.counters.clone()  # their maximum over the arrivals
        if s.facts:
            self._restore()
        self.record = Record(s.folder, s.rounds_done * s.run.cohort.size + len(self.tally.cohort))

    def run(self) -> None:
        """Absorb one contribution after another; see `run_events`."""
        s, size, rounds = self.s, self.s.run.cohort.size, self.s.run.rounds
        try:
            while s.rounds_done < rounds:
                if self.tally.cohort and self.world.stop_requested():
                    self._meet(None, measure=False, save=True, stop=True)
                with s.timed("train"):
                    flight, update = self._arrival()
                with s.timed("step"):
                    self._absorb(flight, update)
                if len(self.tally.cohort) == size:
                    self._end_round()
        finally:
            self.record.close()

    # ---- dispatch and arrive ----

    def _arrival(self) -> tuple[Flight, Update]:
        """Return the next contribution, after handing out what can be trained in the meantime."""
        due = self.order.next(self.s.server.version)
        version = self.s.server.version
        if version not in self.models and any(flight.version == version for flight in self._untrained()):
            self.models[version] = [
                tensor.clone() for tensor in self.method.dispatch(self.s.server) if tensor.numel()
            ]
        self._hand_out()
        while (ticket := due.ticket if due else next(iter(self.updates), None)) not in self.updates:
            waiting = self._wanted() if self.crew is not None else []
            if self.crew is not None and waiting and not self.inbox.has_come():
                self._train_here(self.crew, waiting[0])
            else:
                self._receive()
            self._hand_out()
        assert ticket is not None
        return self.order.flights[ticket], self.updates.pop(ticket)

    def _untrained(self, most: int | None = None) -> list[Flight]:
        """Return who is not yet in training among the first `most` to arrive, in that order."""
        begun = {*self.updates, *self.running.values()}
        return [flight for flight in self.order.upcoming()[:most] if flight.ticket not in begun]

    def _wanted(self) -> list[Flight]:
        """Return whom of these to train: nobody who would arrive after the last round."""
        size = self.s.run.cohort.size
        return self._untrained((self.s.run.rounds - self.s.rounds_done) * size - len(self.tally.cohort))

    def _hand_out(self) -> None:
        """Send the other groups that are idle a client and a model each."""
        own = self.world.group
        idle = [g for g in range(self.world.groups) if g not in self.running and g != own]
        for group, flight in zip(idle, self._wanted(), strict=False):
            rank = self.world.leader(group)
            self.world.post([VISIT, flight.ticket, flight.client, 0, 0, 0, 0], rank)
            for tensor in self.models[flight.version]:
                self.world.send(tensor, rank)
            self.running[group], self.began[group] = flight.ticket, time.perf_counter()
            what = f"the leader of client group {group}, which trains client {flight.client}"
            self.inbox.expect(rank, WORDS, what)
            self._forget_models()

    def _receive(self) -> None:
        """Take what comes first from the other groups."""
        rank, (ticket, *facts) = self.inbox.next()
        tensors = self._room()
        for tensor in tensors:
            if tensor.numel():
                self.world.receive(tensor, rank)
        update = Update.of(tensors, facts)
        del self.running[update.group]
        self._take(int(ticket), update)

    def _train_here(self, crew: Crew, flight: Flight) -> None:
        """Train a client in this rank's own group."""
        order = [VISIT, flight.ticket, flight.client, 0, 0, 0, 0]
        self.world.group_broadcast(torch.tensor(order, dtype=torch.float64, device=self.world.device))
        for place, tensor in zip(crew.place(), self.models[flight.version], strict=True):
            place.copy_(tensor)
        self._take(flight.ticket, crew.train(ticket=flight.ticket, client=flight.client))
        self._forget_models()

    def _take(self, ticket: int, update: Update) -> None:
        """Keep an update until it is due."""
        self.updates[ticket] = update
        self.busy[update.group] += update.seconds
        self.s.tracker.visit_done()

    def _room(self) -> list[Tensor]:
        """Return empty tensors for an update."""
        server = self.s.server
        lengths = self.method.lengths(server.params.numel()).values()
        vectors = [server.params.new_empty(length) for length in lengths]
        return [*vectors, torch.empty_like(server.buffers), torch.empty_like(server.counters)]

    def _forget_models(self) -> None:
        needed = {flight.version for flight in self._untrained()}
        self.models = {version: model for version, model in self.models.items() if version in needed}

    # ---- absorb ----

    def _absorb(self, flight: Flight, update: Update) -> None:
        s, tally, server = self.s, self.tally, self.s.server
        staleness = server.version - flight.version
        *vectors, buffers, counters = update.tensors
        names = self.method.lengths(server.params.numel())
        contribution = Contribution(dict(zip(names, vectors, strict=True)), 1.0)
        contribution = s.received(flight.client, flight.ticket, contribution)
        admitted = s.run.aggregation.admit(flight.client, contribution, buffers, loss=update.loss[0])
        if admitted.vectors is not None:
            torch.maximum(self.counters, counters, out=self.counters)
            if self.method.absorb(server, Contribution(admitted.vectors, 1.0), staleness):
                server.version += 1
                server.counters.copy_(self.counters)
        if not admitted.valid:
            print(f"warning: NaN, infinity or overflow in the update of client {flight.client}", flush=True)
        for index, one in enumerate((admitted.vectors is not None, not admitted.valid, admitted.clipped)):
            tally.counts[index] += int(one)
        if admitted.valid:
            tally.loss = [a + b for a, b in zip(tally.loss, update.loss, strict=True)]
        tally.steps += update.steps
        tally.cohort.append(flight.client)
        tally.staleness.append(staleness)
        self.order.land(flight)
        facts = {"ticket": flight.ticket, "client": flight.client, "version": flight.version}
        place = {"round": s.rounds_done + 1, "staleness": staleness, "group": update.group}
        self.record.add({**place, **facts, "virtual": self.order.now})

    # ---- rounds, meetings, checkpoints ----

    def _end_round(self) -> None:
        """Record a row after every `cohort.size` arrivals, and meet when something is due."""
        s = self.s
        s.rounds_done += 1
        last = s.rounds_done == s.run.rounds
        stop = last or self.world.stop_requested()
        measure = s.run.evaluation.due(s.rounds_done, s.run.rounds)
        save = stop or s.rounds_done % s.run.checkpoint.every == 0
        if measure or save:
            self._finish_visits()
        row = self._summarise()
        self.tally = Tally(dispatched=self.order.dispatched, now=self.order.now)
        if measure or save:
            self._meet(row, measure=measure, save=save, stop=stop)
        else:
            s.record({"round": s.rounds_done, **row})

    def _summarise(self) -> Metrics:
        tally, s = self.tally, self.s
        seen, now = Counter(tally.staleness), time.perf_counter()
        under_way = [now - self.began[g] if g in self.running else 0.0 for g in range(self.world.groups)]
        row: Metrics = {
            **s.summary(
                loss=tally.loss,
                steps=tally.steps,
                counts=tally.counts,
                received=len(tally.cohort),
                dispatched=self.order.dispatched - tally.dispatched,
                busy=[told + spent for told, spent in zip(self.busy, under_way, strict=True)],
            ),
            "staleness/mean": sum(tally.staleness) / len(tally.staleness),
            "staleness/max": max(tally.staleness),
            "staleness/histogram": [seen[tau] for tau in range(max(seen) + 1)],
            "server/version": s.server.version,
            "cohort": tally.cohort,
        }
        if isinstance(self.order, VirtualOrder):
            row["time/virtual"] = self.order.now - tally.now
        self.busy = [-spent for spent in under_way]
        return row

    def _finish_visits(self) -> None:
        """Let the groups finish whom they train."""
        with self.s.timed("train"):
            while self.running:
                self._receive()

    def _meet(self, row: Metrics | None, *, measure: bool, save: bool, stop: bool) -> None:
        """Call all ranks together, when the groups have finished whom they train."""
        s = self.s
        self._finish_visits()
        if save:
            self.record.sync()
        meeting = Meeting(s.rounds_done, len(self.tally.cohort), s.server.version, measure, save, stop)
        order = [float(number) for number in (MEET, *meeting)]
        for group in range(self.world.groups):
            if group != self.world.group:
                self.world.post(order, self.world.leader(group))
        if self.crew is not None:
            self.world.group_broadcast(torch.tensor(order, dtype=torch.float64, device=self.world.device))
        tensors, facts = self._state() if save else (None, None)
        meet(s, meeting, row, tensors, facts)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return all that is in flight: models, updates, and who has which."""
        tensors = {"counters": self.counters}
        for version, model in self.models.items():
            tensors |= {f"model.{version}.{i}": tensor for i, tensor in enumerate(model)}
        for ticket, update in self.updates.items():
            tensors |= {f"update.{ticket}.{i}": tensor for i, tensor in enumerate(update.tensors)}
        facts = {
            "order": self.order.state(),
            "tally": asdict(self.tally),
            "updates": {ticket: update.facts() for ticket, update in self.updates.items()},
            "models": list(self.models),
        }
        return tensors, facts

    def _restore(self) -> None:
        """Take back what `_state` returned."""
        facts, saved, device = self.s.facts, self.s.partial, self.world.device
        self.order.load(facts["order"])
        self.tally = Tally(**facts["tally"])
        self.counters.copy_(saved["counters"])
        parts = sum(1 for tensor in self.method.dispatch(self.s.server) if tensor.numel())
        for version in facts["models"]:
            self.models[version] = [saved[f"model.{version}.{i}"].to(device) for i in range(parts)]
        for ticket, values in facts["updates"].items():
            count = len(self._room())
            tensors = [saved[f"update.{ticket}.{i}"].to(device) for i in range(count)]
            self.updates[int(ticket)] = Update.of(tensors, values)
        self.s.partial = {}
