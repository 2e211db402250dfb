"""Puts the parts of one run together; the public entry from Python."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from fedddp.algorithms.algorithm import Server
from fedddp.config.loader import to_dict
from fedddp.config.schema import ConfigError, Run
from fedddp.data.datasets import Images, from_dataset, load
from fedddp.data.loader import Feed
from fedddp.data.partition import Split, holdout
from fedddp.distributed.heartbeat import Pulse
from fedddp.distributed.launch import connect
from fedddp.distributed.signals import stop_on_signals
from fedddp.distributed.world import World
from fedddp.evaluation import Metrics
from fedddp.models.flat import FlatModel
from fedddp.simulation.clock import examples_trained
from fedddp.storage.checkpoint import Checkpoints, save_model, write_text
from fedddp.storage.client_states import ClientStates
from fedddp.tracking.tracker import NullTracker, Tracker
from fedddp.training.asynchronous.coordinator import run_events
from fedddp.training.client_trainer import Trainer
from fedddp.training.run_directory import check_replay, run_folder
from fedddp.training.session import Session, Stopped
from fedddp.training.synchronous import run_rounds

WANDB_RUN = ".wandb-run"
"""File of the run directory with the id of its wandb run."""


@dataclass(frozen=True)
class Outcome:
    """What a run returns, the same on every rank but for the history (the coordinator's)."""

    model: nn.Module
    """The global model, in evaluation mode."""
    history: list[Metrics]
    """One row a round, as in `history.jsonl`; empty on the other ranks."""
    folder: Path
    """The run directory."""
    finished: bool
    """False when the run was asked to stop; `resume="auto"` goes on."""


class AnotherRankFailedError(Exception):
    """Another rank reported the error that ended the run; this one has nothing to add."""


class Federation:
    """One federated run, under any launcher or none (then it is a world of one, as in a notebook).

    Example:
        >>> outcome = Federation(model=my_net, train=my_images, test=my_test, rounds=5).run()
    """

    def __init__(
        self,
        run: Run | None = None,
        *,
        model: nn.Module | None = None,
        train: Dataset[Any] | None = None,
        test: Dataset[Any] | None = None,
        default_name: str = "run",
        **sections: Any,
    ) -> None:
        """Describe the run; nothing is started.

        Args:
            run: the configuration; `Run()` by default.
            model: your own module instead of `run.model.name`; it is copied, not changed.
            train: your own map-style dataset of (image, label) instead of `run.data.dataset`.
            test: the examples for central evaluation; with `train`, none means no evaluation.
            default_name: the run directory's name when `run.name` is none; numbered when taken.
            sections: fields of `Run` to change, e.g. `rounds=5, algorithm=FedProx(mu=0.1)`.

        Raises:
            ValueError: the configuration cannot run.
        """
        self.config = dataclasses.replace(run or Run(), **sections)
        check_replay(self.config)
        self.module, self.images = model, (train, test)
        self.default_name = default_name
        if test is not None and train is None:
            raise ValueError("test is given without train; give both, or data.dataset for both")

    def run(self) -> Outcome:
        """Collective. Train, and return the global model and the history.

        Raises:
            ValueError: what the user gave cannot run.
            AnotherRankFailedError: the error is another rank's, which reports it.
        """
        with _refusing():
            world = connect(self.config.topology)
        pulse = Pulse(world)
        try:
            with torch.random.fork_rng(devices=[]), stop_on_signals(world), _first_error_speaks(pulse):
                return self._run(world)
        finally:
            world.close()
            pulse.stop()

    def _run(self, world: World) -> Outcome:
        with run_folder(self.config, self.default_name, world) as (folder, config):
            with _refusing():
                session = self._session(world, folder, config)
            try:
                if session.tracker.run_id:
                    write_text(folder / WANDB_RUN, session.tracker.run_id)
                return self._outcome(session, finished=_train(session))
            except BaseException:
                world.failed = True
                session.tracker.finish(failed=True)
                raise

    def _outcome(self, s: Session, *, finished: bool) -> Outcome:
        s.send()
        s.load_global_model()
        model_file = s.folder / "model.safetensors" if finished else None
        if s.world.is_coordinator and model_file:
            save_model(s.flat.module, model_file)
        s.world.barrier()
        last = {n: v for n, v in (s.history[-1] if s.history else {}).items() if n != "cohort"}
        s.tracker.finish(model_file, last)
        return Outcome(s.flat.module.eval(), s.history, s.folder, finished)

    def _session(self, world: World, folder: Path, run: Run) -> Session:
        with _one_rank_first(world):
            train, test = self._load_images(run)
        module = self._build(world, run, train)
        flat = FlatModel(module)
        run.algorithm.check_model(flat)
        world.broadcast(*(t.detach() for t in module.state_dict().values()))
        split, sizes = run.data.split(train, run.seed)
        server = Server(flat.params.clone(), flat.buffers.clone(), flat.counters.clone(), len(split))
        run.algorithm.start(server)
        liars = run.attacks.malicious(len(split), run.seed)
        feed = Feed(_relabelled(train, split, run, liars), run.data, world.device, seed=run.seed)
        run.clock.check(examples_trained(run.local, sizes), run.aggregation.least(), run.seed)
        checkpoints = Checkpoints(folder / "checkpoints", run.checkpoint.keep, world)
        session = Session(
            run=run,
            world=world,
            flat=flat,
            server=server,
            trainer=Trainer(world, flat, run.task, feed, run.local, run.algorithm),
            states=ClientStates(world),
            train=feed,
            test=None if test is None else Feed(test, run.data, world.device, seed=run.seed),
            split=split,
            sizes=sizes,
            tracker=NullTracker(),
            checkpoints=checkpoints,
            folder=folder,
            liars=frozenset(liars.tolist()),
        )
        run_id = _resume(session) if run.resume == "auto" else None
        if world.is_coordinator:
            session.tracker = Tracker(
                run.track,
                folder,
                to_dict(run),
                name=folder.name,
                total_rounds=run.rounds,
                resume_round=session.rounds_done,
                run_id=run_id,
            )
        return session

    def _load_images(self, run: Run) -> tuple[Images, Images | None]:
        train, test = self.images
        if train is None:
            return load(run.data)
        images = from_dataset(train)
        return images, None if test is None else from_dataset(test)

    def _build(self, world: World, run: Run, train: Images) -> nn.Module:
        known = {"classes": train.classes, "shape": train.shape, "sync": world.group_sum}
        if self.module is None:
            module = run.model.build(seed=run.seed, **known)  # type: ignore[arg-type]
        else:
            module = run.model.adapt(copy.deepcopy(self.module), **known)  # type: ignore[arg-type]
        module = module.to(world.device)
        if run.local.channels_last:
            module = module.to(memory_format=torch.channels_last)
        return module


def _train(s: Session) -> bool:
    """Collective. Train; return whether to the last round, or False when asked to stop."""
    try:
        (run_events if s.run.algorithm.asynchronous else run_rounds)(s)
    except Stopped:
        return False
    return True


def _resume(s: Session) -> str | None:
    """Collective. Restore the newest whole checkpoint if there is one; returns its wandb run id."""
    found, damaged = s.checkpoints.newest() if s.world.is_coordinator else (None, [])
    for line in damaged:
        print(f"warning: {line}", flush=True)
    if damaged and found is None:
        print(f"warning: no checkpoint of {s.folder} is whole; starting anew", flush=True)
    name, facts = s.world.gather((found.folder.name, found.facts) if found else (None, {}))[0]
    if name is not None:
        s.restore(s.checkpoints.open(name, facts))
        if s.world.is_coordinator:
            print(f"resuming {s.folder} from {name}", flush=True)
    noted = s.folder / WANDB_RUN  # newer than the checkpoint, if the run was killed before its first one
    text = noted.read_text(errors="replace") if noted.exists() else ""
    return text if re.fullmatch(r"\w+", text) else facts.get("wandb_run_id")


@contextlib.contextmanager
def _first_error_speaks(pulse: Pulse) -> Iterator[None]:
    """Turn an error of the block that is not the world's first into an `AnotherRankFailedError`.

    The launcher sends SIGTERM as soon as a rank is gone; whoever has yet to say why must not end by it.
    """
    try:
        yield
    except Exception as error:
        if not pulse.first_to_fail():
            raise AnotherRankFailedError from error
        pulse.name_absent(error)
        raise


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Make a ValueError of the block, in which nothing is trained yet, a refusal of the settings."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _relabelled(images: Images, split: Split, run: Run, liars: NDArray[np.int64]) -> Images:
    """Return `images` with the labels that malicious clients train on; held-out ones stay true."""
    if not len(liars):
        return images
    labels = images.labels.copy()
    for client in liars.tolist():
        mine, _ = holdout(split.indices(client), run.data.holdout, client, run.seed)
        labels[mine] = run.attacks.relabel(labels[mine], images.classes)
    return dataclasses.replace(images, labels=labels)


@contextlib.contextmanager
def _one_rank_first(world: World) -> Iterator[None]:
    """Collective. Let one rank of each node run the block before the others (downloads, caches)."""
    if world.local_rank == 0:
        yield
    world.barrier()
    if world.local_rank != 0:
        yield
