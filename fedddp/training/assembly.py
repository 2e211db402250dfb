"""Puts the parts of one run together, in the order in which they need each other."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedddp.algorithms import ServerState
from fedddp.config.loader import to_dict
from fedddp.config.schema import Config
from fedddp.data.datasets import Images
from fedddp.data.loader import ClientLoader
from fedddp.data.partition import Split, holdout
from fedddp.distributed.world import World
from fedddp.models.flat import FlatModel
from fedddp.simulation.clock import examples_trained
from fedddp.storage.checkpoint import Checkpoints, write_text
from fedddp.storage.client_states import ClientStates
from fedddp.tracking.tracker import Tracker
from fedddp.training.client_trainer import ClientTrainer
from fedddp.training.objects import Objects
from fedddp.training.session import Session

logger = logging.getLogger(__name__)

WANDB_RUN = ".wandb-run"
"""File of the run directory with the id of its wandb run."""


def load_images(objects: Objects, config: Config, world: World) -> tuple[Images, Images | None]:
    """Collective. Return the training and the test images; one rank per node downloads and decodes first."""
    with _one_rank_first(world):
        return objects.load_images(config)


def assemble(
    config: Config,
    world: World,
    directory: Path,
    module: nn.Module | None,
    train: Images,
    test: Images | None,
) -> Session:
    """Collective. Return the session of a run: from scratch, or resumed from its newest intact checkpoint.

    Args:
        config: the configuration.
        world: the ranks.
        directory: the run directory.
        module: the user's own model instead of `config.model.name`; it is copied.
        train: the training images.
        test: the images of central evaluation; None for none.

    Raises:
        ValueError: the configuration cannot run.
    """
    # The model, the same on all ranks.
    flat = FlatModel(_build(config, world, module, train))
    config.algorithm.check_model(flat)
    world.broadcast(*(tensor.detach() for tensor in flat.module.state_dict().values()))

    # The clients: their data, speed and honesty.
    split, sizes = config.data.split(train, config.seed)
    malicious = config.attacks.malicious(len(split), config.seed)
    train = _poisoned(config, train, split, malicious)
    config.clock.check(examples_trained(config.local, sizes), config.aggregation.min_clients(), config.seed)

    # The server, the trainer of this rank's group, and the session that holds them.
    server = ServerState.of(flat, len(split))
    config.algorithm.start(server)
    loader = ClientLoader(train, config.data, world.device, seed=config.seed)
    local, algorithm = config.local, config.algorithm
    session = Session(
        config=config,
        world=world,
        flat=flat,
        server=server,
        trainer=ClientTrainer(world, flat, config.task, loader, local, algorithm, seed=config.seed),
        states=ClientStates(world),
        train=loader,
        test=None if test is None else ClientLoader(test, config.data, world.device, seed=config.seed),
        split=split,
        sizes=sizes,
        checkpoints=Checkpoints(directory / "checkpoints", config.checkpoint.keep, world),
        directory=directory,
        malicious=frozenset(malicious.tolist()),
    )

    # The checkpoint, if there is one, and then the tracker, which resumes the run's history and dashboards.
    run_id = _resume(session) if config.resume == "auto" else None
    if world.is_coordinator:
        _track(session, run_id)
    return session


def _track(s: Session, run_id: str | None) -> None:
    """Start the session's tracker, with the wandb run that it resumes."""
    s.tracker = Tracker(
        s.config.tracking,
        s.directory,
        to_dict(s.config),
        name=s.directory.name,
        total_rounds=s.config.rounds,
        resume_round=s.rounds_done,
        run_id=run_id,
    )
    if s.tracker.run_id:
        write_text(s.directory / WANDB_RUN, s.tracker.run_id)


def _build(config: Config, world: World, module: nn.Module | None, train: Images) -> nn.Module:
    """Return the model on this rank's device, in its memory format."""
    properties: dict[str, Any] = {"classes": train.classes, "shape": train.shape, "sync": world.group_sum}
    if module is None:
        built = config.model.build(seed=config.seed, **properties)
    else:
        built = config.model.adapt(copy.deepcopy(module), **properties)
    built = built.to(world.device)
    return built.to(memory_format=torch.channels_last) if config.local.channels_last else built


def _poisoned(config: Config, images: Images, split: Split, malicious: NDArray[np.int64]) -> Images:
    """Return `images` with the labels that malicious clients train on; held-out labels stay true."""
    if not len(malicious):
        return images
    labels = images.labels.copy()
    for client in malicious.tolist():
        mine, _ = holdout(split.indices(client), config.data.holdout, client, config.seed)
        labels[mine] = config.attacks.relabel(labels[mine], images.classes)
    return dataclasses.replace(images, labels=labels)


def _resume(s: Session) -> str | None:
    """Collective. Restore the newest intact checkpoint if there is one; return its wandb run id."""
    found, corrupt = s.checkpoints.newest() if s.world.is_coordinator else (None, [])
    for line in corrupt:
        logger.warning(line)
    if corrupt and found is None:
        logger.warning("no checkpoint of %s is intact; training restarts from scratch", s.directory)
    name, metadata = s.world.gather((found.folder.name, found.metadata) if found else (None, {}))[0]
    if name is not None:
        s.restore(s.checkpoints.open(name, metadata))
        if s.world.is_coordinator:
            logger.info("resuming %s from %s", s.directory, name)
    noted = s.directory / WANDB_RUN  # newer than the checkpoint, if the run was killed before its first one
    text = noted.read_text(errors="replace") if noted.exists() else ""
    return text if re.fullmatch(r"\w+", text) else metadata.get("wandb_run_id")


@contextlib.contextmanager
def _one_rank_first(world: World) -> Iterator[None]:
    """Collective. Let one rank of each node run the block before the others (downloads, caches)."""
    if world.local_rank == 0:
        yield
    world.barrier()
    if world.local_rank != 0:
        yield
