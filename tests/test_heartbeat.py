"""Ranks that fail, hang or are late: the first error is reported once and names the absent ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import await_file

from fedddp import TopologyConfig
from fedddp.distributed import heartbeat as module
from fedddp.distributed.heartbeat import Heartbeat
from fedddp.distributed.launch import connect
from fedddp.distributed.world import World
from fedddp.testing import run_world


def join(timeout_s: float, follow_s: float = 9.0) -> tuple[World, Heartbeat]:
    """Join the world with short heartbeats."""
    module.HEARTBEAT_S, module.FOLLOW_S = 0.4, follow_s
    world = connect(TopologyConfig(timeout_s=timeout_s))
    return world, Heartbeat(world)


def busy_while_another_fails() -> None:
    """Rank 0 reports an error; rank 1 is in one long call and learns of it only through its heartbeat."""
    world, _ = join(30, follow_s=1)
    if world.rank == 0:
        assert world.report_failure("an error")
    time.sleep(100 if world.rank else 10)


def test_a_busy_rank_ends_soon_after_another_failed() -> None:
    with pytest.raises(AssertionError, match="rank 1: died without a traceback"):
        run_world(busy_while_another_fails, size=2)


def wait_for_all(world: World, heartbeat: Heartbeat) -> str:
    """Wait for the others, and fail as a run does; return the notes of the first rank to fail."""
    try:
        world.barrier()
    except RuntimeError as error:
        if not world.report_failure("an error"):
            world.close()
            return "not the first"
        heartbeat.name_absent(error)
        return "".join(getattr(error, "__notes__", []))
    return "no error"


def one_is_stopped(folder: Path) -> str:
    world, heartbeat = join(2)
    if world.rank == 1:
        (folder / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
        return "woken"
    notes = wait_for_all(world, heartbeat)
    if notes != "not the first":
        os.kill(int((folder / "pid").read_text()), signal.SIGCONT)
    return notes


def test_only_the_stopped_rank_is_named_not_those_that_timed_out_too(tmp_path: Path) -> None:
    reported = run_world(one_is_stopped, tmp_path, size=4)
    note = "rank 1: no heartbeat (killed, stopped or hung); others waited for up to topology.timeout_s=2 s"
    assert sorted(reported) == sorted([note, "woken", "not the first", "not the first"])


def one_is_late(folder: Path) -> str:
    world, heartbeat = join(2)
    if world.rank == 1:
        await_file(folder / "named")  # as if its disk had gone away
        return "late"
    notes = wait_for_all(world, heartbeat)
    if notes != "not the first":
        (folder / "named").touch()
    return notes


def test_a_rank_with_a_heartbeat_that_is_late_is_named(tmp_path: Path) -> None:
    reported = run_world(one_is_late, tmp_path, size=3)
    state = "still in local training, data loading or file access"
    note = f"rank 1: {state}; others waited for up to topology.timeout_s=2 s"
    assert sorted(reported) == sorted([note, "late", "not the first"])


def one_does_not_start() -> str:
    if os.environ["RANK"] == "1":
        time.sleep(2)
        return "too late"
    try:
        connect(TopologyConfig(timeout_s=1))
    except ConnectionError as error:
        return str(error)
    return "no error"


def test_a_rank_that_does_not_start_is_named() -> None:
    reported = run_world(one_does_not_start, size=2)
    assert reported[0].startswith("rank 1 of 2 did not start within topology.timeout_s=1 s")


def fail_by_itself(folder: Path) -> list[str]:
    world, heartbeat = join(30)
    error = RuntimeError("not one of communication")
    if world.rank == 0:
        assert world.report_failure("an error")
        heartbeat.name_absent(error)
        (folder / "done").touch()
    else:
        await_file(folder / "done")
    return getattr(error, "__notes__", [])


def test_an_error_of_its_own_names_no_other_rank(tmp_path: Path) -> None:
    assert run_world(fail_by_itself, tmp_path, size=2) == [[], []]


RANK = """
import os, sys, time
from types import SimpleNamespace
from torch.distributed import HashStore
from fedddp.distributed import heartbeat
heartbeat.HEARTBEAT_S = 0.05
store, rank = HashStore(), int(sys.argv[1])
heartbeat.Heartbeat(
    SimpleNamespace(rank=rank, local_rank=rank, size=2, store=store, waiting=False, first_to_fail=None)
)
while not store.check([f"fedddp/heart/{rank}"]):
    time.sleep(0.01)
print("beats", flush=True)
time.sleep(40)
"""
LAUNCHER = """
import subprocess, sys
for rank in "01":
    subprocess.Popen([sys.executable, "-c", sys.argv[1], rank])
sys.stdin.read()
"""


def test_ranks_whose_launcher_was_killed_end_and_one_of_a_node_says_so() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    ) as launcher:
        assert launcher.stdout is not None
        assert [launcher.stdout.readline() for _ in range(2)] == ["beats\n"] * 2
        launcher.kill()
        out, err = launcher.communicate()  # until both ranks have ended
    assert out == ""
    assert err == "error: the launcher of this rank is gone; resume with --resume auto\n"
