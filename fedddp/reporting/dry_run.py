"""The dry run: what a run would do, before it does it: groups, clients, bytes, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.filesize import decimal

from fedddp.algorithms import ServerState
from fedddp.config.schema import Config
from fedddp.data.datasets import Images, load
from fedddp.models.flat import FlatModel
from fedddp.simulation.clock import examples_trained
from fedddp.simulation.cohort import assign
from fedddp.training.engine import Place, clients_at_once

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

OPTIMIZER_VECTORS = {"sgd": 0, "adam": 2, "adamw": 2}
SHOWN = 8
"""Groups that are listed one by one."""


def dry_run(config: Config, world_size: int) -> Table:
    """Return a table of what a run would do on `world_size` ranks; builds the model, trains nothing.

    Raises:
        ValueError: the run cannot work.
    """
    from rich.table import Table

    groups = config.topology.groups(world_size)
    train, test = load(config.data)
    split, sizes = config.data.split(train, config.seed)
    config.clock.check(examples_trained(config.local, sizes), config.aggregation.min_clients(), config.seed)
    shape = train.shape
    module = config.model.build(
        classes=train.classes, shape=shape, seed=config.seed, sync=lambda tensor: tensor
    )
    flat = FlatModel(module)
    config.algorithm.check_model(flat)
    server = ServerState.of(flat, len(split))
    config.algorithm.start(server)
    cohort = config.cohort.sample(len(split), config.seed, 0)
    assignment = assign(cohort, sizes[cohort], groups)
    examples = [int(sizes[clients].sum()) for clients in assignment]
    up, down = config.algorithm.traffic(server)
    steps = config.local.steps or config.local.epochs * float(np.ceil(sizes / config.local.batch_size).mean())

    table = Table("", "", box=None, show_header=False)
    table.add_row("world", _world(config, world_size, groups))
    table.add_row(
        "data",
        f"{config.data.dataset}: {len(train.labels):,} training images of "
        f"{'x'.join(map(str, shape))}, {0 if test is None else len(test.labels):,} for testing",
    )
    table.add_row(
        "population",
        f"{len(split):,} clients of {sizes.min():,} to {sizes.max():,} "
        f"examples (median {np.median(sizes):,.0f})",
    )
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
    table.add_row("local training", _engine(config, module, train, groups))
    table.add_row("bytes per round", f"{_size(down * len(cohort))} down, {_size(up * len(cohort))} up")
    table.add_row("memory per rank", _memory(config, train, test, flat))
    return table


def _world(config: Config, world_size: int, groups: int) -> str:
    ranks = config.topology.ranks_per_client
    where = "rank 0 only" if config.topology.coordinator == "dedicated" else "rank 0, which also trains"
    return f"{_count(world_size, 'rank')}: {_count(groups, 'client group')} of {ranks}; coordinator: {where}"


def _engine(config: Config, module: nn.Module, train: Images, groups: int) -> str:
    """Return how many clients train at a time, or why one by one."""
    cpu = config.topology.device == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if cpu else "cuda")
    place = Place(device, groups, config.topology.ranks_per_client, train.pixels is None)
    together, reason = clients_at_once(config, module, train.shape, place)
    ways = f"up to {together} clients of a rank side by side" if together > 1 else "clients one by one"
    return f"{ways}, because {reason}" if reason else ways


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _memory(config: Config, train: Images, test: Images | None, flat: FlatModel) -> str:
    """Return the bytes of the images and of the vectors: model, gradient, server, update, optimizer, sums."""
    p, b, item = flat.params.numel(), flat.buffers.numel(), flat.params.element_size()
    vectors = 4 + OPTIMIZER_VECTORS[config.local.optimizer] + bool(config.local.momentum)
    state = (p * vectors + 2 * b) * item + p * config.aggregation.bytes_per_element
    pixels = [s.pixels for s in (train, test) if s is not None and s.pixels is not None]
    images = sum(tensor.numel() for tensor in pixels)
    return f"{_size(images)} of images, {_size(state)} of model state, plus activations"


def _size(count: int) -> str:
    return decimal(count, precision=2)


def _list(values: list[int]) -> str:
    shown = ", ".join(f"{v:,}" for v in values[:SHOWN])
    return f"{shown}, ..." if len(values) > SHOWN else shown
