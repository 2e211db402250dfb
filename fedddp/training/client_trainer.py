"""One visit: the local training of one client on its group. Its body holds the one inner loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedddp.algorithms.algorithm import Contribution, Method, Server, Visit
from fedddp.algorithms.local import Local
from fedddp.data.loader import Batch, Feed
from fedddp.distributed.world import World
from fedddp.models.flat import FlatModel, norm
from fedddp.rng import stream, stream_seed
from fedddp.tasks.task import Task

OPTIMIZER_STATE = "optimizer."


class NoMemoryError(ValueError):
    """A client's batch does not fit into memory: one line that says what to set."""


@dataclass(frozen=True)
class Result:
    """What a visit leaves behind on each rank of the group."""

    contribution: Contribution
    buffers: Tensor
    """The client's float buffers, combined over the group; (B,)."""
    counters: Tensor
    loss: Tensor
    """[sum, count] of the training loss over the visit; float64, shape (2,), the same on all ranks."""
    steps: int


class Trainer:
    """Trains one client after another on this rank's group; holds what stays between visits."""

    def __init__(
        self, world: World, flat: FlatModel, task: Task, feed: Feed, local: Local, method: Method
    ) -> None:
        """Collective over the group: wraps the model in DDP."""
        self.world, self.flat, self.task, self.feed = world, flat, task, feed
        self.local, self.method = local, method
        self.replica = self._replicate()
        parameter = nn.Parameter(flat.params)
        parameter.grad = flat.grad
        self.optimizer = local.make_optimizer(parameter)
        self.parameter = parameter
        self.autocast, self.make_scaler = _mixed_precision(local, world.device.type)
        modules = list(flat.module.modules())
        self.idle_aware = [m for m in modules if hasattr(m, "idle")]
        self.own_buffers = [b for m in modules if not hasattr(m, "idle") for b in m.buffers(recurse=False)]
        self.loss_sum = torch.zeros(1, dtype=torch.float64, device=world.device)
        self.loss_count = 0

    def visit(
        self,
        server: Server,
        *,
        client: int,
        round_index: int,
        indices: NDArray[np.int64],
        examples_in_cohort: int,
        cohort_size: int,
        lr: float,
        state: dict[str, Tensor],
        seed: int,
    ) -> Result:
        """Collective over the group. Train `client` from the server's model; `state` is changed in place."""
        world, flat = self.world, self.flat
        visit = Visit(
            client=client,
            round=round_index,
            examples=len(indices),
            weight=len(indices) / examples_in_cohort if examples_in_cohort else 0.0,
            share=1 / cohort_size,
            flat=flat,
            start=server.params,
            start_buffers=server.buffers,
            start_counters=server.counters,
            sent=server.vectors,
            state=state,
            local=self.local,
            lr=lr,
            train=lambda correct: self._train(visit, indices, correct, seed),
            mean_loss=lambda: self._mean_loss(indices, client),
        )
        with self._telling(visit):
            visit.restart()
            self.method.begin(visit)
            self.method.run(visit)
            contribution = self.method.finish(visit)
        count = torch.full_like(self.loss_sum, self.loss_count)
        loss = world.group_sum(torch.cat([self.loss_sum, count])).cpu()
        return Result(contribution, flat.buffers, flat.counters, loss, visit.steps)

    @contextlib.contextmanager
    def _telling(self, visit: Visit) -> Iterator[None]:
        """Name the client in any error of the block; running out of memory becomes one line."""
        try:
            yield
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise NoMemoryError(self._advise(visit)) from error
            error.add_note(f"while training client {visit.client} in {self._when(visit)}")
            raise

    def _when(self, visit: Visit) -> str:
        """Say which round this is, or which visit of an asynchronous run, as a reader counts them."""
        return f"{'visit' if self.method.asynchronous else 'round'} {visit.round + 1}"

    def _advise(self, visit: Visit) -> str:
        local, ranks = self.local, self.world.ranks_per_client
        device = "GPU" if self.world.device.type == "cuda" else "CPU"
        more = "" if local.precision != "fp32" else ", choose local.precision=bf16"
        return (
            f"client {visit.client}: out of {device} memory in {self._when(visit)} with "
            f"local.batch_size={local.batch_size} over {ranks} rank{'s'[: ranks > 1]} and local.accumulate="
            f"{local.accumulate}; raise local.accumulate (the result stays the same){more}, raise "
            "topology.ranks_per_client, or lower local.batch_size"
        )

    def _train(
        self,
        visit: Visit,
        indices: NDArray[np.int64],
        correct: Callable[[Visit], None],
        seed: int,
    ) -> None:
        """The inner loop: every step of a client's local training, for every method."""
        self._seed_dropout(stream_seed("visit", seed, visit.round, visit.client, self.world.data_rank))
        self.flat.module.train()
        self._load_optimizer(visit)
        scaler = self.make_scaler()
        visit.steps, visit.lr_sum = 0, 0.0
        self.loss_sum.zero_()
        self.loss_count = 0
        for batch in self._batches(visit, indices, seed):
            visit.grad.zero_()
            self._gradient(visit, batch, scaler)
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            correct(visit)
            if self.local.clip_norm is not None:
                visit.grad.mul_(torch.clamp(self.local.clip_norm / norm(visit.grad), max=1.0))
            if self._step(scaler):
                visit.steps += 1
                visit.lr_sum += visit.lr
        self._merge_buffers(self.loss_count)
        self._save_optimizer(visit)

    def _seed_dropout(self, seed: int) -> None:
        """Make torch's global generators, which dropout draws from, the visit's own.

        Not by `torch.manual_seed`: without a GPU it keeps a stack trace of every call, for good.
        """
        torch.default_generator.manual_seed(seed)
        if self.world.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _batches(self, visit: Visit, indices: NDArray[np.int64], seed: int) -> Iterator[Batch]:
        """Yield this rank's share of every batch of the visit; the batches do not depend on R."""
        local, steps, epoch = self.local, 0, 0
        share = (self.world.data_rank, self.world.ranks_per_client)
        while len(indices) and (epoch < local.epochs if local.steps is None else steps < local.steps):
            order = stream("batches", seed, visit.round, visit.client, epoch)
            for batch in self.feed.batches(
                indices, local.batch_size, client=visit.client, order=order, share=share, train=True
            ):
                if local.steps is not None and steps == local.steps:
                    return
                yield batch
                steps += 1
            epoch += 1

    def _gradient(self, visit: Visit, batch: Batch, scaler: Any) -> None:
        """Add to `grad` the gradient of the mean loss over the whole batch, reduced over the group."""
        # DDP divides by R and the loss is summed, so this makes the result the mean over the batch.
        rank, ranks = self.world.data_rank, self.world.ranks_per_client
        pieces = list(_pieces(batch, self.local.accumulate, rank, ranks))
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1
            idle = self._idle() if piece.count == 0 else contextlib.nullcontext()
            with contextlib.nullcontext() if last else self._no_sync(), idle:
                with self.autocast():
                    images = piece.images
                    if self.local.channels_last:
                        images = images.contiguous(memory_format=torch.channels_last)
                    outputs = self.replica(images)
                    loss = self.task.loss(outputs.float(), piece.targets)
                    penalty = self.method.penalty(visit, piece, outputs)
                objective = (loss if penalty is None else loss + penalty) * (
                    ranks / batch.total if piece.count else 0.0
                )
                (objective if scaler is None else scaler.scale(objective)).backward()
            if piece.count:
                self.loss_sum += loss.detach()
                self.loss_count += piece.count

    @contextlib.contextmanager
    def _idle(self) -> Iterator[None]:
        """Let this rank take part with a stand-in example that leaves no trace in the model's buffers."""
        before = [buffer.clone() for buffer in self.own_buffers]
        for module in self.idle_aware:
            setattr(module, "idle", True)  # noqa: B010 - modules type their attributes as tensors
        yield
        for module in self.idle_aware:
            setattr(module, "idle", False)  # noqa: B010
        for buffer, value in zip(self.own_buffers, before, strict=True):
            buffer.copy_(value)

    def _step(self, scaler: Any) -> bool:
        """Step the optimizer; return False when fp16 overflowed, which skips the step on all ranks."""
        if scaler is None:
            self.optimizer.step()
            return True
        before = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        return bool(scaler.get_scale() >= before)

    def _replicate(self) -> nn.Module:
        """Collective over the group. Wrap the model in DDP, and let it settle before a client trains.

        DDP orders its buckets anew after its first backward pass, and a sum over three ranks or more
        can depend on that order: a resumed run would differ from one that was never stopped.
        """
        if self.world.ranks_per_client == 1 or self.world.group is None:
            return self.flat.module
        module = self.flat.module.eval()
        images = torch.zeros(2, *self.feed.images.shape, device=self.world.device)
        trained = [p for p in module.parameters() if p.requires_grad]
        grads = torch.autograd.grad(module(images).sum(), trained, allow_unused=True)
        replica = self.world.replicate(module, some_unused=any(grad is None for grad in grads))
        for _ in range(2):
            (replica(images).sum() * 0).backward()
        return replica

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        no_sync = getattr(self.replica, "no_sync", None)
        return no_sync() if no_sync else contextlib.nullcontext()

    def _merge_buffers(self, seen: int) -> None:
        """Collective over the group. Average float buffers by examples seen; integer ones by maximum."""
        if self.world.ranks_per_client == 1:
            return
        count = torch.tensor([float(seen)], dtype=torch.float64, device=self.world.device)
        summed = self.world.group_sum(torch.cat([self.flat.buffers.double() * count, count]))
        if summed[-1] > 0:
            self.flat.buffers.copy_(summed[:-1] / summed[-1])
        if self.flat.counters.numel():
            self.world.group_max(self.flat.counters)

    def _load_optimizer(self, visit: Visit) -> None:
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = visit.lr
        kept = {n: t for n, t in visit.state.items() if n.startswith(OPTIMIZER_STATE)}
        if kept:
            self.optimizer.state[self.parameter] = {
                name.removeprefix(OPTIMIZER_STATE): tensor.to(self.world.device, copy=True)
                if tensor.dim()
                else tensor.clone()
                for name, tensor in kept.items()
            }

    def _save_optimizer(self, visit: Visit) -> None:
        if self.local.optimizer_state == "keep":
            for name, value in self.optimizer.state[self.parameter].items():
                if isinstance(value, Tensor):
                    visit.remember(OPTIMIZER_STATE + name, value)

    @torch.no_grad()
    def _mean_loss(self, indices: NDArray[np.int64], client: int) -> float:
        self.flat.module.eval()
        share = (self.world.data_rank, self.world.ranks_per_client)
        pair = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for batch in self.feed.batches(indices, self.local.batch_size, client=client, share=share):
            if batch.count:
                loss = self.task.loss(self.flat.module(batch.images), batch.targets)
                pair += torch.stack([loss.double(), loss.new_tensor(batch.count)])
        loss_sum, count = self.world.group_sum(pair).tolist()
        return float(loss_sum / max(count, 1))


def _pieces(batch: Batch, pieces: int, rank: int, ranks: int) -> Iterator[Batch]:
    """Yield this rank's part of every micro-batch; the micro-batches do not depend on the number of ranks.

    A rank without an example in one gets the first of its batch as a stand-in, with a count of 0.
    """
    pieces = min(pieces, batch.total)
    if pieces == 1:
        yield batch
        return
    for piece in range(pieces):
        first, end = (-((rank - batch.total * k // pieces) // ranks) for k in (piece, piece + 1))
        count = end - first if batch.count else 0
        own = slice(first, end) if count else slice(1)
        yield Batch(batch.images[own], batch.targets[own], count, batch.total)


def _mixed_precision(local: Local, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a maker of autocast contexts and one of gradient scalers (of None in fp32 and bf16)."""
    if local.precision == "fp32":
        return contextlib.nullcontext, lambda: None
    kind = torch.bfloat16 if local.precision == "bf16" else torch.float16
    autocast = partial(torch.autocast, device, dtype=kind)
    if local.precision == "bf16":
        return autocast, lambda: None
    # A scaler per visit, which must not depend on what the group trained before; it starts lower than
    # torch's 2^16, at which a short visit would lose its first steps to overflow.
    return autocast, lambda: torch.amp.GradScaler(device, init_scale=2.0**12)
