"""The groups' side of asynchronous training: train whom the coordinator hands out, meet when it calls."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedddp.algorithms.algorithm import Server
from fedddp.evaluation import Metrics
from fedddp.training.session import Session, Stopped

VISIT, MEET = 0, 1
WORDS = 7
"""Numbers in a message, of the coordinator or to it."""


class Meeting(NamedTuple):
    """What all ranks do together, at the coordinator's call."""

    rounds_done: int
    arrived: int
    """Arrivals since the last round's end."""
    version: int
    measure: bool
    save: bool
    stop: bool
    """Whether the loop ends here, at the last round or before."""


@dataclass
class Update:
    """What came of a visit."""

    tensors: list[Tensor]
    """The contribution's vectors in the order of `Method.lengths`, float buffers, integer buffers."""
    loss: list[float]
    """Sum and count of the training loss."""
    steps: int
    seconds: float
    """How long the group trained."""
    group: int

    def facts(self) -> list[float]:
        """Return everything but the tensors."""
        return [*self.loss, self.steps, self.seconds, self.group]

    @classmethod
    def of(cls, tensors: list[Tensor], facts: list[float]) -> Update:
        """Put tensors and `facts` together again."""
        return cls(tensors, facts[:2], int(facts[2]), facts[3], int(facts[4]))


@dataclass
class Crew:
    """This rank's part in its group."""

    s: Session
    model: Server = field(init=False)
    """The model that was dispatched to this group."""

    def __post_init__(self) -> None:
        """Make room for a dispatched model."""
        server = self.s.server
        self.model = Server(
            server.params.clone(), server.buffers.clone(), server.counters.clone(), server.population
        )
        self.model.vectors = {name: server.vectors[name].clone() for name in self.s.run.algorithm.sends}

    def serve(self) -> None:
        """Follow the coordinator's orders to the end of the run."""
        world = self.s.world
        while True:
            order = torch.zeros(WORDS, dtype=torch.float64, device=world.device)
            if world.leads_group:
                order = order.new_tensor(world.collect(WORDS, rank=0))
            world.group_broadcast(order)
            kind, *numbers = (int(number) for number in order.tolist())
            if kind == MEET:
                rounds_done, arrived, version, *flags = numbers
                if meet(self.s, Meeting(rounds_done, arrived, version, *(bool(flag) for flag in flags))):
                    return
                continue
            if world.leads_group:
                for tensor in self.place():
                    world.receive(tensor, rank=0)
            update = self.train(ticket=numbers[0], client=numbers[1])
            if world.leads_group:
                world.post([numbers[0], *update.facts(), 0.0], rank=0)
                for tensor in update.tensors:
                    if tensor.numel():
                        world.send(tensor, rank=0)

    def place(self) -> list[Tensor]:
        """Return where a dispatched model goes, in the order in which it comes; nothing empty."""
        return [tensor for tensor in self.s.run.algorithm.dispatch(self.model) if tensor.numel()]

    def train(self, *, ticket: int, client: int) -> Update:
        """Collective over the group. Visit `client`, from the model that the leader holds."""
        s, start = self.s, time.perf_counter()
        s.world.group_broadcast(*self.place())
        indices = s.indices(client)
        round_index = min(ticket // s.run.cohort.size, s.run.rounds - 1)
        result = s.trainer.visit(
            self.model,
            client=client,
            round_index=ticket,
            indices=indices,
            examples_in_cohort=len(indices),
            cohort_size=1,
            lr=s.run.local.lr_at(round_index, s.run.rounds),
            state={},
            seed=s.run.seed,
        )
        s.world.stop_requested()  # tells the coordinator when it is this rank that was asked
        names = s.run.algorithm.lengths(s.server.params.numel())
        vectors = [result.contribution.vectors[name] for name in names]
        tensors = [*vectors, result.buffers.clone(), result.counters.clone()]
        spent = time.perf_counter() - start
        return Update(tensors, result.loss.tolist(), result.steps, spent, s.world.group or 0)


def meet(
    s: Session,
    meeting: Meeting,
    row: Metrics | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> bool:
    """Collective. Measure, record and save what is due; return whether the loop ends.

    Args:
        s: the session.
        meeting: what to do.
        row: the coordinator's row of the round that ended; None in the middle of one.
        tensors: what the coordinator saves besides the server.
        facts: likewise.

    Raises:
        Stopped: the run was asked to stop; a checkpoint was written first.
    """
    s.rounds_done, s.server.version = meeting.rounds_done, meeting.version
    name = f"round-{meeting.rounds_done:05d}"
    if meeting.arrived:
        name, line = f"{name}-{meeting.arrived:05d}", None
    else:
        line = {"round": meeting.rounds_done, **(row or {})}
    if meeting.measure and line is not None:
        line |= s.measure(meeting.rounds_done)
    if meeting.save:
        s.save(name, line, tensors=tensors, facts=facts)
    elif line is not None:
        s.record(line)
    if meeting.stop and meeting.rounds_done < s.run.rounds:
        raise Stopped
    return meeting.stop
