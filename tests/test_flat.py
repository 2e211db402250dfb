"""The flat model: its parameters, gradients and buffers are views, also with DDP and tied weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedddp.distributed.launch import connect
from fedddp.distributed.topology import TopologyConfig
from fedddp.models.flat import FlatModel, norm
from fedddp.testing import run_world


class Tied(nn.Module):
    """Two layers that share a weight, one frozen layer, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(16, 3)
        self.frozen.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.bn(self.conv(images)).mean(1).flatten(1)
        logits: Tensor = self.frozen(self.second(self.first(hidden).relu()))
        return logits


def test_parameters_gradients_and_buffers_are_views_of_flat_vectors() -> None:
    torch.manual_seed(0)
    module = Tied()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    flat = FlatModel(module)
    assert flat.params.shape == (4 * 9 + 4 + 4 + 4 + 16 * 16 + 16 + 16,)  # tied once, frozen not
    assert flat.buffers.shape == (8,)
    assert flat.integer_buffers.tolist() == [0]
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    flat.params.fill_(2.0)
    assert module.second.weight.eq(2).all()
    assert not module.frozen.weight.eq(2).any()
    module(torch.randn(5, 1, 4, 4)).sum().backward()
    assert module.conv.weight.grad is not None
    assert torch.equal(flat.grad[flat.slices["conv.weight"]], module.conv.weight.grad.flatten())
    assert flat.integer_buffers.tolist() == [1]
    assert torch.equal(flat.buffers[:4], module.bn.get_buffer("running_mean"))


def test_channels_last_parameters_keep_their_layout() -> None:
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    weight = module.weight.clone()
    FlatModel(module)
    assert torch.equal(module.weight, weight)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_first_layer_of_one_channel_gives_its_layout_to_what_follows(layout: torch.memory_format) -> None:
    module = nn.Conv2d(1, 4, 3).to(memory_format=layout)
    flat, other = FlatModel(module), torch.contiguous_format
    if layout is other:
        other = torch.channels_last
    assert (module.weight.flatten() == flat.params[flat.slices["weight"]]).all()
    maps = module(torch.rand(2, 1, 8, 8))
    maps.sum().backward()
    assert maps.is_contiguous(memory_format=layout)
    assert not maps.is_contiguous(memory_format=other)
    assert module.weight.grad is not None
    assert module.weight.grad.stride() == module.weight.stride()


def test_mask_marks_the_elements_of_named_parameters() -> None:
    flat = FlatModel(nn.Linear(3, 2))
    assert flat.mask(["bias"]).tolist() == [False] * 6 + [True] * 2


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no trainable parameter.*model\.freeze"):
        FlatModel(nn.Linear(2, 2).requires_grad_(False))


def gradient_of(ranks: int) -> Tensor:
    world = connect(TopologyConfig(ranks_per_client=ranks))
    torch.manual_seed(1)
    images, labels = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
    module = Tied()
    module.bn = nn.Identity()  # type: ignore[assignment] # its statistics would differ per rank
    flat = FlatModel(module)
    replica = world.replicate(module)
    views = [parameter.grad for parameter in module.parameters()]
    for _ in range(2):  # twice: DDP rebuilds its buckets after the first step
        flat.grad.zero_()
        mine = slice(world.data_rank, None, ranks)
        cross_entropy(replica(images[mine]), labels[mine]).backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is view for p, view in zip(module.parameters(), views, strict=True))
    return flat.grad.clone()


def test_ddp_reduces_gradients_into_the_flat_vector() -> None:
    (alone,) = run_world(gradient_of, 1, size=1)
    for grad in run_world(gradient_of, 2, size=2):
        torch.testing.assert_close(grad, alone)
    assert norm(alone) > 0


# ---- buffers of other types than float32 and int64, and those that are not exchanged ----


class Buffers(nn.Linear):
    """A layer with buffers of every kind, whose values are 1."""

    COPIED = ("float64", "float16", "int32", "flags", "uint8")
    CONSTANT = ("complex", "cache", "cached_count")

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("mean", torch.ones(3))
        self.register_buffer("count", torch.ones(2, dtype=torch.int64))
        self.register_buffer("float64", torch.ones(2, dtype=torch.float64))
        self.register_buffer("float16", torch.ones(2, dtype=torch.float16))
        self.register_buffer("int32", torch.ones((), dtype=torch.int32))
        self.register_buffer("flags", torch.ones(2, 2, dtype=torch.bool))
        self.register_buffer("uint8", torch.ones(2, dtype=torch.uint8))
        self.register_buffer("complex", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.register_buffer("cached_count", torch.ones(2, dtype=torch.int64), persistent=False)


def test_persistent_buffers_of_all_real_types_are_exchanged() -> None:
    flat = FlatModel(Buffers())
    assert (flat.buffers.dtype, flat.buffers.tolist()) == (torch.float32, [1] * 7)
    assert (flat.integer_buffers.dtype, flat.integer_buffers.tolist()) == (torch.int64, [1] * 9)


@pytest.mark.parametrize("name", Buffers.CONSTANT)
def test_loading_a_model_resets_its_constant_buffers(name: str) -> None:
    module = Buffers()
    flat = FlatModel(module)
    module.get_buffer(name).zero_()
    flat.load(flat.params.clone(), torch.full((7,), 5.0), torch.arange(9))
    assert module.get_buffer(name).eq(1).all()
    assert module.get_buffer("mean").eq(5).all()
    assert module.get_buffer("count").tolist() == [0, 1]


def test_buffers_of_other_types_are_written_and_read_back() -> None:
    module = Buffers()
    flat = FlatModel(module)
    buffers, integer_buffers = torch.arange(7) + 0.5, torch.arange(9) - 1
    integer_buffers[3:7] = torch.tensor([0, 1, 0, 1])
    flat.load(flat.params.clone(), buffers, integer_buffers)
    assert module.get_buffer("float64").tolist() == [3.5, 4.5]
    assert module.get_buffer("float16").tolist() == [5.5, 6.5]
    assert module.get_buffer("int32").item() == 1
    assert module.get_buffer("flags").tolist() == [[False, True], [False, True]]
    assert module.get_buffer("uint8").tolist() == [6, 7]
    assert [str(module.get_buffer(name).dtype)[6:] for name in Buffers.COPIED] == [
        *("float64", "float16", "int32", "bool", "uint8")
    ]
    for name in Buffers.COPIED:
        module.get_buffer(name).zero_()
    flat.read_buffers()
    assert flat.buffers.tolist() == [0.5, 1.5, 2.5, 0, 0, 0, 0]
    assert flat.integer_buffers.tolist() == [-1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_a_float64_constant_keeps_digits_that_its_vector_does_not_hold() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("table", torch.tensor([0.1, 0.7], dtype=torch.float64))
    flat = FlatModel(module)
    start = flat.buffers.clone()
    module.get_buffer("table").zero_()
    flat.load(flat.params.clone(), start, flat.integer_buffers.clone())
    assert module.get_buffer("table").tolist() == [0.1, 0.7]
    flat.load(flat.params.clone(), start * 2, flat.integer_buffers.clone())
    assert module.get_buffer("table").tolist() == (start * 2).double().tolist()


def test_named_buffers_have_the_types_of_the_module() -> None:
    flat = FlatModel(Buffers())
    named = flat.named(flat.params, flat.buffers * 2)
    assert {name: (t.dtype, t.tolist()) for name, t in named.items() if name.startswith("float")} == {
        "float64": (torch.float64, [2, 2]),
        "float16": (torch.float16, [2, 2]),
    }


def test_a_complex_buffer_that_changes_is_refused() -> None:
    module = Buffers()
    flat = FlatModel(module)
    flat.check_constants()
    module.get_buffer("complex")[-1] = 0
    message = r"buffer 'complex', of type torch.complex64, changes in training, but only floating-point, int"
    with pytest.raises(ValueError, match=message):
        flat.check_constants()


@pytest.mark.parametrize("name", ["mean", "count", *Buffers.COPIED, "cache", "cached_count"])
def test_exchanged_buffers_and_caches_may_change(name: str) -> None:
    module = Buffers()
    flat = FlatModel(module)
    module.get_buffer(name).zero_()
    flat.check_constants()


def test_statistics_of_a_float64_model_are_exchanged_in_float64() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    module.register_buffer("float32", torch.ones(2))
    flat = FlatModel(module)
    assert flat.buffers.dtype == torch.float64
    assert sorted(flat.buffers.tolist()) == [0, 0, 1, 1, 1, 1]
    third = torch.tensor([1 / 3] * 6, dtype=torch.float64)
    flat.load(flat.params.clone(), third, flat.integer_buffers.clone())
    assert torch.equal(module[1].get_buffer("running_var"), third[:2])
    assert torch.equal(module.get_buffer("float32"), third[:2].float())


def test_a_constant_buffer_may_be_an_expanded_tensor() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.ones(1, 4, dtype=torch.bool).expand(3, 4))
    flat = FlatModel(module)
    flat.load(flat.params.clone(), flat.buffers.clone(), flat.integer_buffers.clone())
    assert module.get_buffer("mask").all()


def test_the_norm_of_a_finite_vector_is_finite() -> None:
    assert norm(torch.tensor([3e30, 4e30])).item() == pytest.approx(5e30)
    assert norm(torch.tensor([3e-30, 4e-30])).item() == pytest.approx(5e-30)
    assert norm(torch.tensor([1.0, float("inf")])).item() == float("inf")
