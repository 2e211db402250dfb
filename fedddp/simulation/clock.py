"""Clocks: how long a client takes, in virtual time, which is a function of the seed, or in wall time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedddp.algorithms.local import LocalConfig
from fedddp.rng import stream
from fedddp.section import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section

Indices = NDArray[np.int64]

__all__ = ["Clock", "LogNormalSpeed", "SameSpeed", "Speed", "SpeedTable", "Virtual", "Wall"]


@dataclass(frozen=True, kw_only=True)
class Speed(Section, ABC):
    """How fast clients are: one takes `slowness` × (`overhead_s` + `example_s` × examples trained on)."""

    key: ClassVar[str] = "clock.speed"
    chosen_by_name: ClassVar[bool] = True

    overhead_s: PositiveFloat = 0.1
    """Virtual seconds of a client besides its training, such as sending and receiving; > 0."""

    example_s: NonNegativeFloat = 0.001
    """Virtual seconds of training per example (and pass over it) of a client of usual speed, >= 0."""

    dropout: Fraction = 0.0
    """Probability that a client is lost after it was sent the model, in [0, 1)."""

    @abstractmethod
    def slowness(self, client: int, seed: int) -> float:
        """Return how many times longer than usual `client` takes, > 0."""

    def seconds(self, client: int, examples: int, seed: int) -> float:
        """Return the virtual seconds of a client that trains on `examples` examples (passes included)."""
        return self.slowness(client, seed) * (self.overhead_s + self.example_s * examples)

    def drops_out(self, client: int, seed: int, number: int) -> bool:
        """Return whether `client` is lost in the round (or dispatch) with that number."""
        return self.dropout > 0 and bool(stream("dropout", seed, number, client).random() < self.dropout)


@dataclass(frozen=True, kw_only=True)
class SameSpeed(Speed):
    """All clients are equally fast."""

    def slowness(self, client: int, seed: int) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class LogNormalSpeed(Speed):
    """Each client has a slowness of its own, log-normal with median 1."""

    sigma: NonNegativeFloat = 0.5
    """Standard deviation of the logarithm, >= 0; with 1 one client in twenty is five times slower."""

    def slowness(self, client: int, seed: int) -> float:
        """Return exp(σ z), z standard normal, one draw per client and seed."""
        return float(np.exp(self.sigma * stream("slowness", seed, client).standard_normal()))


@dataclass(frozen=True, kw_only=True)
class SpeedTable(Speed):
    """Each client's slowness is given."""

    factors: list[PositiveFloat] = field(default_factory=lambda: [1.0])
    """Slowness by client, each > 0; repeated where there are more clients than numbers."""

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError("factors must be one or more numbers > 0, got []")

    def slowness(self, client: int, seed: int) -> float:
        """Return the client's entry."""
        return self.factors[client % len(self.factors)]


@dataclass(frozen=True, kw_only=True)
class Clock(Section, ABC):
    """Decides which client arrives when."""

    key: ClassVar[str] = "clock"
    chosen_by_name: ClassVar[bool] = True

    virtual: ClassVar[bool]
    """Whether arrivals are a function of the seed; else they are known only as they happen."""

    def check(self, examples: Indices, min_clients: int, seed: int) -> None:
        """Raise ValueError when too few clients can ever arrive.

        Args:
            examples: how many examples each client of the population trains on, passes included; (N,).
            min_clients: clients that a round (or, in asynchronous training, the run) needs.
            seed: the run's seed.
        """

    @abstractmethod
    def arrivals(
        self, sampled: Indices, examples: Indices, wanted: int, seed: int, round_index: int
    ) -> tuple[Indices, float | None]:
        """Return the clients of a synchronous round that count, in ascending order, and how long it takes.

        Args:
            sampled: the clients that were sent the model, ascending; (s,).
            examples: how many examples each of them trains on, passes included; (s,).
            wanted: arrivals that end the round.
            seed: the run's seed.
            round_index: index of the round, from 0.

        Returns:
            The cohort, and the round's virtual seconds (None on the wall clock).
        """


@dataclass(frozen=True, kw_only=True)
class Virtual(Clock):
    """Clients take the time that `speed` gives them: arrivals are a function of the seed alone."""

    virtual = True

    speed: Speed = field(default_factory=SameSpeed)
    """How fast clients are, and how often they drop out."""

    deadline_s: PositiveFloat | None = None
    """Virtual seconds after which the coordinator stops waiting for a client, > 0; none: it waits for all."""

    in_flight: PositiveInt | None = None
    """Clients that train at once in asynchronous training, >= 1; none: as many as cohort.size."""

    def check(self, examples: Indices, min_clients: int, seed: int) -> None:
        """Raise ValueError when fewer than `min_clients` clients can meet the deadline; see `Clock.check`."""
        if self.deadline_s is None:
            return
        learners, limit = np.flatnonzero(examples).tolist(), self.deadline_s
        in_time = (k for k in learners if self.speed.seconds(k, int(examples[k]), seed) <= limit)
        needed = min(min_clients, len(learners))
        found = len(list(islice(in_time, needed)))
        if found < needed:
            raise ValueError(
                f"clock.deadline_s={limit:g} is met by {found} of {len(learners)} clients with examples, but "
                f"{needed} must arrive; raise clock.deadline_s"
            )

    def local_training(self, client: int, examples: int, seed: int, number: int) -> tuple[float, bool]:
        """Return how long a client is in flight, in virtual seconds, and whether its update arrives."""
        seconds = self.speed.seconds(client, examples, seed)
        arrives = not self.speed.drops_out(client, seed, number)
        if self.deadline_s is not None and (not arrives or seconds > self.deadline_s):
            return self.deadline_s, False
        return seconds, arrives

    def arrivals(
        self, sampled: Indices, examples: Indices, wanted: int, seed: int, round_index: int
    ) -> tuple[Indices, float | None]:
        """Return the first `wanted` arrivals; the round waits for lost clients until their deadline."""
        clients = [
            (*self.local_training(client, trained, seed, round_index), client)
            for client, trained in zip(sampled.tolist(), examples.tolist(), strict=True)
        ]
        arrived = sorted((seconds, client) for seconds, arrives, client in clients if arrives)[:wanted]
        ends = [s for s, _ in arrived] if len(arrived) == wanted else [s for s, _, _ in clients]
        cohort = np.array(sorted(client for _, client in arrived), dtype=np.int64)
        return cohort, max(ends, default=0.0)


@dataclass(frozen=True, kw_only=True)
class Wall(Clock):
    """Clients take as long as their training takes; asynchronous training records the order of arrivals."""

    virtual = False

    def arrivals(
        self, sampled: Indices, examples: Indices, wanted: int, seed: int, round_index: int
    ) -> tuple[Indices, float | None]:
        """Return all sampled clients, and no virtual time."""
        return sampled, None


def examples_trained(local: LocalConfig, examples: Indices) -> Indices:
    """Return how many examples clients with `examples` (n,) train on in a round, passes included."""
    if local.steps is None:
        return examples * local.epochs
    batches = np.maximum(-(-examples // local.batch_size), 1)  # per pass; its last batch may be smaller
    passes, steps = np.divmod(local.steps, batches)
    trained: Indices = passes * examples + np.minimum(steps * local.batch_size, examples)
    return trained
