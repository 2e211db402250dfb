"""The local training of several clients side by side on one rank, with the results of `ClientTrainer`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedddp.algorithms import Algorithm, ClientContext
from fedddp.algorithms.algorithm import ServerState
from fedddp.algorithms.local import LocalConfig
from fedddp.data.loader import Batch, ClientLoader, blank_batch
from fedddp.distributed.world import World
from fedddp.evaluation import NoMemoryError, is_out_of_memory
from fedddp.models.flat import FlatModel
from fedddp.models.stacked import Part, StackedModel, Step, rows_per_copy
from fedddp.tasks import Task
from fedddp.training.client_trainer import ClientJob, ClientResult, ClientTrainer


@dataclass
class _Training:
    """One client in training."""

    slot: int
    trainer: ClientTrainer
    context: ClientContext
    job: ClientJob
    batches: Iterator[Batch]
    generator: Tensor
    """State of torch's CPU generator, as the client's layers have left it; (n,) uint8, or empty."""


class StackedTrainer(ClientTrainer):
    """Trains up to `clients_at_once` clients in lockstep, each on its own copy of the model.

    The copies share one forward and one backward pass (`StackedModel`). All else happens per client, as in
    `ClientTrainer`: random streams, hooks of the algorithm, the optimizer. A client's bits depend neither on
    the other clients nor on their number.
    """

    def __init__(
        self,
        world: World,
        flat: FlatModel,
        task: Task,
        loader: ClientLoader,
        local: LocalConfig,
        algorithm: Algorithm,
        *,
        seed: int,
        clients_at_once: int,
    ) -> None:
        """Copy the model `clients_at_once` − 1 times.

        Raises:
            UnsupportedModelError: copies of the model cannot run side by side.
        """
        super().__init__(world, flat, task, loader, local, algorithm, seed=seed)
        self.clients_at_once = clients_at_once
        # Frozen parameters are shared: a checkpoint is restored into the first copy only.
        frozen = [p for p in flat.module.parameters() if not p.requires_grad]
        shared = [{id(p): p for p in frozen} for _ in range(clients_at_once - 1)]
        copies = [FlatModel(copy.deepcopy(flat.module, memo)) for memo in shared]
        others = [ClientTrainer(world, f, task, loader, local, algorithm, seed=seed) for f in copies]
        self.slots: list[ClientTrainer] = [self, *others]
        self.model = StackedModel([slot.flat.module for slot in self.slots])
        corrected = local.clip_norm is not None or reads_grad(type(algorithm))
        self.steps_in_backward = local.takes_plain_steps and not corrected
        """Whether a step needs nothing but the gradient, so that the backward pass can take it."""
        kind = type(task)
        self.losses_apart = definer(kind, "loss") is definer(kind, "losses")
        """Whether the task gives the loss of every example; one that overrides `loss` alone does not."""
        self.rows = rows_per_copy(local.batch_size)
        rows = clients_at_once * self.rows
        layout = torch.channels_last if local.channels_last is True else torch.contiguous_format
        self.images = torch.zeros(rows, *loader.images.shape).contiguous(memory_format=layout)
        blank = blank_batch(loader.images, world.device).targets
        assert isinstance(blank, Tensor)  # `engine.obstacle`
        self.targets = torch.zeros(rows, *blank.shape[1:], dtype=blank.dtype)
        self.real = torch.zeros(rows, dtype=torch.float64)
        """1 for a row that holds an example; (rows,)."""
        self.loss_sums = torch.zeros(clients_at_once, dtype=torch.float64)

    def train(
        self, server: ServerState, jobs: Sequence[ClientJob], states: Sequence[dict[str, Tensor]]
    ) -> Iterator[ClientResult]:
        """Train clients side by side, then yield each one's result."""
        with contextlib.ExitStack() as on_exit, self._name_clients(jobs):
            trainings = []
            for slot, (job, state) in enumerate(zip(jobs, states, strict=True)):
                context = self.slots[slot].context(server, job, state, on_exit)
                trainings.append(_Training(slot, self.slots[slot], context, job, iter(()), torch.empty(0)))
            for pass_index in range(self.algorithm.passes):
                for t in trainings:
                    t.context.pass_index = pass_index
                    self.algorithm.begin(t.context)
                self._lockstep(trainings)
            for t in trainings:
                yield t.trainer.result(t.context)

    def _lockstep(self, trainings: Sequence[_Training]) -> None:
        """The inner loop: every step of a pass of all clients; those that have finished wait."""
        for t in trainings:
            t.trainer.begin_pass(t.context)
            t.batches = t.trainer.batches(t.context, t.job.indices)
            if self.model.draws:
                seed = t.trainer.dropout_seed(t.context)
                t.generator = torch.Generator().manual_seed(seed).get_state()
        self.loss_sums.zero_()
        while pairs := [(t, batch) for t in trainings if (batch := next(t.batches, None)) is not None]:
            self._backward(pairs)
            for t, _ in pairs:
                if self.steps_in_backward:
                    t.context.steps += 1
                    t.context.lr_sum += t.context.lr
                else:
                    self.algorithm.correct(t.context)
                    t.trainer.step(t.context)
        for t in trainings:
            t.trainer.loss_sum.copy_(self.loss_sums[t.slot])
            t.trainer.end_pass(t.context)

    def _backward(self, pairs: Sequence[tuple[_Training, Batch]]) -> None:
        """Compute the gradients of one batch of each client; with plain SGD take the steps too."""
        rows = len(pairs) * self.rows
        images, targets, real = self.images[:rows], self.targets[:rows], self.real[:rows].zero_()
        parts = []
        for number, (t, batch) in enumerate(pairs):
            own = slice(number * self.rows, number * self.rows + batch.count)
            assert isinstance(batch.targets, Tensor)
            images[own], targets[own], real[own] = batch.images, batch.targets, 1
            parts.append(Part(t.slot, own.start, batch.count, self.rows, t.generator))
            t.trainer.loss_count += batch.count

        step = Step(pairs[0][0].context.lr, self.local.weight_decay) if self.steps_in_backward else None
        loss_sums = self._loss_sums(self.model(images, parts, step), targets, real, parts)
        objective = (loss_sums / torch.tensor([part.count for part in parts])).sum()
        objective.backward()  # type: ignore[no-untyped-call]
        self.model.finish(parts, step)
        self.loss_sums.index_add_(0, torch.tensor([part.copy for part in parts]), loss_sums.detach())
        for part, (t, _) in zip(parts, pairs, strict=True):
            t.generator = part.generator

    @contextlib.contextmanager
    def _name_clients(self, jobs: Sequence[ClientJob]) -> Iterator[None]:
        """Name the clients in any error of the block."""
        if len(jobs) == 1:
            with self.name_client(jobs[0]):
                yield
            return
        clients = ", ".join(str(job.client) for job in jobs)
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                raise NoMemoryError(
                    f"clients {clients}: out of memory in round {jobs[0].round + 1} with "
                    f"local.batch_size={self.local.batch_size} and {len(jobs)} clients side by side; "
                    "lower local.clients_at_once (the result stays the same)"
                ) from error
            error.add_note(f"while training clients {clients} in round {jobs[0].round + 1}")
            raise

    def _loss_sums(self, outputs: Tensor, targets: Tensor, real: Tensor, parts: Sequence[Part]) -> Tensor:
        """Return each part's summed loss; float64, (parts,). In float64 the order of a sum hardly matters."""
        if self.losses_apart:
            losses = self.task.losses(outputs, targets)
            assert losses is not None
            apart = torch.where(real > 0, losses.double(), 0.0)  # a row of padding may have an infinite loss
            return apart.view(len(parts), self.rows).sum(1)
        rows = [slice(part.start, part.start + part.count) for part in parts]
        return torch.stack([self.task.loss(outputs[own], targets[own]).double() for own in rows])


def reads_grad(algorithm: type[Algorithm]) -> bool:
    """Return whether a hook of the algorithm may use the gradient; see `Algorithm.reads_grad`."""
    hooks = {definer(algorithm, name) for name in ("begin", "correct", "finish")}
    return any(vars(owner).get("reads_grad", True) for owner in hooks)


def definer(cls: type, name: str) -> type:
    """Return the class, of `cls` and its bases, that defines the attribute `name`."""
    return next(base for base in cls.__mro__ if name in vars(base))
