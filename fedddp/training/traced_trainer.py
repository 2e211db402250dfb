"""The local training of one client after another by a traced model, with the results of `ClientTrainer`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fedddp.algorithms import Algorithm, ClientContext
from fedddp.algorithms.local import LocalConfig
from fedddp.models.traced import Step, TracedModel
from fedddp.rng import seed_global
from fedddp.training.client_trainer import ClientTrainer, Parts


class TracedTrainer(ClientTrainer):
    """Runs forward and backward pass by `TracedModel`; all else happens as in `ClientTrainer`."""

    def __init__(self, parts: Parts, model: TracedModel) -> None:
        """Take the passes of the module in `parts`."""
        super().__init__(parts)
        self.model = model
        self.steps_in_backward = not needs_gradients(parts.local, parts.algorithm)
        if self.steps_in_backward:
            parts.flat.drop_gradients()
            self.parameter.grad = None

    @torch.no_grad()
    def _local_sgd(self, context: ClientContext, indices: NDArray[np.int64]) -> None:
        """The inner loop: every step of a pass of local training, for every algorithm."""
        self.begin_pass(context)
        if self.model.draws:
            seed_global(self.dropout_seed(context))
        lr, keep = context.lr, 1 - context.lr * self.local.weight_decay
        loss_sum = 0.0  # as a number of Python's: an operation less per step
        for batch in self.batches(context, indices):
            outputs = self.task.forward(self.model.forward, self._laid_out(batch))
            loss, gradient = self.task.loss_and_gradient(outputs, batch.targets)
            loss_sum += float(loss)
            self.loss_count += batch.count
            if self.steps_in_backward:
                self.model.backward(gradient, Step(lr / batch.count, keep))
                context.steps += 1
                context.lr_sum += lr
            else:
                self.model.backward(gradient / batch.count, None)
                self.algorithm.correct(context)
                self.step(context)
        self.loss_sum.fill_(loss_sum)
        self.end_pass(context)


def needs_gradients(local: LocalConfig, algorithm: Algorithm) -> bool:
    """Return whether something between backward pass and step takes the gradient, or the step more than it.

    Else the backward pass takes the step, and no gradient is held.
    """
    return not local.takes_plain_steps or local.clip_norm is not None or reads_grad(type(algorithm))


def reads_grad(algorithm: type[Algorithm]) -> bool:
    """Return whether a hook of the algorithm may use the gradient; see `Algorithm.reads_grad`."""
    hooks = {definer(algorithm, name) for name in ("begin", "correct", "finish")}
    return any(vars(owner).get("reads_grad", True) for owner in hooks)


def definer(cls: type, name: str) -> type:
    """Return the class, of `cls` and its bases, that defines the attribute `name`."""
    return next(base for base in cls.__mro__ if name in vars(base))
