"""The dry run: what a run would do, before it does it: groups, clients, bytes, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.filesize import decimal

from fedddp.algorithms import ServerState
from fedddp.config.baselines import in_effect
from fedddp.config.schema import Config
from fedddp.data.datasets import Images, load
from fedddp.data.partition import Split, holdout_sizes
from fedddp.models.flat import FlatModel
from fedddp.privacy.config import CentralDP, ExampleDP
from fedddp.privacy.protection import check_model
from fedddp.privacy.statement import forecast
from fedddp.secure import SecureAggregation
from fedddp.simulation.clock import examples_trained
from fedddp.simulation.cohort import Assigner
from fedddp.training.assembly import outputs_check
from fedddp.training.clients import client_names, clients_of, pooled
from fedddp.training.engine import Engine, engine_of
from fedddp.training.exchange import round_bytes
from fedddp.training.protect import check_library, example_account, participations_of
from fedddp.training.traced_trainer import needs_gradients
from fedddp.transport.links import Links
from fedddp.transport.shared import Shared

if TYPE_CHECKING:
    from rich.table import Table

OPTIMIZER_VECTORS = {"sgd": 0, "adam": 2, "adamw": 2}
SHOWN = 8
"""Groups, and clients with a name, that are listed one by one."""


def dry_run(config: Config, world_size: int) -> Table:
    """Return a table of what a run would do on `world_size` ranks; builds the model, trains nothing.

    Raises:
        ValueError: the run cannot work.
    """
    from rich.table import Table

    config = in_effect(config)
    groups = config.topology.groups(world_size)
    train, test = load(config.data, config.task.target)
    config, split, sizes = _split(config, train, test)
    config.clock.check(examples_trained(config.local, sizes), config.aggregation.min_clients(), config.seed)
    shape = train.shape
    module = config.model.build(
        classes=train.classes,
        shape=shape,
        seed=config.seed,
        sync=lambda tensor: tensor,
        check=outputs_check(config.task, train),
    )
    flat = FlatModel(module)
    config.algorithm.check_model(flat)
    server = ServerState.of(flat, len(split))
    config.algorithm.start(server)
    cohort = config.cohort.sample(len(split), config.seed, 0)
    assignment = Assigner(groups).assign(cohort, sizes)
    examples = [int(sizes[clients].sum()) for clients in assignment]
    steps = np.mean([config.local.steps_on(examples) for examples in sizes.tolist()])

    table = Table("", "", box=None, show_header=False)
    table.add_row("world", _world(config, world_size, groups))
    table.add_row(
        "data",
        f"{config.data.dataset}: {len(train.labels):,} training images of "
        f"{'x'.join(map(str, shape))}, {0 if test is None else len(test.labels):,} for testing",
    )
    table.add_row("population", _population(sizes, client_names(config.data, train)))
    parameters, buffers = flat.params.numel(), flat.buffers.numel()
    table.add_row(
        "model", f"{config.model.name}: {parameters:,} trainable parameters, {buffers:,} buffer elements"
    )
    table.add_row(
        "rounds", f"{config.rounds}, {len(cohort)} clients each, about {steps:,.0f} steps per client"
    )
    table.add_row(
        "first round",
        f"clients per group {_list([len(v) for v in assignment])}, examples per group {_list(examples)}",
    )
    engine = _engine(config, flat, train)
    table.add_row("local training", str(engine))
    if config.privacy is not None:
        table.add_row("privacy", privacy_text(config, flat, sizes))
    table.add_row("bytes per round", _traffic(config, server, flat, len(cohort)))
    if config.secure_aggregation is not None:
        table.add_row("secure aggregation", _secure(config.secure_aggregation, len(cohort)))
    gradients = engine.traced is None or needs_gradients(config.local, config.algorithm)
    table.add_row("memory per rank", _memory(config, train, test, flat, gradients=gradients))
    return table


def _split(config: Config, train: Images, test: Images | None) -> tuple[Config, Split, NDArray[np.int64]]:
    """Return the split over those that train, the examples that each has, and `config` as they train."""
    clients = clients_of(config, train, test)
    if config.baseline == "pooled":
        config, split = pooled(config, clients)
        return config, split, split.sizes
    sizes = clients.split.sizes
    return config, clients.split, sizes - holdout_sizes(sizes, config.data.holdout)


def privacy_text(config: Config, flat: FlatModel, sizes: NDArray[np.int64]) -> str:
    """Return the noise and the ε that the section `privacy` asks for, of clients with `sizes` examples.

    Raises:
        ValueError: the model, or the budget, does not allow a run.
    """
    privacy, population = config.privacy, config.data.clients
    assert privacy is not None
    check_library(config)
    check_model(flat, config.algorithm, privacy)
    account: Any = None
    if isinstance(privacy, CentralDP):
        account = privacy.account(config.cohort, population, config.rounds)
    if isinstance(privacy, ExampleDP):
        account = example_account(config, privacy, sizes)
    return forecast(privacy, account, participations_of(config, population), config.rounds)


def _traffic(config: Config, server: ServerState, flat: FlatModel, clients: int) -> str:
    """Return the bytes of a round, as its row of the history will have them without drop-outs."""
    links = Links(config.transport, config.algorithm, config.seed, Shared.of(config.algorithm, flat))
    up, most = round_bytes(config, links, server, clients)
    down = f"{_size(most)} down"
    if config.transport.down is not None:
        least = most - clients * (links.model_bytes(server) - links.change_bytes(server))
        down += f" at most ({_size(least)} to clients of the round before)"
    return f"{down}, {_size(up)} up"


def _secure(settings: SecureAggregation, clients: int) -> str:
    """Return the neighbours and thresholds of a cohort of `clients` clients."""
    degree = settings.degree(clients)
    name, needed = type(settings).__name__, settings.needed(degree + 1)
    return (
        f"{name}: {_count(degree, 'neighbour')} per client, {needed} of {degree + 1} shares recover a secret"
    )


def _population(sizes: NDArray[np.int64], names: Sequence[str]) -> str:
    """Return how many clients there are, and how many of their `sizes` (clients,) examples train.

    With `names`, (clients,) or empty, the first are listed with their sizes.
    """
    if len(sizes) == 1:
        return f"1 client of {sizes[0]:,} examples"
    median = f"median {np.median(sizes):,.0f}"
    found = f"{len(sizes):,} clients of {sizes.min():,} to {sizes.max():,} examples ({median})"
    if len(names) != len(sizes):
        return found
    listed = ", ".join(f"{name} {size:,}" for name, size in zip(names[:SHOWN], sizes, strict=False))
    return f"{found}: {listed}{', ...' if len(names) > SHOWN else ''}"


def _world(config: Config, world_size: int, groups: int) -> str:
    ranks = config.topology.ranks_per_client
    where = "rank 0 only" if config.topology.coordinator == "dedicated" else "rank 0, which also trains"
    return f"{_count(world_size, 'rank')}: {_count(groups, 'client group')} of {ranks}; coordinator: {where}"


def _engine(config: Config, flat: FlatModel, train: Images) -> Engine:
    """Return the engine that trains the clients."""
    cpu = config.topology.device == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if cpu else "cuda")
    return engine_of(config, flat, train.shape, device, config.topology.ranks_per_client)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _memory(config: Config, train: Images, test: Images | None, flat: FlatModel, *, gradients: bool) -> str:
    """Return the bytes of the images and of the vectors: model, server, update, gradient, optimizer, sums."""
    p, b, item = flat.params.numel(), flat.buffers.numel(), flat.params.element_size()
    vectors = 3 + gradients + OPTIMIZER_VECTORS[config.local.optimizer] + bool(config.local.momentum)
    sums = 1 if config.secure_aggregation is None else 3  # a client's vector, its masked copy, and the sum
    state = (p * vectors + 2 * b) * item + p * config.aggregation.bytes_per_element * sums
    pixels = [s.pixels for s in (train, test) if s is not None and s.pixels is not None]
    images = sum(tensor.numel() for tensor in pixels)
    return f"{_size(images)} of images, {_size(state)} of model state, plus activations"


def _size(count: int) -> str:
    return decimal(count, precision=2)


def _list(values: list[int]) -> str:
    shown = ", ".join(f"{v:,}" for v in values[:SHOWN])
    return f"{shown}, ..." if len(values) > SHOWN else shown
