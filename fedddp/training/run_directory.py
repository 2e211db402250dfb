"""The directory of one run: found or made, locked against other runs, with the configuration in it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedddp.config.loader import dump_yaml, to_dict
from fedddp.config.schema import Config, Role, execution_settings, fields_with
from fedddp.distributed.environment import Launch
from fedddp.distributed.world import World
from fedddp.section import ConfigError, Section, default_of, has_default, local_path
from fedddp.storage.checkpoint import write_text
from fedddp.storage.history import read_config
from fedddp.storage.run_folder import LAUNCHER, find_folder
from fedddp.storage.run_record import held

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"

MAY_CHANGE: tuple[Role, ...] = ("budget", "bookkeeping")
"""Roles of the settings that a resumed run may change; others make another run."""

LOCK_WAIT_S = 100.0
"""Seconds a resumed run waits for the lock: a file server frees that of a dead machine after up to 90."""

LOCK_POLL_S = 0.5


@contextlib.contextmanager
def run_directory(
    config: Config, default_name: str, world: World, record: Mapping[str, Any]
) -> Iterator[tuple[Path, Config]]:
    """Collective. Make (or find) the run directory and lock it against other runs.

    Args:
        config: the configuration.
        default_name: name of the directory when `config.name` is none; numbered when it is taken.
        world: the coordinator makes the directory.
        record: what config.yaml holds, but for the name; `write_record` writes it.

    Yields:
        The directory, and `config` with its name and with whether it resumes ("auto") or is new ("never").

    Raises:
        ConfigError: it cannot be written, another run holds it, or it is of another run.
    """
    directory, problem, locks, resumes = None, None, [], False
    try:
        if world.is_coordinator:
            launch = Launch.from_environment()
            try:
                local_path(config.output, "output").mkdir(parents=True, exist_ok=True)
                directory, resumes = find_folder(
                    config.output, config.name, default_name, config.resume, launch
                )
                directory.mkdir(parents=True, exist_ok=True)
                locks = _lock(directory, LOCK_WAIT_S if resumes else 0.0)
                if resumes:
                    check_same(config, record, directory / CONFIG)
                    _warn_of_schedule(config, directory / CONFIG)
                write_text(directory / LAUNCHER, launch.launcher)
            except ValueError as error:
                problem = str(error)
            except OSError as error:
                problem = (
                    f"output: cannot write {error.filename or config.output}: {error.strerror}; "
                    "choose another --output"
                )
        directory, problem, resumes = world.gather((directory, problem, resumes))[0]
        if problem is not None:
            raise ConfigError(problem)
        with held(directory) if locks else contextlib.nullcontext():
            yield (
                directory,
                dataclasses.replace(config, name=directory.name, resume="auto" if resumes else "never"),
            )
    finally:
        for descriptor in locks:
            _unlock(descriptor)


def check_before_data(config: Config, default_name: str, record: Mapping[str, Any] | None) -> None:
    """Refuse a run whose directory holds another, before its data are read; no collective.

    Args:
        config: the configuration.
        default_name: as for `run_directory`.
        record: what config.yaml will hold; None where that depends on the data.

    Raises:
        ConfigError: the directory holds another run, or that to resume has other settings.
    """
    launch = Launch.from_environment()
    try:
        found = find_folder(config.output, config.name, default_name, config.resume, launch)
    except OSError:  # reported where the directory is made
        return
    if found[1] and record is not None:
        check_same(config, record, found[0] / CONFIG)


def _lock(directory: Path, wait_s: float) -> list[int]:
    """Return the descriptors of the directory's locks, which end with them or with the process.

    The lock of the file `.lock` is a POSIX one, which network file systems know; closing any other
    descriptor of the file would end it. The lock of the directory itself holds where `.lock` is deleted.
    """
    file = os.open(directory / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    folder = os.open(directory, os.O_RDONLY)
    deadline = time.monotonic() + wait_s
    logged = False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno == errno.EAGAIN:  # else a network file system, which locks files only
                    raise
            return [file, folder]
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                # Some file systems know no locks.
                logger.warning("cannot lock %s (%s); use it for one run only", directory, error.strerror)
                return [file, folder]
        if time.monotonic() >= deadline:
            for descriptor in (file, folder):
                os.close(descriptor)
            raise ConfigError(
                f"name: another run is writing to {directory}; wait for it or choose another --name"
            )
        if not logged:
            logger.info("waiting up to %.0f s for another run to leave %s", wait_s, directory)
        logged = True
        time.sleep(LOCK_POLL_S)


def _unlock(descriptor: int) -> None:
    """End a lock, also where a forked worker of the loader still holds the descriptor."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the run's config.yaml, when it is known that the run can start.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        write_text(directory / CONFIG, dump_yaml({**record, "name": directory.name}))
    except OSError as error:
        raise ConfigError(
            f"output: cannot write {directory / CONFIG}: {error.strerror}; choose another --output"
        ) from None


def _warn_of_schedule(config: Config, earlier: Path) -> None:
    """Log that another number of rounds changes a schedule that depends on it."""
    before = read_config(earlier).get("rounds", config.rounds) if earlier.exists() else config.rounds
    if config.local.schedule not in ("constant", "step") and before != config.rounds:
        logger.warning(
            "rounds was %s and is %d: local.schedule=%s continues at another learning rate, so the "
            "model is not that of a run of %d rounds from the start",
            before,
            config.rounds,
            config.local.schedule,
            config.rounds,
        )


def check_replay(config: Config, record: Mapping[str, Any]) -> None:
    """Refuse to repeat the arrivals of a run that had other settings.

    Args:
        config: the configuration.
        record: what its config.yaml will hold.

    Raises:
        ConfigError: `replay` is no run directory, or a setting differs.
    """
    if config.replay is not None:
        earlier = local_path(config.replay, "replay") / CONFIG
        if not earlier.exists():
            raise ConfigError(
                f"replay: {config.replay} is no run directory; give that of an asynchronous run"
            )
        may_change = ("clock", *fields_with("replay", *MAY_CHANGE))
        check_same(config, record, earlier, may_change, setting="replay")


def check_same(
    config: Config,
    record: Mapping[str, Any],
    earlier: Path,
    may_change: tuple[str, ...] = fields_with(*MAY_CHANGE),
    setting: str = "resume",
) -> None:
    """Refuse to resume a run with settings that would make it another run.

    A setting that the run's config.yaml lacks, because an earlier version wrote it, had its default.

    Args:
        config: the configuration now.
        record: what config.yaml is to hold now.
        earlier: the config.yaml of the run.
        may_change: sections that may differ.
        setting: what asks for the comparison, for errors: "resume" or "replay".

    Raises:
        ConfigError: it was started with another setting, or is corrupt.
    """
    if not earlier.exists():
        return
    try:
        before = read_config(earlier)
    except ValueError as error:
        raise ConfigError(
            f"{setting}: {earlier} is corrupt ({error}); restore it, or delete it to resume with the "
            "settings given"
        ) from None
    if "track" in before:
        raise ConfigError(
            f"{setting}: {earlier} was written by fedddp before 0.1.0, whose checkpoints and arrivals this "
            "version cannot read; train it from scratch under another --name"
        )
    before = _with_defaults(before, record, config)
    old_sections, new_sections = (_comparable(sections, may_change) for sections in (before, record))
    for section in {**new_sections, **old_sections}:
        name, old, new = section, old_sections.get(section), new_sections.get(section)
        while old != new and isinstance(old, dict) and isinstance(new, dict):
            key = next(k for k in {**new, **old} if old.get(k) != new.get(k))
            name, old, new = f"{name}.{key}", old.get(key), new.get(key)
        if old != new:
            raise ConfigError(
                f"{name}: is {_text(new)}, but {earlier} was started with {_text(old)}; {setting} with the "
                "same settings, or start another run with another --name or --output"
            )


def _with_defaults(before: Mapping[str, Any], now: Mapping[str, Any], section: Section) -> dict[str, Any]:
    """Return what was recorded `before` of a section, and the defaults of what is recorded `now` only."""
    found = dict(before)
    for item in dataclasses.fields(section):
        name, inner = item.name, getattr(section, item.name)
        if name in now and name not in before and has_default(item):
            found[name] = to_dict(default_of(item))
        elif isinstance(inner, Section) and all(isinstance(part.get(name), dict) for part in (before, now)):
            found[name] = _with_defaults(before[name], now[name], inner)
    return found


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def _comparable(sections: Mapping[str, Any], may_change: tuple[str, ...]) -> dict[str, Any]:
    """Return the sections that decide the result, without the settings that decide no number."""
    left_out = execution_settings()
    return {
        name: {key: item for key, item in value.items() if f"{name}.{key}" not in left_out}
        if isinstance(value, dict)
        else value
        for name, value in sections.items()
        if name not in may_change
    }
