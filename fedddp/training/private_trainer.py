"""DP-SGD: the local training of a client whose examples are protected one by one (`privacy=ExampleDP`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedddp.algorithms import ClientContext
from fedddp.data.loader import Batch, blank_batch
from fedddp.data.poisson import poisson_batches
from fedddp.models.flat import tensors_kept
from fedddp.models.trace import first_line
from fedddp.privacy.config import ExampleDP
from fedddp.privacy.example import add_clipped, step_noise
from fedddp.privacy.noise import UNIT, secret_seed
from fedddp.rng import DROPOUT, drawing_from, stream, stream_seed
from fedddp.training.client_trainer import ClientTrainer, Parts
from fedddp.training.replica import in_float32

logger = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 2**20
"""Gradients of single examples that are held at once, in bytes; `local.accumulate` makes it fewer."""


MOST_LOSS = 1e4
"""Loss of an example, at most, in the sum that is recorded."""


class PrivateTrainer(ClientTrainer):
    """Trains with Poisson batches, clipped gradients of single examples, and noise; all else is its parent's.

    A client's examples enter its training by `_gradient` alone, and all later steps work on the noisy sum.
    """

    def __init__(self, parts: Parts, privacy: ExampleDP) -> None:
        """Find out how to compute the gradients of single examples."""
        super().__init__(parts)
        self.privacy = privacy
        self.noise_multiplier = privacy.noise_multiplier
        """z; where it follows from `target_epsilon`, `training.protect` puts it in before the first round."""
        self.pass_seed = parts.seed
        """Names the streams of a pass: the run's seed, or a secret one."""
        self.buffers_before: list[Tensor] = []
        self.total = torch.zeros_like(parts.flat.params, dtype=torch.int64)
        per_example = 3 * parts.flat.params.nbytes
        bound = -(-parts.local.batch_size // (parts.world.ranks_per_client * parts.local.accumulate))
        self.chunk = max(1, min(bound, CHUNK_BYTES // per_example))
        """Examples whose gradients are computed at once."""
        self.side_by_side = self._can_map()

    def _replica(self) -> nn.Module:
        return self.flat.module  # its gradients are summed here, and not by DDP

    # ---- randomness ----

    def begin_pass(self, context: ClientContext) -> None:
        """Draw the secret of a pass, if noise is secret: who is in a batch, and what is dropped, is too."""
        super().begin_pass(context)
        self.buffers_before = [buffer.clone() for buffer in self.flat.module.buffers()]
        self.pass_seed = self.seed
        if self.privacy.noise == "secret":
            drawn = torch.tensor([secret_seed()], device=self.world.device)
            self.world.group_broadcast(drawn)
            self.pass_seed = int(drawn)

    def end_pass(self, context: ClientContext) -> None:
        """End a pass as the parent does.

        Raises:
            ValueError: a buffer changed, in which examples would leave the client without noise.
        """
        for (name, buffer), before in zip(self.flat.module.named_buffers(), self.buffers_before, strict=True):
            if not torch.equal(buffer, before):
                raise ValueError(
                    f"privacy: the buffer {name!r} changes in training, and would carry examples past the "
                    "clipping and the noise; use a model whose buffers are constants"
                )
        super().end_pass(context)

    def _name(self, purpose: str, context: ClientContext, number: int) -> tuple[int | str, ...]:
        return purpose, self.pass_seed, context.round, context.client, context.pass_index, number

    def dropout_seed(self, context: ClientContext) -> int:
        """Return the seed of the global generators: masks that are known would not hide an example."""
        return stream_seed(*self._name(DROPOUT, context, self.world.data_rank))

    # ---- batches and gradients ----

    def batches(self, context: ClientContext, indices: NDArray[np.int64]) -> Iterator[Batch]:
        """Yield this rank's share of every Poisson batch of a pass; the batches do not depend on R."""
        size, examples = self.local.batch_size, len(indices)
        left, epoch = self.local.steps_on(examples), 0
        while left:
            steps = min(left, -(-examples // size))
            yield from poisson_batches(
                *(self.loader, indices, min(1.0, size / examples), steps),
                client=context.client,
                rng=stream(*self._name("poisson batches", context, epoch)),
                shard=self.shard,
            )
            left, epoch = left - steps, epoch + 1

    def _gradient(self, context: ClientContext, batch: Batch, scaler: Any) -> None:
        """Set `grad` to the noisy sum of the clipped gradients of a batch, over the fixed batch size."""
        assert self.noise_multiplier is not None
        self.total.zero_()
        for start in range(0, batch.count, self.chunk):
            own = slice(start, min(start + self.chunk, batch.count))
            part = Batch(batch.images[own], batch.targets[own], own.stop - start, batch.total)
            losses, rows = self.example_gradients(part)
            add_clipped(self.total, rows, self.privacy.clip)
            # The loss of one example must not decide about the update, which is refused where the sum is
            # no number, or too large for masks.
            self.loss_sum += losses.double().nan_to_num(0.0, 0.0, 0.0).clamp(-MOST_LOSS, MOST_LOSS).sum()
            self.loss_count += part.count
        if self.world.data_rank == 0:  # once for the group
            name = self._name("example noise", context, context.steps)
            noise = step_noise(self.privacy, self.noise_multiplier, len(self.total), name)
            self.total.add_(noise.to(self.total.device))
        summed = self.world.group_sum(self.total)
        context.grad.copy_(summed.double() * (UNIT / self.local.batch_size))

    def example_gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of every example of a batch, (b,), and its gradient, (b, P); b >= 1."""
        if not self.side_by_side:
            return self._one_by_one(batch)
        assert isinstance(batch.targets, Tensor)
        named = self.flat.named(self.flat.params, self.flat.buffers)
        trained = {name: value for name, value in named.items() if name in self.flat.slices}
        mapped = vmap(grad_and_value(self._loss), in_dims=(None, 0, 0), randomness="different")
        gradients, losses = mapped(trained, batch.images, batch.targets)
        return losses, self.flat.rows(gradients)

    def _loss(self, trained: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        """Return the loss of one example."""
        call = partial(functional_call, self.flat.module, trained)
        batch = Batch(image[None], target[None], 1, 1)
        with self.autocast():
            outputs = self.task.forward(call, batch)
            return self.task.loss(in_float32(outputs), batch.targets)

    def _one_by_one(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what `example_gradients` returns, by one backward pass per example."""
        named = dict(self.flat.module.named_parameters())
        trained = {name: named[name] for name in self.flat.slices}
        losses, rows = [], []
        for i in range(batch.count):
            one = Batch(batch.images[i : i + 1], batch.targets[i : i + 1], 1, 1)
            with self.autocast():
                outputs = self.task.forward(self.flat.module, one)
                loss = self.task.loss(in_float32(outputs), one.targets)
            found = torch.autograd.grad(
                loss, list(trained.values()), allow_unused=True, materialize_grads=True
            )
            rows.append(self.flat.rows({n: g[None] for n, g in zip(trained, found, strict=True)}))
            losses.append(loss.detach())
        return torch.stack(losses), torch.cat(rows)

    def _can_map(self) -> bool:
        """Return whether `vmap` can take the gradients of many examples at once; tries it on blank ones."""
        batch = blank_batch(self.loader.images, self.world.device)
        if not isinstance(batch.targets, Tensor):
            return False
        module = self.flat.module.train()
        self.side_by_side = True
        try:
            with drawing_from("trial", 0), tensors_kept(module.buffers()):
                self.example_gradients(batch)
        except Exception as error:  # of many kinds; one by one, what is wrong with a model is raised again
            logger.info("examples are taken one by one, as vmap cannot train this (%s)", first_line(error))
            return False
        return True
