"""Which trainer a run uses: one client at a time, or several side by side."""

from __future__ import annotations

import logging

import torch
from torch import nn

from fedddp.algorithms import Algorithm, AsynchronousAlgorithm
from fedddp.algorithms.local import LocalConfig
from fedddp.config.schema import Config
from fedddp.data.loader import ClientLoader
from fedddp.distributed.world import World
from fedddp.models.flat import FlatModel
from fedddp.models.stacked import StackedModel, UnsupportedModelError
from fedddp.section import ConfigError
from fedddp.training.client_trainer import ClientTrainer
from fedddp.training.stacked_trainer import StackedTrainer

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
    streamed = loader.images.pixels is None
    reason, together = "a client has several ranks", 0
    if world.ranks_per_client == 1:
        together, reason = clients_at_once(config, flat.module, world.device, world.groups, streamed=streamed)
    if together:
        return StackedTrainer(*parts, seed=config.seed, clients_at_once=together)
    if config.local.engine == "stacked":
        raise ConfigError(f"local.engine=stacked cannot train this: {reason}; leave it out")
    if config.local.engine == "auto":
        logger.debug("local.engine=auto: one client at a time, because %s", reason)
    return ClientTrainer(*parts, seed=config.seed)


def clients_at_once(
    config: Config, module: nn.Module, device: torch.device, groups: int, *, streamed: bool
) -> tuple[int, str]:
    """Return how many clients a rank trains side by side; 0 and the reason if the eager engine trains.

    A rank reads one stream of images at a time, and a worker of asynchronous training gets one client at a
    time: the stacked engine trains these one by one.
    """
    local, algorithm = config.local, config.algorithm
    reason = obstacle(config, device)
    if reason:
        return 0, reason
    try:
        StackedModel([module])
    except UnsupportedModelError as error:
        return 0, str(error)
    if streamed or isinstance(algorithm, AsynchronousAlgorithm):
        return 1, ""
    cohort = config.cohort.size + config.cohort.extra
    return min(slots(local, sum(p.numel() for p in module.parameters())), -(-cohort // groups)), ""


def obstacle(config: Config, device: torch.device) -> str:
    """Return why clients are not trained side by side, whatever the model; empty if they can be."""
    local, algorithm = config.local, config.algorithm
    if local.engine == "eager":
        return "local.engine is eager"
    if config.topology.ranks_per_client > 1:
        return "a client has several ranks"
    if device.type != "cpu":
        return "the clients train on a GPU"
    if local.precision != "fp32":
        return f"local.precision is {local.precision}"
    if local.accumulate > 1:
        return f"local.accumulate is {local.accumulate}"
    if type(algorithm).penalty is not Algorithm.penalty:
        return f"{type(algorithm).__name__} adds a penalty to the loss"
    return ""


def slots(local: LocalConfig, parameters: int) -> int:
    """Return how many copies of a model with so many parameters train side by side."""
    if local.clients_at_once != "auto":
        return local.clients_at_once
    return max(1, min(MOST, ELEMENTS // parameters))


def channels_last(local: LocalConfig, module: nn.Module, side: int, device: torch.device) -> bool:
    """Return whether `module` trains channels-last on images whose shorter side has so many pixels.

    Measured on a CPU (docs/benchmarks.md) it takes 0.5 to 0.95 of the time, but more where a large network
    ends in maps of one or two pixels, as ResNet-18 does at 32 x 32. GPUs gain in half precision only.
    """
    if local.channels_last != "auto":
        return local.channels_last
    convolves = any(isinstance(layer, nn.Conv2d) for layer in module.modules())
    large = sum(p.numel() for p in module.parameters()) > LARGE and side < 64
    return convolves and device.type == "cpu" and not large
