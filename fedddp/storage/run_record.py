"""What a run directory records of its launches: command, versions, machine, state, log lines."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import logging
import logging.handlers
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fedddp.storage.history import parse_json, read_text

if TYPE_CHECKING:
    import torch

RECORD, LOG = "run.json", "run.log"
MODEL, BEST, REPORT = "model.safetensors", "best.safetensors", "report.html"
SPLIT, EVALUATION, WRONG = "split.json", "evaluation.json", "wrong.safetensors"
CROSS_SITE = "cross-site.json"
"""Files of a run directory, beside those of the history and `config.yaml`."""

ALONE, CLIENT = "no_global_model", "client"
"""In the header of a model: why there is no global one, as "algorithm=FedBN"; the client whose own it is."""

MOST_HEADER = 10**8
"""Bytes of a model's header, at most, as of the format itself."""

HELD_RECORDS = 1000
"""Log records of the start of a run that are held until it is known that it can start."""

GIT_TIMEOUT_S = 2.0
"""A large working folder is not waited for longer at the start of a run."""

State = Literal["running", "stopped", "failed", "finished"]

_OWN: set[Path] = set()  # runs of this process, whose locks a look at them would end


@dataclass(frozen=True)
class LaunchRecord:
    """One launch of a run: its start, or a resume."""

    started: str
    """ISO 8601, UTC."""
    ended: str | None
    """ISO 8601, UTC; None while it lasts, and where it was killed."""
    command: str
    fedddp: str
    torch: str
    torchvision: str
    python: str
    platform: str
    git_commit: str | None
    """Of the working folder, with + after it where files differ from the commit; None outside of git."""
    device: str
    ranks: int
    groups: int
    ranks_per_client: int
    threads: int
    """Per rank."""
    from_round: int
    """Rounds that were done before."""


@dataclass(frozen=True)
class RunRecord:
    """The launches of a run, and how the last one ended."""

    state: State
    error: str | None
    sessions: tuple[LaunchRecord, ...]


def launch_record(
    device: torch.device, *, ranks: int, groups: int, ranks_per_client: int, from_round: int
) -> LaunchRecord:
    """Return the record of the launch that this process belongs to."""
    import torch  # which `fedddp runs` does not need

    program, *arguments = sys.argv
    if Path(program).name == "__main__.py":
        program = Path(program).parent.name
    return LaunchRecord(
        started=_now(),
        ended=None,
        command=shlex.join([Path(program).name if program.startswith("/") else program, *arguments]),
        fedddp=importlib.metadata.version("fedddp"),
        torch=torch.__version__,
        torchvision=importlib.metadata.version("torchvision"),
        python=platform.python_version(),
        platform=platform.platform(),
        git_commit=_git_commit(),
        device=_device_name(device),
        ranks=ranks,
        groups=groups,
        ranks_per_client=ranks_per_client,
        threads=torch.get_num_threads(),
        from_round=from_round,
    )


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Note that this process holds the lock of the run in `folder`: in the block it does not look at it."""
    _OWN.add(folder.resolve())
    try:
        yield
    finally:
        _OWN.discard(folder.resolve())


def begin(folder: Path, launch: LaunchRecord) -> None:
    """Write that the run in `folder` is running, launched once more."""
    earlier = read_record(folder)
    sessions = (*(earlier.sessions if earlier else ()), launch)
    _write(folder, RunRecord("running", None, sessions))


def end(folder: Path, state: State, error: str | None = None) -> None:
    """Write how the last launch ended; a directory that is gone, or was never begun, is left alone."""
    record = read_record(folder)
    if record is not None and record.state != "finished":
        *before, last = record.sessions
        sessions = (*before, dataclasses.replace(last, ended=_now()))
        with contextlib.suppress(OSError):
            _write(folder, RunRecord(state, error, sessions))


def read_record(folder: Path) -> RunRecord | None:
    """Return the record of the run in `folder`; None where it has none, or it is corrupt."""
    try:
        content = parse_json(read_text(folder / RECORD))
        sessions = tuple(_launch(session) for session in content["sessions"])
        state, error = content["state"], content["error"]
        if not sessions or state not in get_args(State) or not isinstance(error, str | None):
            return None
        return RunRecord(state, error, sessions)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _launch(session: dict[str, Any]) -> LaunchRecord:
    """Return the launch that a file describes.

    Raises:
        TypeError: a value has another type, or one is missing.
        ValueError: a moment is no date and time of UTC.
    """
    launch = LaunchRecord(**session)
    for item in dataclasses.fields(launch):
        kinds = {"str": str, "int": int, "str | None": str | None}
        if not isinstance(getattr(launch, item.name), kinds[str(item.type)]):
            raise TypeError(item.name)
    for moment in filter(None, (launch.started, launch.ended)):
        if datetime.fromisoformat(moment).utcoffset() is None:
            raise ValueError(moment)
    return launch


def state_of(folder: Path) -> State:
    """Return the state of the run in `folder`; one that was killed has failed."""
    record = read_record(folder)
    if record is None:
        return "finished" if (folder / MODEL).exists() else "stopped"
    if record.state == "running":
        return "running" if is_locked(folder) else "failed"
    return record.state


def age_s(moment: str) -> float:
    """Return the seconds since a `moment` of a record (ISO 8601, UTC)."""
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()


def unchanged_s(path: Path) -> float:
    """Return the seconds since the file `path` was last written.

    Raises:
        OSError: there is no such file.
    """
    return datetime.now(UTC).timestamp() - path.stat().st_mtime


@contextlib.contextmanager
def log_file(folder: Path) -> Iterator[Callable[[], None]]:
    """Append fedddp's log records in the block to `run.log`, from the first on, once the block calls it.

    A run that is refused, or that has nothing left to train, changes no file.
    """
    file = LogFile(folder / LOG)
    kept = logging.handlers.MemoryHandler(HELD_RECORDS, flushLevel=100, flushOnClose=False)
    kept.setLevel(logging.INFO)  # `--verbose` logs more

    def write() -> None:
        kept.setTarget(file)
        kept.flush()
        kept.flushLevel = 0

    logger = logging.getLogger("fedddp")
    logger.addHandler(kept)
    try:
        yield write
    finally:
        logger.removeHandler(kept)
        kept.close()
        file.close()


def read_warnings(folder: Path) -> list[str]:
    """Return the warnings and errors of all launches of the run in `folder`, oldest first."""
    try:
        lines = read_text(folder / LOG).splitlines()
    except (OSError, ValueError):
        return []
    found = (re.fullmatch(r"[\d-]{10} [\d:]{8} (?:WARNING|ERROR|CRITICAL) (.*)", line) for line in lines)
    return [match[1] for match in found if match]


class LogFile(logging.FileHandler):
    """A log file on a disk that may be full: a line that cannot be written is lost, and no error."""

    def __init__(self, path: Path) -> None:
        """Append to the file `path`, which is opened with the first record."""
        super().__init__(path, encoding="utf-8", delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write `record`, if that is possible."""
        with contextlib.suppress(OSError):  # of opening the file, which no handler catches
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing: the default prints a traceback for every line."""

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # of what could not be written
            super().close()


def _write(folder: Path, record: RunRecord) -> None:
    from fedddp.storage.checkpoint import write_text

    write_text(folder / RECORD, json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def is_locked(folder: Path) -> bool:
    """Return whether a process holds the lock of the run directory `folder`."""
    if folder.resolve() in _OWN:
        return True
    try:
        with (folder / ".lock").open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def _git_commit() -> str | None:
    describe = [
        "git",
        "--no-optional-locks",
        "describe",
        "--always",
        "--dirty=+",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        result = subprocess.run(describe, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def _device_name(device: torch.device) -> str:
    """Return the device with the name of its model, such as "cuda (NVIDIA H100 80GB HBM3)"."""
    import torch

    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif os.path.exists("/proc/cpuinfo"):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        name = found[1].strip() if found else name
    return f"{device.type} ({name})"


def read_model_header(file: Path) -> dict[str, str]:
    """Return the texts in the header of a .safetensors file, without torch; empty where it cannot be read."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = parse_json(opened.read(min(length, MOST_HEADER)))
        return {str(key): str(value) for key, value in header.get("__metadata__", {}).items()}
    except (OSError, ValueError, AttributeError):
        return {}
