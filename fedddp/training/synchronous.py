"""The round loop, written once: sample, send, train, aggregate, step, evaluate, record."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fedddp.aggregation import Accumulator
from fedddp.algorithms import SynchronousAlgorithm
from fedddp.evaluation import Metrics
from fedddp.simulation.clock import examples_trained
from fedddp.training.client_trainer import ClientJob, ClientResult
from fedddp.training.exchange import accumulator, received, round_bytes, sent_down
from fedddp.training.secure_round import SecureRound, log_dropped
from fedddp.training.session import Indices, Session, Stopped

if TYPE_CHECKING:
    from fedddp.secure.masked_sums import MaskedSums

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
    bytes_up: Tensor
    """Bytes that the client sent; (m,) int64."""

    @classmethod
    def empty(cls, clients: int) -> CohortResults:
        """Return the results of a cohort of `clients` before it trains."""
        integers, floats = (torch.zeros(clients, dtype=d) for d in (torch.int64, torch.float64))
        return cls(integers, integers.clone(), floats, floats.clone(), integers.clone(), integers.clone())

    def put(self, position: int, result: ClientResult, sent: int, *, valid: bool, secret: bool) -> None:
        """Record the result of the client at `position` in the cohort; of a `secret` one only that it is."""
        trained, counted, loss_sum, loss_count, steps, bytes_up = (tensor.numpy() for tensor in self)
        trained[position], counted[position] = 1, valid
        if not secret:
            steps[position], bytes_up[position] = result.steps, sent
        if valid and not secret:
            loss_sum[position], loss_count[position] = result.loss


@dataclass
class Round:
    """A round in progress on this rank."""

    cohort: Indices
    """The clients whose updates count, of all that were sampled; (m,)."""
    waiting: Indices
    """Those of them that have not trained yet."""
    sampled: Indices
    """The clients that are sent the model."""
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
    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """The states of this rank's clients after their training, until they are kept."""
    bytes_down: int = 0
    """Bytes that the sampled clients were sent; on the coordinator."""
    secure: SecureRound | None = None
    """Its secure aggregation, if it has one; `updates` are masked then."""

    @property
    def masked(self) -> MaskedSums:
        """`updates`, of a secure round."""
        return cast("MaskedSums", self.updates)


def run_rounds(s: Session) -> None:
    """Collective. Train until the last round.

    Raises:
        Stopped: a rank was asked to stop; `Checkpoints.finish` waits for its checkpoint.
    """
    stop = not s.complete and s.world.agree_to_stop()
    while not s.complete:
        current = run_round(s, stop)
        s.rounds_done += 1
        row = {"round": s.rounds_done, **round_metrics(s, current), **s.evaluate(s.rounds_done)}
        if s.config.privacy is not None and s.world.is_coordinator:
            with s.timed("account"):  # a query takes up to a second
                row |= s.protection.metrics(s.rounds_done)
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
    assignment = s.assigner.assign(current.waiting, s.sizes)
    s.send()  # 2. send
    if not s.protection.strict:
        s.tracker.begin_round(len(current.waiting), s.world.groups)
    open_secure(s, current, assignment)
    with s.timed("train"):  # 3. train
        s.states.move(assignment)
        losses = initial_losses(s, current) if s.config.algorithm.needs_initial_loss else None
        train_clients(s, current, assignment, losses)
    with s.timed("aggregate"):  # 4. aggregate
        current.updates.reduce(s.world)
        current.stopping += int(s.world.stop_requested())
        # One rank has set each number, and the others have 0: the bits of floats add up, in the same message.
        bits = [tensor.view(torch.int64) for tensor in (*current.results, current.busy)]
        s.world.sum_numbers(*current.updates.numbers(), *bits, current.stopping)
    trained = current.results.trained.numpy().astype(bool)
    if trained.all():
        finish_secure(s, current)
        keep_states(s, current)
    if s.keeps_state:
        s.states.settle(assignment, current.cohort[trained])
    if not trained.all():
        save_partial(s, current, int(trained.sum()))
        raise Stopped
    s.assigner.learn(assignment, s.sizes, current.busy.numpy())
    with s.timed("step"):  # 5. step
        step(s, current)
    log_invalid(s, current)
    return current


def save_partial(s: Session, current: Round, trained: int) -> None:
    """Collective. Save a round that was stopped after `trained` clients; under `privacy.strict` its start."""
    name = f"round-{s.rounds_done:05d}"
    if s.protection.strict:  # sums without noise are kept nowhere
        s.save(name)
        return
    results = {f"results.{name}": t for name, t in current.results._asdict().items()}
    # The secrets of a secure round are lost with the process: all of it is repeated.
    partial = {**results, **current.updates.state()} if current.secure is None else {}
    s.save(f"{name}-{trained:05d}", tensors=partial)


def sample(s: Session) -> Round:
    """Return the next round, empty or as it was stopped, with the clients that have yet to train."""
    config = s.config
    sampled = config.cohort.sample(len(s.split), config.seed, s.rounds_done)
    wanted = len(sampled) - config.cohort.extra
    work = examples_trained(config.local, s.sizes[sampled])
    cohort, seconds = config.clock.arrivals(sampled, work, wanted, config.seed, s.rounds_done)
    secure = None
    if config.secure_aggregation is not None:
        secure = SecureRound(s, config.secure_aggregation, cohort)
        cohort = secure.senders
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
    return Round(cohort, waiting, sampled, missing, seconds, updates, results, busy, stopping, secure=secure)


def open_secure(s: Session, current: Round, assignment: list[list[int]]) -> None:
    """Collective. Exchange keys and shares, if the round is secure; no client trains where they do not do."""
    if current.secure is not None:
        with s.timed("secure"):
            current.secure.open(current.masked, assignment)
        if current.masked.problem:
            current.results.trained.fill_(s.world.is_coordinator)  # on one rank: the results are summed
            assignment[:] = [[] for _ in assignment]


def finish_secure(s: Session, current: Round) -> None:
    """Collective. Unmask the sum of a secure round; take the seconds of masking out of those of training."""
    if current.secure is not None:
        with s.timed("secure"):
            current.secure.finish(current.masked)
        s.seconds["secure"] += current.masked.seconds
        s.seconds["train"] -= current.masked.seconds


def initial_losses(s: Session, current: Round) -> Tensor:
    """Collective. Return F_k(x) of every client of the cohort, by position; float64, (m,).

    In a secure round, each rank learns those of its own clients, and for another's the largest.
    """
    losses = torch.zeros(len(current.cohort), dtype=torch.float64)
    own = torch.zeros(len(current.cohort), dtype=torch.bool)
    assignment = s.assigner.assign(current.cohort, s.sizes)
    for client in [] if s.world.group is None else assignment[s.world.group]:
        job = s.job(client, number=s.rounds_done, lr=0.0, weight=0.0, share=0.0)
        loss = s.trainer.mean_loss(s.server, job)
        if s.world.leads_group:
            position = int(np.searchsorted(current.cohort, client))
            losses[position], own[position] = loss, True
    if current.secure is None:
        s.world.sum(losses)
        return losses
    known = losses[own & torch.isfinite(losses)]
    largest = known.max().reshape(1) if len(known) else torch.zeros(1, dtype=torch.float64)
    s.world.max(largest)
    return torch.where(own, losses, largest)


def train_clients(
    s: Session, current: Round, assignment: list[list[int]], losses: Tensor | None = None
) -> None:
    """Collective over the group. Train this group's clients, until the run is asked to stop."""
    if s.world.group is None:
        return
    started, cohort = time.perf_counter(), current.cohort
    lr = s.config.local.lr_at(s.rounds_done, s.config.rounds)
    examples = current.secure.examples if current.secure else max(int(s.sizes[cohort].sum()), 1)
    known = torch.empty(0) if losses is None else losses[torch.isfinite(losses)]
    largest = float(known.max()) if len(known) else math.nan  # another loss is its own client's fault
    for client in assignment[s.world.group]:
        if s.world.ranks_per_client == 1:  # ranks of one group must agree, which they do after each client
            current.stopping += int(s.world.stop_requested())
        if current.stopping:
            break
        weight, share = s.protection.weights(int(s.sizes[client]) / examples, len(cohort))
        job = s.job(client, number=s.rounds_done, lr=lr, weight=weight, share=share)
        if losses is not None:
            loss = float(losses[int(np.searchsorted(cohort, client))])
            job = replace(job, initial_loss=loss, largest_initial_loss=largest)
        state = s.states.share(client) if s.keeps_state else {}
        s.world.restart_compression()
        result = s.trainer.train(s.server, job, state)
        take(s, current, job, state, result)
        current.stopping += int(result.stop)
        del result  # its update is as large as the model, and so is the next one's
    if s.world.leads_group:
        current.busy[s.world.group] = time.perf_counter() - started


def take(s: Session, current: Round, job: ClientJob, state: dict[str, Tensor], result: ClientResult) -> None:
    """Add a client's update to the round's, and keep its state if it was valid; on the group's leader."""
    if s.world.leads_group:
        update, sent = received(s, job.client, s.rounds_done, result.update, state)
        change = buffer_change(result.buffers, s.server.buffers)
        change, integers = s.protection.buffers(change, result.integer_buffers, s.server)
        change = change if s.links.shared.buffers else change[:0]
        (loss, count), secret = result.loss, current.secure is not None
        valid = current.updates.add(
            job.client, update, change, job.weight, integers, loss, (count, result.steps)
        )
        position = int(np.searchsorted(current.cohort, job.client))
        current.results.put(position, result, sent, valid=valid, secret=secret)
        if valid:
            current.states[job.client] = state
            if not (secret or s.protection.strict):  # of a round that is stopped, these keep nothing
                keep_states(s, current)
        if logger.isEnabledFor(logging.DEBUG) and not (secret or s.protection.strict):
            logger.debug("client %d: %d steps, loss %.4f", job.client, result.steps, loss / max(count, 1))
    if not s.protection.strict:
        s.tracker.client_done(s.world.groups)


def keep_states(s: Session, current: Round) -> None:
    """Keep the states of the clients that have trained, unless the secure round was abandoned."""
    if current.secure is None or not current.masked.problem:
        for client, state in current.states.items():
            s.states.keep(client, state)
    current.states.clear()


def buffer_change(buffers: Tensor, start: Tensor) -> Tensor:
    """Return how training changed float buffers (B,); 0 where it did not, infinite masks included."""
    return torch.where(buffers == start, 0.0, buffers - start) if buffers.numel() else buffers


def step(s: Session, current: Round) -> None:
    """Step the server by the aggregated updates, if enough of them arrived; on the coordinator."""
    algorithm, server = s.config.algorithm, s.server
    assert isinstance(algorithm, SynchronousAlgorithm)
    if s.world.is_coordinator:
        current.bytes_down = sent_down(s, current.sampled.tolist())
    if s.world.is_coordinator and current.updates.counts[0] < current.updates.min_clients():
        log_abandoned(s, current)
    elif s.world.is_coordinator:
        aggregated = s.links.unpacked(current.updates.result(), server)
        if "update" in aggregated.vectors:  # else no client had an example
            before = s.links.snapshot(server)
            algorithm.step(server, aggregated)
            s.links.send_change(server, before, s.rounds_done)
        if "buffers" in aggregated.vectors:
            server.buffers.add_(aggregated.vectors["buffers"])
        server.integer_buffers.copy_(current.updates.integer_buffers)
    server.version += 1


def log_abandoned(s: Session, current: Round) -> None:
    """Log that too few clients sent an update for the rule to aggregate."""
    rule, arrived = s.config.aggregation, int(current.updates.counts[0])
    if s.protection.strict:
        logger.warning("round %d: abandoned; the model is unchanged", s.rounds_done + 1)
    elif current.secure is not None:
        problem = current.masked.problem or "no client sent a valid update"
        logger.warning("round %d: %s; the model is unchanged", s.rounds_done + 1, problem)
    elif len(current.sampled):
        logger.warning(
            "round %d: %s needs %d updates, but got %d (%d clients late or lost, %d invalid); the model is "
            "unchanged",
            s.rounds_done + 1,
            type(rule).__name__,
            rule.min_clients(),
            arrived,
            current.missing,
            len(current.cohort) - arrived,
        )


def log_invalid(s: Session, current: Round) -> None:
    """Log, once per round, the clients whose updates were invalid."""
    invalid = current.cohort[(current.results.valid == 0).numpy()]
    if not s.world.is_coordinator or not len(invalid) or s.protection.strict:
        return
    if current.secure is not None:
        log_dropped(s, current.masked, len(invalid))
    else:
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
    # Under secure aggregation no row names clients, and what concerns them are sums.
    cohort: Metrics = {"cohort": current.cohort.tolist()}
    if current.secure is not None:
        cohort = current.secure.metrics(current.masked, current.bytes_down)
    if s.protection.strict:  # what is known before the round
        up, down = round_bytes(s.config, s.links, s.server, s.config.cohort.size)
        cohort |= {"bytes/up": up, "bytes/down": down}
    return {
        **s.training_metrics(
            loss=(float(results.loss_sum.sum()), float(results.loss_count.sum())),
            steps=int(results.steps.sum()),
            counts=current.updates.counts.tolist(),
            bytes_up=int(results.bytes_up.sum()),
            bytes_down=current.bytes_down,
            busy=current.busy.tolist(),
        ),
        "clients/missing": current.missing,
        **virtual,
        **cohort,
    }
