"""Ranks that fail, hang or are late: the first error is told once, and says whom it waited for."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from fedddp import Topology
from fedddp.distributed import heartbeat as pulse_module
from fedddp.distributed.heartbeat import Pulse
from fedddp.distributed.launch import connect
from fedddp.distributed.world import World
from fedddp.testing import run_world


def join(timeout_s: float, follow_s: float = 9.0) -> tuple[World, Pulse]:
    """Join the world, with quick hearts."""
    pulse_module.HEARTBEAT_S, pulse_module.FOLLOW_S = 0.4, follow_s
    world = connect(Topology(timeout_s=timeout_s))
    return world, Pulse(world)


def busy_while_another_fails() -> None:
    """Rank 0 reports an error; rank 1 is in one long call and hears of it only from its heartbeat."""
    world, pulse = join(30, follow_s=1)
    if world.rank == 0:
        assert pulse.first_to_fail()
    time.sleep(100 if world.rank else 10)


def test_a_busy_rank_ends_soon_after_another_failed() -> None:
    with pytest.raises(AssertionError, match="rank 1: died without a traceback"):
        run_world(busy_while_another_fails, size=2, timeout_s=40)


def wait_for_all(world: World, pulse: Pulse) -> str:
    """Wait for the others, and fail as a run does; return what the first rank to fail says."""
    try:
        world.barrier()
    except RuntimeError as error:
        if not pulse.first_to_fail():
            world.close()
            return "not the first"
        pulse.name_absent(error)
        return "".join(getattr(error, "__notes__", []))
    return "no error"


def one_is_stopped(folder: Path) -> str:
    world, pulse = join(2)
    if world.rank == 1:
        (folder / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
        return "woken"
    said = wait_for_all(world, pulse)
    if said != "not the first":
        os.kill(int((folder / "pid").read_text()), signal.SIGCONT)
    return said


def test_a_stopped_rank_is_named_and_those_that_gave_up_too_are_not(tmp_path: Path) -> None:
    said = run_world(one_is_stopped, tmp_path, size=4, timeout_s=60)
    told = "rank 1: no sign of life (killed, stopped or hung); others waited for up to topology.timeout_s=2 s"
    assert sorted(said) == sorted([told, "woken", "not the first", "not the first"])


def one_is_late() -> str:
    world, pulse = join(2)
    if world.rank == 1:
        time.sleep(5)  # as if its disk had gone away
        return "late"
    return wait_for_all(world, pulse)


def test_a_rank_that_lives_but_does_not_come_is_named() -> None:
    said = run_world(one_is_late, size=3, timeout_s=60)
    told = "rank 1: still in its visit, its data or its files; others waited for up to topology.timeout_s=2 s"
    assert sorted(said) == sorted([told, "late", "not the first"])


def one_does_not_start(folder: Path) -> str:
    if os.environ["RANK"] == "1":
        time.sleep(2)
        return "too late"
    try:
        connect(Topology(timeout_s=1))
    except ConnectionError as error:
        return str(error)
    return "no error"


def test_a_rank_that_does_not_start_is_named(tmp_path: Path) -> None:
    said = run_world(one_does_not_start, tmp_path, size=2, timeout_s=30)
    assert said[0].startswith("rank 1 of 2 did not start within topology.timeout_s=1 s")


def fail_by_itself() -> list[str]:
    world, pulse = join(30)
    error = RuntimeError("not one of communication")
    if world.rank == 0:
        assert pulse.first_to_fail()
        pulse.name_absent(error)
    else:
        time.sleep(1.5)
    return getattr(error, "__notes__", [])


def test_a_rank_that_fails_by_itself_blames_nobody() -> None:
    assert run_world(fail_by_itself, size=2, timeout_s=30) == [[], []]
