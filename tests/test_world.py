"""The world of ranks: the mesh, the collectives, stop requests, signals and errors."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from launching import await_file

from fedddp.distributed import launch
from fedddp.distributed.environment import Launch
from fedddp.distributed.launch import connect, joined, loopback_warning
from fedddp.distributed.signals import stop_on_signals
from fedddp.distributed.topology import TopologyConfig
from fedddp.distributed.world import World
from fedddp.section import ConfigError
from fedddp.testing import run_world


def coordinates(topology: TopologyConfig) -> tuple[object, ...]:
    world = connect(topology)
    return world.group, world.data_rank, world.groups, world.is_coordinator, world.leads_group


def test_ranks_form_groups_of_ranks_per_client() -> None:
    assert run_world(coordinates, TopologyConfig(ranks_per_client=2), size=4) == [
        (0, 0, 2, True, True),
        (0, 1, 2, False, False),
        (1, 0, 2, False, True),
        (1, 1, 2, False, False),
    ]


def test_a_dedicated_coordinator_is_in_no_group() -> None:
    topology = TopologyConfig(ranks_per_client=2, coordinator="dedicated")
    assert run_world(coordinates, topology, size=3) == [
        (None, 0, 1, True, False),
        (0, 0, 1, False, True),
        (0, 1, 1, False, False),
    ]


def test_without_a_launcher_the_world_has_one_rank() -> None:
    world = connect(TopologyConfig())
    assert (world.size, world.group, world.groups) == (1, 0, 1)
    world.sum(torch.ones(3))
    world.close()


def test_the_number_of_threads_does_not_depend_on_the_launcher() -> None:
    before = torch.get_num_threads()
    for threads in (1, 3):
        world = connect(TopologyConfig(threads=threads))
        assert torch.get_num_threads() == threads
        world.close()
        assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("topology", "size", "words"),
    [
        (TopologyConfig(ranks_per_client=2), 3, "ranks_per_client=2 does not divide"),
        (TopologyConfig(ranks_per_client=2, coordinator="dedicated"), 4, "1 is the coordinator"),
        (TopologyConfig(coordinator="dedicated"), 1, "at least 2 ranks"),
    ],
)
def test_a_world_that_does_not_divide_into_groups_is_rejected(
    topology: TopologyConfig, size: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        topology.groups(size)


def communicate() -> dict[str, object]:
    world = connect(TopologyConfig(ranks_per_client=2))
    number = torch.tensor([float(world.rank)])
    total, largest, first = number.clone(), number.clone(), number + 5
    world.sum(total)
    world.max(largest)
    world.broadcast(first)
    leader = number.clone()
    world.group_broadcast(leader)
    weights = number.clone().requires_grad_()
    # f = (sum over the group)^2, so df/dweight = 2 * sum, from each of the two ranks' own f.
    world.group_sum(weights).square().sum().backward()  # type: ignore[no-untyped-call]
    if world.rank == 1:
        world.send(torch.tensor([7.0]), 3)
    received = torch.zeros(1)
    if world.rank == 3:
        world.receive(received, 1)
    assert weights.grad is not None
    return {
        "sum": total.item(),
        "max": largest.item(),
        "first": first.item(),
        "leader": leader.item(),
        "gradient": weights.grad.item(),
        "received": received.item(),
        "gathered": world.gather(world.rank),
    }


def test_collectives_cover_the_world_or_the_group() -> None:
    rows = run_world(communicate, size=4)
    assert [row["sum"] for row in rows] == [6.0] * 4
    assert [row["max"] for row in rows] == [3.0] * 4
    assert [row["first"] for row in rows] == [5.0] * 4
    assert [row["leader"] for row in rows] == [0.0, 0.0, 2.0, 2.0]
    assert [row["gradient"] for row in rows] == [2 * 2 * 1.0] * 2 + [2 * 2 * 5.0] * 2
    assert rows[3]["received"] == 7.0
    assert rows[0]["gathered"] == [0, 1, 2, 3]


def hold_sums(coordinator: Literal["colocated", "dedicated"]) -> tuple[bool, list[int]]:
    """Add up a number for every rank that holds sums; those of the others are empty."""
    topology = TopologyConfig(ranks_per_client=2, coordinator=coordinator, device="cpu")
    with contextlib.closing(connect(topology)) as world:
        sums = torch.tensor([2**world.rank] if world.holds_sums else [])
        world.sum_held(sums)
        return world.holds_sums, sums.tolist()


@pytest.mark.parametrize(
    ("size", "coordinator", "holding"),
    [(2, "colocated", [0]), (4, "colocated", [0, 2]), (3, "dedicated", [0, 1]), (5, "dedicated", [0, 1, 3])],
)
def test_sums_are_added_over_the_leaders_and_the_coordinator(
    size: int, coordinator: str, holding: list[int]
) -> None:
    total = sum(2**rank for rank in holding)
    expected = [(rank in holding, [total] if rank in holding else []) for rank in range(size)]
    assert run_world(hold_sums, coordinator, size=size) == expected


def wait_for_an_absent_peer(folder: Path) -> None:
    with contextlib.closing(connect(TopologyConfig(ranks_per_client=2, timeout_s=1, device="cpu"))) as world:
        given_up = folder / "given up"
        if world.rank == 0:
            with pytest.raises(RuntimeError):
                world.group_sum(torch.ones(1))
            given_up.touch()
        await_file(given_up)


def test_a_rank_waits_for_its_peers_no_longer_than_for_all_ranks(tmp_path: Path) -> None:
    run_world(wait_for_an_absent_peer, tmp_path, size=4)


def connect_late_on_rank_1(folder: Path) -> bool:
    """Return whether rank 1 was connected when this rank was."""
    made, file = World, folder / "connected"

    def late(*parts: Any) -> World:
        time.sleep(0.3)
        file.touch()
        return made(*parts)

    patched = mock.patch.object(launch, "World", late)
    with (
        patched if os.environ["RANK"] == "1" else contextlib.nullcontext(),
        contextlib.closing(connect(TopologyConfig(device="cpu"))),
    ):
        return file.exists()


def test_no_rank_goes_on_alone_while_others_still_connect(tmp_path: Path) -> None:
    assert run_world(connect_late_on_rank_1, tmp_path, size=2) == [True, True]


def connect_three_times() -> list[float]:
    sums = []
    for number in range(3):
        world = connect(TopologyConfig(ranks_per_client=2))
        if number == 0:
            world.request_stop()
        world.sum(total := torch.ones(1))
        sums.append(float(total) + 10 * world.agree_to_stop())
        world.close()
    return sums


def test_a_script_can_connect_one_world_after_another() -> None:
    assert run_world(connect_three_times, size=2) == [[12.0, 2.0, 2.0]] * 2


def fail_on_rank_1() -> None:
    world = connect(TopologyConfig())
    if world.rank == 1:
        raise RuntimeError("this rank fails")
    world.sum(torch.ones(1))


def test_the_first_error_is_reported_and_no_rank_hangs() -> None:
    with pytest.raises(AssertionError, match=r"rank 1: [\s\S]*this rank fails"):
        run_world(fail_on_rank_1, size=2)


def request_stop_on_rank_1() -> list[bool]:
    world = connect(TopologyConfig())
    if world.rank == 1:
        world.request_stop()
    return [world.agree_to_stop(), world.stop_requested()]


def test_all_ranks_learn_of_a_stop_request_on_one_rank() -> None:
    (first, _), (second, own) = run_world(request_stop_on_rank_1, size=2)
    assert first
    assert second
    assert own


def press_ctrl_c_twice(again_after_s: float) -> str:
    world = connect(TopologyConfig())
    try:
        with stop_on_signals(world):
            os.kill(os.getpid(), signal.SIGINT)
            assert world.stop_requested()
            time.sleep(again_after_s)
            os.kill(os.getpid(), signal.SIGINT)
            return "continues to its checkpoint"
    except KeyboardInterrupt:
        return "interrupted"


@pytest.mark.parametrize(
    ("again_after_s", "expected"), [(0.1, "continues to its checkpoint"), (2.2, "interrupted")]
)
def test_a_repeated_sigint_counts_once_and_a_later_one_interrupts(
    again_after_s: float, expected: str
) -> None:
    assert run_world(press_ctrl_c_twice, again_after_s, size=1) == [expected]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_request_a_stop_and_their_handlers_are_restored(number: signal.Signals) -> None:
    world, before = connect(TopologyConfig()), signal.getsignal(number)
    with stop_on_signals(world):
        os.kill(os.getpid(), number)
        assert world.stop_requested()
    assert signal.getsignal(number) == before
    world.close()


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    world, before = connect(TopologyConfig()), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(world):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not world.stop_requested()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        world.close()


def test_only_ctrl_c_is_an_interruption() -> None:
    for number, interrupted in ((signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGINT, True)):
        world = connect(TopologyConfig())
        with stop_on_signals(world):
            os.kill(os.getpid(), number)
        assert (world.stop_requested(), world.interrupted) == (True, interrupted)
        world.close()


# ---- the caller's own program ----


def use_a_group_of_its_own() -> tuple[list[float], bool]:
    """Join two worlds while a process group of the caller's is there; return sums, and whether it is kept."""
    dist.init_process_group("gloo")
    own, sums = dist.group.WORLD, []
    for _ in range(2):
        with joined(TopologyConfig(ranks_per_client=2)) as world:
            world.sum(total := torch.ones(1))
        sums.append(float(total))
    dist.all_reduce(again := torch.ones(1))
    return [*sums, float(again)], dist.group.WORLD is own


def test_a_process_group_of_the_callers_is_used_and_kept() -> None:
    assert run_world(use_a_group_of_its_own, size=2) == [([2.0, 2.0, 2.0], True)] * 2


def test_a_process_group_of_fedddps_own_ends_with_the_run() -> None:
    with joined(TopologyConfig()):
        assert dist.is_initialized()
    assert not dist.is_initialized()


def hooks_of_several_runs(own_group: bool) -> list[bool]:
    """Return whether the hook for uncaught exceptions is the caller's, within and after each run."""

    def hook(*_: object) -> None:
        pass

    if own_group:
        dist.init_process_group("gloo")
    sys.excepthook = hook
    kept = []
    for _ in range(3):
        with joined(TopologyConfig()):
            kept.append(sys.excepthook is hook)
        kept.append(sys.excepthook is hook)
    return kept


@pytest.mark.parametrize("own_group", [False, True])
def test_the_callers_exception_hook_is_the_same_after_several_runs(own_group: bool) -> None:
    assert run_world(hooks_of_several_runs, own_group, size=2) == [[True] * 6] * 2


def test_threads_and_random_numbers_of_the_caller_are_the_same_after_a_run() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, threads = torch.rand(1), torch.get_num_threads()
    with joined(TopologyConfig(threads=threads + 1)):
        torch.rand(5)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("variable", "setting", "threads"),
    [("3", None, 3), ("3", 2, 2), ("2", 5, 5), (None, None, 1), (None, 4, 4), ("0", None, 1), ("x", None, 1)],
)
def test_threads_come_from_the_setting_then_from_the_environment(
    variable: str | None, setting: int | None, threads: int
) -> None:
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS")
        if variable is not None:
            patch.setenv("OMP_NUM_THREADS", variable)
        with joined(TopologyConfig(threads=setting)):
            assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == before


# ---- launchers ----

SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
MPIEXEC = {"PMI_SIZE": "4", "PMI_RANK": "2"}
ONE_TASK = {"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1", "PMI_RANK": "0"}
TORCHRUN = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("environment", "starter"),
    [
        (SRUN, "srun"),
        (MPIRUN, "mpirun"),
        (MPIEXEC, "mpiexec"),
        ({}, None),
        (ONE_TASK, None),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, None),  # a batch script is one task of its job
        (SRUN | TORCHRUN, None),
        (MPIRUN | TORCHRUN, None),
    ],
    ids=str,
)
def test_several_tasks_that_no_launcher_made_one_world_of_are_refused(
    environment: dict[str, str], starter: str | None
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in SRUN | MPIRUN | MPIEXEC | TORCHRUN:
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        if starter is None:
            connect(TopologyConfig()).close()
        else:
            with pytest.raises(ConfigError, match=f"^this is task 2 of 4 of {starter}, but no launcher"):
                connect(TopologyConfig())


SEVERAL_NODES = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),  # once per node
        ({"LOCAL_WORLD_SIZE": "4"}, False),  # one node
        ({"GLOO_SOCKET_IFNAME": "eth0"}, False),
        ({"MASTER_ADDR": "127.0.1.11"}, False),  # all nodes on one machine, as in tests/slurm
        ({"MASTER_ADDR": "no-such-host.invalid"}, False),  # the rendezvous reports it
    ],
)
def test_a_warning_names_the_setting_for_a_host_name_that_resolves_to_loopback(
    changes: dict[str, str], warned: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        for name, value in {**SEVERAL_NODES, "MASTER_ADDR": "192.0.2.1", **changes}.items():
            patch.setenv(name, value)
        patch.setattr(socket, "gethostname", lambda: "localhost")
        warning = loopback_warning(Launch.from_environment())
    assert (warning is not None) is warned
    if warning:
        assert "localhost resolves to 127.0.0.1" in warning
        assert "set GLOO_SOCKET_IFNAME" in warning
