"""Which directory a run has: found by its name, without torch and before any data are read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fedddp.distributed.environment import Launch
from fedddp.section import ConfigError, local_path
from fedddp.storage.history import HISTORY, read_text

LAUNCHER = ".launcher"
"""File of a run directory with the launcher that started the run."""


def find_folder(
    output: str, name: str | None, default_name: str, resume: str, launch: Launch
) -> tuple[Path, bool]:
    """Return the directory of a run, which may not exist yet, and whether it holds the run to resume.

    Args:
        output: the folder of runs.
        name: the run's; None: `default_name`, numbered where it is taken.
        default_name: see `name`.
        resume: "auto" or "never".
        launch: a restarted launcher resumes in the directory it had, and never in one that it was refused.

    Raises:
        ConfigError: the directory holds another run.
        OSError: it cannot be read.
    """
    folder, wanted = local_path(output, "output"), name or default_name
    paths = [*folder.iterdir()] if folder.exists() else []
    runs = [p for p in paths if re.fullmatch(rf"{re.escape(wanted)}(-\d+)?", p.name)]
    restarted = [p for p in runs if launch.restarts and _belongs_to(p, launch)]
    if name is not None:
        directory = folder / name
        resumes = resume == "auto" or directory in restarted
    elif resume == "auto" or restarted:
        oldest_first = sorted(restarted or runs, key=lambda path: (len(path.name), path.name))
        directory, resumes = (oldest_first or [folder / wanted])[-1], True
    else:
        taken = {path.name for path in paths}
        directory, resumes = folder / next(n for n in _numbered(wanted) if n not in taken), False
    if not resumes and ((directory / HISTORY).exists() or (directory / "checkpoints").exists()):
        raise ConfigError(
            f"name: {directory} holds a run already; choose another --name, or resume it with --resume auto"
        )
    return directory, resumes


def _belongs_to(directory: Path, launch: Launch) -> bool:
    try:
        return read_text(directory / LAUNCHER) == launch.launcher
    except (OSError, ValueError):
        return False


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1
