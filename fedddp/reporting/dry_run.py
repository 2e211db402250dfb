"""What a run would do, before it does it: groups, visits, bytes, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedddp.algorithms.algorithm import Server
from fedddp.config.schema import Run
from fedddp.data.datasets import Images, load
from fedddp.models.flat import FlatModel
from fedddp.reporting.render import size
from fedddp.simulation.cohort import assign

if TYPE_CHECKING:
    from rich.table import Table

OPTIMIZER_VECTORS = {"sgd": 0, "adam": 2, "adamw": 2}


def plan(run: Run, world_size: int) -> Table:
    """Return a table of what `run` would do on `world_size` ranks; builds the model, trains nothing.

    Raises:
        ValueError: the run cannot work.
    """
    from rich.table import Table

    groups = run.topology.groups(world_size)
    train, test = load(run.data)
    split, sizes = run.data.split(train, run.seed)
    shape = train.shape
    module = run.model.build(classes=train.classes, shape=shape, seed=run.seed, sync=lambda tensor: tensor)
    flat = FlatModel(module)
    server = Server(flat.params, flat.buffers, flat.counters, len(split))
    run.algorithm.start(server)
    cohort = run.cohort.sample(len(split), run.seed, 0)
    visits = assign(cohort, sizes[cohort], groups)
    examples = [int(sizes[clients].sum()) for clients in visits]

    p, b, item = flat.params.numel(), flat.buffers.numel(), flat.params.element_size()
    up, down = run.algorithm.traffic(server)
    steps = run.local.steps or run.local.epochs * float(np.ceil(sizes / run.local.batch_size).mean())

    table = Table("", "", box=None, show_header=False)
    table.add_row("world", _world(run, world_size, groups))
    table.add_row(
        "data",
        f"{run.data.dataset}: {len(train.labels):,} training images of "
        f"{'x'.join(map(str, shape))}, {0 if test is None else len(test.labels):,} for testing",
    )
    table.add_row(
        "population",
        f"{len(split):,} clients of {sizes.min():,} to {sizes.max():,} "
        f"examples (median {np.median(sizes):,.0f})",
    )
    table.add_row("model", f"{run.model.name}: {p:,} trainable parameters, {b:,} buffer elements")
    table.add_row("rounds", f"{run.rounds}, {len(cohort)} clients each, about {steps:,.0f} steps a visit")
    table.add_row(
        "first round",
        f"visits per group {_list([len(v) for v in visits])}, examples per group {_list(examples)}",
    )
    table.add_row("bytes a round", f"{size(down * len(cohort))} down, {size(up * len(cohort))} up")
    table.add_row("memory a rank", _memory(run, train, test, p, b, item))
    return table


def _world(run: Run, world_size: int, groups: int) -> str:
    ranks = run.topology.ranks_per_client
    where = "rank 0 only" if run.topology.coordinator == "dedicated" else "rank 0, which also trains"
    return f"{world_size} ranks: {groups} client groups of {ranks}; coordinator: {where}"


def _memory(run: Run, train: Images, test: Images | None, p: int, b: int, item: int) -> str:
    """Images, and the vectors: model, gradient, server copy, update, optimizer, sums."""
    vectors = 4 + OPTIMIZER_VECTORS[run.local.optimizer] + bool(run.local.momentum)
    state = (p * vectors + 2 * b) * item + p * (8 if run.aggregation.sums == "exact" else 4)
    pixels = [s.pixels for s in (train, test) if s is not None and s.pixels is not None]
    images = sum(tensor.numel() for tensor in pixels)
    return f"{size(images)} of images, {size(state)} of model state, plus activations"


def _list(values: list[int]) -> str:
    shown = ", ".join(f"{v:,}" for v in values[:8])
    return f"{shown}, ..." if len(values) > 8 else shown
