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
