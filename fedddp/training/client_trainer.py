"""The local training of one client on its client group; it holds the one inner loop."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedddp.algorithms import Algorithm, AsynchronousAlgorithm, ClientContext, ClientUpdate, ServerState
from fedddp.algorithms.local import LocalConfig
from fedddp.data.loader import Batch, ClientLoader, blank_batch, micro_batches
from fedddp.distributed.world import World
from fedddp.evaluation import NoMemoryError, is_out_of_memory
from fedddp.models.flat import FlatModel, norm, tensors_kept
from fedddp.rng import DROPOUT, seed_global, stream, stream_seed
from fedddp.tasks import Task
from fedddp.training.replica import in_float32, replicate

logger = logging.getLogger(__name__)

OPTIMIZER_STATE = "optimizer."
"""Prefix of the local optimizer's tensors in a client's state."""


@dataclass(frozen=True, kw_only=True)
class ClientJob:
    """One local training to do: the client, its data, and its weight in the round."""

    client: int
    round: int
    """Index of the round, or the dispatch id in asynchronous training; names the random streams."""
    indices: NDArray[np.int64]
    """The client's training examples; (n_k,)."""
    weight: float
    """p_k, the client's share of the cohort's examples."""
    share: float
    """1 / m, m the cohort's size."""
    lr: float
    """η of this round."""
    initial_loss: float = float("nan")
    """F_k(x), where the algorithm needs it; and the largest of the cohort's."""
    largest_initial_loss: float = float("nan")


@dataclass(frozen=True)
class ClientResult:
    """The result of one local training, on each rank of the group."""

    update: ClientUpdate
    buffers: Tensor
    """The client's float buffers, averaged over the group; (B,). A view of live state."""
    integer_buffers: Tensor
    """The client's integer buffers, maximum over the group; (I,) int64."""
    loss: tuple[float, float]
    """Sum and count of the training loss, the same on all ranks of the group."""
    steps: int
    """K_k, optimizer steps of the group."""
    stop: bool
    """Whether a rank of the group was asked to stop."""


class Parts(NamedTuple):
    """What every trainer is made of."""

    world: World
    flat: FlatModel
    task: Task
    loader: ClientLoader
    local: LocalConfig
    algorithm: Algorithm
    seed: int


class ClientTrainer:
    """Trains one client after another on this rank's group; the model and the optimizer are reused."""

    def __init__(self, parts: Parts) -> None:
        """Collective over the group: wraps the model in DDP."""
        world, flat, self.task, self.loader, local, self.algorithm, self.seed = parts
        self.world, self.flat, self.local = world, flat, local
        self.shard = (world.data_rank, world.ranks_per_client)
        self.replica = self._replica()
        self.parameter = nn.Parameter(flat.params)
        self.parameter.grad = flat.grad
        self.optimizer = local.make_optimizer(self.parameter)
        self.autocast, self.make_scaler = _mixed_precision(local, world.device.type)
        self.modules = modules = list(flat.module.modules())
        # Layers that weigh a padding example by 0 themselves, and the buffers of all others.
        self.padding_aware = [m for m in modules if hasattr(m, "is_padding")]
        others = (m for m in modules if not hasattr(m, "is_padding"))
        self.restored_buffers = [b for m in others for b in m.buffers(recurse=False)]
        self.has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules)
        if self.has_batch_norm and local.accumulate > 1 and world.is_coordinator:
            logger.warning(
                "local.accumulate=%d: batch norm normalises each micro-batch by itself, so steps differ from "
                "those of whole batches; model.norm=group does not",
                local.accumulate,
            )
        self.loss_sum = torch.zeros(1, dtype=torch.float64, device=world.device)
        self.loss_count = 0
        self.loss, self.stop = (0.0, 0.0), False
        """Of the group, after a pass: sum and count of the training loss; whether a rank is to stop."""

    def train(self, server: ServerState, job: ClientJob, state: dict[str, Tensor]) -> ClientResult:
        """Collective over the group. Train a client from the server's model; return its result.

        It is to be used before the next client trains: it holds views of live state.

        Args:
            server: the model to start from.
            job: the local training.
            state: the client's own, changed in place.
        """
        with contextlib.ExitStack() as on_exit, self.name_client(job):
            context = self.context(server, job, state, on_exit)
            for context.pass_index in range(self.algorithm.passes):
                self.algorithm.begin(context)
                self._local_sgd(context, job.indices)
            return self.result(context)

    def _local_sgd(self, context: ClientContext, indices: NDArray[np.int64]) -> None:
        """The inner loop: every step of a pass of local training, for every algorithm."""
        self.begin_pass(context)
        seed_global(self.dropout_seed(context))
        scaler = self.make_scaler()
        for batch in self.batches(context, indices):
            context.grad.zero_()
            self._gradient(context, batch, scaler)
            self.loss_count += batch.count
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            # After the all-reduce and the un-scaling: it is the same on all ranks, and added once.
            self.algorithm.correct(context)
            self.step(context, scaler)
        self.end_pass(context)

    # ---- the parts of a local training, which engines share ----

    def context(
        self, server: ServerState, job: ClientJob, state: dict[str, Tensor], on_exit: contextlib.ExitStack
    ) -> ClientContext:
        """Return what the algorithm's hooks see of a local training, at its start."""
        context = ClientContext(
            client=job.client,
            round=job.round,
            examples=len(job.indices),
            weight=job.weight,
            share=job.share,
            flat=self.flat,
            start=server.params,
            start_buffers=server.buffers,
            start_integer_buffers=server.integer_buffers,
            server_vectors=server.vectors,
            state=state,
            local=self.local,
            lr=job.lr,
            on_exit=on_exit,
            initial_loss=job.initial_loss,
            largest_initial_loss=job.largest_initial_loss,
        )
        context.restart()
        return context

    def begin_pass(self, context: ClientContext) -> None:
        """Load the optimizer's state, and start to count steps and losses."""
        if not all(module.training for module in self.modules):  # to set it takes a microsecond for each
            self.flat.module.train()
        self._load_optimizer(context)
        context.steps, context.lr_sum = 0, 0.0
        if not context.examples:  # hooks would find the gradient of another client
            context.grad.zero_()
        self.loss_sum.zero_()
        self.loss_count = 0

    def step(self, context: ClientContext, scaler: Any = None) -> None:
        """Clip the gradient of a batch, which the algorithm has corrected, and step the parameters."""
        if self.local.clip_norm is not None:
            context.grad.mul_(torch.clamp(self.local.clip_norm / norm(context.grad), max=1.0))
        if self._step(scaler):
            context.steps += 1
            context.lr_sum += context.lr

    def end_pass(self, context: ClientContext) -> None:
        """Collective over the group. Bring its ranks' buffers together; keep the optimizer's state."""
        self.flat.check_constants()
        self.flat.read_buffers()
        self._merge()
        self._store_optimizer(context)

    def result(self, context: ClientContext) -> ClientResult:
        """Return the result of a local training after its last pass."""
        update, flat = self.algorithm.finish(context), self.flat
        return ClientResult(
            update, flat.buffers, flat.integer_buffers, self.loss, context.steps, stop=self.stop
        )

    # ---- batches and gradients ----

    def batches(self, context: ClientContext, indices: NDArray[np.int64]) -> Iterator[Batch]:
        """Yield this rank's share of every batch of a pass; the batches do not depend on R."""
        local, steps, epoch = self.local, 0, 0
        while len(indices) and (epoch < local.epochs if local.steps is None else steps < local.steps):
            rng = stream("batches", self.seed, context.round, context.client, epoch)
            for batch in self.loader.batches(
                *(indices, local.batch_size),
                client=context.client,
                rng=rng,
                shard=self.shard,
                train=True,
                most=None if local.steps is None else local.steps - steps,
            ):
                yield batch
                steps += 1
            epoch += 1

    def _gradient(self, context: ClientContext, batch: Batch, scaler: Any) -> None:
        """Add to `grad` the gradient of the mean loss over the whole batch, reduced over the group."""
        rank, ranks = self.shard
        parts = list(micro_batches(batch, self.local.accumulate, rank, ranks))
        for number, micro in enumerate(parts, 1):
            # DDP reduces gradients in the last backward pass; a rank without an example takes part too.
            reduces = number == len(parts)
            with contextlib.nullcontext() if reduces else self._no_sync(), self._padding(micro):
                with self.autocast():
                    outputs = self.task.forward(self.replica, self._laid_out(micro))
                    loss = self.task.loss(in_float32(outputs), micro.targets)
                    penalty = self.algorithm.penalty(context, micro, outputs)
                # DDP divides by R and the loss is a sum, so this makes the result the mean over the batch.
                scale = ranks / batch.total if micro.count else 0.0
                objective = (loss if penalty is None else loss + penalty) * scale
                (objective if scaler is None else scaler.scale(objective)).backward()
            if micro.count:
                self.loss_sum += loss.detach()

    def _laid_out(self, batch: Batch) -> Batch:
        """Return `batch` with its images in the layout of the model."""
        if self.local.channels_last is not True:
            return batch
        return replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))

    def _padding(self, batch: Batch) -> contextlib.AbstractContextManager[None]:
        """Keep a padding example out of the model's buffers."""
        return contextlib.nullcontext() if batch.count else self._padded()

    @contextlib.contextmanager
    def _padded(self) -> Iterator[None]:
        for module in self.padding_aware:
            setattr(module, "is_padding", True)  # noqa: B010 - modules type their attributes as tensors
        with tensors_kept(self.restored_buffers):
            yield
        for module in self.padding_aware:
            setattr(module, "is_padding", False)  # noqa: B010

    def _step(self, scaler: Any) -> bool:
        """Step the optimizer; return False when fp16 overflowed, which skips the step on all ranks."""
        if scaler is None:
            self.optimizer.step()
            return True
        before = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        return bool(scaler.get_scale() >= before)

    def dropout_seed(self, context: ClientContext) -> int:
        """Return the seed of the global generators, from which dropout and own layers draw."""
        return stream_seed(DROPOUT, self.seed, context.round, context.client, self.world.data_rank)

    # ---- DDP ----

    def _replica(self) -> nn.Module:
        """Collective over the group. Return the model as the group trains it."""
        return replicate(
            self.world, self.flat.module, self.task, blank_batch(self.loader.images, self.world.device)
        )

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        no_sync = getattr(self.replica, "no_sync", None)
        return no_sync() if no_sync else contextlib.nullcontext()

    def _merge(self) -> None:
        """Collective over the group. Bring together its ranks' losses, buffers, and whether to stop.

        Float buffers are averaged by examples seen; integer ones have their maximum.
        """
        count, stop = float(self.loss_count), self.world.stop_requested()
        if self.world.ranks_per_client == 1:
            self.loss, self.stop = (float(self.loss_sum), count), stop
            return
        message = torch.cat([self.loss_sum, self.loss_sum.new_tensor([count, float(stop)])])
        # A rank without an example has no weight: zero times an infinite mask would be NaN.
        buffers = self.flat.buffers.double() * count if count else torch.zeros_like(self.flat.buffers)
        message = self.world.group_sum(torch.cat([message, buffers.double()]))
        loss_sum, total, stops = message[:3].tolist()
        if total > 0:
            self.flat.buffers.copy_(message[3:] / total)
        if self.flat.integer_buffers.numel():
            self.world.group_max(self.flat.integer_buffers)
        self.loss, self.stop = (loss_sum, total), stops > 0

    # ---- the optimizer's state ----

    def _load_optimizer(self, context: ClientContext) -> None:
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = context.lr
        kept = {n: t for n, t in context.state.items() if n.startswith(OPTIMIZER_STATE)}
        if kept:
            self.optimizer.state[self.parameter] = {
                name.removeprefix(OPTIMIZER_STATE): tensor.to(self.world.device, copy=True)
                if tensor.dim()
                else tensor.clone()
                for name, tensor in kept.items()
            }

    def _store_optimizer(self, context: ClientContext) -> None:
        if self.local.optimizer_state == "keep":
            for name, value in self.optimizer.state[self.parameter].items():
                if isinstance(value, Tensor):
                    context.store(OPTIMIZER_STATE + name, value)

    # ---- the initial loss, and errors ----

    @torch.no_grad()
    def mean_loss(self, server: ServerState, job: ClientJob) -> float:
        """Collective over the group. Return F_k(x), the server model's mean loss on the client's data."""
        self.flat.load(server.params, server.buffers, server.integer_buffers)
        self.flat.module.eval()
        pair = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for batch in self.loader.batches(
            job.indices, self.local.batch_size, client=job.client, shard=self.shard
        ):
            if batch.count:
                loss = self.task.loss(self.task.forward(self.flat.module, batch), batch.targets)
                pair += torch.stack([loss.double(), loss.new_tensor(batch.count)])
        loss_sum, count = self.world.group_sum(pair).tolist()
        return float(loss_sum / max(count, 1))

    @contextlib.contextmanager
    def name_client(self, job: ClientJob) -> Iterator[None]:
        """Name the client in any error of the block; running out of memory becomes one line."""
        what = "dispatch" if isinstance(self.algorithm, AsynchronousAlgorithm) else "round"
        where = f"{what} {job.round + 1}"
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                raise NoMemoryError(self._no_memory(job.client, where)) from error
            error.add_note(f"while training client {job.client} in {where}")
            raise

    def _no_memory(self, client: int, where: str) -> str:
        local = self.local
        device = "GPU" if self.world.device.type == "cuda" else "CPU"
        same = "" if self.has_batch_norm else " (the result stays the same)"
        fixes = [f"raise local.accumulate{same}"]
        if local.precision == "fp32":
            fixes.append("choose local.precision=bf16")
        fixes.append("raise topology.ranks_per_client, or lower local.batch_size")
        return (
            f"client {client}: out of {device} memory in {where} with local.batch_size={local.batch_size}, "
            f"topology.ranks_per_client={self.world.ranks_per_client} and "
            f"local.accumulate={local.accumulate}; {', '.join(fixes)}"
        )


def _mixed_precision(local: LocalConfig, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a maker of autocast contexts and one of gradient scalers (of None in fp32 and bf16)."""
    if local.precision == "fp32":
        return contextlib.nullcontext, lambda: None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[local.precision]
    autocast = partial(torch.autocast, device, dtype=dtype)
    if local.precision == "bf16":
        return autocast, lambda: None
    # A scaler per local training, which must not depend on the clients trained before; it starts lower
    # than torch's 2^16, at which a short training would lose its first steps to overflow.
    return autocast, lambda: torch.amp.GradScaler(device, init_scale=2.0**12)
