"""Which engine trains the clients of a run, and in which layout of images."""

from __future__ import annotations

import copy
import logging
from typing import NamedTuple

import torch
from torch import nn

from fedddp.algorithms import Algorithm
from fedddp.algorithms.local import LocalConfig
from fedddp.config.schema import Config
from fedddp.data.loader import ClientLoader
from fedddp.distributed.world import World
from fedddp.models.flat import FlatModel
from fedddp.models.trace import UnsupportedModelError, trace
from fedddp.models.traced import TracedModel, try_traced
from fedddp.privacy.config import ExampleDP
from fedddp.section import ConfigError
from fedddp.training.client_trainer import ClientTrainer, Parts
from fedddp.training.graph_trainer import GraphTrainer
from fedddp.training.private_trainer import PrivateTrainer
from fedddp.training.traced_trainer import TracedTrainer, definer

logger = logging.getLogger(__name__)

LARGE = 4_000_000
"""Parameters of a network that trains channels-last on images of 64 pixels or more only."""


class Engine(NamedTuple):
    """What trains the clients of a run."""

    name: str
    """`eager`, `traced` or `graph`."""
    reason: str = ""
    """Why it is the eager one."""
    traced: TracedModel | None = None
    asked: str = "auto"
    """`local.engine`."""

    @property
    def refusal(self) -> str:
        """The line that refuses another engine that was asked for; empty if it is this one."""
        if not self.reason or self.asked in ("auto", "eager"):
            return ""
        return f"local.engine={self.asked} cannot train this: {self.reason}; leave it out"

    def __str__(self) -> str:
        """Return the name, with the reason, or the refusal."""
        return self.refusal or (f"{self.name}, because {self.reason}" if self.reason else self.name)


def make_trainer(config: Config, world: World, flat: FlatModel, loader: ClientLoader) -> ClientTrainer:
    """Collective over the group. Return the trainer of `config.local.engine`.

    Raises:
        ConfigError: the model, the algorithm or the place does not allow the engine that is asked for.
    """
    parts = Parts(world, flat, config.task, loader, config.local, config.algorithm, config.seed)
    if isinstance(config.privacy, ExampleDP):
        return PrivateTrainer(parts, config.privacy)
    if (
        config.local.engine == "graph" and world.group is None
    ):  # a dedicated coordinator, which trains no client
        return ClientTrainer(parts)
    engine = engine_of(config, flat, loader.images.shape, world.device, world.ranks_per_client)
    logger.debug("local.engine: %s", engine)
    if engine.traced is not None:
        return TracedTrainer(parts, engine.traced)
    if engine.name == "graph":
        try:
            return GraphTrainer(parts)
        except UnsupportedModelError as error:
            raise ConfigError(engine._replace(reason=str(error)).refusal) from error
    if engine.refusal:
        raise ConfigError(engine.refusal)
    trainer = ClientTrainer(parts)
    if config.transport.group is not None:
        world.compress_gradients(trainer.replica, config.transport.group)
    return trainer


def engine_of(
    config: Config, flat: FlatModel, shape: tuple[int, int, int], device: torch.device, ranks: int
) -> Engine:
    """Return the engine that trains the clients.

    The engine decides bits, so its choice depends on nothing that may change when a run is resumed.

    Args:
        config: of the run.
        flat: the model, which is tried and put back.
        shape: of an image, (C, H, W).
        device: where clients train.
        ranks: R, of a client.
    """
    asked, reason = config.local.engine, obstacle(config, device, ranks)
    if reason:
        return Engine("eager", reason, asked=asked)
    try:
        if asked == "graph":
            trace(flat.module)
            return Engine("graph", asked=asked)
        return Engine("traced", traced=try_traced(flat, shape), asked=asked)
    except UnsupportedModelError as error:
        return Engine("eager", str(error), asked=asked)


def obstacle(config: Config, device: torch.device, ranks: int) -> str:
    """Return why the eager engine trains any model of such a run; empty if another one can."""
    local, algorithm, graph = config.local, config.algorithm, config.local.engine == "graph"
    owners = [definer(type(algorithm), hook) for hook in ("begin", "correct", "finish")]
    owners += [definer(type(config.task), name) for name in ("forward", "loss", "loss_and_gradient")]
    unknown = [owner.__name__ for owner in owners if not owner.__module__.startswith("fedddp.")]
    reasons = {
        "local.engine is eager": local.engine == "eager",
        "ExampleDP takes the gradient of every example": isinstance(config.privacy, ExampleDP),
        "a client has several ranks": ranks > 1,
        "the clients train on a GPU": device.type != "cpu" and not graph,
        "the clients do not train on a GPU": device.type != "cuda" and graph,
        f"local.precision is {local.precision}": (
            local.precision == "fp16" or (local.precision == "bf16" and not graph)
        ),
        "images differ in how many boxes they have": config.task.target == "boxes" and graph,
        f"local.accumulate is {local.accumulate}": local.accumulate > 1,
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
