"""Which client is dispatched and which arrives next: by virtual time, as it happens, or as recorded."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedddp.rng import stream
from fedddp.section import local_path
from fedddp.simulation.clock import Virtual, examples_trained
from fedddp.storage.history import Row, read_rows, write_rows
from fedddp.training.session import Indices, Session

ARRIVALS = "arrivals.jsonl"
LOST_IN_A_ROW = 10_000
"""Lost clients after which the clock's settings are taken to be impossible."""


@dataclass(frozen=True)
class InFlightClient:
    """A client between its dispatch and its arrival."""

    dispatch_id: int
    """Number of the dispatch, from 0; names the random streams of the local training."""
    client: int
    version: int
    """Version of the model that it was sent."""
    ends: float = 0.0
    """When it arrives, in virtual seconds; in a replay its position in the record."""
    arrives: bool = True
    """False for a client that drops out or misses its deadline."""


class Scheduler(ABC):
    """The clients in flight, and which of them arrives next."""

    def __init__(self) -> None:
        """Start with no client in flight."""
        self.in_flight: dict[int, InFlightClient] = {}
        self.dispatched = 0
        self.now = 0.0

    @abstractmethod
    def next(self, version: int) -> InFlightClient | None:
        """Dispatch due clients with model `version`; return the next to arrive, None if that is open."""

    def complete(self, client: InFlightClient) -> None:
        """Record that the update of `client` was absorbed."""
        del self.in_flight[client.dispatch_id]

    def upcoming(self) -> list[InFlightClient]:
        """Return the clients in flight that will arrive, in the order of arrival."""
        arriving = (client for client in self.in_flight.values() if client.arrives)
        return sorted(arriving, key=lambda client: (client.ends, client.dispatch_id))

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as JSON has it."""
        in_flight = [astuple(client) for client in self.in_flight.values()]
        return {"dispatched": self.dispatched, "now": self.now, "in_flight": in_flight}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the `state` of a stopped run."""
        self.dispatched, self.now = state["dispatched"], state["now"]
        self.in_flight = {values[0]: InFlightClient(*values) for values in state["in_flight"]}


class SampledScheduler(Scheduler):
    """Clients are sampled one by one, uniformly among those not in flight; the next to arrive is open."""

    def __init__(self, clients: Indices, concurrent: int, seed: int) -> None:
        """Sample among `clients`, and keep `concurrent` of them (all, if they are fewer) in flight."""
        super().__init__()
        self.clients, self.concurrent, self.seed = clients, min(concurrent, len(clients)), seed

    def next(self, version: int) -> InFlightClient | None:
        """Dispatch until enough clients are in flight."""
        while len(self.in_flight) < self.concurrent:
            self._dispatch(version)
        return None

    def _dispatch(self, version: int) -> None:
        dispatch_id, busy = self.dispatched, {client.client for client in self.in_flight.values()}
        rng = stream("dispatch", self.seed, dispatch_id)
        client = int(rng.choice(self.clients))
        while client in busy:
            client = int(rng.choice(self.clients))
        self.in_flight[dispatch_id] = self._timed(dispatch_id, client, version)
        self.dispatched += 1

    def _timed(self, dispatch_id: int, client: int, version: int) -> InFlightClient:
        return InFlightClient(dispatch_id, client, version)


class VirtualScheduler(SampledScheduler):
    """Clients arrive by the virtual clock. All arrivals of one moment come before the next dispatch."""

    def __init__(self, clients: Indices, concurrent: int, seed: int, clock: Virtual, work: Indices) -> None:
        """Let `work` be the examples that each client of the population trains on; (N,)."""
        super().__init__(clients, concurrent, seed)
        self.clock, self.work = clock, work

    def next(self, version: int) -> InFlightClient | None:
        """Return the first client to arrive, and advance the clock to then; lost clients are replaced."""
        for _ in range(LOST_IN_A_ROW):
            if all(client.ends > self.now for client in self.in_flight.values()):
                super().next(version)
            first = min(self.in_flight.values(), key=lambda client: (client.ends, client.dispatch_id))
            self.now = first.ends
            if first.arrives:
                return first
            del self.in_flight[first.dispatch_id]
        raise ValueError(
            f"clock: {LOST_IN_A_ROW} clients in a row were lost with deadline_s={self.clock.deadline_s} and "
            f"speed.dropout={self.clock.speed.dropout}; raise clock.deadline_s or lower clock.speed.dropout"
        )

    def _timed(self, dispatch_id: int, client: int, version: int) -> InFlightClient:
        seconds, arrives = self.clock.local_training(client, int(self.work[client]), self.seed, dispatch_id)
        return InFlightClient(dispatch_id, client, version, self.now + seconds, arrives)


class ReplayScheduler(Scheduler):
    """Clients arrive as they did in an earlier run."""

    def __init__(self, directory: Path, arrivals: int) -> None:
        """Read the arrivals of the run in `directory`.

        Raises:
            ValueError: it has no record, or one of fewer than `arrivals` arrivals.
        """
        super().__init__()
        try:
            rows = read_rows(directory / ARRIVALS)
        except OSError as error:
            raise ValueError(
                f"replay: cannot read {directory / ARRIVALS}: {error.strerror}; give the directory of an "
                "asynchronous run"
            ) from None
        if len(rows) < arrivals:
            raise ValueError(
                f"replay: {directory} has {len(rows)} arrivals, but this run has {arrivals}; lower rounds"
            )
        if any("dispatch_id" not in row for row in rows):
            raise ValueError(
                f"replay: {directory} was written by fedddp before 0.1.0, which recorded arrivals otherwise; "
                "train it again"
            )
        self.recorded: dict[int, list[InFlightClient]] = defaultdict(list)
        for position, row in enumerate(rows[:arrivals]):
            client = InFlightClient(row["dispatch_id"], row["client"], row["version"], float(position))
            self.recorded[client.version].append(client)
        self.newest_version = -1

    def next(self, version: int) -> InFlightClient | None:
        """Dispatch all clients that were sent this version; return the next in the record."""
        while self.newest_version < version:
            self.newest_version += 1
            clients = self.recorded[self.newest_version]
            self.in_flight |= {client.dispatch_id: client for client in clients}
            self.dispatched += len(clients)
        return min(self.in_flight.values(), key=lambda client: client.ends)

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as JSON has it."""
        return {**super().state(), "newest_version": self.newest_version}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the `state` of a stopped run."""
        super().load(state)
        self.newest_version = state["newest_version"]


def make_scheduler(s: Session) -> Scheduler:
    """Return the scheduler of this run.

    Raises:
        ValueError: no client has an example, or a record cannot be replayed.
    """
    config = s.config
    if config.replay is not None:
        return ReplayScheduler(local_path(config.replay, "replay"), config.rounds * config.cohort.size)
    clients = np.flatnonzero(s.sizes)
    if not len(clients):
        raise ValueError("data: no client has a training example; choose another data.partition")
    if not isinstance(config.clock, Virtual):
        return SampledScheduler(clients, s.world.groups, config.seed)
    concurrent = config.clock.in_flight or config.cohort.size
    work = examples_trained(config.local, s.sizes)
    return VirtualScheduler(clients, concurrent, config.seed, config.clock, work)


class ArrivalLog:
    """The file `arrivals.jsonl`: a line per arrival, in the order in which they were absorbed."""

    def __init__(self, directory: Path, keep: int) -> None:
        """Open it; lines after the first `keep`, those of the checkpoint, are cut off."""
        path = directory / ARRIVALS
        path.touch()
        with path.open("rb") as lines:
            end = sum(len(line) for _, line in zip(range(keep), lines, strict=False))
        self._file = path.open("ab", buffering=0)
        self._file.truncate(end)

    def add(self, row: Row) -> None:
        """Append one arrival."""
        write_rows(self._file, [row])

    def sync(self) -> None:
        """Force the lines to the disk, so that no checkpoint is newer than its lines."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
