"""The directory of one run: found or made, held against other runs, with the configuration in it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from fedddp.config.loader import to_dict, to_yaml
from fedddp.config.schema import ConfigError, Run
from fedddp.distributed.environment import Launch
from fedddp.distributed.world import World
from fedddp.storage.checkpoint import write_text
from fedddp.storage.history import read_config

MAY_CHANGE = ("rounds", "evaluation", "checkpoint", "track", "output", "name", "resume")
"""Settings that a resumed run may change, with those of the topology; others would make it another run."""

MAY_CHANGE_IN_REPLAY = (*MAY_CHANGE, "clock", "replay")
"""Settings that a run which repeats another's order of arrivals may change."""

LOCK_WAIT_S = 100.0
"""Seconds a resumed run waits for the lock: a file server frees that of a dead machine after up to 90."""


@contextlib.contextmanager
def run_folder(run: Run, default_name: str, world: World) -> Iterator[tuple[Path, Run]]:
    """Collective. Make (or find) the run directory and hold it against other runs.

    Yields the directory, and `run` with its name and with whether it goes on ("auto") or is new.

    Raises:
        ConfigError: it cannot be written, another run holds it, or it is of another run.
    """
    folder, problem, lock, again = None, None, None, False
    try:
        if world.is_coordinator:
            try:
                folder, again = _find(run, default_name, Launch.from_environment())
                lock = _lock(folder, LOCK_WAIT_S if again else 0.0)
                if again:
                    _check_same(run, folder / "config.yaml")
                write_text(folder / "config.yaml", to_yaml(dataclasses.replace(run, name=folder.name)))
                write_text(folder / ".launcher", Launch.from_environment().launcher)
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
        yield folder, dataclasses.replace(run, name=folder.name, resume="auto" if again else "never")
    finally:
        if lock is not None:
            os.close(lock)


def _find(run: Run, default_name: str, launch: Launch) -> tuple[Path, bool]:
    """Return the run directory, which exists, and whether it holds the run that shall go on."""
    output, name = Path(run.output), run.name or default_name
    output.mkdir(parents=True, exist_ok=True)
    runs = [p for p in output.iterdir() if re.fullmatch(rf"{re.escape(name)}(-\d+)?", p.name)]
    # A restarted launcher goes on with the directory it had, and never with one it was refused.
    restarted = [p for p in runs if launch.restarts and _is_of(p, launch)]
    if run.name is not None:
        folder, again = output / name, run.resume == "auto" or output / name in restarted
    elif run.resume == "auto" or restarted:
        oldest_first = sorted(restarted or runs, key=lambda path: (len(path.name), path.name))
        folder, again = (oldest_first or [output / name])[-1], True
    else:
        taken = {path.name for path in output.iterdir()}
        folder, again = output / next(n for n in _numbered(name) if n not in taken), False
    if not again and ((folder / "history.jsonl").exists() or (folder / "checkpoints").exists()):
        raise ConfigError(
            f"name: {folder} holds a run already; choose another --name, or go on with --resume auto"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder, again


def _is_of(folder: Path, launch: Launch) -> bool:
    try:
        return (folder / ".launcher").read_text() == launch.launcher
    except (OSError, ValueError):
        return False


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1


def _lock(folder: Path, wait_s: float) -> int:
    """Return the descriptor of the directory's lock, which ends with it or with the process.

    The lock is a POSIX one, which network file systems know; closing any other descriptor of the
    file would end it.
    """
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    deadline = time.monotonic() + wait_s
    told = False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                # Some file systems know no locks.
                print(
                    f"warning: cannot lock {folder} ({error.strerror}); give it to one run only", flush=True
                )
                return descriptor
        if time.monotonic() >= deadline:
            os.close(descriptor)
            raise ConfigError(
                f"name: another run is writing to {folder}; wait for it or choose another --name"
            )
        if not told:
            print(f"waiting up to {wait_s:.0f} s for another run to leave {folder}", flush=True)
        told = True
        time.sleep(0.5)


def check_replay(run: Run) -> None:
    """Refuse to repeat the arrivals of a run that had other settings."""
    if run.replay is not None:
        earlier = Path(run.replay) / "config.yaml"
        if not earlier.exists():
            raise ConfigError(f"replay: {run.replay} is no run directory; give that of an asynchronous run")
        _check_same(run, earlier, MAY_CHANGE_IN_REPLAY)


def _check_same(run: Run, earlier: Path, may_change: tuple[str, ...] = MAY_CHANGE) -> None:
    """Refuse to resume a run with settings that would make it another run."""
    if not earlier.exists():
        return
    try:
        before = read_config(earlier)
    except ValueError as error:
        raise ConfigError(
            f"resume: {earlier} is damaged ({error}); restore it, or delete it to go on with the "
            "settings given"
        ) from None
    now = to_dict(run)
    for settings in (before, now):  # of the topology only the threads change a model's last bits
        topology = settings.get("topology")
        settings["topology"] = {"threads": topology.get("threads")} if isinstance(topology, dict) else None
    for section in now:
        if section not in may_change and before.get(section) != now[section]:
            name, old, new = section, before.get(section), now[section]
            if isinstance(old, dict) and isinstance(new, dict):
                key = next(k for k in {**new, **old} if old.get(k) != new.get(k))
                name, old, new = f"{section}.{key}", old.get(key), new.get(key)
            raise ConfigError(
                f"{name}: is {new}, but {earlier} was started with {old}; go on with the "
                "same settings, or start another run with another --name or --output"
            )
