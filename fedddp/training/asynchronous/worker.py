"""The client groups' side of asynchronous training: follow the coordinator's orders."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedddp.algorithms import ServerState
from fedddp.evaluation import Metrics
from fedddp.training.session import Session, Stopped


class Dispatch(NamedTuple):
    """The coordinator's order to a group: train this client from the model that follows."""

    dispatch_id: int
    client: int


class SyncPoint(NamedTuple):
    """The coordinator's order to all ranks: evaluate, record and save together."""

    rounds_done: int
    arrived: int
    """Arrivals since the end of the last round."""
    version: int
    evaluate: bool
    save: bool
    stop: bool
    """Whether the loop ends here, at the last round or before."""


class Report(NamedTuple):
    """A group's report of a local training; the update's tensors follow."""

    dispatch_id: int
    loss_sum: float
    loss_count: float
    steps: int
    seconds: float
    """How long the group trained."""
    group: int


ORDERS: tuple[type[Any], ...] = (Dispatch, SyncPoint)
ORDER_LENGTH = 1 + max(len(kind._fields) for kind in ORDERS)
REPORT_LENGTH = len(Report._fields)


def pack(order: Dispatch | SyncPoint) -> list[float]:
    """Return an order as `ORDER_LENGTH` numbers: its kind, its fields, zeros."""
    numbers = [float(ORDERS.index(type(order))), *map(float, order)]
    return numbers + [0.0] * (ORDER_LENGTH - len(numbers))


def unpack(numbers: Sequence[float]) -> Dispatch | SyncPoint:
    """Return the order in `numbers`."""
    kind = ORDERS[int(numbers[0])]
    values = zip(kind.__annotations__.values(), numbers[1:], strict=False)
    order: Dispatch | SyncPoint = kind(*(bool(v) if hint == "bool" else int(v) for hint, v in values))
    return order


@dataclass
class TrainedUpdate:
    """The result of a dispatch."""

    report: Report
    tensors: list[Tensor]
    """The update's vectors in the order of `Algorithm.lengths`, float buffers, integer buffers."""


@dataclass
class Worker:
    """This rank's part in its client group."""

    s: Session
    model: ServerState = field(init=False)
    """The model that was dispatched to this group."""

    def __post_init__(self) -> None:
        server = self.s.server
        self.model = ServerState.of(self.s.flat, server.population)
        self.model.vectors = {name: server.vectors[name].clone() for name in self.s.config.algorithm.sends}

    def serve(self) -> None:
        """Collective over the group. Follow the coordinator's orders until the end of the run."""
        world = self.s.world
        while True:
            numbers = torch.zeros(ORDER_LENGTH, dtype=torch.float64, device=world.device)
            if world.leads_group:
                numbers = numbers.new_tensor(world.collect(ORDER_LENGTH, rank=0))
            world.group_broadcast(numbers)
            order = unpack(numbers.tolist())
            if isinstance(order, SyncPoint):
                if synchronize(self.s, order):
                    return
                continue
            if world.leads_group:
                for tensor in self.model_tensors():
                    world.receive(tensor, rank=0)
            trained = self.train(order)
            if world.leads_group:
                world.post(trained.report, rank=0)
                for tensor in trained.tensors:
                    if tensor.numel():
                        world.send(tensor, rank=0)

    def model_tensors(self) -> list[Tensor]:
        """Return the tensors of the dispatched model, in the order in which they are sent; none empty."""
        return [tensor for tensor in self.s.config.algorithm.dispatch(self.model) if tensor.numel()]

    def train(self, order: Dispatch) -> TrainedUpdate:
        """Collective over the group. Train a client from the model that the leader holds."""
        s, config, start = self.s, self.s.config, time.perf_counter()
        s.world.group_broadcast(*self.model_tensors())
        round_index = min(order.dispatch_id // config.cohort.size, config.rounds - 1)
        lr = config.local.lr_at(round_index, config.rounds)
        job = s.job(order.client, number=order.dispatch_id, lr=lr, weight=1.0, share=1.0)
        s.world.restart_compression()
        result = s.trainer.train(self.model, job, {})
        s.world.stop_requested()  # announces it to the coordinator when this rank was asked
        names = config.algorithm.lengths(s.server.params.numel())
        vectors = [result.update.vectors[name] for name in names]
        tensors = [*vectors, result.buffers.clone(), result.integer_buffers.clone()]
        loss_sum, loss_count = result.loss
        seconds, group = time.perf_counter() - start, s.world.group or 0
        report = Report(order.dispatch_id, loss_sum, loss_count, result.steps, seconds, group)
        return TrainedUpdate(report, tensors)


def synchronize(
    s: Session,
    point: SyncPoint,
    row: Metrics | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> bool:
    """Collective. Evaluate, record and save what is due; return whether the loop ends.

    Args:
        s: the session.
        point: what is due.
        row: the coordinator's row of the round that ended; None within one.
        tensors: what the coordinator saves besides the server.
        metadata: likewise.

    Raises:
        Stopped: the run was asked to stop; `Checkpoints.finish` waits for its checkpoint.
    """
    s.rounds_done, s.server.version = point.rounds_done, point.version
    name = f"round-{point.rounds_done:05d}"
    if point.arrived:
        name, line = f"{name}-{point.arrived:05d}", None
    else:
        line = {"round": point.rounds_done, **(row or {})}
    if point.evaluate and line is not None:
        line |= s.evaluate(point.rounds_done)
    stalled = point.evaluate and s.stalled
    if point.save or stalled:
        s.save(name, line, tensors=tensors, metadata=metadata)
    elif line is not None:
        s.record(line)
    if point.stop and point.rounds_done < s.config.rounds and not stalled:
        raise Stopped
    return point.stop or stalled
