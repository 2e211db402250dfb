"""The local training of one client after another by a CUDA graph, with the results of `ClientTrainer`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedddp.algorithms import ClientContext
from fedddp.data.loader import Batch, blank_batch
from fedddp.evaluation import is_out_of_memory
from fedddp.models.flat import tensors_kept
from fedddp.models.trace import UnsupportedModelError, first_line
from fedddp.models.traced import alike
from fedddp.rng import generators_kept
from fedddp.training.client_trainer import ClientTrainer, Parts

WARM_UP = 3
"""Passes before one is recorded: in their first, libraries choose kernels and take memory."""

TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
"""Of a trial, by `local.precision`: recorded kernels may add up in another order."""

NO_CONTEXT: Any = None
"""Only a penalty takes the context of a client, and no algorithm with a penalty trains by graphs."""


class GraphTrainer(ClientTrainer):
    """Replays the passes of every whole batch from one CUDA graph; a smaller batch takes the eager passes.

    A replay is one launch instead of one for each kernel. Its kernels use the memory that they were recorded
    with: the model's flat vectors, the sum of the losses, and `held`.
    """

    def __init__(self, parts: Parts) -> None:
        """Try a replay of two images.

        Raises:
            UnsupportedModelError: the passes cannot be recorded, or a replay does something else.
        """
        super().__init__(parts)
        self.held: tuple[Tensor, ...] = ()
        """The images and targets that the graph reads, from the first whole batch on."""
        self.replay: Callable[[], None] = lambda: None
        blank = blank_batch(self.loader.images, self.world.device)
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(*blank.images.shape, generator=generator).to(self.world.device)
        trial, module = replace(blank, images=images), self.flat.module
        training = module.training
        module.train()
        try:
            expected = self._results(lambda: super(GraphTrainer, self)._gradient(NO_CONTEXT, trial, None))
            found = self._results(self._recorded(trial))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # Where recording fails, torch ends it, which fails too.
            reason = first_line(error.__context__ or error)
            raise UnsupportedModelError(f"its passes cannot be recorded ({reason})") from error
        finally:
            module.train(training)
        tolerance = TOLERANCE[self.local.precision]
        if not all(alike(*pair, tolerance) for pair in zip(found, expected, strict=True)):
            raise UnsupportedModelError("a replay of its passes computes something else")

    def _gradient(self, context: ClientContext, batch: Batch, scaler: Any) -> None:
        """Add to `grad` the gradient of the mean loss over the batch."""
        if batch.count < self.local.batch_size:
            super()._gradient(context, batch, scaler)
            return
        assert isinstance(batch.targets, Tensor)
        if not self.held:
            self.held = batch.images.clone(), batch.targets.clone()
            self.replay = self._recorded(Batch(*self.held, batch.count, batch.total))
        for memory, given in zip(self.held, (batch.images, batch.targets), strict=True):
            memory.copy_(given)
        self.replay()

    def _recorded(self, batch: Batch) -> Callable[[], None]:
        """Return what replays the passes of `batch`; they read what its tensors hold by then."""
        eager = super()._gradient
        with self._kept():
            return record(lambda: eager(NO_CONTEXT, batch, None))

    def _results(self, passes: Callable[[], None]) -> list[Tensor]:
        """Return what two passes, from the state of now, add up and leave in the buffers; all is put back."""
        with self._kept():
            for _ in range(2):
                passes()
            return [tensor.clone() for tensor in self._changed()]

    def _changed(self) -> list[Tensor]:
        """Return all that passes change."""
        return [self.flat.grad, self.loss_sum, *self.flat.module.buffers()]

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Put back all that passes change, after the block."""
        with generators_kept(), tensors_kept(self._changed()):
            yield


def record(passes: Callable[[], None]) -> Callable[[], None]:
    """Run `passes`, which only launch kernels, a few times; return what launches these again."""
    # Not on the default stream, which cannot be recorded: autograd adds up gradients on the stream on which
    # a parameter was first used, in the oldest pass that is still held; here it is this one.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            passes()
        graph = torch.cuda.CUDAGraph()
        # "thread_local": threads of NCCL and of pinned memory may ask the GPU for something meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            passes()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay
