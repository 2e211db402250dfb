"""Asynchronous algorithms: each run equals the simulation of its events, in any world."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from simulation import SETTINGS, config_of, simulate, taus_of, train
from torch import nn

from fedddp import (
    CheckpointConfig,
    CohortConfig,
    Config,
    DataConfig,
    Federation,
    LocalConfig,
    TopologyConfig,
    TrackingConfig,
)
from fedddp.algorithms import Algorithm, FedAsync, FedAvg, FedBuff
from fedddp.data.partition import Dirichlet
from fedddp.simulation.clock import SpeedTable, Virtual
from fedddp.testing import run_world

ONE_EACH = {type(settings["algorithm"]): name for name, (settings, _) in SETTINGS.items()}.values()
"""Settings of each algorithm, for the worlds in which others would show nothing new."""


def train_all(topology: TopologyConfig, output: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Train with the settings of those names, one after the other, on this world's ranks."""
    results = {}
    for name in names:
        result = train(config_of(name, topology=topology), output)
        results[name] = {**result, "taus": taus_of(result) if result["history"] else []}
    return results


@functools.cache
def in_world(groups: int, ranks: int, dedicated: bool) -> dict[str, dict[str, Any]]:
    """Train on `groups` groups of `ranks` ranks; return the coordinator's results by name."""
    topology = TopologyConfig(ranks_per_client=ranks, coordinator="dedicated" if dedicated else "colocated")
    all_of_them = (groups, ranks, dedicated) in ((1, 1, False), (2, 1, True), (1, 2, False))
    names = [*SETTINGS] if all_of_them else [*ONE_EACH]
    with tempfile.TemporaryDirectory() as output:
        if groups * ranks == 1 and not dedicated:
            return train_all(topology, output, names)
        size = groups * ranks + dedicated
        return run_world(train_all, topology, output, names, size=size)[0]


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
def test_a_run_equals_the_simulation_of_its_events_in_any_world(
    groups: int, ranks: int, dedicated: bool
) -> None:
    results, first = in_world(groups, ranks, dedicated), in_world(1, ranks, False)
    for name, result in results.items():
        params, statistics, count, taus = simulate(name)
        assert max(taus) >= 1, name
        assert result["taus"] == taus, name
        torch.testing.assert_close(result["params"], params.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result["buffers"], statistics.float(), rtol=1e-4, atol=1e-5)
        assert result["tracked"] == count, name
        for part in ("params", "buffers"):
            assert torch.equal(result[part], first[name][part]), name


def seconds_to_95_percent(algorithm: Algorithm, output: Path) -> float:
    """Return the virtual seconds until a run on digits classifies 95 % of the test images correctly."""
    config = Config(
        data=DataConfig(dataset="digits", clients=10, partition=Dirichlet(alpha=1)),
        local=LocalConfig(epochs=2, batch_size=16, lr=0.1),
        cohort=CohortConfig(size=5),
        clock=Virtual(speed=SpeedTable(factors=[10.0] + 9 * [1.0])),
        checkpoint=CheckpointConfig(every=100),
        tracking=TrackingConfig(trackers=[], progress=False),
        rounds=20,
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    history = Federation(config, module=net, algorithm=algorithm, output=str(output)).run().history
    reached = next(n for n, row in enumerate(history, 1) if row["eval/accuracy"] >= 0.95)
    return float(sum(row["time/virtual"] for row in history[:reached]))


def test_asynchronous_algorithms_reach_95_percent_sooner_when_a_client_is_ten_times_slower(
    tmp_path: Path,
) -> None:
    synchronous = seconds_to_95_percent(FedAvg(), tmp_path)
    assert seconds_to_95_percent(FedBuff(buffer_size=5), tmp_path) < synchronous / 2
    assert seconds_to_95_percent(FedAsync(), tmp_path) < synchronous / 2
