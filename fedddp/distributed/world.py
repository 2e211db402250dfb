"""A world of ranks as a mesh of client groups, and every way in which its ranks communicate."""

from __future__ import annotations

import _thread
import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from fedddp.distributed.environment import Launch, threads_of_environment
from fedddp.distributed.topology import TopologyConfig

logger = logging.getLogger(__name__)

STOP_POLL_S = 0.2
NUMBERS = 1  # the tag of messages of numbers; tensors have 0
ERRORS = "fedddp/errors"
"""Key of the store that counts the ranks that reported an error."""
FIRST_ERROR = "fedddp/first-error"
"""Key of the store that has the first of these errors."""


class World:
    """This rank in the world, and every way in which ranks communicate.

    The mesh has the dimensions ("client", "data"): G groups of R ranks. A method that is
    marked "collective" must be called by all ranks of the world (or of the group) in the same order.
    Tensors may be on any device; they are moved to one from which the backend can send them.
    """

    owns_process_group = True
    """False when the caller's program had initialised torch.distributed before."""

    def __init__(
        self, topology: TopologyConfig, launch: Launch, store: Store, device: torch.device, nccl: bool
    ) -> None:
        """Collective over the world; `fedddp.distributed.launch.connect` calls it.

        Args:
            topology: how the ranks are shared out.
            launch: which rank this is.
            store: shared by all ranks.
            device: where this rank trains.
            nccl: whether the client groups communicate by NCCL.
        """
        self.rank, self.size = launch.rank, launch.world_size
        self.local_rank = launch.local_rank
        self.ranks_per_client = topology.ranks_per_client
        self.groups = topology.groups(launch.world_size)
        self.dedicated = topology.coordinator == "dedicated"
        self.timeout_s = topology.timeout_s
        self.store = store
        self.device = device
        # World-wide tensors go through the CPU unless every rank has a GPU of its own.
        self._transport = self.device if nccl and not self.dedicated else torch.device("cpu")
        self.group: int | None = None
        self.data_rank = 0
        if self.rank or not self.dedicated:
            self.group, self.data_rank = divmod(self.rank - int(self.dedicated), self.ranks_per_client)
        leaders = [self.leader(group) for group in range(self.groups)]
        peers = [self._new_group(range(first, first + self.ranks_per_client)) for first in leaders]
        self._peers = None if self.group is None else peers[self.group]
        self._leaders = self._new_group(sorted({0, *leaders}))
        self._threads = torch.get_num_threads()
        torch.set_num_threads(topology.threads or threads_of_environment())
        self.waiting = False
        """Whether this rank waits for other ranks; the heartbeat reports it."""
        self.first_to_fail: bool | None = None
        """Whether this rank's error was the first in the world; None while it has none."""
        self.interrupted = False
        """Whether this rank was asked to stop by Ctrl-C."""
        self.on_stop: Callable[[], None] = self._log_stop
        """Called once, in a thread of its own, when a rank was asked to stop."""
        self._power_sgd: Any = None  # state of its hook, where gradients are compressed so
        self._stopping = self._announced = False
        self._asked_at = 0.0

    def _new_group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Collective. Return a process group of `ranks`; None for all ranks, or for a lone one."""
        if len(ranks) in (1, self.size):
            return None
        # Without a timeout of its own, a group waits as long as its backend likes.
        made = dist.new_group(list(ranks), timedelta(seconds=self.timeout_s))
        return made if isinstance(made, dist.ProcessGroup) else None

    def __str__(self) -> str:
        """Return this rank's part in the world, for logs."""
        part = "dedicated coordinator"
        if self.group is not None:
            part = f"client group {self.group} of {self.groups}, data rank {self.data_rank}"
        return f"rank {self.rank} of {self.size}: {part}, on {self.device}"

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank is the coordinator (rank 0)."""
        return self.rank == 0

    @property
    def leads_group(self) -> bool:
        """Whether this rank is the first of its client group, which sends and receives for it."""
        return self.group is not None and self.data_rank == 0

    @property
    def holds_sums(self) -> bool:
        """Whether this rank adds up what clients send: it leads a group, or is the coordinator."""
        return self.leads_group or self.is_coordinator

    @property
    def all_send_sums_from_cpu(self) -> bool:
        """Whether every rank adds up what clients send, and sends the sums from its CPU."""
        return self.ranks_per_client == 1 and not self.dedicated and self._transport.type == "cpu"

    def leader(self, group: int) -> int:
        """Return the world rank that leads `group`."""
        return int(self.dedicated) + group * self.ranks_per_client

    def replicate(self, module: nn.Module, *, some_unused: bool = False) -> nn.Module:
        """Collective over the group. Wrap `module` in DDP when R > 1; gradients stay in place.

        `some_unused`: some trainable parameters get no gradient.
        """
        if self.ranks_per_client == 1 or self.group is None:
            return module
        with warnings.catch_warnings():
            # torch 2.15 renames broadcast_buffers; the new name is unknown to the torch we still support.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                module,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                process_group=self._peers,
                broadcast_buffers=False,
                gradient_as_bucket_view=False,
                find_unused_parameters=some_unused,
            )

    def compress_gradients(self, replica: nn.Module, how: str) -> None:
        """Let DDP reduce the gradients of `replica` by torch's hook `how`: bf16, fp16 or powersgd.

        PowerSGD (Vogels et al., 2019, arXiv:1905.13727) approximates them with rank 1 after two exact steps.
        """
        if not isinstance(replica, DistributedDataParallel):
            return
        if how == "powersgd":
            # The small number keeps a gradient of zeros from becoming 0/0.
            self._power_sgd = powerSGD_hook.PowerSGDState(
                self._peers, start_powerSGD_iter=2, orthogonalization_epsilon=1e-8
            )
            replica.register_comm_hook(self._power_sgd, powerSGD_hook.powerSGD_hook)
        else:
            hooks = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
            replica.register_comm_hook(self._peers, hooks[how])

    def restart_compression(self) -> None:
        """Forget what PowerSGD kept: a client's update must not depend on the clients trained before."""
        if self._power_sgd is not None:
            self._power_sgd.__init__(self._peers, start_powerSGD_iter=2, orthogonalization_epsilon=1e-8)

    def broadcast(self, *tensors: Tensor) -> None:
        """Collective. Copy the coordinator's `tensors` to all ranks, in place."""
        self._exchange(tensors, lambda tensor: dist.broadcast(tensor, src=0))

    def sum(self, *tensors: Tensor) -> None:
        """Collective. Replace each tensor by its sum over all ranks, in place."""
        self._exchange(tensors, dist.all_reduce)

    def sum_held(self, *tensors: Tensor) -> None:
        """Collective. Do as `sum` over the ranks that hold sums; those of other ranks are empty."""
        if self.groups > 1 or self.dedicated:
            self._exchange(tensors, lambda tensor: dist.all_reduce(tensor, group=self._leaders))

    def sum_numbers(self, *tensors: Tensor) -> None:
        """Collective. As `sum`, for small tensors of int64 and float64: those of one type are one message."""
        for kind in (torch.int64, torch.float64):
            alike = [tensor for tensor in tensors if tensor.dtype == kind]
            if self.size == 1 or not alike:
                continue
            self.sum(message := torch.cat([tensor.flatten().cpu() for tensor in alike]))
            pieces = torch.split(message, [tensor.numel() for tensor in alike])
            for tensor, piece in zip(alike, pieces, strict=True):
                tensor.copy_(piece.view(tensor.shape))

    def max(self, *tensors: Tensor) -> None:
        """Collective. Replace each tensor by its elementwise maximum over all ranks, in place."""
        self._exchange(tensors, lambda tensor: dist.all_reduce(tensor, op=dist.ReduceOp.MAX))

    def _exchange(self, tensors: tuple[Tensor, ...], collective: Any) -> None:
        for tensor in tensors:
            if tensor.numel() == 0 or self.size == 1:
                continue
            direct = tensor.device == self._transport and tensor.is_contiguous()
            staged = tensor if direct else tensor.to(self._transport).contiguous()
            with self._waiting():
                collective(staged)
            if not direct:
                tensor.copy_(staged)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self.waiting = True
        yield  # after an error it stays set: this rank was waiting for others
        self.waiting = False

    def group_broadcast(self, *tensors: Tensor) -> None:
        """Collective over the group. Copy the group leader's `tensors` to its ranks, in place."""
        if self.ranks_per_client > 1:
            for tensor in tensors:
                if tensor.numel():
                    dist.broadcast(tensor, group=self._peers, group_src=0)

    def group_sum(self, tensor: Tensor) -> Tensor:
        """Collective over the group. Return the sum of `tensor` over its ranks; differentiable."""
        if self.ranks_per_client == 1:
            return tensor
        result: Tensor = _GroupSum.apply(tensor, self._peers)
        return result

    def group_max(self, tensor: Tensor) -> Tensor:
        """Collective over the group. Replace `tensor` by its maximum over the ranks, in place."""
        if self.ranks_per_client > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._peers)
        return tensor

    def send(self, tensor: Tensor, rank: int) -> None:
        """Send `tensor` to `rank`, which must `receive` it."""
        dist.send(tensor.to(self._transport).contiguous(), dst=rank)

    def receive(self, tensor: Tensor, rank: int) -> None:
        """Fill `tensor` from `rank`."""
        with self._waiting():
            dist.recv(staged := torch.empty_like(tensor, device=self._transport), src=rank)
        tensor.copy_(staged)

    def post(self, numbers: Sequence[float], rank: int) -> None:
        """Send a few numbers to `rank`, through the CPU; it must `collect` as many."""
        dist.send(torch.tensor(numbers, dtype=torch.float64), dst=rank, tag=NUMBERS)

    def collect(self, count: int, rank: int) -> list[float]:
        """Wait for `count` numbers from `rank`; may be called from any thread."""
        dist.recv(numbers := torch.empty(count, dtype=torch.float64), src=rank, tag=NUMBERS)
        return [float(number) for number in numbers]

    def gather(self, value: object) -> list[Any]:
        """Collective. Return every rank's `value`, by rank; for small things."""
        values: list[Any] = [None] * self.size
        if self.size == 1:
            return [value]
        with self._waiting():
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Collective. Wait until all ranks are here."""
        self.sum(torch.zeros(1))

    # ---- stopping early, and failing: one rank knows first, all ranks must learn ----

    def request_stop(self) -> None:
        """Ask the run to stop at its next safe point; may be called from a signal handler."""
        if not self._stopping:
            self._stopping = True
            # Not from here: a signal may come while this thread prints, and holds the lock of the stream.
            _thread.start_new_thread(self.on_stop, ())

    def _log_stop(self) -> None:
        if self.is_coordinator:
            logger.info("stopping as soon as the run is set up (Ctrl-C again stops at once)")

    def stop_requested(self) -> bool:
        """Return whether any rank was asked to stop; not a collective, ranks may differ for a moment."""
        if self._stopping:
            if not self._announced:
                self.store.set("fedddp/stop", "1")
                self._announced = True
        elif time.monotonic() - self._asked_at > STOP_POLL_S:
            self._asked_at = time.monotonic()
            if self.store.check(["fedddp/stop"]):
                self._announced = True
                self.request_stop()
        return self._stopping

    def report_failure(self, error: str) -> bool:
        """Count this rank's `error` in the store, once; return whether no other rank counted one before."""
        if self.first_to_fail is None:
            self.first_to_fail = False
            try:
                self.first_to_fail = int(self.store.add(ERRORS, 1)) == 1
                if self.first_to_fail:
                    self.store.set(FIRST_ERROR, f"rank {self.rank}: {error}")
            except RuntimeError:  # the store's host is gone, and with it the count: one rank per node reports
                self.first_to_fail = self.local_rank == 0
        return self.first_to_fail

    def first_error(self) -> str:
        """Return the error, and the rank, that was reported first; empty if it is not known."""
        try:
            return self.store.get(FIRST_ERROR).decode() if self.store.check([FIRST_ERROR]) else ""
        except RuntimeError:
            return ""

    def agree_to_stop(self) -> bool:
        """Collective. Return whether any rank was asked to stop; the same on all ranks."""
        asked = torch.tensor([float(self.stop_requested())])
        self.max(asked)
        return bool(asked)

    def close(self) -> None:
        """Leave the world; the process may connect again."""
        if self.size > 1:
            with contextlib.suppress(RuntimeError):
                self.store.set(f"fedddp/left/{self.rank}", "1")
        torch.set_num_threads(self._threads)
        if self.owns_process_group and dist.is_initialized():
            dist.destroy_process_group()


class _GroupSum(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, peers: dist.ProcessGroup) -> Tensor:
        ctx.peers = peers
        total = tensor.clone()
        dist.all_reduce(total, group=peers)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.peers)
        return total, None
