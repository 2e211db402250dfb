"""Which trainer a run uses: one client at a time, or several side by side."""

from __future__ import annotations

import copy
import logging
from typing import NamedTuple

import torch
from torch import nn

from fedddp.algorithms import Algorithm, AsynchronousAlgorithm
from fedddp.algorithms.local import LocalConfig
from fedddp.config.schema import Config
from fedddp.data.loader import ClientLoader
from fedddp.distributed.world import World
from fedddp.models.flat import FlatModel
from fedddp.models.stacked import try_side_by_side
from fedddp.models.trace import UnsupportedModelError
from fedddp.privacy.config import ExampleDP
from fedddp.section import ConfigError
from fedddp.training.client_trainer import ClientTrainer
from fedddp.training.private_trainer import PrivateTrainer
from fedddp.training.stacked_trainer import StackedTrainer, definer

logger = logging.getLogger(__name__)

ELEMENTS = 1_500_000
"""Parameters of all copies together, at most, where `local.clients_at_once` is auto: 6 MB in float32. Copies
that leave the processor's cache cost more than they save."""
LARGE = 4_000_000
"""Parameters of a network that trains channels-last on images of 64 pixels or more only."""
MOST = 25
"""Copies, at most; more gain nothing."""


def make_trainer(config: Config, world: World, flat: FlatModel, loader: ClientLoader) -> ClientTrainer:
    """Collective over the group. Return the trainer of `config.local.engine`.

    Raises:
        ConfigError: `local.engine` is "stacked", and the clients cannot be trained side by side.
    """
    parts = (world, flat, config.task, loader, config.local, config.algorithm)
    if isinstance(config.privacy, ExampleDP):
        return PrivateTrainer(*parts, seed=config.seed, privacy=config.privacy)
    place = Place(world.device, world.groups, world.ranks_per_client, loader.images.pixels is None)
    together, reason = clients_at_once(config, flat.module, loader.images.shape, place)
    if together:
        return StackedTrainer(*parts, seed=config.seed, clients_at_once=together)
    if config.local.engine == "stacked":
        raise ConfigError(f"local.engine=stacked cannot train this: {reason}; leave it out")
    if config.local.engine == "auto":
        logger.debug("local.engine=auto: one client at a time, because %s", reason)
    trainer = ClientTrainer(*parts, seed=config.seed)
    if config.transport.group is not None:
        world.compress_gradients(trainer.replica, config.transport.group)
    return trainer


class Place(NamedTuple):
    """Where clients train, and how they get their images."""

    device: torch.device
    groups: int
    """G."""
    ranks: int
    """R."""
    streamed: bool
    """Whether images are read as they are needed, of which a rank has one stream at a time."""


def clients_at_once(
    config: Config, module: nn.Module, shape: tuple[int, int, int], place: Place
) -> tuple[int, str]:
    """Return how many clients a rank trains side by side; 0 and the reason if one by one.

    `shape` is that of an image, (C, H, W).
    """
    local, parameters = config.local, sum(p.numel() for p in module.parameters())
    copies, cohort = max(1, min(MOST, ELEMENTS // parameters)), config.cohort.size + config.cohort.extra
    reason = obstacle(config, place)
    # The engine decides bits, so its choice depends on nothing that may change when a run is resumed.
    if not reason and min(copies, cohort) == 1 and local.engine == "auto":
        reason = f"with {parameters:,} parameters there is one at a time"
    if reason:
        return 0, reason
    try:
        try_side_by_side(module, shape)
    except UnsupportedModelError as error:
        return 0, str(error)
    if local.clients_at_once != "auto":
        copies = local.clients_at_once
    return 1 if place.streamed else min(copies, -(-cohort // place.groups)), ""


def obstacle(config: Config, place: Place) -> str:
    """Return why clients are not trained side by side, whatever the model; empty if they can be."""
    local, algorithm = config.local, config.algorithm
    owners = [definer(type(algorithm), hook) for hook in ("begin", "correct", "finish")]
    owners += [definer(type(config.task), name) for name in ("forward", "loss", "losses")]
    unknown = [owner.__name__ for owner in owners if not owner.__module__.startswith("fedddp.")]
    reasons = {
        "local.engine is eager": local.engine == "eager",
        "ExampleDP takes the gradient of every example": isinstance(config.privacy, ExampleDP),
        "a client has several ranks": place.ranks > 1,
        "the clients train on a GPU": place.device.type != "cpu",
        f"local.precision is {local.precision}": local.precision != "fp32",
        f"local.accumulate is {local.accumulate}": local.accumulate > 1,
        "images differ in their number of boxes": config.task.target == "boxes",
        "asynchronous training hands out one client at a time": isinstance(algorithm, AsynchronousAlgorithm),
        f"{type(algorithm).__name__} adds a penalty to the loss": (
            type(algorithm).penalty is not Algorithm.penalty
        ),
        # A hook may draw at random, change the model, or register hooks on it.
        f"{'/'.join(unknown[:1])} is not one of fedddp's own classes": bool(unknown),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


@torch.no_grad()
def channels_last(
    local: LocalConfig, module: nn.Module, shape: tuple[int, int, int], device: torch.device
) -> bool:
    """Return whether `module` trains channels-last on images of `shape` (C, H, W).

    Measured on a CPU (docs/benchmarks.md) it takes 0.5 to 0.95 of the time, but more where a large network
    ends in maps of one or two pixels, as ResNet-18 does at 32 x 32. GPUs gain in half precision only.
    """
    if local.channels_last != "auto":
        return local.channels_last
    convolves = any(isinstance(layer, nn.Conv2d) for layer in module.modules())
    large = sum(p.numel() for p in module.parameters()) > LARGE and min(shape[1:]) < 64
    if not convolves or large or device.type != "cpu":
        return False
    trial = copy.deepcopy(module).eval().to(memory_format=torch.channels_last)
    images = torch.zeros(2, *shape).contiguous(memory_format=torch.channels_last)
    try:
        trial(images)
    except RuntimeError:  # it takes views that channels-last images do not allow
        return False
    return True
