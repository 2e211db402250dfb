"""The round loop, written once: sample, send, train, aggregate, step, evaluate, record."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedddp.aggregation import Accumulator
from fedddp.algorithms import SynchronousAlgorithm
from fedddp.evaluation import Metrics
from fedddp.simulation.clock import examples_trained
from fedddp.simulation.cohort import assign
from fedddp.training.client_trainer import ClientJob, ClientResult
from fedddp.training.session import Indices, Session, Stopped

logger = logging.getLogger(__name__)


class CohortResults(NamedTuple):
    """The result of each local training of a round, by position in the cohort; zeros before it."""

    trained: Tensor
    """1 for a client whose local training ended; (m,) int64."""
    valid: Tensor
    """1 for a client whose update was finite and could be summed; (m,) int64."""
    loss_sum: Tensor
    """Sum of the training loss, of valid updates; (m,) float64."""
    loss_count: Tensor
    """Examples trained on, of valid updates; (m,) float64."""
    steps: Tensor
    """Optimizer steps; (m,) int64."""

    @classmethod
    def empty(cls, clients: int) -> CohortResults:
        """Return the results of a cohort of `clients` before it trains."""
        integers, floats = (torch.zeros(clients, dtype=d) for d in (torch.int64, torch.float64))
        return cls(integers, integers.clone(), floats, floats.clone(), integers.clone())

    def put(self, position: int, result: ClientResult, *, valid: bool) -> None:
        """Record the result of the client at `position` in the cohort."""
        trained, counted, loss_sum, loss_count, steps = (tensor.numpy() for tensor in self)
        trained[position], steps[position] = 1, result.steps
        if valid:
            counted[position] = 1
            loss_sum[position], loss_count[position] = result.loss.tolist()


@dataclass
class Round:
    """A round in progress on this rank."""

    cohort: Indices
    """The clients whose updates count, of all that were sampled; (m,)."""
    waiting: Indices
    """Those of them that have not trained yet."""
    sampled: int
    missing: int
    """Sampled clients that did not report, of `cohort.size`."""
    virtual_s: float | None
    """Seconds of the round on the virtual clock; None on the wall clock."""
    updates: Accumulator
    results: CohortResults
    busy: Tensor
    """Seconds that each group trained, of those since the run was last resumed; float64, shape (G,)."""
    stopping: Tensor
    """Above 0 if a rank was asked to stop; (1,) int64."""


def run_rounds(s: Session) -> None:
    """Collective. Train until the last round.

    Raises:
        Stopped: a rank was asked to stop; a checkpoint was written first.
    """
    stop = not s.complete and s.world.agree_to_stop()
    while not s.complete:
        current = run_round(s, stop)
        s.rounds_done += 1
        row = {"round": s.rounds_done, **round_metrics(s, current), **s.evaluate(s.rounds_done)}
        last = s.complete
        stop = bool(current.stopping) and not last
        if stop or last or s.rounds_done % s.config.checkpoint.every == 0:
            s.save(f"round-{s.rounds_done:05d}", row)
        else:
            s.record(row)
        if stop:
            raise Stopped


def run_round(s: Session, stop: bool = False) -> Round:
    """Collective. One round of the algorithm over a sampled cohort; `stop`: no client trains."""
    current = sample(s)  # 1. sample
    current.stopping += int(stop)
    assignment = assign(current.waiting, s.sizes[current.waiting], s.world.groups)
    s.send()  # 2. send
    s.tracker.begin_round(len(current.waiting), s.world.groups * s.trainer.clients_at_once)
    with s.timed("train"):  # 3. train
        s.states.move(assignment)
        losses = initial_losses(s, current) if s.config.algorithm.needs_initial_loss else None
        train_clients(s, current, assignment, losses)
    with s.timed("aggregate"):  # 4. aggregate
        current.updates.reduce(s.world)
        current.stopping += int(s.world.stop_requested())
        s.world.sum_numbers(*current.updates.numbers(), *current.results, current.busy, current.stopping)
    trained = current.results.trained.numpy().astype(bool)
    if s.keeps_state:
        s.states.settle(assignment, current.cohort[trained])
    if not trained.all():
        tensors = {f"results.{name}": t for name, t in current.results._asdict().items()}
        s.save(
            f"round-{s.rounds_done:05d}-{trained.sum():05d}", tensors={**tensors, **current.updates.state()}
        )
        raise Stopped
    with s.timed("step"):  # 5. step
        step(s, current)
    log_invalid(s, current)
    return current


def sample(s: Session) -> Round:
    """Return the next round, empty or as it was stopped, with the clients that have yet to train."""
    config = s.config
    sampled = config.cohort.sample(len(s.split), config.seed, s.rounds_done)
    wanted = len(sampled) - config.cohort.extra
    work = examples_trained(config.local, s.sizes[sampled])
    cohort, seconds = config.clock.arrivals(sampled, work, wanted, config.seed, s.rounds_done)
    updates = accumulator(s, len(cohort))
    results = CohortResults.empty(len(cohort))
    waiting = cohort
    if s.partial:
        saved = CohortResults(*(s.partial[f"results.{name}"] for name in CohortResults._fields))
        waiting = cohort[saved.trained.numpy() == 0]
        if s.world.is_coordinator:  # on one rank: the results of all ranks are summed
            updates.load(s.partial)
            results = saved
        s.partial = {}
    busy, stopping = torch.zeros(s.world.groups, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    missing = wanted - len(cohort)
    return Round(cohort, waiting, len(sampled), missing, seconds, updates, results, busy, stopping)


def accumulator(s: Session, clients: int) -> Accumulator:
    """Return an empty accumulator for `clients` clients, in the memory of the round before."""
    server = s.server
    if s.updates is None:
        lengths = {**s.config.algorithm.lengths(server.params.numel()), "buffers": server.buffers.numel()}
        rule = s.config.aggregation
        s.updates = rule.accumulator(lengths, clients, server.params, server.integer_buffers)
    else:
        s.updates.reset(clients)
    return s.updates


def initial_losses(s: Session, current: Round) -> Tensor:
    """Collective. Return F_k(x) of every client of the cohort, by position; float64, (m,)."""
    losses = torch.zeros(len(current.cohort), dtype=torch.float64)
    assignment = assign(current.cohort, s.sizes[current.cohort], s.world.groups)
    for client in [] if s.world.group is None else assignment[s.world.group]:
        job = s.job(client, number=s.rounds_done, lr=0.0, weight=0.0, share=0.0)
        loss = s.trainer.mean_loss(s.server, job)
        if s.world.leads_group:
            losses[int(np.searchsorted(current.cohort, client))] = loss
    s.world.sum(losses)
    return losses


def train_clients(
    s: Session, current: Round, assignment: list[list[int]], losses: Tensor | None = None
) -> None:
    """Collective over the group. Train this group's clients, until the run is asked to stop."""
    if s.world.group is None:
        return
    started, cohort = time.perf_counter(), current.cohort
    lr = s.config.local.lr_at(s.rounds_done, s.config.rounds)
    examples = max(int(s.sizes[cohort].sum()), 1)
    known = torch.empty(0) if losses is None else losses[torch.isfinite(losses)]
    largest = float(known.max()) if len(known) else math.nan  # another loss is its own client's fault
    clients, together = assignment[s.world.group], s.trainer.clients_at_once
    for start in range(0, len(clients), together):
        if s.world.ranks_per_client == 1:  # ranks of one group must agree, which they do after each client
            current.stopping += int(s.world.stop_requested())
        if current.stopping:
            break
        jobs, states = [], []
        for client in clients[start : start + together]:
            weight, position = int(s.sizes[client]) / examples, int(np.searchsorted(cohort, client))
            job = s.job(client, number=s.rounds_done, lr=lr, weight=weight, share=1 / len(cohort))
            if losses is not None:
                job = replace(job, initial_loss=float(losses[position]), largest_initial_loss=largest)
            jobs.append(job)
            states.append(s.states.share(client) if s.keeps_state else {})
        for job, state, result in zip(jobs, states, s.trainer.train(s.server, jobs, states), strict=True):
            take(s, current, job, state, result)
            current.stopping += int(result.stop)
    if s.world.leads_group:
        current.busy[s.world.group] = time.perf_counter() - started


def take(s: Session, current: Round, job: ClientJob, state: dict[str, Tensor], result: ClientResult) -> None:
    """Add a client's update to the round's, and keep its state if it was valid; on the group's leader."""
    if s.world.leads_group:
        update = s.received(job.client, s.rounds_done, result.update)
        change = buffer_change(result.buffers, s.server.buffers)
        valid = current.updates.add(
            job.client, update, change, job.weight, result.integer_buffers, float(result.loss[0])
        )
        position = int(np.searchsorted(current.cohort, job.client))
        current.results.put(position, result, valid=valid)
        if valid:
            s.states.keep(job.client, state)
        if logger.isEnabledFor(logging.DEBUG):
            total, count = result.loss.tolist()
            logger.debug("client %d: %d steps, loss %.4f", job.client, result.steps, total / max(count, 1))
    s.tracker.client_done(s.world.groups)


def buffer_change(buffers: Tensor, start: Tensor) -> Tensor:
    """Return how training changed float buffers (B,); 0 where it did not, infinite masks included."""
    return torch.where(buffers == start, 0.0, buffers - start) if buffers.numel() else buffers


def step(s: Session, current: Round) -> None:
    """Step the server by the aggregated updates, if enough of them arrived; on the coordinator."""
    algorithm, server = s.config.algorithm, s.server
    assert isinstance(algorithm, SynchronousAlgorithm)
    if s.world.is_coordinator and current.updates.counts[0] < s.config.aggregation.min_clients():
        log_abandoned(s, current)
    elif s.world.is_coordinator:
        aggregated = current.updates.result()
        if "update" in aggregated.vectors:  # else no client had an example
            algorithm.step(server, aggregated)
        if "buffers" in aggregated.vectors:
            server.buffers.add_(aggregated.vectors["buffers"])
        server.integer_buffers.copy_(current.updates.integer_buffers)
    server.version += 1


def log_abandoned(s: Session, current: Round) -> None:
    """Log that too few clients sent an update for the rule to aggregate."""
    rule, received = s.config.aggregation, int(current.updates.counts[0])
    if current.sampled:
        logger.warning(
            "round %d: %s needs %d updates, but got %d (%d clients late or lost, %d invalid); the model is "
            "unchanged",
            s.rounds_done + 1,
            type(rule).__name__,
            rule.min_clients(),
            received,
            current.missing,
            len(current.cohort) - received,
        )


def log_invalid(s: Session, current: Round) -> None:
    """Log, once per round, the clients whose updates were invalid."""
    invalid = current.cohort[(current.results.valid == 0).numpy()]
    if s.world.is_coordinator and len(invalid):
        action = {"skip": "left out", "clip": "clipped"}[s.config.aggregation.on_invalid_update]
        clients = ", ".join(map(str, invalid))
        logger.warning(
            "round %d: NaN, infinity or overflow in the update of client %s; %s",
            s.rounds_done + 1,
            clients,
            action,
        )


def round_metrics(s: Session, current: Round) -> Metrics:
    """Return the training metrics of a round: loss, clients, steps, bytes, virtual time, cohort."""
    results = current.results
    virtual = {} if current.virtual_s is None else {"time/virtual": current.virtual_s}
    return {
        **s.training_metrics(
            loss=(float(results.loss_sum.sum()), float(results.loss_count.sum())),
            steps=int(results.steps.sum()),
            counts=current.updates.counts.tolist(),
            received=len(current.cohort),
            dispatched=current.sampled,
            busy=current.busy.tolist(),
        ),
        "clients/missing": current.missing,
        **virtual,
        "cohort": current.cohort.tolist(),
    }
