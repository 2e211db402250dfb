"""Puts the parts of one run together, in the order in which they need each other."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedddp.algorithms import ServerState
from fedddp.config.baselines import in_effect
from fedddp.config.loader import to_dict
from fedddp.config.schema import Config
from fedddp.data.datasets import Images
from fedddp.data.loader import ClientLoader, blank_batch
from fedddp.data.partition import Split, holdout_sizes
from fedddp.distributed.world import World
from fedddp.models.flat import FlatModel
from fedddp.section import ConfigError
from fedddp.simulation.clock import examples_trained
from fedddp.simulation.cohort import Assigner
from fedddp.storage.checkpoint import Checkpoints, Saved, write_text
from fedddp.storage.client_states import ClientStates
from fedddp.storage.history import main_metric, read_text
from fedddp.storage.run_record import EVALUATION, MODEL, WRONG
from fedddp.tasks import Task
from fedddp.tracking.tracker import Tracker
from fedddp.training.announcements import announce
from fedddp.training.best import BestModels
from fedddp.training.clients import Clients, PooledLoader, clients_of, pooled
from fedddp.training.engine import channels_last, make_trainer
from fedddp.training.objects import Objects
from fedddp.training.protect import protect
from fedddp.training.session import Session
from fedddp.transport.links import Links

logger = logging.getLogger(__name__)

STAGE = {"stage": True}
"""Marks a log record of what a run does before its first round: a terminal shows it, a file does not."""

EXAMINED = (EVALUATION, WRONG)
"""Files of the run directory about the final model."""

WANDB_RUN = ".wandb-run"
"""File of the run directory with the id of its wandb run."""


def load_images(objects: Objects, config: Config, world: World) -> tuple[Images, Images | None]:
    """Collective. Return the training and the test images; one rank per node downloads and decodes first."""
    logger.info("preparing the data (%s)", config.data.dataset, extra=STAGE)
    with _one_rank_first(world):
        train, test = objects.load_images(config)
    _check_same_data(world, config, train, test)
    return train, test


def _check_same_data(world: World, config: Config, train: Images, test: Images | None) -> None:
    """Collective. Refuse to train where ranks hold different data: unsorted lists, splits without a seed.

    Raises:
        ConfigError: the first rank that differs from rank 0.
    """
    digests = world.gather((train.digest(), None if test is None else test.digest()))
    for rank, own in enumerate(digests):
        if own != digests[0]:
            which = "training" if own[0] != digests[0][0] else "test"
            raise ConfigError(
                f"rank {rank} holds other {which} data than rank 0 ({config.data.dataset}): other labels, "
                "owners or images; sort what is listed, seed what is split, and renew old copies"
            )


def assemble(
    config: Config,
    world: World,
    directory: Path,
    module: nn.Module | None,
    train: Images,
    test: Images | None,
    record: Mapping[str, Any] | None = None,
) -> Session:
    """Collective. Return the session of a run: from scratch, or resumed from its newest intact checkpoint.

    Args:
        config: the configuration.
        world: the ranks.
        directory: the run directory.
        module: the user's own model instead of `config.model.name`; it is copied.
        train: the training images.
        test: the images of central evaluation; None for none.
        record: what config.yaml holds, for trackers; by default `config`.

    Raises:
        ValueError: the configuration cannot run.
    """
    record, config = record or to_dict(config), in_effect(config)
    logger.info("building the model (%s)", config.model.name, extra=STAGE)
    # The checkpoint to resume from, and the model; the coordinator reads pretrained weights.
    checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint.keep, world)
    saved = _newest_checkpoint(checkpoints, world) if config.resume == "auto" else None
    built = _build(config, world, module, train, pretrained=saved is None and world.is_coordinator)
    clients = clients_of(config, train, test)
    config, split, sizes = _split(config, clients)
    malicious = config.attacks.malicious(len(split), config.seed)
    loader = _training_loader(config, _poisoned(config, train, clients, malicious), clients, world)
    laid_out = _with_layout(config, built, train, world, saved)
    flat = FlatModel(built)
    server = _server(config, flat, len(split))
    session = Session(
        config=config,
        world=world,
        flat=flat,
        server=server,
        links=Links.started(config.transport, config.algorithm, config.seed, server, flat),
        trainer=make_trainer(laid_out, world, flat, loader),
        states=ClientStates(world),
        assigner=Assigner(world.groups, learns=config.aggregation.any_grouping),
        train=loader,
        test=None if test is None else ClientLoader(test, config.data, world.device, seed=config.seed),
        clients=clients,
        split=split,
        sizes=sizes,
        checkpoints=checkpoints,
        directory=directory,
        data_digest=loader.images.digest(pixels=False),
        channels_last=bool(laid_out.local.channels_last),
        malicious=frozenset(malicious.tolist()),
    )
    _begin(session, saved, record)
    return session


def _begin(s: Session, saved: Saved | None, record: Mapping[str, Any]) -> None:
    """Collective. Put in what depends on the session itself and on its checkpoint, then start the tracker."""
    s.best = _best(s)
    s.protection = protect(s, saved.metadata if saved else {})
    if saved is not None:
        _restore(s, saved)
    _track(s, record)


def _server(config: Config, flat: FlatModel, population: int) -> ServerState:
    """Return the server before the first round."""
    config.algorithm.check_model(flat)
    server = ServerState.of(flat, population)
    config.algorithm.start(server)
    return server


def _with_layout(
    config: Config, built: nn.Module, train: Images, world: World, saved: Saved | None
) -> Config:
    """Return `config` with the layout of images decided, and put the weights of `built` into it.

    A resumed run keeps the layout that it had, also on another device: flat vectors are in that order.
    """
    last = saved.metadata.get("channels_last") if saved else None
    if last is None:
        last = channels_last(config.local, built, train.shape, world.device)
    built.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    return dataclasses.replace(config, local=dataclasses.replace(config.local, channels_last=last))


def _best(s: Session) -> BestModels | None:
    """Return what compares evaluations, if the configuration asks for it.

    Raises:
        ConfigError: the evaluations of this run do not have the metric.
    """
    config, metrics = s.config, s.config.checkpoint.metrics
    if not metrics and not config.evaluation.stop_after:
        return None
    names = s.evaluated_metrics()
    wanted = metrics or [main_metric(dict.fromkeys(names, 0.0)) or "eval/loss"]
    missing = next((metric for metric in wanted if metric not in names), None)
    if missing is not None:
        key = f"checkpoint.best={missing}" if metrics else "evaluation.stop_after"
        raise ConfigError(
            f"{key}: the evaluations of this run do not have {missing}; set checkpoint.best to one of "
            f"{', '.join(names) or 'theirs, and give test data (of clients: data.holdout)'}"
        )
    return BestModels(wanted, kept=bool(metrics))


def _track(s: Session, record: Mapping[str, Any]) -> None:
    """Start the coordinator's tracker, which resumes the run's history and its wandb run."""
    if not s.world.is_coordinator:
        return
    announce(s)
    run_id = _wandb_run(s) if s.config.resume == "auto" else None
    if s.config.tracking.trackers:
        logger.info("starting %s", ", ".join(s.config.tracking.trackers), extra=STAGE)
    s.tracker = Tracker(
        s.config.tracking,
        s.directory,
        {**record, "name": s.directory.name},
        name=s.directory.name,
        total_rounds=s.config.rounds,
        resume_round=s.rounds_done,
        resume_client_rows=s.metadata.get("client_rows"),
        run_id=run_id,
    )
    s.world.on_stop = s.tracker.stopping
    if s.tracker.run_id:
        write_text(s.directory / WANDB_RUN, s.tracker.run_id)


def _build(
    config: Config, world: World, module: nn.Module | None, train: Images, *, pretrained: bool
) -> nn.Module:
    """Collective. Return the coordinator's model on this device; its weights are loaded if `pretrained`."""
    model = config.model if pretrained else dataclasses.replace(config.model, weights=None)
    model.check_weights()
    properties: dict[str, Any] = {
        "classes": train.classes,
        "shape": train.shape,
        "sync": world.group_sum,
        "check": outputs_check(config.task, train),
    }
    if module is None:
        built = model.build(seed=config.seed, **properties)
    else:
        built = model.adapt(_copied(module), seed=config.seed, **properties)
    built = built.to(world.device)
    world.broadcast(*(tensor.detach() for tensor in built.state_dict().values()))
    return built


def outputs_check(task: Task, images: Images) -> Callable[[Any], None]:
    """Return what refuses a model's outputs, for two blank images, that `task` cannot use."""
    batch = blank_batch(images, torch.device("cpu"))

    def check(outputs: Any) -> None:
        task.check_outputs(task.forward(lambda _: outputs, batch), images.classes, images.shape)

    return check


def _copied(module: nn.Module) -> nn.Module:
    """Return a copy of the user's module.

    Raises:
        ConfigError: it cannot be copied.
    """
    memo: dict[int, Any] = {  # torch cannot copy buffers of lazy layers
        id(b): nn.parameter.UninitializedBuffer(device=b.device, dtype=b.dtype)  # type: ignore[call-arg]
        for b in module.buffers()
        if nn.parameter.is_lazy(b)
    }
    try:
        return copy.deepcopy(module, memo)
    except RuntimeError as error:
        raise ConfigError(
            f"module {type(module).__name__} cannot be copied ({str(error).splitlines()[0][:100]}); with "
            "torch.nn.utils.weight_norm, use torch.nn.utils.parametrizations.weight_norm instead"
        ) from error


def _split(config: Config, clients: Clients) -> tuple[Config, Split, NDArray[np.int64]]:
    """Return the split over the clients that train, n_k of each, and `config` as they train by it."""
    if config.secure_aggregation is not None:
        config.secure_aggregation.check_installed()
    if config.baseline == "pooled":
        config, split = pooled(config, clients)
        return config, split, split.sizes
    sizes = clients.split.sizes - holdout_sizes(clients.split.sizes, config.data.holdout)
    config.clock.check(examples_trained(config.local, sizes), config.aggregation.min_clients(), config.seed)
    return config, clients.split, sizes


def _training_loader(config: Config, train: Images, clients: Clients, world: World) -> ClientLoader:
    """Return the training images as batches."""
    if config.baseline == "pooled":
        if world.groups > 1 and world.is_coordinator:
            logger.info(
                "baseline=pooled trains on one of %d client groups; raise topology.ranks_per_client to use "
                "all ranks",
                world.groups,
            )
        return PooledLoader(train, config.data, world.device, seed=config.seed, split=clients.split)
    return ClientLoader(train, config.data, world.device, seed=config.seed)


def _poisoned(config: Config, images: Images, clients: Clients, malicious: NDArray[np.int64]) -> Images:
    """Return `images` with the labels that malicious clients train on; held-out labels stay true."""
    if not len(malicious):
        return images
    labels = images.labels.copy()
    for client in malicious.tolist():
        mine = clients.training(client)
        labels[mine] = config.attacks.relabel(labels[mine], images.classes)
    return dataclasses.replace(images, labels=labels)


def _newest_checkpoint(checkpoints: Checkpoints, world: World) -> Saved | None:
    """Collective. Return the newest intact checkpoint, if there is one."""
    found, corrupt = checkpoints.newest() if world.is_coordinator else (None, [])
    for line in corrupt:
        logger.warning(line)
    if corrupt and found is None:
        logger.warning("no checkpoint in %s is intact; training restarts from scratch", checkpoints.folder)
    name, metadata = world.gather((found.folder.name, found.metadata) if found else (None, {}))[0]
    return None if name is None else checkpoints.open(name, metadata)


def _restore(s: Session, saved: Saved) -> None:
    """Collective. Restore the session from `saved`.

    Raises:
        ConfigError: the run has done more rounds than it is given, or its data have changed.
    """
    s.restore(saved)
    if s.rounds_done > s.config.rounds:
        raise ConfigError(
            f"rounds={s.config.rounds} is less than the {s.rounds_done} rounds that {s.directory} has done; "
            "raise rounds, or start another run with another --name"
        )
    if saved.metadata["data"] != s.data_digest:
        raise ConfigError(
            f"data: the labels or images are not those that {s.directory} was trained on; restore them, or "
            "start another run with another --name"
        )
    threads = saved.metadata["threads"], torch.get_num_threads()
    if threads[0] != threads[1] and s.world.is_coordinator:
        logger.warning(
            "%s was trained with %d threads per rank and resumes with %d: its last bits depend on it; set "
            "topology.threads or OMP_NUM_THREADS to %d for those of an uninterrupted run",
            *(s.directory, *threads, threads[0]),
        )
    if s.world.is_coordinator:
        logger.info("resuming %s from %s", s.directory, saved.folder.name)
        if s.stalled and s.rounds_done < s.config.rounds:
            logger.info(
                "evaluation.stop_after=%d ended this run after round %d; raise it, or set 0, to train more",
                *(s.config.evaluation.stop_after, s.rounds_done),
            )


def _wandb_run(s: Session) -> str | None:
    """Return the id of the run's wandb run: of its file, which a run killed before a checkpoint has too."""
    noted = s.directory / WANDB_RUN
    try:
        text = read_text(noted) if noted.exists() else ""
    except (OSError, ValueError):
        text = ""
    return text if re.fullmatch(r"\w+", text) else s.metadata.get("wandb_run_id")


def set_model_aside(s: Session) -> None:
    """Rename the final model of a finished run that is given more rounds: until its end it has none."""
    model = s.directory / MODEL
    if not s.complete and model.exists():
        model.rename(s.directory / f"model-{s.rounds_done:05d}.safetensors")
        for name in EXAMINED:
            (s.directory / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _one_rank_first(world: World) -> Iterator[None]:
    """Collective. Let one rank of each node run the block before the others (downloads, caches)."""
    if world.local_rank == 0:
        yield
    world.barrier()
    if world.local_rank != 0:
        yield
