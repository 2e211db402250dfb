"""Puts the parts of one run together; the public entry from Python."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.data import Dataset

from fedddp.checkpoint import Checkpoints, save_model
from fedddp.client import Trainer
from fedddp.client_state import ClientStates
from fedddp.config import ConfigError, Run, to_dict, to_yaml
from fedddp.data.datasets import Images, from_dataset, load
from fedddp.data.feed import Feed
from fedddp.data.partition import holdout_sizes
from fedddp.evaluation import Metrics
from fedddp.method import Server
from fedddp.rounds import run_rounds
from fedddp.session import Session, Stopped
from fedddp.topology import Launch, World, connect, stop_on_signals
from fedddp.tracking import NullTracker, Tracker
from fedddp.vector import FlatModel

MAY_CHANGE = ("rounds", "topology", "evaluation", "checkpoint", "track", "output", "name", "resume")
"""Settings that a resumed run may change; the others would make it another run."""


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
        world = connect(self.config.topology)
        try:
            with torch.random.fork_rng(devices=[]), stop_on_signals(world):
                return self._run(world)
        except Exception as error:
            if not world.first_to_fail():
                raise AnotherRankFailedError from error
            world.name_silent_ranks(error)
            raise
        finally:
            world.close()

    def _run(self, world: World) -> Outcome:
        with _run_folder(self.config, self.default_name, world) as (folder, config):
            session = self._session(world, folder, config)
            failed = True
            try:
                run_rounds(session)
                failed = False
            except Stopped:
                return self._outcome(session, finished=False)
            finally:
                session.tracker.finish(failed=failed) if failed else None
            return self._outcome(session, finished=True)

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
        split = run.data.partition.split(train.labels, run.data.clients, run.seed, train.ids)
        server = Server(flat.params.clone(), flat.buffers.clone(), flat.counters.clone(), len(split))
        run.algorithm.start(server)
        feed = Feed(train, run.data, world.device, seed=run.seed)
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
            sizes=split.sizes - holdout_sizes(split.sizes, run.data.holdout),
            tracker=NullTracker(),
            checkpoints=checkpoints,
            folder=folder,
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


def _resume(s: Session) -> str | None:
    """Collective. Restore the newest whole checkpoint if there is one; returns its wandb run id."""
    found, damaged = s.checkpoints.newest() if s.world.is_coordinator else (None, [])
    for line in damaged:
        print(f"warning: {line}", flush=True)
    name, facts = s.world.gather((found.folder.name, found.facts) if found else (None, {}))[0]
    if name is None:
        return None
    s.restore(s.checkpoints.open(name, facts))
    if s.world.is_coordinator:
        print(f"resuming {s.folder} from {name}", flush=True)
    return facts["wandb_run_id"]  # type: ignore[no-any-return]


@contextlib.contextmanager
def _one_rank_first(world: World) -> Iterator[None]:
    """Collective. Let one rank of each node run the block before the others (downloads, caches)."""
    if world.local_rank == 0:
        yield
    world.barrier()
    if world.local_rank != 0:
        yield


@contextlib.contextmanager
def _run_folder(run: Run, default_name: str, world: World) -> Iterator[tuple[Path, Run]]:
    """Collective. Make (or find) the run directory and hold it against other runs."""
    folder, problem, lock, again = None, None, None, False
    if world.is_coordinator:
        again = run.resume == "auto" or Launch.from_environment().restarts > 0
        try:
            folder, lock = _claim(run, default_name, again)
            earlier = folder / "config.yaml"
            if again and earlier.exists():
                _check_same(run, earlier)
            earlier.write_text(to_yaml(dataclasses.replace(run, name=folder.name)))
        except ValueError as error:
            problem = str(error)
        except OSError as error:
            problem = (
                f"output: cannot write {error.filename or run.output}: {error.strerror}; "
                "choose another --output"
            )
    folder, problem, again = world.gather((folder, problem, again))[0]
    if problem is not None:
        raise ConfigError(problem)
    try:
        yield (
            folder,
            dataclasses.replace(run, name=folder.name, resume="auto" if again else "never"),
        )
    finally:
        if lock is not None:
            os.close(lock)


def _claim(run: Run, default_name: str, again: bool) -> tuple[Path, int]:
    """Return the run directory and the descriptor of its lock."""
    output, name = Path(run.output), run.name or default_name
    if run.name is None and not again:
        output.mkdir(parents=True, exist_ok=True)
        taken = {path.name for path in output.iterdir()}
        name = next(n for n in _numbered(name) if n not in taken)
    elif run.name is None:
        runs = [p for p in output.glob(f"{name}*") if re.fullmatch(rf"{re.escape(name)}(-\d+)?", p.name)]
        name = max(runs, key=lambda p: (len(p.name), p.name)).name if runs else name
    folder = output / name
    if not again and (folder / "history.jsonl").exists():
        raise ConfigError(
            f"name: {folder} holds a run already; choose another --name, or go on with --resume auto"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(
            f"name: another run is writing to {folder}; wait for it or choose another --name"
        ) from None
    return folder, lock


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1


def _check_same(run: Run, earlier: Path) -> None:
    """Refuse to resume a run with settings that would make it another run."""
    before, now = yaml.safe_load(earlier.read_text()), to_dict(run)
    for section in now:
        if section not in MAY_CHANGE and before.get(section) != now[section]:
            name, old, new = section, before.get(section), now[section]
            if isinstance(old, dict) and isinstance(new, dict):
                key = next(k for k in {**new, **old} if old.get(k) != new.get(k))
                name, old, new = f"{section}.{key}", old.get(key), new.get(key)
            raise ConfigError(
                f"{name}: is {new}, but {earlier} was started with {old}; go on with the "
                "same settings, or start another run with --name"
            )
