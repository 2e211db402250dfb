"""Many small runs in one world, put together by the package's public functions."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import references as ref
import torch
from torch import Tensor

from fedddp import CohortConfig, Config, DataConfig, LocalConfig, ModelConfig, TopologyConfig, TrackingConfig
from fedddp.algorithms import Algorithm, AsynchronousAlgorithm
from fedddp.data.partition import Dirichlet
from fedddp.distributed.launch import connect
from fedddp.distributed.world import World
from fedddp.testing import run_world
from fedddp.training.assembly import assemble, load_images
from fedddp.training.asynchronous.coordinator import run_asynchronous
from fedddp.training.objects import Objects
from fedddp.training.session import Session, Stopped
from fedddp.training.synchronous import run_rounds

WORLDS = list(itertools.product((1, 2), (1, 2)))
"""Client groups, and ranks of each."""

LOCAL = LocalConfig(epochs=2, batch_size=4, lr=0.2)
# With no batch of one example, which batch norm refuses in float64.
NORM = LocalConfig(epochs=2, batch_size=7, lr=0.2)
MOMENTUM = LocalConfig(epochs=2, batch_size=4, lr=0.1, momentum=0.8)

Trained = tuple[Tensor, dict[int, dict[str, Tensor]]]
"""The server's parameters and buffers, and the state that each client keeps."""


def has_norm(name: str) -> bool:
    """Return whether the run of that name trains a model with batch norm."""
    return "BN" in name or "norm" in name


def config_of(algorithm: Algorithm, local: LocalConfig, norm: bool = False, **changes: Any) -> Config:
    """Return the configuration of a run on the references' data."""
    config = Config(
        data=DataConfig(clients=ref.CLIENTS, partition=Dirichlet(alpha=0.5, min_examples=3)),
        cohort=CohortConfig(size=ref.COHORT),
        model=ModelConfig(norm="sync" if norm else "keep"),
        local=local,
        algorithm=algorithm,
        rounds=ref.ROUNDS,
        seed=4,
        tracking=TrackingConfig(trackers=[], progress=False),
    )
    return dataclasses.replace(config, **changes)


def objects_of(name: str, config: Config) -> Objects:
    """Return the module and the images of the run of that name."""
    if isinstance(config.task, ref.Quadratic):
        return Objects(ref.Point(), ref.TwoExamples())
    return Objects(ref.net(has_norm(name), 0.5 if "dropout" in name else 0.0), ref.Pixels())


def session_of(config: Config, world: World, directory: Path, objects: Objects) -> Session:
    """Collective. Return a session as `Federation.run` assembles it."""
    directory.mkdir(parents=True, exist_ok=True)
    train, test = load_images(objects, config, world)
    return assemble(config, world, directory, objects.module, train, test)


def train(configs: Mapping[str, Config], ranks: int, folder: str, stop: bool = False) -> dict[str, Trained]:
    """Train every configuration on this world, in groups of `ranks`; return what each trained, by name.

    With `stop` (in a world of one rank), each run is stopped within a round, after its fourth client, and
    then resumed.
    """
    topology = TopologyConfig(ranks_per_client=ranks, device="cpu")
    results: dict[str, Trained] = {}
    if stop:
        for name, config in configs.items():
            stop_within_a_round(config, topology, Path(folder) / name, objects_of(name, config))
    with contextlib.closing(connect(topology)) as world:
        for name, config in configs.items():
            resumed = dataclasses.replace(config, resume="auto") if stop else config
            session = session_of(resumed, world, Path(folder) / name, objects_of(name, config))
            # A secure round is repeated from its start.
            assert bool(session.partial) == (stop and config.secure_aggregation is None)
            loop = run_asynchronous if isinstance(config.algorithm, AsynchronousAlgorithm) else run_rounds
            loop(session)
            kept = {k: v for part in world.gather(session.states.kept) for k, v in part.items()}
            results[name] = (torch.cat([session.server.params, session.server.buffers]), kept)
    return results


def stop_within_a_round(config: Config, topology: TopologyConfig, directory: Path, objects: Objects) -> None:
    """Train until four clients are done; in a world of its own, for which the request to stop holds."""
    with contextlib.closing(connect(topology)) as world:
        session = session_of(config, world, directory, objects)
        stops = mock.patch.object(session.tracker, "client_done", StopsAfter(world, clients=4))
        with stops, pytest.raises(Stopped):
            run_rounds(session)
        session.checkpoints.finish()
    assert list(directory.glob("checkpoints/round-0000?-0*"))


class StopsAfter:
    """Asks the run to stop when so many clients are done."""

    def __init__(self, world: World, clients: int) -> None:
        self.world, self.left = world, clients

    def __call__(self, count: int = 1) -> None:
        self.left -= 1
        if self.left == 0:
            self.world.request_stop()


def train_in_world(
    configs: Mapping[str, Config], groups: int, ranks: int, folder: str, stop: bool = False
) -> dict[str, Trained]:
    """Train every configuration in a fresh world of `groups` groups of `ranks`; return the coordinator's."""
    return run_world(train, configs, ranks, folder, stop, size=groups * ranks)[0]


def assert_same_bits(one: Trained, two: Trained) -> None:
    """Compare the server's model and what clients keep."""
    assert torch.equal(one[0], two[0])
    assert one[1].keys() == two[1].keys()
    for client, state in one[1].items():
        assert state.keys() == two[1][client].keys()
        assert all(torch.equal(tensor, two[1][client][name]) for name, tensor in state.items())
