"""The local training of one client after another by CUDA graphs, with the results of `ClientTrainer`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fedddp.algorithms import ClientContext
from fedddp.data.loader import Batch, blank_batch
from fedddp.evaluation import is_out_of_memory
from fedddp.models.trace import UnsupportedModelError, first_line
from fedddp.models.traced import alike
from fedddp.rng import generators_kept, seed_global
from fedddp.training.client_trainer import ClientTrainer

WARM_UP = 3
"""Passes before one is recorded: in their first, libraries choose kernels and take memory."""

NO_CONTEXT: Any = None
"""Only a penalty takes the context of a client, and no algorithm with a penalty trains by graphs."""


class GraphTrainer(ClientTrainer):
    """Records the passes of a batch once for each number of images, and replays them.

    A replay is one launch instead of one for each kernel. Its kernels use the memory that they were recorded
    with: the model's flat vectors, the sum of the losses, and space for the images and targets of a batch.
    """

    def prepare(self) -> None:
        """Make space for a batch, and try a replay; all else is left as it was.

        Raises:
            UnsupportedModelError: the passes cannot be recorded, or a replay does something else.
        """
        blank, size = blank_batch(self.loader.images, self.world.device), self.local.batch_size
        assert isinstance(blank.targets, Tensor)
        self.images, self.targets = (t.new_zeros(size, *t.shape[1:]) for t in (blank.images, blank.targets))
        self.replays: dict[int, Callable[[], None]] = {}
        self.recorder = Recorder()
        generator = torch.Generator().manual_seed(0)
        count = min(2, size)
        images = torch.rand(count, *blank.images.shape[1:], generator=generator).to(self.world.device)
        batch = Batch(images, blank.targets[:count], count, count)
        training = self.flat.module.training
        with self._kept():
            self.flat.module.train()
            found = []
            try:
                for passes in (super()._gradient, self._gradient):
                    seed_global(0)
                    self.flat.grad.zero_()
                    self.loss_sum.zero_()
                    passes(NO_CONTEXT, batch, None)
                    found.append((self.flat.grad.clone(), self.loss_sum.clone()))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise UnsupportedModelError(f"its passes cannot be recorded ({first_line(error)})") from error
            finally:
                self.flat.module.train(training)
        if not all(alike(mine, other) for mine, other in zip(*reversed(found), strict=True)):
            raise UnsupportedModelError("a replay of its passes computes something else")

    def _gradient(self, context: ClientContext, batch: Batch, scaler: Any) -> None:
        """Add to `grad` the gradient of the mean loss over the batch."""
        assert isinstance(batch.targets, Tensor)
        count = batch.count
        self.images[:count].copy_(batch.images)
        self.targets[:count].copy_(batch.targets)
        if count not in self.replays:
            self.replays[count] = self._record(count)
        seen = self.loss_count + count
        self.replays[count]()
        self.loss_count = seen  # passes count themselves, replays do not

    def _record(self, count: int) -> Callable[[], None]:
        """Return what replays the passes of a batch of `count` images."""
        batch = Batch(self.images[:count], self.targets[:count], count, count)
        eager = super()._gradient
        with self._kept():
            return self.recorder.record(lambda: eager(NO_CONTEXT, batch, None))

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Put back all that passes change, after the block."""
        changed = (self.flat.grad, self.loss_sum, *self.flat.module.buffers())
        before, count = [tensor.clone() for tensor in changed], self.loss_count
        with generators_kept():
            yield
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        self.loss_count = count


class Recorder:
    """Records what launches kernels. Its graphs share their memory: only one of them runs at a time."""

    def __init__(self) -> None:
        # Graphs that share memory are recorded on one stream. It is not the default one: autograd would add
        # up gradients on that, which no graph can hold.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, passes: Callable[[], None]) -> Callable[[], None]:
        """Run `passes`, which only launch kernels, a few times; return what launches these again."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                passes()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": threads of NCCL and of pinned memory may ask the GPU for something meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            passes()
        return graph.replay
