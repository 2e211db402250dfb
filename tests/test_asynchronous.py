"""Asynchronous methods: each run is the simulation of its events, to the same bits in every world."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from simulation import METHODS, run_of, simulate, taus_of, train
from torch import nn

from fedddp import (
    Checkpoint,
    Cohort,
    Data,
    Dirichlet,
    FedAsync,
    FedAvg,
    FedBuff,
    Federation,
    Local,
    Run,
    SpeedTable,
    Topology,
    Track,
    Virtual,
)
from fedddp.algorithms.algorithm import Method
from fedddp.testing import run_world


def train_all(topology: Topology, output: str) -> dict[str, dict[str, Any]]:
    """Train with every method, one after the other, on this world's ranks."""
    results = {}
    for method in METHODS:
        result = train(run_of(method, topology=topology), output)
        results[method] = {**result, "taus": taus_of(result) if result["history"] else []}
    return results


@functools.cache
def in_world(groups: int, ranks: int, dedicated: bool) -> dict[str, dict[str, Any]]:
    """Train on `groups` groups of `ranks` ranks; return the coordinator's results by method."""
    topology = Topology(ranks_per_client=ranks, coordinator="dedicated" if dedicated else "colocated")
    with tempfile.TemporaryDirectory() as output:
        if groups * ranks == 1 and not dedicated:
            return train_all(topology, output)
        size = groups * ranks + dedicated
        return run_world(train_all, topology, output, size=size, timeout_s=150)[0]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("groups", "ranks", "dedicated"),
    [
        (1, 1, False),
        (1, 1, True),
        (2, 1, True),
        (3, 1, False),
        (1, 2, False),
        (2, 2, True),
    ],
)
def test_a_run_is_the_simulation_of_its_events_in_any_world(groups: int, ranks: int, dedicated: bool) -> None:
    results, first = in_world(groups, ranks, dedicated), in_world(1, ranks, False)
    for method, result in results.items():
        params, statistics, count, taus = simulate(method)
        assert max(taus) >= 1, method
        assert result["taus"] == taus, method
        torch.testing.assert_close(result["params"], params.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result["buffers"], statistics.float(), rtol=1e-4, atol=1e-5)
        assert result["tracked"] == count, method
        for part in ("params", "buffers"):
            assert torch.equal(result[part], first[method][part]), method


def seconds_to_95_percent(algorithm: Method, output: Path) -> float:
    """Return the virtual seconds until a run on digits is right about 95 % of the test images."""
    run = Run(
        data=Data(dataset="digits", clients=10, partition=Dirichlet(alpha=1)),
        local=Local(epochs=2, batch_size=16, lr=0.1),
        cohort=Cohort(size=5),
        clock=Virtual(speed=SpeedTable(factors=[10.0] + 9 * [1.0])),
        checkpoint=Checkpoint(every=100),
        track=Track(with_=[], progress=False),
        rounds=20,
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    history = Federation(run, model=net, algorithm=algorithm, output=str(output)).run().history
    reached = next(n for n, row in enumerate(history, 1) if row["eval/accuracy"] >= 0.95)
    return sum(row["time/virtual"] for row in history[:reached])


def test_with_a_client_ten_times_slower_the_asynchronous_reach_95_percent_sooner(tmp_path: Path) -> None:
    waiting = seconds_to_95_percent(FedAvg(), tmp_path)
    assert seconds_to_95_percent(FedBuff(buffer_size=5), tmp_path) < waiting / 2
    assert seconds_to_95_percent(FedAsync(), tmp_path) < waiting / 2
