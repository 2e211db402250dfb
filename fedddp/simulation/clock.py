"""How long a client takes: virtual time, which is a function of the seed, or the time of the wall."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from fedddp.algorithms.local import Local
from fedddp.rng import stream

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Speed(ABC):
    """How fast clients are: a visit takes `slowness` × (`visit_s` + `example_s` × examples trained on)."""

    visit_s: float = 0.1
    """Virtual seconds of a visit besides its training, such as sending and receiving; > 0."""

    example_s: float = 0.001
    """Virtual seconds of training per example (and pass over it) of a client of usual speed, >= 0."""

    dropout: float = 0.0
    """Probability that a client does not come back from a visit, in [0, 1)."""

    def __post_init__(self) -> None:
        if not self.visit_s > 0:
            raise ValueError(f"visit_s must be > 0 seconds, got {self.visit_s}")
        if self.example_s < 0:
            raise ValueError(f"example_s must be >= 0 seconds, got {self.example_s}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @abstractmethod
    def slowness(self, client: int, seed: int) -> float:
        """Return how many times longer than usual `client` takes, > 0."""

    def seconds(self, client: int, examples: int, seed: int) -> float:
        """Return the virtual seconds of a visit that trains on `examples` examples (passes included)."""
        return self.slowness(client, seed) * (self.visit_s + self.example_s * examples)

    def drops_out(self, client: int, seed: int, visit: int) -> bool:
        """Return whether `client` is lost in the round (or dispatch) number `visit`."""
        return self.dropout > 0 and bool(stream("dropout", seed, visit, client).random() < self.dropout)


@dataclass(frozen=True, kw_only=True)
class SameSpeed(Speed):
    """All clients are equally fast."""

    def slowness(self, client: int, seed: int) -> float:
        """One."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class LogNormalSpeed(Speed):
    """Each client has a slowness of its own, log-normal with median 1."""

    sigma: float = 0.5
    """Standard deviation of the logarithm, >= 0; 1 makes one client in twenty five times slower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma < 0:
            raise ValueError(f"sigma must be >= 0, got {self.sigma}")

    def slowness(self, client: int, seed: int) -> float:
        """Exp(σ z), z standard normal, one draw per client and seed."""
        return float(np.exp(self.sigma * stream("slowness", seed, client).standard_normal()))


@dataclass(frozen=True, kw_only=True)
class SpeedTable(Speed):
    """Each client's slowness is given."""

    factors: list[float] = field(default_factory=lambda: [1.0])
    """Slowness by client, each > 0; begun anew where there are more clients than numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.factors or min(self.factors) <= 0:
            raise ValueError(f"factors must be one or more numbers > 0, got {self.factors}")

    def slowness(self, client: int, seed: int) -> float:
        """The client's entry."""
        return self.factors[client % len(self.factors)]


@dataclass(frozen=True, kw_only=True)
class Clock(ABC):
    """What decides who arrives when."""

    def check(self, examples: Indices, least: int, seed: int) -> None:
        """Raise ValueError when too few clients can ever arrive.

        Args:
            examples: how many examples each client of the population trains on, passes included.
            least: clients that a round (or, in asynchronous training, the run) needs.
            seed: the run's seed.
        """

    @abstractmethod
    def arrivals(
        self, sampled: Indices, examples: Indices, wanted: int, seed: int, round_index: int
    ) -> tuple[Indices, float | None]:
        """Return the clients of a synchronous round that count, in ascending order, and how long it takes.

        Args:
            sampled: the clients that were sent the model, ascending.
            examples: how many examples each of them trains on, passes included.
            wanted: arrivals that end the round.
            seed: the run's seed.
            round_index: index of the round, from 0.

        Returns:
            The cohort, and the round's virtual seconds (None on the wall clock).
        """


@dataclass(frozen=True, kw_only=True)
class Virtual(Clock):
    """Clients take the time that `speed` says: who arrives when is a function of the seed alone."""

    speed: Speed = field(default_factory=SameSpeed)
    """How fast clients are, and how often they drop out."""

    deadline_s: float | None = None
    """Virtual seconds after which a client that was sent the model is given up, > 0; none: waited for."""

    in_flight: int | None = None
    """Clients that train at once in asynchronous training, >= 1; none: as many as cohort.size."""

    def __post_init__(self) -> None:
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ValueError(
                f"deadline_s must be > 0 seconds, got {self.deadline_s}; leave it out to wait for all"
            )
        if self.in_flight is not None and self.in_flight < 1:
            raise ValueError(f"in_flight must be >= 1, got {self.in_flight}")

    def check(self, examples: Indices, least: int, seed: int) -> None:
        """See `Clock.check`; stops looking when it has found `least` of them."""
        if self.deadline_s is None:
            return
        learners, limit = np.flatnonzero(examples).tolist(), self.deadline_s
        in_time = (k for k in learners if self.speed.seconds(k, int(examples[k]), seed) <= limit)
        least = min(least, len(learners))
        found = len(list(islice(in_time, least)))
        if found < least:
            raise ValueError(
                f"clock.deadline_s={limit:g} is met by {found} of {len(learners)} clients with examples, but "
                f"{least} must arrive; raise clock.deadline_s"
            )

    def visit(self, client: int, examples: int, seed: int, number: int) -> tuple[float, bool]:
        """Return when a visit ends, in virtual seconds from its dispatch, and whether the client arrives."""
        seconds = self.speed.seconds(client, examples, seed)
        arrives = not self.speed.drops_out(client, seed, number)
        if self.deadline_s is not None and (not arrives or seconds > self.deadline_s):
            return self.deadline_s, False
        return seconds, arrives

    def arrivals(
        self, sampled: Indices, examples: Indices, wanted: int, seed: int, round_index: int
    ) -> tuple[Indices, float | None]:
        """See `Clock.arrivals`; lost clients are missed until the deadline, or until they were due."""
        visits = [
            (*self.visit(client, work, seed, round_index), client)
            for client, work in zip(sampled.tolist(), examples.tolist(), strict=True)
        ]
        arrived = sorted((seconds, client) for seconds, arrives, client in visits if arrives)[:wanted]
        ends = [s for s, _ in arrived] if len(arrived) == wanted else [s for s, _, _ in visits]
        cohort = np.array(sorted(client for _, client in arrived), dtype=np.int64)
        return cohort, max(ends, default=0.0)


@dataclass(frozen=True, kw_only=True)
class Wall(Clock):
    """Clients take the time they take; in asynchronous training the order of arrivals is recorded."""

    def arrivals(
        self, sampled: Indices, examples: Indices, wanted: int, seed: int, round_index: int
    ) -> tuple[Indices, float | None]:
        """See `Clock.arrivals`; everybody arrives."""
        return sampled, None


def examples_trained(local: Local, examples: Indices) -> Indices:
    """Return how many examples visits to clients of these sizes train on, passes included."""
    if local.steps is None:
        return examples * local.epochs
    return np.minimum(examples, local.batch_size) * local.steps
