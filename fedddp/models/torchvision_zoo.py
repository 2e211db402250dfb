"""torchvision's models by name: classifiers, segmentation models and RetinaNets."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from fedddp.models.retinanet import torchvision_retinanet
from fedddp.models.zoo import Maker, Shape

SEGMENTATION = {
    "lraspp_mobilenet_v3_large": "mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large": "mobilenet_v3_large",
    "deeplabv3_resnet50": "resnet50",
    "deeplabv3_resnet101": "resnet101",
    "fcn_resnet50": "resnet50",
    "fcn_resnet101": "resnet101",
}
"""Models for masks, each with the classifier that is its backbone."""

RETINANETS = {"retinanet_resnet50_fpn": "resnet50", "retinanet_resnet50_fpn_v2": "resnet50"}
"""Models for boxes, each with the classifier that is its backbone."""

SAMPLED = "draws examples from torch's global generator and divides its loss by their number in a batch"
UNUSABLE = {
    "fasterrcnn_": SAMPLED,
    "maskrcnn_": SAMPLED,
    "keypointrcnn_": SAMPLED,
    "ssd": "divides its loss by the number of foreground anchors in a batch",
    "fcos_": "divides its loss by the number of foreground points in a batch",
}
"""Beginnings of the names of torchvision's other detectors, and why more ranks would train another model."""

LRASPP_HEADS = ("classifier.low_classifier", "classifier.high_classifier")


def models() -> Any:
    """Import `torchvision.models` on first use: it takes seconds."""
    return importlib.import_module("torchvision.models")


def classifiers() -> list[str]:
    """Return the names of torchvision's classification models."""
    names: list[str] = models().list_models(module=models())
    return names


def usable_names() -> list[str]:
    """Return the names of all models of torchvision that `maker` makes."""
    return [*classifiers(), *SEGMENTATION, *RETINANETS]


def maker(name: str) -> Maker | None:
    """Return what makes torchvision's model `name`; None: it has no such model.

    Raises:
        ValueError: it is a detector whose loss of an image depends on the batch.
    """
    for beginning, reason in UNUSABLE.items():
        if name.startswith(beginning) and name in models().list_models(module=models().detection):
            raise ValueError(
                f"name: {name} {reason}, so that several ranks would not train what one rank trains; use "
                f"retinanet-tiny, {' or '.join(RETINANETS)}"
            )
    if name not in usable_names():
        return None
    return lambda classes, shape: _make(name, classes, shape)


def _make(name: str, classes: int, shape: Shape) -> nn.Module:
    if name in RETINANETS:
        module = torchvision_retinanet(name, classes)
    else:
        module = models().get_model(name, weights=None, **_options(name, classes, shape))
    if name.startswith("lraspp_"):
        module.head_layers = LRASPP_HEADS  # type: ignore[assignment]
    first = next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
    first.weight.data = with_channels(first.weight.data, shape[0])
    first.in_channels = shape[0]
    return module


def _options(name: str, classes: int, shape: Shape) -> dict[str, Any]:
    options: dict[str, Any] = {"num_classes": classes}
    if name in SEGMENTATION:
        options["weights_backbone"] = None  # torchvision would download them
        if not name.startswith("lraspp_"):
            options["aux_loss"] = False
    elif name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        if shape[1] != shape[2]:
            raise ValueError("it needs square images")
        options["image_size"] = shape[1]
    elif name.startswith("maxvit_"):
        options["input_size"] = shape[1:]
    return options


def weights_of(name: str, weights: str) -> Any:
    """Return torchvision's enum member `weights` of the model `name`, or else of its backbone.

    Raises:
        ValueError: there are none of that name.
    """
    if name not in usable_names():
        raise ValueError(f"weights={weights}: torchvision has none for {name}; name a local file")
    members = dict(models().get_model_weights(name).__members__)
    backbone = {**SEGMENTATION, **RETINANETS}.get(name)
    if backbone:
        members = {**models().get_model_weights(backbone).__members__, **members}
    if weights not in members:
        raise ValueError(
            f"weights={weights}: {name} has {', '.join(members) or 'none'}; or name a local file"
        )
    return members[weights]


def with_channels(weight: Tensor, channels: int) -> Tensor:
    """Return a first convolution's `weight`, (out, in, h, w), for images of `channels` channels.

    A gray image gives what it would give as an RGB image of three equal channels.
    """
    given = weight.shape[1]
    if channels in (given, 1):
        return weight if channels == given else weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // given), 1, 1)[:, :channels] * (given / channels)
