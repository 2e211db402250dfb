"""Names to modules: sizes, shapes, weights, norms, frozen layers, and errors when they do not fit."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedddp import CohortConfig, ConfigError, DataConfig, Federation, LocalConfig, TrackingConfig
from fedddp.algorithms import FedAsync, FedAvg, FedBuff
from fedddp.distributed.launch import connect
from fedddp.distributed.topology import TopologyConfig
from fedddp.models import torchvision_zoo
from fedddp.models.norms import FrozenBatchNorm, SyncedBatchNorm, convert_norm, norm_parameters, synchronized
from fedddp.models.registry import ModelConfig
from fedddp.models.weights import head_of, heads_of, torchvision_weights
from fedddp.storage.checkpoint import save_model
from fedddp.testing import run_world

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


def build(
    name: str, classes: int = 10, shape: tuple[int, int, int] = MNIST, check: Any = None, **model: Any
) -> nn.Module:
    return ModelConfig(name=name, **model).build(classes=classes, shape=shape, seed=0, check=check)


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


@pytest.mark.parametrize(("name", "parameters"), [("unet", 127_592), ("retinanet-tiny", 26_684)])
def test_small_models_for_masks_and_boxes_have_the_documented_size(name: str, parameters: int) -> None:
    module = build(name, shape=CIFAR, check=lambda _: None)
    assert size(module) == parameters
    assert not [b for n, b in module.named_buffers() if n in module.state_dict()]  # group norm has none


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 9, 13), (3, 30, 17)])
def test_unet_takes_images_of_any_size(shape: tuple[int, int, int]) -> None:
    module = build("unet", 5, shape, check=lambda _: None)
    images = torch.randn(2, *shape)
    logits = module(images)
    assert logits.shape == (2, 5, *shape[1:])
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    images[0, 0, 0, 0] += 1  # a pixel changes its own image, and that around it
    changed = (module(images) - logits).abs().sum(1) > 0
    assert changed[0, 0, 0]
    assert not changed[1].any()


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
        ({"name": "lenet", "norm": "layer"}, "must be keep, batch, group, sync or frozen, got layer"),
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
    assert head_of(build("unet", check=lambda _: None))[0] == "head"
    with pytest.raises(ValueError, match="no linear layer"):
        head_of(nn.ReLU())


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("fcn_resnet50", ["classifier.4"]),
        ("deeplabv3_mobilenet_v3_large", ["classifier.4"]),
        ("lraspp_mobilenet_v3_large", ["classifier.low_classifier", "classifier.high_classifier"]),
        ("retinanet-tiny", ["head.regression_head.bbox_reg", "head.classification_head.cls_logits"]),
    ],
)
def test_heads_are_the_layers_that_give_the_outputs(name: str, heads: list[str]) -> None:
    module = build(name, 5, CIFAR, check=lambda _: None)
    found = heads_of(copy.deepcopy(module))
    assert list(found) == heads
    assert head_of(module) == (heads[-1], module.get_submodule(heads[-1]))
    for head in found.values():
        assert isinstance(head, nn.Conv2d)
        nn.init.zeros_(head.weight)
        assert head.bias is not None
        nn.init.ones_(head.bias)
    for layer, head in found.items():
        module.get_submodule(layer).load_state_dict(head.state_dict())
    outputs = module.eval()(torch.randn(1, *CIFAR))
    for output in {"out", "cls_logits", "bbox_regression"} & outputs.keys():
        expected = 2.0 if name.startswith("lraspp") else 1.0  # the sum of two
        torch.testing.assert_close(outputs[output], torch.full_like(outputs[output], expected))


# ---- models of several tasks: checks, and weights of classifiers ----


def test_a_check_sees_the_outputs_of_both_modes_and_names_the_model_and_the_mode() -> None:
    seen = []

    def check(outputs: Any) -> None:
        seen.append(outputs)
        if len(seen) == 2:
            raise ValueError("three of them; there are two")

    with pytest.raises(
        ValueError, match="^model lenet must return three of them in training mode; there are two$"
    ):
        build("lenet", 4, check=check)
    assert [tuple(outputs.shape) for outputs in seen] == [(2, 4), (2, 4)]
    own = nn.Conv2d(1, 4, 1)
    assert ModelConfig().adapt(own, classes=4, shape=MNIST, seed=0, check=seen.append) is own
    assert seen[-1].shape == (2, 4, 28, 28)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unet", r"it returned \(2, 3, 32, 32\) \(unet is for masks: task=Segmentation\)$"),
        ("lraspp_mobilenet_v3_large", "is for masks: task=Segmentation"),
        ("retinanet-tiny", r"it returned dict \(retinanet-tiny is for boxes: task=Detection\)$"),
    ],
)
def test_a_model_for_masks_or_boxes_is_refused_for_classes(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^model {name} must return logits of shape .*{words}"):
        build(name, 3, CIFAR)


def written(module: nn.Module, folder: Path) -> dict[str, Any]:
    """Write the weights of `module`, and return the settings that read them."""
    file = str(folder / "w.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, file)
    return {"weights": file, "check": lambda _: None}


@pytest.mark.parametrize(
    ("name", "classifier", "before", "after", "norm"),
    [
        ("lraspp_mobilenet_v3_large", "mobilenet_v3_large", "features.", "backbone.", "keep"),
        ("fcn_resnet50", "resnet50", "", "backbone.", "group"),
        ("retinanet_resnet50_fpn", "resnet50", "", "backbone.body.", "keep"),
    ],
)
def test_weights_of_a_classifier_start_the_backbone(
    name: str,
    classifier: str,
    before: str,
    after: str,
    norm: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = torchvision_zoo.models().get_model(classifier, weights=None, num_classes=7)
    for tensor in source.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 0.5)
    fresh = build(name, 4, MNIST, norm=norm, check=lambda _: None).state_dict()
    with caplog.at_level("INFO", "fedddp"):
        module = build(name, 4, MNIST, norm=norm, **written(source, tmp_path))
    taken, kept = 0, 0
    for key, tensor in module.state_dict().items():
        own = source.state_dict().get(key.replace(after, before, 1)) if key.startswith(after) else None
        if own is None:
            assert torch.equal(tensor, fresh[key]), key
            kept += 1
        elif own.dim() == 4 and own.shape != tensor.shape:  # gray images
            torch.testing.assert_close(tensor, own.sum(1, keepdim=True))
            taken += 1
        else:
            assert torch.equal(tensor, own), key
            taken += 1
    assert taken > 100
    assert kept > 4
    assert len(caplog.messages) == 1
    if norm == "keep":
        assert f"{taken} tensors of the backbone; the other {kept} of the model" in caplog.messages[0]


def test_weights_of_a_classifier_that_is_not_the_backbone_are_refused(tmp_path: Path) -> None:
    source = torchvision.models.resnet18(num_classes=7)
    with pytest.raises(ValueError, match="do not fit the model"):
        build("fcn_resnet50", 4, CIFAR, **written(source, tmp_path))
    with pytest.raises(ValueError, match="do not fit the model"):
        build("unet", 4, CIFAR, **written(source, tmp_path))


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_weights_of_a_segmentation_model_fit_another_number_of_classes(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if name.startswith("lraspp") else {"aux_loss": True}  # as in published files
    source = torchvision_zoo.models().get_model(
        name, weights=None, weights_backbone=None, num_classes=6, **options
    )
    module = build(name, 4, CIFAR, **written(source, tmp_path))
    heads = tuple(f"{head}." for head in heads_of(module))
    for key, tensor in module.state_dict().items():
        assert key.startswith(heads) or torch.equal(tensor, source.state_dict()[key])
    same = build(name, 6, CIFAR, **written(source, tmp_path))
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in same.state_dict().items())


def test_weights_of_a_retinanet_fit_another_number_of_classes_and_older_names(tmp_path: Path) -> None:
    name = "retinanet_resnet50_fpn"
    source = torchvision_zoo.models().get_model(name, weights=None, weights_backbone=None, num_classes=6)
    # As torchvision published it: with frozen batch norm, and a head of an earlier version.
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    older = {re.sub(r"conv\.(\d)\.0", lambda m: f"conv.{2 * int(m[1])}", k): v for k, v in state.items()}
    assert "head.regression_head.conv.6.weight" in older
    file = str(tmp_path / "w.safetensors")
    save_file(older, file)
    module = build(name, 4, CIFAR, weights=file, norm="frozen", check=lambda _: None)
    for key, tensor in state.items():
        if "cls_logits" not in key:
            assert torch.equal(module.state_dict()[key], tensor)
    assert module.get_parameter("head.classification_head.cls_logits.weight").shape[0] == 9 * 4
    assert any(isinstance(layer, FrozenBatchNorm) for layer in module.modules())


def test_names_of_torchvisions_weights_are_those_of_the_model_and_of_its_backbone() -> None:
    ModelConfig(name="deeplabv3_resnet50", weights="COCO_WITH_VOC_LABELS_V1")
    ModelConfig(name="retinanet_resnet50_fpn_v2", weights="COCO_V1")
    own = torchvision.models.get_model_weights("fcn_resnet50").DEFAULT  # type: ignore[attr-defined]
    assert torchvision_weights("fcn_resnet50", "DEFAULT") is own
    backbone = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
    assert torchvision_weights("fcn_resnet50", "IMAGENET1K_V2") is backbone
    with pytest.raises(ValueError, match="fcn_resnet50 has IMAGENET1K_V1, IMAGENET1K_V2, .*COCO_WITH"):
        ModelConfig(name="fcn_resnet50", weights="COCO")


# ---- normalisation layers ----


def test_frozen_batch_norm_is_a_constant_scale_and_shift() -> None:
    reference = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, eps=0.01), nn.Flatten(), nn.LazyLinear(3))
    reference(torch.randn(5, 1, 6, 6))
    reference.get_parameter("1.weight").data.uniform_()
    module = ModelConfig(norm="frozen").adapt(copy.deepcopy(reference), classes=3, shape=(1, 6, 6), seed=0)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert before.keys() == reference.state_dict().keys()
    x = torch.randn(4, 1, 6, 6)
    torch.testing.assert_close(module.train()(x), reference.eval()(x))
    module(x).sum().backward()
    assert [n for n, p in module.named_parameters() if p.grad is None] == ["1.weight", "1.bias"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("torchvisions", [False, True])
def test_a_run_leaves_frozen_batch_norm_as_it_is(torchvisions: bool) -> None:
    """Its statistics are buffers, of which the mean over clients is what each of them has."""
    kind = torchvision.ops.FrozenBatchNorm2d if torchvisions else nn.BatchNorm2d
    module = nn.Sequential(nn.Conv2d(1, 8, 3), kind(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    for name in ("running_mean", "running_var"):
        module[1].get_buffer(name).copy_(torch.rand(8) / 3 + 0.1)
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    frozen = {} if torchvisions else {"model": ModelConfig(norm="frozen")}
    state = federation(module, rounds=2, **frozen).run().model.state_dict()
    assert not torch.equal(state["0.weight"], start["0.weight"])
    for name, tensor in start.items():
        assert torch.equal(state[name], tensor) == name.startswith("1."), name


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


def test_batch_norm_of_one_value_is_not_counted_synchronised_or_not() -> None:
    states = []
    for norm in ("keep", "sync"):
        module = nn.Sequential(nn.BatchNorm2d(3, momentum=None))
        convert_norm(module, norm)
        for examples in (4, 1, 2, 1):
            module(torch.randn(examples, 3, 1, 1, generator=torch.Generator().manual_seed(examples)))
        states.append(module.state_dict())
    assert states[0]["0.num_batches_tracked"] == states[1]["0.num_batches_tracked"] == 2
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor)


def test_synced_batch_norm_computes_in_float64_in_a_float64_model() -> None:
    reference = nn.BatchNorm2d(3).double()
    for parameter in reference.parameters():
        nn.init.uniform_(parameter, 0.1, 0.9)  # not representable in float32
    reference.get_buffer("running_mean").uniform_()
    module = nn.Sequential(copy.deepcopy(reference))
    convert_norm(module, "sync")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(module.state_dict()[f"0.{name}"], tensor)
        assert module.state_dict()[f"0.{name}"].dtype == tensor.dtype
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(module(x), reference(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(module.eval()(x), reference.eval()(x), rtol=1e-13, atol=1e-13)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[f"0.{name}"], tensor, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("keep", "SyncedBatchNorm"),
        ("sync", "SyncedBatchNorm"),
        ("batch", "BatchNorm"),
        ("group", "GroupNorm"),
    ],
)
def test_an_own_sync_batch_norm_becomes_one_over_the_clients_ranks(norm: Any, kind: str) -> None:
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 2))
    module.get_parameter("1.weight").data.uniform_()
    weight = module.get_parameter("1.weight").clone()
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    assert isinstance(module[1], nn.SyncBatchNorm)
    adapted = ModelConfig(norm=norm).adapt(module, classes=2, shape=(1, 5, 5), seed=0)
    assert type(adapted.get_submodule("1")).__name__ == kind
    assert torch.equal(adapted.get_parameter("1.weight"), weight)
    assert adapted(torch.randn(2, 1, 5, 5)).shape == (2, 2)


def test_own_batch_norm_beside_sync_batch_norm_stays_local() -> None:
    module = nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4))
    convert_norm(module, "keep")
    assert [type(layer).__name__ for layer in module] == ["BatchNorm", "SyncedBatchNorm"]


# ---- the user's own modules ----


class Lazy(nn.Sequential):
    """Layers that learn their sizes from the first images."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(
            nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.Dropout(), nn.LazyLinear(num_classes)
        )


def lazy(seed: int, *, named: bool) -> nn.Module:
    if named:
        config = ModelConfig(name=f"{__name__}.Lazy")
        return config.build(classes=3, shape=(1, 5, 5), seed=seed)
    return ModelConfig().adapt(Lazy(), classes=3, shape=(1, 5, 5), seed=seed)


@pytest.mark.parametrize("named", [False, True])
def test_lazy_layers_are_initialised_by_the_seed_of_the_run(named: bool) -> None:
    states = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        following = torch.random.get_rng_state()
        module = lazy(seed, named=named)
        assert torch.equal(torch.random.get_rng_state(), following)
        assert module.training
        states.append({name: t.clone() for name, t in module.state_dict().items()})
        assert states[-1]["1.num_batches_tracked"] == 0
        assert not states[-1]["1.running_mean"].any()
    for name in ("0.weight", "0.bias", "4.weight", "4.bias"):
        assert torch.equal(states[0][name], states[1][name])
        assert not torch.equal(states[0][name], states[2][name])


def test_lazy_batch_norm_trains_on_one_value_per_channel() -> None:
    module = nn.Sequential(nn.LazyConv2d(4, 5), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))
    adapted = ModelConfig().adapt(module, classes=3, shape=(1, 5, 5), seed=0)
    assert adapted(torch.rand(1, 1, 5, 5)).isfinite().all()


def test_a_run_takes_a_module_with_lazy_layers() -> None:
    assert federation(Lazy()).run().finished


def test_lazy_layers_that_cannot_take_the_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^model Lazy cannot take images of 1x2x2 \(.*\); set another"):
        ModelConfig().adapt(Lazy(), classes=3, shape=(1, 2, 2), seed=0)


class Pair(nn.Linear):
    """A model that returns more than logits in one of its modes."""

    def __init__(self, mode: str, returns: str = "tuple") -> None:
        super().__init__(4, 3)
        self.mode, self.returns = mode, returns

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x.flatten(1))
        if self.training != (self.mode == "training"):
            return logits
        return {"tuple": (logits, logits), "dict": {"logits": logits}, "Tensor": logits[:, :2]}[self.returns]


@pytest.mark.parametrize("mode", ["evaluation", "training"])
@pytest.mark.parametrize(("returns", "got"), [("tuple", "tuple"), ("dict", "dict"), ("Tensor", r"\(2, 2\)")])
def test_a_model_that_returns_no_logits_in_one_mode_is_refused(mode: str, returns: str, got: str) -> None:
    message = (
        r"^model Pair must return logits of shape \(batch, classes\) in "
        rf"{mode} mode; for a batch of 2 and 3 classes it returned {got}$"
    )
    with pytest.raises(ValueError, match=message):
        ModelConfig().adapt(Pair(mode, returns), classes=3, shape=(1, 2, 2), seed=0)


def test_trying_a_model_leaves_its_state_as_it_was() -> None:
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    generator = torch.random.get_rng_state()
    adapted = ModelConfig().adapt(module, classes=3, shape=(1, 2, 2), seed=0)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())


class Tied(nn.Module):
    """Two layers that share a weight, and a layer whose name torchvision gives to auxiliary heads."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(4, 4, bias=False)
        self.first = nn.Linear(4, 4, bias=False)
        self.first.weight = self.second.weight
        self.aux_layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.zeros(4, dtype=torch.bool))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.aux_layer(self.first(self.second(x.flatten(1)))))
        logits: Tensor = self.head(hidden)
        return logits


@pytest.mark.parametrize("norm", ["keep", "batch", "sync", "group"])
def test_weights_that_a_run_saved_are_read_again(norm: Any, tmp_path: Path) -> None:
    properties: dict[str, Any] = {"classes": 3, "shape": (1, 2, 2), "seed": 0}
    trained = ModelConfig(norm=norm).adapt(Tied(), **properties)
    for tensor in trained.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) > 0.5)
    file = tmp_path / "runs" / "x" / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_model(trained, file)
    again = ModelConfig(norm=norm, weights=str(file)).adapt(Tied(), **properties)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.get_parameter("first.weight") is again.get_parameter("second.weight")


@pytest.mark.parametrize("missing", ["aux_layer.weight", "second.weight"])
def test_weights_without_one_of_the_models_own_tensors_are_refused(missing: str, tmp_path: Path) -> None:
    state = {name: t.clone() for name, t in Tied().state_dict().items() if name != missing}
    if missing == "second.weight":
        del state["first.weight"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=rf"do not fit the model: .*{missing} is missing"):
        ModelConfig(weights=str(tmp_path / "w.safetensors")).adapt(Tied(), classes=3, shape=(1, 2, 2), seed=0)


def federation(module: nn.Module | None = None, **fields: Any) -> Federation:
    """Return a run of one round on a few images."""
    images = TensorDataset(torch.rand(8, 1, 6, 6), torch.arange(8) % 3)
    quiet = TrackingConfig(trackers=[], progress=False)
    clients = {"data": DataConfig(clients=2), "cohort": CohortConfig(size=2)}
    given: dict[str, Any] = {**clients, "rounds": 1, "tracking": quiet, **fields}
    return Federation(module=module, train=images, test=images, **given)


def test_a_finished_runs_weights_start_another_run() -> None:
    first = federation(model=ModelConfig(name="resnet8-gn", norm="sync"), name="x").run()
    still = LocalConfig(lr=1e-30)
    model = ModelConfig(name="resnet8-gn", norm="sync", weights="runs/x/model.safetensors")
    second = federation(model=model, local=still, name="y").run()
    for name, parameter in first.model.named_parameters():
        torch.testing.assert_close(second.model.get_parameter(name), parameter)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_old_weight_norm_is_refused_with_the_new_one() -> None:
    def net(wrap: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(), wrap(nn.Linear(36, 3)))

    with pytest.raises(
        ConfigError, match=r"^module Sequential cannot be copied \(.*\); .*use torch.nn.utils.par"
    ) as e:
        federation(net(nn.utils.weight_norm)).run()
    assert "\n" not in str(e.value)
    assert federation(net(nn.utils.parametrizations.weight_norm)).run().finished


class Masked(nn.Module):
    """A linear layer and batch norm beside a constant mask, as attention layers have."""

    def __init__(self, mask: list[float]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(36)
        self.linear = nn.Linear(36, 3)
        self.register_buffer("mask", torch.tensor(mask))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(x.flatten(1)))
        return logits


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("algorithm", "mask"),
    [
        (FedAvg(), [0.0, -math.inf, math.inf, -1e9, LOWEST]),
        (FedAsync(), [0.0, -math.inf, math.inf, -1e9, LOWEST]),
        (FedBuff(buffer_size=2), [0.0, -math.inf, math.inf, -1e9]),
        (FedBuff(buffer_size=2), [LOWEST]),
    ],
)
def test_constant_masks_stay_as_they_are(algorithm: Any, mask: list[float]) -> None:
    result = federation(Masked(mask), algorithm=algorithm, rounds=3).run()
    assert torch.equal(result.model.get_buffer("mask"), torch.tensor(mask))
    running = result.model.get_buffer("norm.running_mean")
    assert running.isfinite().all()
    assert running.all()  # statistics move on
