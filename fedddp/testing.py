"""Real ranks for tests: `run_world` calls a function on fresh gloo ranks in a fraction of a second."""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

T = TypeVar("T")
_CONTEXT = mp.get_context("forkserver")
# Constructing DDP imports torch._dynamo (seconds); the server pays for these once per session.
_CONTEXT.set_forkserver_preload(
    [
        "torch.distributed",
        "torch._dynamo",
        "torch.nn.parallel",
        "torchvision",
        "fedddp.federation",
        "fedddp.tracking.progress",
        "pytest",  # which the module of `fn` imports; left out where it is not installed
    ]
)


def run_world(fn: Callable[..., T], *args: object, size: int = 2, timeout_s: float = 500) -> list[T]:
    """Call `fn(*args)` on `size` fresh ranks; return the results by rank.

    Ranks see torchrun's environment, so that `fedddp.distributed.launch.connect` works in them, have one
    thread each, and start from the same seed.

    Args:
        fn: a function at the top level of a module (it is pickled by name).
        args: pickled arguments of `fn`.
        size: number of ranks, >= 1.
        timeout_s: seconds until the world is killed; for one that hangs, not one that is slow.

    Raises:
        AssertionError: a rank raised; the message is the first rank's traceback.
        TimeoutError: no answer in time.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the fork server must stay single-threaded
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, ranks = [], []
    for rank in range(size):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        spec = (fn, args, rank, size, store.port, theirs, timeout_s)
        ranks.append(_CONTEXT.Process(target=_rank_main, args=spec, daemon=True))
        ranks[-1].start()
        theirs.close()  # so that a dead rank reads as end of file
        pipes.append(ours)
    try:
        return _gather(pipes, time.monotonic() + timeout_s)
    finally:
        for process in ranks:
            process.join(1 if process.exitcode is None else 0)
        for process in ranks:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _gather(pipes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    pending: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    while pending:
        ready = connection.wait(list(pending), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"no answer from ranks {sorted(pending.values())}")
        pipe: Any
        for pipe in ready:
            rank = pending.pop(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ok, value = False, "died without a traceback"
            if not ok:
                raise AssertionError(f"rank {rank}: {value}")
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


def _rank_main(
    fn: Callable[..., object],
    args: tuple[object, ...],
    rank: int,
    size: int,
    port: int,
    pipe: Any,
    timeout_s: float,
) -> None:
    faulthandler.dump_traceback_later(0.8 * timeout_s)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        # Plain pickle, not torch's, which shares memory with a process that is about to end.
        pipe.send_bytes(pickle.dumps((True, fn(*args))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
