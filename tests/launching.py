"""Run an algorithm that a test writes under a real torchrun, and commands on the ranks of a test."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedddp.cli import main

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
