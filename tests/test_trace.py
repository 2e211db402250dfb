"""Models of all kinds, traced: their passes are those of autograd, or they are refused with the reason."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedddp.models.flat import FlatModel
from fedddp.models.trace import UnsupportedModelError
from fedddp.models.traced import Step, TracedModel, try_traced

SHAPE = (2, 4, 4)


class Two(nn.Module):
    """Two linear layers, on which the cases build."""

    def __init__(self) -> None:
        super().__init__()
        self.a: nn.Module = nn.Linear(32, 8)
        self.b, self.relu = nn.Linear(8, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.relu(self.a(x.flatten(1))))  # type: ignore[no-any-return]


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


class Drawing(Two):
    """Skips its layer at random."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if random.random() < 0.5 else x)


class Remembering(Two):
    """Counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Branching(Two):
    """Looks at its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Scaled(Two):
    """Has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale


class Twice(Two):
    """Uses a layer twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.b(self.relu(self.a(x.flatten(1))))  # type: ignore[no-any-return]


class Unused(Two):
    """Has a layer that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Splitting(Two):
    def forward(self, x: Tensor) -> Tensor:
        one, two = self.a(x.flatten(1)).chunk(2, 1)
        return self.b(torch.cat([one, two], 1))  # type: ignore[no-any-return]


class InPlace(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.flatten(1)).mul_(2))  # type: ignore[no-any-return]


class Overwriting(Two):
    """Uses a tensor again that was changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.flatten(1))
        changed = h
        changed += 1
        return self.b(h * changed.relu() + h)  # type: ignore[no-any-return]


class Several(Two):
    def forward(self, x: Tensor) -> Tensor:
        return {"out": super().forward(x)}  # type: ignore[return-value]


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
        (Optional, "takes more than the images"),
        (Checking, "its traced passes compute something else"),
        (Counting, "buffers outside of the layers|uses 'calls' outside of a layer"),
        (Unread, "does not use the result"),
        (Drawing, "draws at random, or counts, outside of layers"),
        (Remembering, "draws at random, or counts, outside of layers"),
        (Branching, r"cannot be traced \(symbolically traced variables cannot be used"),
        (Scaled, "uses 'scale' outside of a layer"),
        (Twice, "two calls of layers share a parameter"),
        (Unused, "does not use all parameters"),
        (Splitting, "splits a tensor into several"),
        (InPlace, "changes a tensor in place, by 'mul_'"),
        (Several, "does not return one tensor"),
        (Overwriting, "its traced passes compute something else"),
        (with_root_hook, "has hooks, or a forward of its own"),
        (with_mixing_hook, "has hooks, or a forward of its own"),
        (with_backward_hook, "has hooks, or a forward of its own"),
        (with_own_forward, "has hooks, or a forward of its own"),
    ],
)
def test_a_model_whose_traced_passes_would_be_others_is_refused_with_the_reason(
    make: Callable[[], nn.Module], reason: str
) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict()), model.training
    with pytest.raises(UnsupportedModelError, match=reason):
        try_traced(FlatModel(model), SHAPE)
    assert model.training == before[1]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in model.state_dict().items())


def test_a_trial_draws_nothing_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(), nn.Linear(12, 3))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    try_traced(FlatModel(model), SHAPE)
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
    try_traced(FlatModel(Rows().to(memory_format=layout)), SHAPE)  # which compares them


class Keywords(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(input=self.relu(self.a(x.flatten(1))))  # type: ignore[no-any-return]


class Mixing(Two):
    """Couples the examples of a batch, scales by a constant, and adds in place."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a((x - x.mean(0)).flatten(1)) * 0.5
        h += nn.functional.relu(h, inplace=False)
        return self.b(nn.functional.gelu(h).view(h.size(0), -1))  # type: ignore[no-any-return]


class Activated(Two):
    """Has layers that change their input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(self.a, nn.Dropout(0.5, inplace=True), nn.Hardswish(inplace=True))


@pytest.mark.parametrize("make", [Keywords, Mixing, Activated])
def test_functions_keywords_and_layers_in_place_are_traced(make: Callable[[], nn.Module]) -> None:
    try_traced(FlatModel(make()), SHAPE)  # which compares them


def test_a_pass_keeps_what_its_way_back_takes_and_no_more() -> None:
    layers = [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)]
    traced = TracedModel(nn.Sequential(*layers))
    with torch.no_grad():
        outputs = traced.forward(torch.rand(2, *SHAPE))
        kept = [place for place, value in enumerate(traced._values) if value is not None]
        traced.backward(outputs, Step(0.1, keep=1.0))
    assert kept == [2, 3, 4]  # of the ReLU and the flattening; and the outputs
    assert not any(value is not None for value in traced._values[1:])


def test_only_layers_that_may_draw_cost_a_seed() -> None:
    quiet = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    assert not TracedModel(quiet).draws
    assert TracedModel(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(32, 3))).draws


def test_a_step_in_backward_is_that_of_sgd_with_weight_decay() -> None:
    """Of y = w·x + b with w = 2, b = 1, x = 3, and 1 as the gradient of the loss by y."""
    layer = nn.Linear(1, 1)
    traced = TracedModel(nn.Sequential(layer))
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(1.0)
        assert traced.forward(torch.tensor([[3.0]])).item() == 7.0
        traced.backward(torch.tensor([[1.0]]), Step(0.5, keep=1 - 0.5 * 0.1))
    assert layer.weight.item() == pytest.approx(0.95 * 2 - 0.5 * 3)
    assert layer.bias.item() == pytest.approx(0.95 * 1 - 0.5)
