"""The synchronous loop, written once: sample, send, train, combine, step, evaluate, record."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fedddp.aggregation import Accumulator
from fedddp.evaluation import Metrics
from fedddp.simulation.clock import examples_trained
from fedddp.simulation.cohort import assign
from fedddp.training.session import Indices, Session, Stopped

DONE, INVALID = 1.0, 2.0
"""How a visit ended: with a valid update, or with one that `aggregation.on_invalid_update` dealt with."""


@dataclass
class Round:
    """A round under way on this rank."""

    cohort: Indices
    """Those whose contributions count, of all that were sampled."""
    sampled: int
    missing: int
    """Contributions that were wanted and did not come."""
    virtual_s: float | None
    """What the round takes on the virtual clock; None on the wall clock."""
    sums: Accumulator
    visits: Tensor
    """What each visit came to: [DONE or INVALID, loss sum, loss count, steps]; float64, shape (m, 4)."""
    busy: Tensor
    """Seconds that each group trained, of those since the run was last resumed; float64, shape (G,)."""


def run_rounds(s: Session) -> None:
    """Collective. Train until the last round.

    Raises:
        Stopped: a rank was asked to stop; a checkpoint was written first.
    """
    while s.rounds_done < s.run.rounds:
        current = one_round(s)
        s.rounds_done += 1
        row = {"round": s.rounds_done, **summarise(s, current), **s.measure(s.rounds_done)}
        last = s.rounds_done == s.run.rounds
        stop = s.world.agree_to_stop() and not last
        if stop or last or s.rounds_done % s.run.checkpoint.every == 0:
            s.save(f"round-{s.rounds_done:05d}", row)
        else:
            s.record(row)
        if stop:
            raise Stopped


def one_round(s: Session) -> Round:
    """Collective. One round of the method over a sampled cohort."""
    world, method, server = s.world, s.run.algorithm, s.server
    current, waiting = begin(s)  # 1. sample
    cohort = current.cohort
    plan = assign(waiting, s.sizes[waiting], world.groups)
    s.send()  # 2. send
    with s.timed("train"):  # 3. train
        s.states.move(plan)
        start = time.perf_counter()
        train(s, current, plan)
        if world.leads_group:
            current.busy[world.group] = time.perf_counter() - start
    with s.timed("combine"):  # 4. combine
        current.sums.combine(world)
        world.sum(current.visits, current.busy)
    visited = current.visits[:, 0] > 0
    if s.keeps_state:
        s.states.settle(plan, cohort[visited.numpy()])
    if not visited.all():
        tensors = {"visits": current.visits, **current.sums.state()}
        s.save(f"round-{s.rounds_done:05d}-{int(visited.sum()):05d}", tensors=tensors)
        raise Stopped
    with s.timed("step"):  # 5. step
        if world.is_coordinator and current.sums.counts[0] < s.run.aggregation.least():
            name_abandoned(s, current)
        elif world.is_coordinator:
            total = current.sums.total()
            if "update" in total.vectors:  # else nobody had an example to learn from
                method.step(server, total)
            server.buffers.copy_(total.vectors.get("buffers", server.buffers))
            server.counters.copy_(current.sums.counters)
    server.version += 1
    name_invalid(s, current)
    return current


def begin(s: Session) -> tuple[Round, Indices]:
    """Return the round with empty sums, or those it was stopped with, and the clients left to visit."""
    run = s.run
    sampled = run.cohort.sample(len(s.split), run.seed, s.rounds_done)
    wanted = len(sampled) - run.cohort.extra
    work = examples_trained(run.local, s.sizes[sampled])
    cohort, seconds = run.clock.arrivals(sampled, work, wanted, run.seed, s.rounds_done)
    rule, method, size = s.run.aggregation, s.run.algorithm, s.server.params.numel()
    lengths = {**method.lengths(size), "buffers": s.server.buffers.numel()}
    sums = rule.accumulator(lengths, len(cohort), s.server.params, s.server.counters)
    visits = torch.zeros(len(cohort), 4, dtype=torch.float64)
    busy = torch.zeros(s.world.groups, dtype=torch.float64)
    waiting = cohort
    if s.partial:
        waiting = cohort[s.partial["visits"][:, 0].numpy() == 0]
        if s.world.is_coordinator:  # once: the sums of all ranks are added up
            sums.load(s.partial)
            visits.copy_(s.partial["visits"])
        s.partial = {}
    return Round(cohort, len(sampled), wanted - len(cohort), seconds, sums, visits, busy), waiting


def train(s: Session, current: Round, plan: list[list[int]]) -> None:
    """Collective over the group. Visit this group's clients, unless the run is asked to stop."""
    if s.world.group is None:
        return
    cohort = current.cohort
    lr = s.run.local.lr_at(s.rounds_done, s.run.rounds)
    examples = int(s.sizes[cohort].sum())
    row = {int(client): position for position, client in enumerate(cohort)}
    for client in plan[s.world.group]:
        if s.world.group_should_stop():
            return
        state = s.states.share(client) if s.keeps_state else {}
        result = s.trainer.visit(
            s.server,
            client=client,
            round_index=s.rounds_done,
            indices=s.indices(client),
            examples_in_cohort=examples,
            cohort_size=len(cohort),
            lr=lr,
            state=state,
            seed=s.run.seed,
        )
        if s.world.leads_group:
            weight, loss = int(s.sizes[client]) / max(examples, 1), result.loss.tolist()
            contribution = s.received(client, s.rounds_done, result.contribution)
            valid = current.sums.add(client, contribution, result.buffers, weight, result.counters, loss[0])
            facts = [DONE, *loss, result.steps] if valid else [INVALID, 0.0, 0.0, result.steps]
            current.visits[row[client]] = torch.tensor(facts, dtype=torch.float64)
            if valid:
                s.states.keep(client, state)
        s.tracker.visit_done(s.world.groups)


def name_abandoned(s: Session, current: Round) -> None:
    """Say that too few of those who were sampled sent something for the rule to combine."""
    rule, came = s.run.aggregation, int(current.sums.counts[0])
    if current.sampled:
        print(
            f"warning: round {s.rounds_done + 1}: {type(rule).__name__} needs {rule.least()} updates, but "
            f"got {came} ({current.missing} clients late or lost, {len(current.cohort) - came} invalid); the "
            "model stays as it was",
            flush=True,
        )


def name_invalid(s: Session, current: Round) -> None:
    """Say, once a round, whose updates were not added as they came."""
    invalid = current.cohort[(current.visits[:, 0] == INVALID).numpy()]
    if s.world.is_coordinator and len(invalid):
        done = {"skip": "left out", "clip": "cut"}[s.run.aggregation.on_invalid_update]
        print(
            f"warning: round {s.rounds_done + 1}: NaN, infinity or overflow in the update of client "
            f"{', '.join(map(str, invalid))}; {done}",
            flush=True,
        )


def summarise(s: Session, current: Round) -> Metrics:
    """Return what the round says of its training: loss, clients, steps, bytes, virtual time."""
    _, *loss, steps = current.visits.sum(0).tolist()
    virtual = {} if current.virtual_s is None else {"time/virtual": current.virtual_s}
    return {
        **s.summary(
            loss=loss,
            steps=int(steps),
            counts=current.sums.counts.tolist(),
            received=len(current.cohort),
            dispatched=current.sampled,
            busy=current.busy.tolist(),
        ),
        "clients/missing": current.missing,
        **virtual,
        "cohort": current.cohort.tolist(),
    }
