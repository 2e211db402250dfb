"""The traced engine trains as the eager one, and refuses what it cannot train so."""

from __future__ import annotations

import contextlib
import dataclasses
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
from fedddp.models.flat import FlatModel
from fedddp.models.traced import TracedModel
from fedddp.tasks import Classification, Task
from fedddp.training.client_trainer import ClientJob, ClientTrainer, Parts
from fedddp.training.traced_trainer import TracedTrainer, reads_grad

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
    trainer: type[ClientTrainer],
    *,
    local: LocalConfig = LOCAL,
    algorithm: Algorithm | None = None,
    clients: tuple[int, ...] = (0, 1, 2, 3, 4),
    task: Classification | None = None,
    data: DataConfig | None = None,
) -> dict[int, list[Tensor]]:
    """Train two rounds; return all results by client."""
    torch.manual_seed(0)
    algorithm = algorithm or FedAvg()
    flat = FlatModel(model())
    loader = ClientLoader(images(), data or DataConfig(), world.device, seed=3)
    parts = Parts(world, flat, task or Classification(), loader, local, algorithm, 3)
    traced = trainer is TracedTrainer
    engine = TracedTrainer(parts, TracedModel(flat.module)) if traced else trainer(parts)
    server, starts = ServerState.of(flat, 5), np.cumsum((0, *SIZES))
    algorithm.start(server)
    states: dict[int, dict[str, Tensor]] = {client: {} for client in clients}
    results: dict[int, list[Tensor]] = {client: [] for client in clients}
    for number in range(2):
        for client in clients:
            job = ClientJob(
                client=client,
                round=number,
                indices=np.arange(starts[client], starts[client + 1]),
                weight=0.2,
                share=0.2,
                lr=local.lr,
                initial_loss=1.5,
                largest_initial_loss=2.0,
            )
            result = engine.train(server, job, states[client])
            vectors = [v.clone() for v in result.update.vectors.values()]
            numbers = [torch.tensor(n) for n in (*result.loss, result.steps, result.update.weight)]
            buffers = [result.buffers.clone(), result.integer_buffers.clone()]
            results[client] += [*vectors, *numbers, *buffers]
    for client, state in states.items():
        results[client] += [state[name] for name in sorted(state)]
    return results


def both(
    world: World, model: Callable[[], nn.Module], **options: Any
) -> tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]]:
    """Return the results of the traced and of the eager engine."""
    traced, eager = (trained(world, model, trainer, **options) for trainer in (TracedTrainer, ClientTrainer))
    return traced, eager


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
def test_traced_clients_train_as_eager_ones(world: World, name: str, local: LocalConfig) -> None:
    traced, eager = both(world, MODELS[name], local=local)
    assert_close(traced, eager)
    assert not torch.equal(eager[0][0], eager[2][0])


@pytest.mark.parametrize("local", [LOCAL, MOMENTUM], ids=["sgd", "momentum"])
def test_gradients_are_held_only_where_a_step_needs_them(world: World, local: LocalConfig) -> None:
    flat = FlatModel(MODELS["mlp"]())
    loader = ClientLoader(images(), DataConfig(), world.device, seed=3)
    parts = Parts(world, flat, Classification(), loader, local, FedAvg(), 3)
    TracedTrainer(parts, TracedModel(flat.module))
    assert (len(flat.grad) == 0) == (local is LOCAL)
    assert all((p.grad is None) == (local is LOCAL) for p in flat.module.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_bits_of_a_client_do_not_depend_on_the_others(world: World, name: str) -> None:
    everyone = trained(world, MODELS[name], TracedTrainer)
    for clients in [(4, 3, 2, 1, 0), (2, 4)]:
        assert_equal(trained(world, MODELS[name], TracedTrainer, clients=clients), everyone)


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
def test_every_kind_of_algorithm_and_step_is_the_same_traced(world: World, name: str) -> None:
    algorithm, settings = ALGORITHMS[name]

    def model() -> nn.Module:
        layout = torch.channels_last if name == "channels last" else torch.contiguous_format
        # Adam turns the rounding of a gradient of 0 into a step, as a bias before a batch norm has one.
        name_of_model = "convolutions" if "adam" in name else "batch norm"
        return MODELS[name_of_model]().to(memory_format=layout)

    local = dataclasses.replace(LOCAL, **settings)
    assert_close(*both(world, model, local=local, algorithm=algorithm))


def test_augmentation_and_label_smoothing_are_the_same_traced(world: World) -> None:
    options: dict[str, Any] = {
        "task": Classification(label_smoothing=0.1),
        "data": DataConfig(augment="crop-flip"),
        "local": MOMENTUM,
    }
    assert_close(*both(world, MODELS["convolutions"], **options))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_gradient_of_the_cross_entropy_is_that_of_autograd(smoothing: float) -> None:
    task = Classification(label_smoothing=smoothing)
    outputs, targets = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 3, 2])
    found, expected = task.loss_and_gradient(outputs, targets), Task.loss_and_gradient(task, outputs, targets)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[0], task.loss(outputs, targets))


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
    traced, eager = both(world, MODELS["mlp"], algorithm=ReadsGradient())
    assert_close(traced, eager)
    assert eager[0][0].abs().sum() > 0
