"""From what the launcher says of this process to its place in the world.

The only module that reads torchrun's variables, with the commands and `testing.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from fedddp.distributed.environment import Launch
from fedddp.distributed.topology import Topology
from fedddp.distributed.world import World

_CONNECTIONS = itertools.count()


def connect(topology: Topology) -> World:
    """Collective. Join the launcher's world (or be one of one rank) and build the mesh; raises as `place`."""
    launch = Launch.from_environment()
    device, nccl = place(topology, launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world_size == launch.local_world_size and sys.platform == "linux":
        # The default resolves the own hostname, which often fails where there is no network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=topology.timeout_s)
    if launch.world_size == 1:
        store: Store = HashStore()
    else:
        warning = loopback_warning(launch)
        if warning:
            print(warning, file=sys.stderr, flush=True)
        store, _, _ = next(iter(rendezvous("env://", timeout=timeout)))
        # torchrun's store lives on when ranks are restarted, with addresses and errors of those before.
        # So it does when a script starts its second run; ranks do so in the same order.
        store = PrefixStore(f"start-{launch.restarts}-{next(_CONNECTIONS)}", store)
        _wait_for_all(launch, store, timeout)
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=PrefixStore("groups", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    return World(topology, launch, store, device, nccl)


def _wait_for_all(launch: Launch, store: Store, timeout: timedelta) -> None:
    """Collective. Wait until every rank has come this far.

    Raises:
        ConnectionError: some have not; the first rank to say so names them.
    """
    store.set(f"fedddp/here/{launch.rank}", "1")
    ranks = {rank: f"fedddp/here/{rank}" for rank in range(launch.world_size)}
    try:
        store.wait(list(ranks.values()), timeout)
    except RuntimeError as error:
        missing = [str(rank) for rank, key in ranks.items() if not store.check([key])]
        if store.add("fedddp/errors", 1) > 1:
            time.sleep(10)  # the launcher ends this rank once the first one has spoken
        raise ConnectionError(
            f"rank {', '.join(missing)} of {launch.world_size} did not start within "
            f"topology.timeout_s={timeout.total_seconds():g} s (killed, stopped or hung); see its output"
        ) from error


def place(topology: Topology, launch: Launch) -> tuple[torch.device, bool]:
    """Return this rank's device and whether the groups speak NCCL.

    Raises:
        ValueError: the world does not divide into groups, or a device or backend is missing.
    """
    topology.groups(launch.world_size)
    gpus = torch.cuda.device_count() if topology.device != "cpu" else 0
    if topology.device == "cuda" and not gpus:
        raise ValueError("topology.device=cuda, but torch sees no GPU; use device=cpu or auto")
    # A dedicated coordinator needs no GPU: the training ranks of its node take them from the first.
    idle = int(topology.coordinator == "dedicated" and launch.rank == launch.local_rank)
    own_gpu = 0 < launch.local_world_size - idle <= gpus
    nccl = topology.backend == "nccl" or (topology.backend == "auto" and own_gpu)
    if topology.backend == "nccl" and not own_gpu:
        raise ValueError(
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
                f"warning: this host's name {name} resolves to {own}, which other nodes cannot reach; "
                "set GLOO_SOCKET_IFNAME=<network interface> (see docs/slurm.md)"
            )
    return None
