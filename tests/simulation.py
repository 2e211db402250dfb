"""Asynchronous training as a sequence of events, by the papers, in one process and in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fedddp import CohortConfig, Config, DataConfig, Federation, LocalConfig, ModelConfig, TrackingConfig
from fedddp.algorithms import AsyncSGD, Constant, FedAsync, FedBuff, Hinge, Inverse, Polynomial
from fedddp.data.datasets import Images, load
from fedddp.data.partition import Dirichlet, Split
from fedddp.rng import stream
from fedddp.simulation.clock import SpeedTable, Virtual
from fedddp.storage.history import read_rows

SPEED = SpeedTable(factors=[1.0, 3.0, 1.5, 6.0, 1.0, 2.2], overhead_s=0.1, example_s=0.01, dropout=0.1)
BASE = Config(
    data=DataConfig(dataset="digits", clients=6, partition=Dirichlet(alpha=1)),
    model=ModelConfig(norm="sync"),
    local=LocalConfig(steps=3, batch_size=24, lr=0.1),
    cohort=CohortConfig(size=4),
    clock=Virtual(speed=SPEED, deadline_s=2.6),
    tracking=TrackingConfig(trackers=[], progress=False),
    rounds=3,
    seed=1,
)
ONE_STEP = LocalConfig(steps=1, batch_size=24, lr=0.1, weight_decay=0.01)
HINGE = Hinge(a=2.0, b=1)

SETTINGS: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
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


def config_of(name: str, /, **changes: Any) -> Config:
    return dataclasses.replace(BASE, **{**SETTINGS[name][0], **changes})


def make_net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))


def state_of(module: nn.Module) -> tuple[Tensor, Tensor, int]:
    buffers = torch.cat([b.double().flatten() for b in module.buffers() if b.is_floating_point()])
    tracked = next(b for name, b in module.named_buffers() if name.endswith("tracked"))
    return parameters_to_vector(module.parameters()).detach().double(), buffers, int(tracked)


def train(config: Config, output: str) -> dict[str, Any]:
    """Train on this world's ranks; return the final state, the history and the folder."""
    result = Federation(config, module=make_net(), output=output).run()
    params, buffers, tracked = state_of(result.model)
    return {
        "params": params.float(),
        "buffers": buffers.float(),
        "tracked": tracked,
        "history": result.history,
        "folder": result.folder,
        "finished": result.finished,
    }


@functools.cache
def digits() -> tuple[Images, Split]:
    images, _ = load(BASE.data)
    return images, BASE.data.partition.split(images.labels, BASE.data.clients, BASE.seed, images.ids)


def local_training(
    config: Config, net: nn.Sequential, start: tuple[Tensor, Tensor, int], client: int, dispatch_id: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return a client's last gradient, parameters, running statistics and their count, in float64."""
    images, split = digits()
    chosen, local, norm = split.indices(client), config.local, dict(net[2].named_buffers())
    assert images.pixels is not None
    vector_to_parameters(start[0].clone(), net.parameters())
    norm["running_mean"].copy_(start[1][:12])
    norm["running_var"].copy_(start[1][12:])
    norm["num_batches_tracked"].fill_(start[2])
    batches: list[NDArray[np.int64]] = []
    for epoch in range(local.steps or 0):
        permuted = stream("batches", config.seed, dispatch_id, client, epoch).permutation(chosen)
        batches += np.split(permuted, range(local.batch_size, len(permuted), local.batch_size))
    for rows in batches[: local.steps]:
        pixels = (images.pixels[torch.from_numpy(rows)].double() / 255 - images.mean[0]) / images.std[0]
        loss = F.cross_entropy(net.train()(pixels), torch.from_numpy(images.labels[rows]))
        grad = parameters_to_vector(torch.autograd.grad(loss, list(net.parameters())))
        here = parameters_to_vector(net.parameters()).detach()
        grad += getattr(config.algorithm, "rho", 0.0) * (here - start[0]) + local.weight_decay * here
        vector_to_parameters(here - local.lr * grad, net.parameters())
    return grad, *state_of(net)


class Sent(NamedTuple):
    """A client in flight; compared by its arrival."""

    ends: float
    dispatch_id: int
    client: int
    version: int
    model: tuple[Tensor, Tensor, int]
    lost: bool


def dispatch(
    config: Config,
    busy: set[int],
    dispatch_id: int,
    now: float,
    version: int,
    model: tuple[Tensor, Tensor, int],
) -> Sent:
    """Sample a client that is not busy, and return when it will arrive."""
    clock, rng = config.clock, stream("dispatch", config.seed, dispatch_id)
    assert isinstance(clock, Virtual)
    assert isinstance(clock.speed, SpeedTable)
    assert clock.deadline_s is not None
    client = int(rng.choice(np.arange(6)))
    while client in busy:
        client = int(rng.choice(np.arange(6)))
    work = min(len(digits()[1].indices(client)), config.local.batch_size) * (config.local.steps or 0)
    seconds = clock.speed.factors[client] * (0.1 + 0.01 * work)
    drops_out = stream("dropout", config.seed, dispatch_id, client).random() < 0.1
    lost = bool(drops_out or seconds > clock.deadline_s)
    return Sent(now + (clock.deadline_s if lost else seconds), dispatch_id, client, version, model, lost)


@functools.cache
def simulate(name: str) -> tuple[Tensor, Tensor, int, list[int]]:
    """Return parameters, running statistics, their count, and the stalenesses of all arrivals."""
    config, weight = config_of(name), SETTINGS[name][1]
    algorithm, net = config.algorithm, make_net()
    config.model.adapt(net, classes=10, shape=(1, 8, 8), sync=lambda tensor: tensor, seed=0)
    x, statistics, count = state_of(net.double())
    version, dispatched, now, largest = 0, 0, 0.0, 0
    in_flight: list[Sent] = []
    taus: list[int] = []
    deltas: list[Tensor] = []
    buffered: list[Tensor] = []
    while len(taus) < config.rounds * config.cohort.size:
        while all(sent.ends > now for sent in in_flight) and len(in_flight) < config.cohort.size:
            busy = {sent.client for sent in in_flight}
            in_flight.append(dispatch(config, busy, dispatched, now, version, (x, statistics, count)))
            dispatched += 1
        first = min(in_flight)
        in_flight.remove(first)
        now = first.ends
        if first.lost:
            continue
        grad, y, new_statistics, steps = local_training(
            config, net, first.model, first.client, first.dispatch_id
        )
        tau, largest = version - first.version, max(largest, steps)
        taus.append(tau)
        if isinstance(algorithm, FedBuff):
            deltas.append(weight(tau) * (y - first.model[0]))
            buffered.append(new_statistics)
            if len(deltas) < algorithm.buffer_size:
                continue
            x = x + algorithm.lr * torch.stack(deltas).mean(0)
            statistics, deltas, buffered = torch.stack(buffered).mean(0), [], []
        elif isinstance(algorithm, FedAsync):
            alpha = algorithm.alpha * weight(tau)
            x, statistics = (1 - alpha) * x + alpha * y, (1 - alpha) * statistics + alpha * new_statistics
        else:
            x = x - config.local.lr * weight(tau) * grad
            statistics = (tau * statistics + new_statistics) / (1 + tau)
        count, version = largest, version + 1
    return x, statistics, count, taus


def taus_of(result: dict[str, Any]) -> list[int]:
    rows = read_rows(result["folder"] / "arrivals.jsonl")
    return [row["staleness"] for row in rows]
