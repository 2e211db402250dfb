"""Read the launcher's environment and initialise torch.distributed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from fedddp.distributed.environment import Launch, wait_for_first_error
from fedddp.distributed.heartbeat import Heartbeat
from fedddp.distributed.signals import stop_on_signals
from fedddp.distributed.topology import TopologyConfig
from fedddp.distributed.world import ERRORS, World
from fedddp.rng import generators_kept
from fedddp.section import ConfigError

logger = logging.getLogger(__name__)
_CONNECTIONS = itertools.count()


class AnotherRankFailedError(Exception):
    """Another rank reported the error that ended the run; this one has nothing to add."""


@contextlib.contextmanager
def joined(topology: TopologyConfig) -> Iterator[World]:
    """Collective. Join the world for the block: with a heartbeat, and signals as requests to stop.

    The launcher sends SIGTERM as soon as a rank is gone; a rank that has yet to report its error must
    not end by it.

    Raises:
        AnotherRankFailedError: the block failed on another rank first, which reports it.
    """
    with _own_exception_hook():
        world = connect(topology)
    heartbeat = Heartbeat(world)
    try:
        with generators_kept(), stop_on_signals(world):
            try:
                yield world
            except Exception as error:
                if not world.report_failure(str(error)):
                    raise AnotherRankFailedError from error
                heartbeat.name_absent(error)
                raise
    finally:
        world.close()
        heartbeat.stop()


@contextlib.contextmanager
def _own_exception_hook() -> Iterator[None]:
    """Keep Python's hook for uncaught exceptions: torch wraps it once more with every process group."""
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook


def connect(topology: TopologyConfig) -> World:
    """Collective. Join the launcher's world (or a world of one rank) and build the mesh.

    Raises:
        ConfigError: as for `choose_device`.
        ConnectionError: a rank did not start in time.
    """
    Launch.check()
    launch = Launch.from_environment()
    device, nccl = choose_device(topology, launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world_size == launch.local_world_size and sys.platform == "linux":
        # The default resolves the host's name, which often fails without a network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=topology.timeout_s)
    if launch.world_size == 1:
        store: Store = HashStore()
    else:
        warning = loopback_warning(launch)
        if warning:
            logger.warning(warning)
        store, _, _ = next(iter(rendezvous("env://", timeout=timeout)))
        # torchrun's store outlives a restart of the ranks, with the addresses and errors of the earlier
        # ones. A script's second run uses it too; all ranks start their runs in the same order.
        store = PrefixStore(f"start-{launch.restarts}-{next(_CONNECTIONS)}", store)
        _wait_for_all(launch, store, timeout)
    owns_process_group = not dist.is_initialized()
    if owns_process_group:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=PrefixStore("groups", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    world = World(topology, launch, store, device, nccl)
    world.owns_process_group = owns_process_group
    # A rank that ends at once, with an error of its own, must not close connections that others still make.
    world.barrier()
    return world


def _wait_for_all(launch: Launch, store: Store, timeout: timedelta) -> None:
    """Collective. Wait until every rank has started.

    Raises:
        ConnectionError: some have not; the first rank to report it names them.
    """
    store.set(f"fedddp/here/{launch.rank}", "1")
    ranks = {rank: f"fedddp/here/{rank}" for rank in range(launch.world_size)}
    try:
        store.wait(list(ranks.values()), timeout)
    except RuntimeError as error:
        missing = [str(rank) for rank, key in ranks.items() if not store.check([key])]
        if store.add(ERRORS, 1) > 1:
            wait_for_first_error()
        raise ConnectionError(
            f"rank {', '.join(missing)} of {launch.world_size} did not start within "
            f"topology.timeout_s={timeout.total_seconds():g} s (killed, stopped or hung); see its output"
        ) from error


def choose_device(topology: TopologyConfig, launch: Launch) -> tuple[torch.device, bool]:
    """Return this rank's device, and whether the client groups communicate by NCCL.

    Raises:
        ConfigError: the world does not divide into groups, or a device or backend is missing.
    """
    topology.groups(launch.world_size)
    gpus = torch.cuda.device_count() if topology.device != "cpu" else 0
    if topology.device == "cuda" and not gpus:
        raise ConfigError("topology.device=cuda, but torch sees no GPU; use device=cpu or auto")
    # A dedicated coordinator needs no GPU: the training ranks of its node take them from the first.
    idle = int(topology.coordinator == "dedicated" and launch.rank == launch.local_rank)
    own_gpu = 0 < launch.local_world_size - idle <= gpus
    nccl = topology.backend == "nccl" or (topology.backend == "auto" and own_gpu)
    if topology.backend == "nccl" and not own_gpu:
        raise ConfigError(
            f"topology.backend=nccl needs a GPU for each of the {launch.local_world_size - idle} training "
            f"ranks of this node, but it has {gpus}; use backend=gloo or fewer ranks"
        )
    if not gpus or (topology.coordinator == "dedicated" and launch.rank == 0):
        return torch.device("cpu"), nccl
    return torch.device("cuda", (launch.local_rank - idle) % gpus), nccl


def loopback_warning(launch: Launch) -> str | None:
    """Return what to set when other nodes could not reach this one by its own name."""
    several_nodes = launch.world_size > launch.local_world_size
    if not several_nodes or launch.local_rank or os.environ.get("GLOO_SOCKET_IFNAME"):
        return None
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        own = socket.gethostbyname(name)
        head = socket.gethostbyname(os.environ.get("MASTER_ADDR", name))
        if own.startswith("127.") and not head.startswith("127."):
            return (
                f"this host's name {name} resolves to {own}, which other nodes cannot reach; "
                "set GLOO_SOCKET_IFNAME=<network interface> (see docs/slurm.md)"
            )
    return None
