"""Models whose copies cannot run side by side, though they look as if they could: each is found out."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedddp.algorithms import FedAvg
from fedddp.algorithms.local import LocalConfig
from fedddp.data.datasets import DataConfig, Images
from fedddp.data.loader import ClientLoader
from fedddp.distributed.launch import connect
from fedddp.distributed.topology import TopologyConfig
from fedddp.models.flat import FlatModel
from fedddp.models.stacked import try_side_by_side
from fedddp.models.trace import UnsupportedModelError
from fedddp.tasks import Classification
from fedddp.training.stacked_trainer import StackedTrainer

SHAPE = (2, 4, 4)


class Two(nn.Module):
    """Two linear layers, on which the cases build."""

    def __init__(self) -> None:
        super().__init__()
        self.a: nn.Module = nn.Linear(32, 8)
        self.b, self.relu = nn.Linear(8, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.relu(self.a(x.flatten(1))))  # type: ignore[no-any-return]


class Keywords(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(input=self.relu(self.a(x.flatten(1))))  # type: ignore[no-any-return]


class Optional(Two):
    def forward(self, x: Tensor, raw: Tensor | None = None) -> Tensor:
        return super().forward(x) if raw is None else x.flatten(1)


class Checking(Two):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if not isinstance(x, Tensor) else self.relu(x + x))


class Counting(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        return super().forward(x)


class Unread(Two):
    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        self.a(x)
        return self.b(self.relu(self.a(x)))  # type: ignore[no-any-return]


class Regrouping(Two):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.view(-1, 8))).view(-1, 12)  # type: ignore[no-any-return]


def with_root_hook() -> nn.Module:
    model = Two()
    model.register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def with_mixing_hook() -> nn.Module:
    model = Two()
    model.relu.register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    return model


def with_backward_hook() -> nn.Module:
    model = Two()
    model.a.register_full_backward_pre_hook(lambda module, grads: None)
    return model


def with_own_forward() -> nn.Module:
    model = Two()
    vars(model.a)["forward"] = lambda x: x[:, :8]
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Keywords, "calls 'b' with keywords"),
        (Optional, "takes more than the images"),
        (Checking, "two copies side by side compute something else"),
        (Counting, "buffers outside of the layers|uses 'calls' outside of a layer"),
        (Unread, "does not use the result"),
        (Regrouping, "other rows than the batch"),
        (with_root_hook, "has hooks, or a forward of its own"),
        (with_mixing_hook, "has hooks, or a forward of its own"),
        (with_backward_hook, "has hooks, or a forward of its own"),
        (with_own_forward, "has hooks, or a forward of its own"),
    ],
)
def test_a_model_that_only_looks_as_if_its_copies_were_independent_is_refused(
    make: Callable[[], nn.Module], reason: str
) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict()), model.training
    with pytest.raises(UnsupportedModelError, match=reason):
        try_side_by_side(model, SHAPE)
    assert model.training == before[1]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in model.state_dict().items())


def test_a_trial_draws_nothing_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(), nn.Linear(12, 3))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    try_side_by_side(model, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Rows(nn.Module):
    """A linear layer on the last dimension of channels-last maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last, self.fc = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(4, 5), nn.Linear(60, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.conv(x)).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_pass_through_a_linear_layer_on_maps_of_any_layout(layout: torch.memory_format) -> None:
    try_side_by_side(Rows().to(memory_format=layout), SHAPE)  # which compares them


def test_frozen_parameters_are_shared_with_the_copies() -> None:
    """A checkpoint is restored into the first copy, after the others were made."""
    model = Two()
    model.a.requires_grad_(False)
    images = Images(
        torch.zeros(4).long().numpy(), 3, SHAPE, torch.zeros(4, *SHAPE).byte(), None, None, (0, 0), (1, 1)
    )
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        loader = ClientLoader(images, DataConfig(), world.device, seed=0)
        flat = FlatModel(model)
        parts = (world, flat, Classification(), loader, LocalConfig(), FedAvg())
        trainer = StackedTrainer(*parts, seed=0, clients_at_once=3)
    with torch.no_grad():
        model.get_parameter("a.weight").fill_(7)
    for slot in trainer.slots[1:]:
        assert slot.flat.module.get_parameter("a.weight").eq(7).all()
        assert slot.flat.params.data_ptr() != flat.params.data_ptr()
