"""Who is dispatched and whose contribution is taken next: by virtual time, as it happens, or as recorded."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedddp.rng import stream
from fedddp.simulation.clock import Virtual
from fedddp.storage.history import Row, read_rows, write_rows

ARRIVALS = "arrivals.jsonl"
LOST_IN_A_ROW = 10_000


@dataclass(frozen=True)
class Flight:
    """A client between its dispatch and its arrival."""

    ticket: int
    """Number of the dispatch, from 0; names the visit's random streams."""
    client: int
    version: int
    """Version of the model that it was sent."""
    ends: float = 0.0
    """When the visit ends, in virtual seconds; or its place in the record."""
    arrives: bool = True
    """False for a client that drops out or misses its deadline."""


class Order(ABC):
    """The clients in flight, and who of them arrives next."""

    def __init__(self) -> None:
        """Nobody is in flight."""
        self.flights: dict[int, Flight] = {}
        self.dispatched = 0
        self.now = 0.0

    @abstractmethod
    def next(self, version: int) -> Flight | None:
        """Dispatch whoever is due, with model `version`; return who arrives next, None if that is open."""

    def land(self, flight: Flight) -> None:
        """Take note that the contribution of `flight` was absorbed."""
        del self.flights[flight.ticket]

    def upcoming(self) -> list[Flight]:
        """Return those in flight who will arrive, in the order in which they are best trained."""
        return sorted(
            (f for f in self.flights.values() if f.arrives), key=lambda flight: (flight.ends, flight.ticket)
        )

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as JSON has it."""
        flights = [astuple(flight) for flight in self.flights.values()]
        return {"dispatched": self.dispatched, "now": self.now, "flights": flights}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self.dispatched, self.now = state["dispatched"], state["now"]
        self.flights = {values[0]: Flight(*values) for values in state["flights"]}


class SampledOrder(Order):
    """Clients are sampled one by one, uniformly among those not in flight; who arrives next is open."""

    def __init__(self, clients: NDArray[np.int64], in_flight: int, seed: int) -> None:
        """Sample among `clients`, and keep `in_flight` of them (all, if they are fewer) in flight."""
        super().__init__()
        self.clients, self.in_flight, self.seed = clients, min(in_flight, len(clients)), seed

    def next(self, version: int) -> Flight | None:
        """Fill up; whoever comes first comes first."""
        while len(self.flights) < self.in_flight:
            self._dispatch(version)
        return None

    def _dispatch(self, version: int) -> Flight:
        ticket, busy = self.dispatched, {flight.client for flight in self.flights.values()}
        random = stream("dispatch", self.seed, ticket)
        client = int(random.choice(self.clients))
        while client in busy:
            client = int(random.choice(self.clients))
        self.flights[ticket] = self._flight(ticket, client, version)
        self.dispatched += 1
        return self.flights[ticket]

    def _flight(self, ticket: int, client: int, version: int) -> Flight:
        return Flight(ticket, client, version)


class VirtualOrder(SampledOrder):
    """Clients arrive when the virtual clock says. Those of one moment arrive before others are dispatched."""

    def __init__(
        self,
        clients: NDArray[np.int64],
        in_flight: int,
        seed: int,
        clock: Virtual,
        work: Callable[[int], int],
    ) -> None:
        """Let `work(client)` be the examples that a client trains on in a visit."""
        super().__init__(clients, in_flight, seed)
        self.clock, self.work = clock, work

    def next(self, version: int) -> Flight | None:
        """Return the earliest of those in flight, at whose arrival it then is; the lost are replaced."""
        for _ in range(LOST_IN_A_ROW):
            if all(flight.ends > self.now for flight in self.flights.values()):
                super().next(version)
            flight = min(self.flights.values(), key=lambda flight: (flight.ends, flight.ticket))
            self.now = flight.ends
            if flight.arrives:
                return flight
            del self.flights[flight.ticket]
        raise ValueError(
            f"clock: {LOST_IN_A_ROW} clients in a row were lost with deadline_s={self.clock.deadline_s} and "
            f"speed.dropout={self.clock.speed.dropout}; raise clock.deadline_s or lower clock.speed.dropout"
        )

    def _flight(self, ticket: int, client: int, version: int) -> Flight:
        seconds, arrives = self.clock.visit(client, self.work(client), self.seed, ticket)
        return Flight(ticket, client, version, self.now + seconds, arrives)


class RecordedOrder(Order):
    """Clients arrive as they did in an earlier run."""

    def __init__(self, folder: Path, arrivals: int) -> None:
        """Read the order of the run in `folder`.

        Raises:
            ValueError: it has no record, or one of fewer than `arrivals` arrivals.
        """
        super().__init__()
        try:
            rows = read_rows(folder / ARRIVALS)
        except OSError as error:
            raise ValueError(
                f"replay: cannot read {folder / ARRIVALS}: {error.strerror}; give the directory of an "
                "asynchronous run"
            ) from None
        if len(rows) < arrivals:
            raise ValueError(
                f"replay: {folder} has {len(rows)} arrivals, but this run has {arrivals}; lower rounds"
            )
        self.recorded: dict[int, list[Flight]] = defaultdict(list)
        for place, row in enumerate(rows[:arrivals]):
            flight = Flight(row["ticket"], row["client"], row["version"], float(place))
            self.recorded[flight.version].append(flight)
        self.known = -1

    def next(self, version: int) -> Flight | None:
        """Dispatch all that were ever sent this version; return the next in the record."""
        while self.known < version:
            self.known += 1
            self.flights |= {flight.ticket: flight for flight in self.recorded[self.known]}
            self.dispatched += len(self.recorded[self.known])
        return min(self.flights.values(), key=lambda flight: flight.ends)

    def state(self) -> dict[str, Any]:
        """See `Order.state`."""
        return {**super().state(), "known": self.known}

    def load(self, state: Mapping[str, Any]) -> None:
        """See `Order.load`."""
        super().load(state)
        self.known = state["known"]


class Record:
    """The file `arrivals.jsonl`: a line an arrival, in the order in which they were absorbed."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Open it; lines after the first `keep`, those of the checkpoint, are cut off."""
        path = folder / ARRIVALS
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
