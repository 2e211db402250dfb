"""Run an algorithm that a test writes under a real torchrun, and commands on the ranks of a test."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedddp.cli import main
from fedddp.distributed import environment

ROOT = Path(__file__).parent.parent


def torchrun(
    folder: Path,
    algorithm: str,
    command: str,
    *options: str,
    ranks: int = 2,
    timeout_s: float = 500,
    strike: str,
) -> subprocess.CompletedProcess[str]:
    """Run `fedddp COMMAND` in `folder` on `ranks` ranks, with `algorithm` as the module `mine`.

    Args:
        folder: where the module is written and the command runs.
        algorithm: source of the module.
        command: what follows `fedddp`.
        options: of torchrun.
        ranks: processes, on this machine.
        timeout_s: seconds after which the launcher is killed.
        strike: the variable STRIKE, from which the module reads which fault to cause on which rank.
    """
    (folder / "mine.py").write_text(algorithm)
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options)
    return subprocess.run(
        [sys.executable, *launcher, "-m", "fedddp", *shlex.split(command)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "STRIKE": strike},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def type_on_this_rank(command: str) -> tuple[object, list[str]]:
    """Return the exit code of `fedddp COMMAND` on this rank of `run_world`, and what it prints there."""
    printed = io.StringIO()
    with (
        contextlib.redirect_stderr(printed),
        contextlib.redirect_stdout(printed),
        pytest.raises(SystemExit) as stop,
    ):
        main(shlex.split(command))
    return stop.value.code, printed.getvalue().splitlines()


def type_and_wait_briefly(command: str) -> tuple[object, list[str]]:
    """Do as `type_on_this_rank`; no launcher ends the ranks that wait for the first error's report."""
    environment.FIRST_ERROR_S = 0.5
    return type_on_this_rank(command)


def await_file(path: Path) -> None:
    """Return when another rank has made a file."""
    while not path.exists():
        time.sleep(0.02)


def try_without(*packages: str) -> list[str]:
    """Return those of `packages` that this fresh rank imported with fedddp; then settings work without."""
    for name in ("federation", "training.synchronous", "reporting.dry_run", "privacy", "secure"):
        importlib.import_module(f"fedddp.{name}")
    found = sorted({name.partition(".")[0] for name in sys.modules} & {*packages})
    for package in packages:
        sys.modules[package] = None  # type: ignore[assignment]  # it cannot be imported any more
    from fedddp import privacy, secure

    assert secure.SecAgg().needed(9) == 6
    account = privacy.Account(sampling="none", population=10, cohort=5, delta=1e-5, rounds=3)
    assert account.epsilon(account.noise_multiplier(2.0, 3), 3) <= 2
    return found


def call(*words: str, code: int = 0) -> None:
    """Type `fedddp WORDS` here, which must exit with `code`."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert (stop.value.code or 0) == code


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what a command prints."""
    capsys.readouterr()
    call(*words)
    return capsys.readouterr().out


def evaluated(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Return the JSON that `fedddp eval` prints, alone."""
    found: dict[str, Any] = json.loads(printed(capsys, "eval", *words, "--json", "-"))
    return found


def error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line that a command fails with."""
    capsys.readouterr()
    call(*words, code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line
