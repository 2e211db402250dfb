"""Clients side by side: the same as one by one, whatever their number, and refused where that cannot be."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedddp.algorithms import (
    SCAFFOLD,
    Algorithm,
    AsyncSGD,
    ClientContext,
    ClientUpdate,
    Ditto,
    FedAvg,
    FedBN,
    FedProx,
    QFedAvg,
    ServerState,
)
from fedddp.algorithms.local import LocalConfig
from fedddp.data.datasets import DataConfig, Images
from fedddp.data.loader import ClientLoader
from fedddp.distributed.launch import connect
from fedddp.distributed.topology import TopologyConfig
from fedddp.distributed.world import World
from fedddp.evaluation import NoMemoryError
from fedddp.models.flat import FlatModel
from fedddp.models.trace import UnsupportedModelError
from fedddp.tasks import Classification
from fedddp.training.client_trainer import ClientJob, ClientTrainer
from fedddp.training.stacked_trainer import StackedTrainer, reads_grad

SIZES = (11, 0, 24, 5, 16)
"""Examples of each client: batches of 8 are uneven, and so are the numbers of steps."""
LOCAL = LocalConfig(batch_size=8, epochs=2, lr=0.1)
MOMENTUM = dataclasses.replace(LOCAL, momentum=0.9)


class Block(nn.Module):
    """A residual block, as a user writes one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class Viewing(nn.Module):
    """A network that flattens as many tutorials do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.view(x.size(0), -1))  # type: ignore[no-any-return]


def frozen_head() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 9), nn.ReLU(), nn.Linear(9, 4))
    model[3].requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 13), nn.ReLU(), nn.Linear(13, 4, bias=False)),
    "convolutions": lambda: nn.Sequential(
        *(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 2, groups=2)),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6, 4)),
    ),
    "same padding": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3, padding="same"), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4)
    ),
    "group norm": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    ),
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
    ),
    "dropout": lambda: nn.Sequential(
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(36, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 4))
    ),
    "gelu and layer norm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(36, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 4)
    ),
    "view": Viewing,
    "frozen": frozen_head,
}


def images() -> Images:
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (60, 1, 6, 6), dtype=np.uint8))
    return Images(rng.integers(0, 4, 60), 4, (1, 6, 6), pixels, None, None, (0.4,), (0.3,))


@pytest.fixture
def world() -> Iterator[World]:
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        yield world


def trained(
    world: World,
    model: Callable[[], nn.Module],
    at_once: int | None,
    *,
    local: LocalConfig = LOCAL,
    algorithm: Algorithm | None = None,
    clients: tuple[int, ...] = (0, 1, 2, 3, 4),
    task: Classification | None = None,
    data: DataConfig | None = None,
) -> dict[int, list[Tensor]]:
    """Train two rounds, `at_once` clients side by side (None: one by one); return all results by client."""
    torch.manual_seed(0)
    algorithm = algorithm or FedAvg()
    flat = FlatModel(model())
    loader = ClientLoader(images(), data or DataConfig(), world.device, seed=3)
    parts = (world, flat, task or Classification(), loader, local, algorithm)
    trainer = ClientTrainer(*parts, seed=3)
    if at_once is not None:
        trainer = StackedTrainer(*parts, seed=3, clients_at_once=at_once)
    server, starts = ServerState.of(flat, 5), np.cumsum((0, *SIZES))
    algorithm.start(server)
    states: dict[int, dict[str, Tensor]] = {client: {} for client in clients}
    results: dict[int, list[Tensor]] = {client: [] for client in clients}
    for number in range(2):
        for first in range(0, len(clients), trainer.clients_at_once):
            chunk = clients[first : first + trainer.clients_at_once]
            jobs = [
                ClientJob(
                    client=client,
                    round=number,
                    indices=np.arange(starts[client], starts[client + 1]),
                    weight=0.2,
                    share=0.2,
                    lr=local.lr,
                    initial_loss=1.5,
                    largest_initial_loss=2.0,
                )
                for client in chunk
            ]
            own = [states[client] for client in chunk]
            for client, result in zip(chunk, trainer.train(server, jobs, own), strict=True):
                vectors = [v.clone() for v in result.update.vectors.values()]
                numbers = [*result.loss, torch.tensor(result.steps), torch.tensor(result.update.weight)]
                buffers = [result.buffers.clone(), result.integer_buffers.clone()]
                results[client] += [*vectors, *numbers, *buffers]
    for client, state in states.items():
        results[client] += [state[name] for name in sorted(state)]
    return results


def assert_equal(one: dict[int, list[Tensor]], two: dict[int, list[Tensor]]) -> None:
    for client in one.keys() & two.keys():
        assert len(one[client]) == len(two[client])
        assert all(torch.equal(a, b) for a, b in zip(one[client], two[client], strict=True)), client


def assert_close(one: dict[int, list[Tensor]], two: dict[int, list[Tensor]]) -> None:
    for client, results in two.items():
        for found, expected in zip(one[client], results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("local", [LOCAL, MOMENTUM], ids=["sgd", "momentum"])
def test_side_by_side_clients_train_as_one_by_one(world: World, name: str, local: LocalConfig) -> None:
    alone, together = (trained(world, MODELS[name], k, local=local) for k in (None, 5))
    assert_close(together, alone)
    assert not torch.equal(alone[0][0], alone[2][0])


@pytest.mark.parametrize("name", MODELS)
def test_bits_of_a_client_do_not_depend_on_the_others(world: World, name: str) -> None:
    all_five = trained(world, MODELS[name], 5)
    for at_once, clients in [(1, (0, 1, 2, 3, 4)), (2, (4, 3, 2, 1, 0)), (3, (2, 4)), (4, (3, 0, 2, 1))]:
        assert_equal(trained(world, MODELS[name], at_once, clients=clients), all_five)


ALGORITHMS: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "FedProx": (FedProx(mu=0.3), {}),
    "SCAFFOLD": (SCAFFOLD(), {}),
    "Ditto": (Ditto(lam=0.2), {}),
    "FedBN": (FedBN(), {"weight_decay": 0.05}),
    "QFedAvg": (QFedAvg(q=0.5), {}),
    "AsyncSGD": (AsyncSGD(), {"steps": 1}),
    "weight decay": (FedAvg(), {"weight_decay": 0.05}),
    "clipped": (FedAvg(), {"clip_norm": 0.05}),
    "adam, kept": (FedAvg(), {"optimizer": "adam", "lr": 0.01, "optimizer_state": "keep"}),
    "adamw": (FedAvg(), {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}),
    "channels last": (FedAvg(), {"channels_last": True}),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_kind_of_algorithm_and_step_is_the_same_side_by_side(world: World, name: str) -> None:
    algorithm, settings = ALGORITHMS[name]

    def model() -> nn.Module:
        layout = torch.channels_last if name == "channels last" else torch.contiguous_format
        return MODELS["batch norm"]().to(memory_format=layout)

    options: dict[str, Any] = {"local": dataclasses.replace(LOCAL, **settings), "algorithm": algorithm}
    alone, together = (trained(world, model, k, **options) for k in (None, 5))
    assert_close(together, alone)
    assert_equal(trained(world, model, 2, **options), together)


def test_augmentation_and_label_smoothing_are_the_same_side_by_side(world: World) -> None:
    options: dict[str, Any] = {
        "task": Classification(label_smoothing=0.1),
        "data": DataConfig(augment="crop-flip"),
        "local": MOMENTUM,
    }
    alone, together = (trained(world, MODELS["convolutions"], k, **options) for k in (None, 5))
    assert_close(together, alone)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squared(Classification):
    """A task of a user that overrides the loss alone."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - nn.functional.one_hot(targets, 4)).square().sum()


def test_a_loss_that_is_not_given_by_example_is_computed_for_each_client(world: World) -> None:
    alone, together = (trained(world, MODELS["mlp"], k, local=MOMENTUM, task=Squared()) for k in (None, 5))
    assert_close(together, alone)


# ---- what cannot be trained side by side ----


class Drawing(Viewing):
    """Skips its layer at random."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if random.random() < 0.5 else x)


class Counting(Viewing):
    """Counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Branching(Viewing):
    """Looks at its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Mixing(Viewing):
    """Couples the examples of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Joining(Viewing):
    """Turns the batch into rows of another number."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.view(-1, 18).view(-1, 36))  # type: ignore[no-any-return]


class Scaled(Viewing):
    """Has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale


class Twice(nn.Module):
    """Uses a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = nn.Linear(36, 36), nn.Linear(36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(self.inner(x.flatten(1))))  # type: ignore[no-any-return]


class Unused(Viewing):
    """Has a layer that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Drawing, "draws at random, or counts, outside of layers"),
        (Counting, "draws at random, or counts, outside of layers"),
        (Branching, r"cannot be traced \(symbolically traced variables cannot be used"),
        (Mixing, "calls 'mean'"),
        (Joining, "the result of 'view' has other rows than the batch"),
        (Scaled, "uses 'scale' outside of a layer"),
        (Twice, "two calls of layers share a parameter"),
        (Unused, "does not use all parameters"),
    ],
)
def test_a_model_whose_copies_cannot_run_side_by_side_is_refused_with_the_reason(
    world: World, model: type[nn.Module], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        trained(world, model, 2)


class ReadsGradient(FedAvg):
    """Sends the last gradient."""

    def finish(self, context: ClientContext) -> ClientUpdate:
        return ClientUpdate({"update": context.grad.clone()}, self.weight(context))


class Renamed(ReadsGradient):
    """Inherits a hook that uses the gradient."""


class Declared(FedAvg):
    """Declares that its hook does not use it."""

    reads_grad = False

    def finish(self, context: ClientContext) -> ClientUpdate:
        return ClientUpdate({"update": context.update * 2}, self.weight(context))


class Redefined(Declared):
    """Overrides the hook of a class that declared it."""

    def finish(self, context: ClientContext) -> ClientUpdate:
        return ClientUpdate({"update": context.grad * 2}, self.weight(context))


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        *((FedAvg, False), (QFedAvg, False), (FedBN, False), (Declared, False)),
        *((FedProx, True), (SCAFFOLD, True), (Ditto, True), (AsyncSGD, True)),
        *((ReadsGradient, True), (Renamed, True), (Redefined, True)),
    ],
)
def test_a_gradient_that_a_hook_may_use_is_computed(algorithm: type[Algorithm], expected: bool) -> None:
    assert reads_grad(algorithm) is expected


def test_a_hook_of_a_users_own_algorithm_finds_the_last_gradient(world: World) -> None:
    alone, together = (trained(world, MODELS["mlp"], k, algorithm=ReadsGradient()) for k in (None, 5))
    assert_close(together, alone)
    assert alone[0][0].abs().sum() > 0


class Failing(FedAvg):
    """Runs out of memory, or fails otherwise."""

    error: str

    def begin(self, context: ClientContext) -> None:
        if context.round == 1:
            raise torch.OutOfMemoryError("CUDA") if self.error == "memory" else RuntimeError("the disk burns")


def test_an_error_names_the_clients_and_where_memory_runs_out_the_setting(world: World) -> None:
    message = (
        "^clients 3, 0: out of memory in round 2 with local.batch_size=8 and 2 clients side by side; lower "
        r"local.clients_at_once \(the result stays the same\)$"
    )
    with pytest.raises(NoMemoryError, match=message):
        trained(world, MODELS["mlp"], 2, algorithm=Failing(error="memory"), clients=(3, 0))
    with pytest.raises(RuntimeError, match="the disk burns") as caught:
        trained(world, MODELS["mlp"], 2, algorithm=Failing(error="disk"), clients=(3, 0))
    assert caught.value.__notes__ == ["while training clients 3, 0 in round 2"]
