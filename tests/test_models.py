"""Names to modules: sizes, shapes, weights, norms, frozen layers, and errors when they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from fedddp.distributed.launch import connect
from fedddp.distributed.topology import TopologyConfig
from fedddp.models.norms import SyncedBatchNorm, convert_norm, norm_parameters, synchronized
from fedddp.models.registry import ModelConfig
from fedddp.models.weights import head_of
from fedddp.testing import run_world

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


def build(name: str, classes: int = 10, shape: tuple[int, int, int] = MNIST, **model: Any) -> nn.Module:
    return ModelConfig(name=name, **model).build(classes=classes, shape=shape, seed=0)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("lenet", 431_080), ("2nn", 199_210), ("cnn", 1_663_370)],  # the papers' own counts
)
def test_small_models_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert size(build(name)) == parameters


@pytest.mark.parametrize("name", ["lenet", "2nn", "cnn", "resnet8-gn", "resnet20-gn"])
@pytest.mark.parametrize("shape", [(1, 8, 8), MNIST, CIFAR, (3, 40, 24)])
def test_small_models_take_images_of_any_size(name: str, shape: tuple[int, int, int]) -> None:
    module = build(name, 7, shape)
    module(torch.randn(2, *shape)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert not list(module.buffers()) or name not in ("resnet8-gn", "resnet20-gn")


def test_a_model_is_a_function_of_the_seed_and_does_not_draw_from_torchs_generator() -> None:
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    one = build("lenet")
    assert torch.equal(torch.rand(1), first)
    two = build("lenet")
    other = ModelConfig(name="lenet").build(classes=10, shape=MNIST, seed=1)
    weights = [next(iter(m.state_dict().values())) for m in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_torchvision_models_by_name(name: str) -> None:
    module = build(name, 4, (1, 64, 64))
    assert module(torch.randn(2, 1, 64, 64)).shape == (2, 4)


def test_pretrained_weights_from_a_file_fit_another_head_and_gray_images(tmp_path: Path) -> None:
    source = torchvision.models.resnet18(num_classes=5)
    file = str(tmp_path / "w.safetensors")
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, file)
    module = build("resnet18", 3, (1, 32, 32), weights=file)
    state = source.state_dict()
    assert torch.equal(module.get_parameter("layer1.0.conv1.weight"), state["layer1.0.conv1.weight"])
    torch.testing.assert_close(
        module.get_parameter("conv1.weight"), state["conv1.weight"].sum(1, keepdim=True)
    )
    assert module.get_parameter("fc.weight").shape == (3, 512)
    same_head = build("resnet18", 5, CIFAR, weights=file)
    assert torch.equal(same_head.get_parameter("fc.weight"), state["fc.weight"])


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "w.safetensors")
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"do not fit the model: a is unknown"):
        build("lenet", weights=file)
    Path(file).write_bytes(b"garbage")
    with pytest.raises(ValueError, match="cannot be read"):
        build("lenet", weights=file)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"name": "resnet81"}, "unknown model 'resnet81'; did you mean resnet18"),
        ({"name": "no_such_lab.nets.Net"}, "cannot import"),
        ({"name": "lenet", "weights": "x.pt"}, "pickled file can run code"),
        ({"name": "resnet18", "weights": "IMAGENET"}, "IMAGENET1K_V1"),
        ({"name": "lenet", "norm": "layer"}, "model.norm must be keep, batch, group or sync, got layer"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused(model: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelConfig(**model)


def test_weights_that_are_not_there_are_named_before_the_model_is_built() -> None:
    with pytest.raises(ValueError, match=r"model.weights=none.safetensors is not a file"):
        ModelConfig(name="lenet", weights="none.safetensors").check_weights()


def test_images_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot take images of 1x2x2 .*data.image_size"):
        build("lenet", 10, (1, 2, 2))
    with pytest.raises(ValueError, match="cannot take images"):
        build("alexnet", 10, (3, 8, 8))


def test_layers_are_frozen_by_name() -> None:
    module = build("lenet", freeze=["conv1", "conv2"])
    assert next(n for n, p in module.named_parameters() if p.requires_grad) == "fc1.weight"
    with pytest.raises(ValueError, match="there are no parameters named 'conv9'"):
        build("lenet", freeze=["conv9"])
    with pytest.raises(ValueError, match="leaves nothing to train"):
        build("2nn", freeze=["fc1", "fc2", "fc3"])


def own_model(num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(image_size[0] * image_size[1], num_classes))


def wrong_model(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes + 1))


def test_a_model_is_found_by_its_dotted_path() -> None:
    module = build(f"{__name__}.own_model", 3, (1, 5, 4))
    assert module(torch.zeros(2, 1, 5, 4)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"it returned \(2, 4\)"):
        build(f"{__name__}.wrong_model", 3, (1, 5, 4))


def test_head_is_the_last_linear_layer() -> None:
    assert head_of(build("lenet"))[0] == "fc2"
    assert head_of(build("resnet8-gn"))[0] == "fc"
    with pytest.raises(ValueError, match="no linear layer"):
        head_of(nn.ReLU())


# ---- normalisation layers ----


@pytest.mark.parametrize("norm", ["batch", "group", "sync"])
def test_norms_are_converted_everywhere(norm: str) -> None:
    module = build("resnet18", 4, CIFAR, norm=norm)
    kinds = {type(m).__name__ for m in module.modules() if "Norm" in type(m).__name__}
    assert kinds == {{"batch": "BatchNorm", "group": "GroupNorm", "sync": "SyncedBatchNorm"}[norm]}
    assert bool(list(module.buffers())) == (norm != "group")
    assert module(torch.randn(2, *CIFAR)).shape == (2, 4)


def test_converted_norms_keep_weights_and_statistics() -> None:
    old = nn.Sequential(nn.BatchNorm2d(16, eps=0.01, momentum=0.3))
    old.get_parameter("0.weight").data.uniform_()
    old(torch.randn(4, 16, 3, 3))
    x = torch.randn(3, 16, 5, 5)
    expected = old.eval()(x)
    convert_norm(old, "sync")
    assert isinstance(old[0], SyncedBatchNorm)
    torch.testing.assert_close(old.eval()(x), expected)
    weight = old.get_parameter("0.weight").clone()
    convert_norm(old, "group")
    assert torch.equal(old.get_parameter("0.weight"), weight)


def test_norm_parameters_are_found_by_the_kind_of_their_layer() -> None:
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.LayerNorm(3)), nn.Linear(3, 3)
    )
    assert norm_parameters(module) == {"1.weight", "1.bias", "2.0.weight", "2.0.bias"}


def test_batch_norm_trains_on_one_value_per_channel_with_its_running_statistics() -> None:
    module = nn.Sequential(nn.BatchNorm2d(4))
    convert_norm(module, "keep")
    before = {k: v.clone() for k, v in module.state_dict().items()}
    assert torch.isfinite(module(torch.randn(1, 4, 1, 1))).all()
    assert torch.equal(module.get_buffer("0.running_mean"), before["0.running_mean"])


def synced(shares: list[list[int]]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the gradients and the state after two batches, whose examples the ranks share by `shares`."""
    world = connect(TopologyConfig(ranks_per_client=len(shares), device="cpu"))
    try:
        torch.manual_seed(0)
        module = nn.Sequential(nn.BatchNorm2d(3))
        convert_norm(module, "sync")
        synchronized(module, world.group_sum)
        norm = module[0]
        assert isinstance(norm, SyncedBatchNorm)
        results: list[Tensor] = []
        for number in range(2):
            x = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(number))
            own = shares[world.data_rank]
            norm.is_padding = not own
            mine = x[own or [0]].requires_grad_()
            y = module(mine)
            (y.square().sum() * bool(own)).backward()
            norm.is_padding = False
            assert mine.grad is not None
            weights = [p.grad.clone() for p in module.parameters() if p.grad is not None]
            total = [world.group_sum(w) for w in weights]
            results += [mine.grad[: len(own)], *total]
            module.zero_grad()
        return results, module.state_dict()
    finally:
        world.close()


@pytest.mark.parametrize("shares", [[[0, 2, 4], [1, 3, 5]], [[0, 1, 2, 3, 4], [5]], [[0, 1, 2, 3, 4, 5], []]])
def test_synced_batch_norm_is_batch_norm_over_the_joined_batch(shares: list[list[int]]) -> None:
    reference = nn.BatchNorm2d(3)
    expected: list[list[Tensor]] = [[], []]
    for number in range(2):
        x = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(number)).requires_grad_()
        reference.zero_grad()
        reference(x).square().sum().backward()
        assert x.grad is not None
        weights = [p.grad.clone() for p in reference.parameters() if p.grad is not None]
        for rank in range(2):
            expected[rank] += [x.grad[shares[rank]], *weights]
    for rank, (results, state) in enumerate(run_world(synced, shares, size=2)):
        for got, wanted in zip(results, expected[rank], strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
        for name, tensor in reference.state_dict().items():
            torch.testing.assert_close(state[f"0.{name}"], tensor, atol=1e-6, rtol=1e-5)
