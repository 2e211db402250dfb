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
from fedddp.models.stacked import UnsupportedModelError
from fedddp.section import ConfigError
from fedddp.training.client_trainer import ClientTrainer
from fedddp.training.stacked_trainer import StackedTrainer

logger = logging.getLogger(__name__)

ELEMENTS = 4_000_000
"""Parameters of all copies together, at most, where `local.clients_at_once` is auto: 16 MB in float32."""
LARGE = 4_000_000
"""Parameters of a network that trains channels-last on images of 64 pixels or more only."""
MOST = 25
"""Copies, at most; more gain nothing."""


def make_trainer(config: Config, world: World, flat: FlatModel, loader: ClientLoader) -> ClientTrainer:
    """Collective over the group. Return the trainer of `config.local.engine`.

    Raises:
        ConfigError: `local.engine` is "stacked", and the clients cannot be trained side by side.
    """
    local, algorithm = config.local, config.algorithm
    parts = (world, flat, config.task, loader, local, algorithm)
    reason = obstacle(world, local, algorithm)
    if local.engine != "eager" and not reason:
        cohort = config.cohort.size + config.cohort.extra
        together = min(clients_at_once(local, flat.params.numel()), -(-cohort // world.groups))
        if isinstance(algorithm, AsynchronousAlgorithm):  # its workers get one client at a time
            together = 1
        try:
            return StackedTrainer(*parts, seed=config.seed, clients_at_once=together)
        except UnsupportedModelError as error:
            reason = str(error)
    if local.engine == "stacked":
        raise ConfigError(f"local.engine=stacked cannot train this: {reason}; leave it out")
    if local.engine == "auto":
        logger.debug("local.engine=auto: one client at a time, because %s", reason)
    return ClientTrainer(*parts, seed=config.seed)


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


def obstacle(world: World, local: LocalConfig, algorithm: Algorithm) -> str:
    """Return why clients cannot be trained side by side, whatever the model; empty if they can."""
    if world.ranks_per_client > 1:
        return "a client has several ranks"
    if world.device.type != "cpu":
        return "the clients train on a GPU"
    if local.precision != "fp32":
        return f"local.precision is {local.precision}"
    if local.accumulate > 1:
        return f"local.accumulate is {local.accumulate}"
    if type(algorithm).penalty is not Algorithm.penalty:
        return f"{type(algorithm).__name__} adds a penalty to the loss"
    return ""


def clients_at_once(local: LocalConfig, parameters: int) -> int:
    """Return how many clients train side by side, for a model with so many parameters."""
    if local.clients_at_once != "auto":
        return local.clients_at_once
    return max(1, min(MOST, ELEMENTS // parameters))
