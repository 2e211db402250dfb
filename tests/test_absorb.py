"""Asynchronous algorithms on vectors of two: what a client sends, and what the server makes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fedddp.algorithms import (
    AsyncSGD,
    ClientContext,
    ClientUpdate,
    Constant,
    FedAsync,
    FedBuff,
    Hinge,
    Inverse,
    Polynomial,
    ServerState,
)
from fedddp.algorithms.asynchronous import Staleness
from fedddp.algorithms.local import LocalConfig


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def context_of(**fields: Any) -> ClientContext:
    """Return a client's local training, of which an algorithm's hooks see these fields."""
    return cast(ClientContext, SimpleNamespace(**fields))


def server_of(params: Tensor, buffers: Tensor) -> ServerState:
    return ServerState(params, buffers, torch.zeros(0, dtype=torch.int64), 1)


def arrival(name: str, values: Tensor, buffers: Tensor) -> ClientUpdate:
    return ClientUpdate({name: values, "buffers": buffers}, 1.0)


@pytest.mark.parametrize(
    ("staleness", "weights"),
    [
        (Constant(), [1, 1, 1, 1, 1]),
        (Polynomial(exponent=0.5), [1, 2**-0.5, 3**-0.5, 0.5, 5**-0.5]),
        (Polynomial(exponent=2), [1, 1 / 4, 1 / 9, 1 / 16, 1 / 25]),
        (Polynomial(exponent=0), [1, 1, 1, 1, 1]),
        (Hinge(a=3, b=2), [1, 1, 1, 1 / 4, 1 / 7]),
        (Hinge(a=0.5, b=0), [1, 2 / 3, 1 / 2, 2 / 5, 1 / 3]),
        (Inverse(), [1, 1, 1 / 2, 1 / 3, 1 / 4]),
    ],
    ids=repr,
)
def test_the_weights_of_stale_updates_are_those_on_paper(staleness: Staleness, weights: list[float]) -> None:
    assert [staleness.weight(tau) for tau in range(5)] == pytest.approx(weights)


def test_fedasync_mixes_a_quarter_of_the_clients_model_in() -> None:
    algorithm = FedAsync(alpha=0.5, staleness=Polynomial(exponent=1))
    sent = algorithm.finish(context_of(params=vector(3, 6)))
    assert (list(sent.vectors), sent.vectors["params"].tolist(), sent.weight) == (["params"], [3, 6], 1)
    server = server_of(vector(1, 2), vector(10, -10))
    assert algorithm.absorb(server, arrival("params", vector(3, 6), vector(20, 30)), 1) is True
    assert server.params.tolist() == [1.5, 3.0]
    assert server.buffers.tolist() == [12.5, 0.0]
    assert algorithm.lengths(2) == {"params": 2}


def test_fedasync_sends_a_copy_of_the_clients_model() -> None:
    params = vector(3, 6)
    sent = FedAsync().finish(context_of(params=params))
    params.zero_()
    assert sent.vectors["params"].tolist() == [3, 6]


@pytest.mark.parametrize(("rho", "expected"), [(0.5, [1.5, 0.0]), (0.0, [1.0, 1.0])])
def test_fedasync_pulls_the_gradient_to_the_dispatched_model(rho: float, expected: list[float]) -> None:
    context = context_of(params=vector(4, 5), start=vector(3, 7), grad=vector(1, 1))
    FedAsync(rho=rho).correct(context)
    assert context.grad.tolist() == expected


def test_fedbuff_steps_at_every_second_arrival_by_the_mean_of_the_weighted_updates() -> None:
    algorithm = FedBuff(buffer_size=2, lr=0.5, staleness=Inverse())
    server = server_of(vector(1, 2), vector(9))
    algorithm.start(server)
    assert algorithm.absorb(server, arrival("update", vector(4, 8), vector(1)), 0) is False
    assert (server.params.tolist(), server.buffers.tolist()) == ([1, 2], [9])
    assert algorithm.absorb(server, arrival("update", vector(2, -8), vector(5)), 2) is True
    # (0.5 / 2) (Δ_1 + Δ_2 / 2), and the mean of the statistics
    assert server.params.tolist() == [1 + 0.25 * 5, 2 + 0.25 * 4]
    assert server.buffers.tolist() == [3]
    assert all(not state.any() for state in server.vectors.values())
    assert algorithm.absorb(server, arrival("update", vector(8, 0), vector(7)), 1) is False
    assert algorithm.absorb(server, arrival("update", vector(0, 8), vector(8)), 1) is True
    assert server.params.tolist() == [2.25 + 2, 3 + 2]
    assert server.buffers.tolist() == [7.5]


def test_fedbuff_of_one_steps_at_every_arrival() -> None:
    algorithm, server = FedBuff(buffer_size=1, lr=1.0), server_of(vector(1, 2), vector(9))
    algorithm.start(server)
    for expected in (2, 3):
        assert algorithm.absorb(server, arrival("update", vector(1, 0), vector(4)), 0) is True
        assert (server.params.tolist(), server.buffers.tolist()) == ([expected, 2], [4])


def test_asyncsgd_sends_a_step_on_the_gradient_and_the_weight_decay() -> None:
    local = LocalConfig(steps=1, lr=0.5, weight_decay=0.25)
    context = context_of(steps=1, lr=0.5, local=local, grad=vector(1, -2), start=vector(4, 8))
    sent = AsyncSGD().finish(context)
    assert (sent.vectors["update"].tolist(), sent.weight) == ([-1.0, 0.0], 1)
    assert context.grad.tolist() == [1, -2]
    empty = AsyncSGD().finish(
        context_of(steps=0, lr=0.5, local=local, grad=vector(1, -2), start=vector(4, 8))
    )
    assert (empty.vectors["update"].tolist(), empty.weight) == ([0, 0], 1)


def test_asyncsgd_applies_each_arrival_at_once() -> None:
    server = server_of(vector(1, 2), vector(8, 8))
    sent = arrival("update", vector(3, -6), vector(0, 16))
    assert AsyncSGD(staleness=Inverse()).absorb(server, sent, 3) is True
    assert server.params.tolist() == pytest.approx([2, 0], abs=1e-6)
    assert server.buffers.tolist() == [6, 10]  # a quarter of the way
    assert AsyncSGD().absorb(server, sent, 0) is True
    assert server.params.tolist() == pytest.approx([5, -6], abs=1e-6)
    assert server.buffers.tolist() == [0, 16]


def test_asyncsgd_requires_one_plain_step() -> None:
    required = AsyncSGD().requires(LocalConfig())
    assert {"steps": 1, "optimizer": "sgd", "momentum": 0.0}.items() <= required.items()
