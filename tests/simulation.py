"""The events of the asynchronous papers one after another, in one process and in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fedddp import (
    AsyncSGD,
    Cohort,
    Constant,
    Data,
    Dirichlet,
    FedAsync,
    FedBuff,
    Federation,
    Hinge,
    Inverse,
    Local,
    Model,
    Polynomial,
    Run,
    SpeedTable,
    Track,
    Virtual,
)
from fedddp.data.datasets import Images, load
from fedddp.data.partition import Split
from fedddp.rng import stream
from fedddp.storage.history import read_rows

SPEED = SpeedTable(factors=[1.0, 3.0, 1.5, 6.0, 1.0, 2.2], visit_s=0.1, example_s=0.01, dropout=0.1)
BASE = Run(
    data=Data(dataset="digits", clients=6, partition=Dirichlet(alpha=1)),
    model=Model(norm="sync"),
    local=Local(steps=3, batch_size=24, lr=0.1),
    cohort=Cohort(size=4),
    clock=Virtual(speed=SPEED, deadline_s=2.6),
    track=Track(with_=[], progress=False),
    rounds=3,
    seed=1,
)
ONE_STEP = Local(steps=1, batch_size=24, lr=0.1, weight_decay=0.01)
HINGE = Hinge(a=2.0, b=1)

METHODS: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "FedAsync constant": ({"algorithm": FedAsync(alpha=0.4, staleness=Constant())}, lambda tau: 1.0),
    "FedAsync polynomial": (
        {"algorithm": FedAsync(rho=0.3, staleness=Polynomial(exponent=0.7))},
        lambda tau: 1 / (1 + tau) ** 0.7,
    ),
    "FedAsync": (
        {"algorithm": FedAsync(rho=0.3, staleness=HINGE)},
        lambda tau: 1.0 if tau <= 1 else 1 / (2 * (tau - 1) + 1),
    ),
    "FedBuff": ({"algorithm": FedBuff(buffer_size=3, lr=0.8)}, lambda tau: 1 / np.sqrt(1 + tau)),
    "FedBuff of 5": ({"algorithm": FedBuff(buffer_size=5, staleness=Inverse())}, lambda tau: 1 / max(tau, 1)),
    "AsyncSGD": (
        {"algorithm": AsyncSGD(staleness=Inverse()), "local": ONE_STEP},
        lambda tau: 1 / tau if tau else 1.0,
    ),
    "AsyncSGD classical": ({"algorithm": AsyncSGD(), "local": ONE_STEP}, lambda tau: 1.0),
}
"""Settings by name, and the weight s(τ) that goes with them."""


def run_of(method: str, **changes: Any) -> Run:
    return dataclasses.replace(BASE, **{**METHODS[method][0], **changes})


def make_net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))


def state_of(module: nn.Module) -> tuple[Tensor, Tensor, int]:
    buffers = torch.cat([b.double().flatten() for b in module.buffers() if b.is_floating_point()])
    tracked = next(b for name, b in module.named_buffers() if name.endswith("tracked"))
    return parameters_to_vector(module.parameters()).detach().double(), buffers, int(tracked)


def train(run: Run, output: str) -> dict[str, Any]:
    """Train on this world's ranks; return the final state, the history and the folder."""
    outcome = Federation(run, model=make_net(), output=output).run()
    params, buffers, tracked = state_of(outcome.model)
    return {
        "params": params.float(),
        "buffers": buffers.float(),
        "tracked": tracked,
        "history": outcome.history,
        "folder": outcome.folder,
        "finished": outcome.finished,
    }


@functools.cache
def digits() -> tuple[Images, Split]:
    images, _ = load(BASE.data)
    return images, BASE.data.partition.split(images.labels, BASE.data.clients, BASE.seed, images.ids)


def local_training(
    run: Run, net: nn.Sequential, start: tuple[Tensor, Tensor, int], client: int, ticket: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return a client's last gradient, parameters, running statistics and their count, in float64."""
    images, split = digits()
    chosen, local, norm = split.indices(client), run.local, net[2]
    assert images.pixels is not None
    vector_to_parameters(start[0].clone(), net.parameters())
    norm.running_mean.copy_(start[1][:12])
    norm.running_var.copy_(start[1][12:])
    norm.num_batches_tracked.fill_(start[2])
    batches: list[np.ndarray] = []
    for epoch in range(local.steps or 0):
        order = stream("batches", run.seed, ticket, client, epoch).permutation(chosen)
        batches += np.split(order, range(local.batch_size, len(order), local.batch_size))
    for rows in batches[: local.steps]:
        pixels = (images.pixels[torch.from_numpy(rows)].double() / 255 - images.mean[0]) / images.std[0]
        loss = F.cross_entropy(net.train()(pixels), torch.from_numpy(images.labels[rows]))
        grad = parameters_to_vector(torch.autograd.grad(loss, list(net.parameters())))
        here = parameters_to_vector(net.parameters()).detach()
        grad += getattr(run.algorithm, "rho", 0.0) * (here - start[0]) + local.weight_decay * here
        vector_to_parameters(here - local.lr * grad, net.parameters())
    return grad, *state_of(net)


@functools.cache
def simulate(name: str) -> tuple[Tensor, Tensor, int, list[int]]:
    """Return parameters, running statistics, their count, and the stalenesses of all arrivals."""
    run, weight = run_of(name), METHODS[name][1]
    method, clock = run.algorithm, run.clock
    assert isinstance(clock, Virtual)
    assert isinstance(clock.speed, SpeedTable)
    assert clock.deadline_s is not None
    net = run.model.adapt(make_net(), classes=10, shape=(1, 8, 8), sync=lambda tensor: tensor).double()
    x, statistics, count = state_of(net)
    version, ticket, now, flights, taus, buffer, largest = 0, 0, 0.0, [], [], [], 0
    while len(taus) < run.rounds * run.cohort.size:
        while all(flight[0] > now for flight in flights) and len(flights) < run.cohort.size:  # dispatch
            random, busy = stream("dispatch", run.seed, ticket), [flight[2] for flight in flights]
            client = int(random.choice(np.arange(6)))
            while client in busy:
                client = int(random.choice(np.arange(6)))
            work = min(len(digits()[1].indices(client)), run.local.batch_size) * (run.local.steps or 0)
            seconds = clock.speed.factors[client] * (0.1 + 0.01 * work)
            lost = stream("dropout", run.seed, ticket, client).random() < 0.1 or seconds > clock.deadline_s
            end = now + (clock.deadline_s if lost else seconds)
            flights.append((end, ticket, client, version, (x, statistics, count), lost))
            ticket += 1
        now, number, client, sent_version, sent, lost = flights.pop(flights.index(min(flights)))  # arrive
        if lost:
            continue
        grad, y, new_statistics, steps = local_training(run, net, sent, client, number)
        tau, largest = version - sent_version, max(largest, steps)
        taus.append(tau)
        if isinstance(method, FedBuff):  # absorb
            buffer.append((weight(tau) * (y - sent[0]), new_statistics))
            if len(buffer) < method.buffer_size:
                continue
            x = x + method.lr * sum(delta for delta, _ in buffer) / len(buffer)
            statistics, buffer = sum(new for _, new in buffer) / len(buffer), []
        elif isinstance(method, FedAsync):
            alpha = method.alpha * weight(tau)
            x, statistics = (1 - alpha) * x + alpha * y, (1 - alpha) * statistics + alpha * new_statistics
        else:
            x = x - run.local.lr * weight(tau) * grad
            statistics = (tau * statistics + new_statistics) / (1 + tau)
        count, version = largest, version + 1
    return x, statistics, count, taus


def taus_of(result: dict[str, Any]) -> list[int]:
    rows = read_rows(result["folder"] / "arrivals.jsonl")
    return [row["staleness"] for row in rows]
