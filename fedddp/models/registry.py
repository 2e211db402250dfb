"""Vision models by name: small ones, torchvision's, and the user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from fedddp.models import torchvision_zoo
from fedddp.models.norms import GroupSum, Norm, convert_norm, synchronized
from fedddp.models.weights import (
    for_backbone,
    load_weights,
    read_weights,
    shape_text,
    statistics_of,
    torchvision_weights,
)
from fedddp.models.zoo import SMALL_MODELS, Maker, Shape
from fedddp.rng import drawing_from
from fedddp.section import Section, local_path

logger = logging.getLogger(__name__)

Check = Callable[[Any], None]
"""Raises ValueError if a task cannot use a model's outputs for a batch of 2: "what it needs; what it got"."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The model that is trained."""

    key = "model"

    name: str = "lenet"
    """For classes and labels `lenet`, `2nn`, `cnn`, `resnet8-gn`, `resnet20-gn` or a classification model of
    torchvision such as `resnet18`; for masks `unet` or a segmentation model of torchvision such as
    `lraspp_mobilenet_v3_large`; for boxes `retinanet-tiny`, `retinanet_resnet50_fpn` or
    `retinanet_resnet50_fpn_v2`; or the dotted path of your own: a callable that returns an `nn.Module` and
    is given those of `num_classes`, `in_channels`, `image_size=(height, width)` that it has."""

    weights: str | None = None
    """Weights to start from: a local .safetensors file, or the name of torchvision's, such as
    `IMAGENET1K_V1` or `DEFAULT` (downloaded). A head for another number of classes is not loaded. Models
    for masks and boxes also take those of the classifier that is their backbone."""

    norm: Norm = "keep"
    """Turns batch and group norms into batch norm per rank (`batch`), batch norm over all ranks of
    a client (`sync`) or group norm (`group`), which needs no statistics of a client's data; or batch norms
    into a constant scale and shift (`frozen`), as detectors with pretrained weights often have."""

    freeze: list[str] = field(default_factory=list)
    """Layers or parameters that are not trained, by name: `layer1` covers `layer1.0.conv1.weight`.
    Running statistics of their batch norms are still updated; `norm: group` has none."""

    def __post_init__(self) -> None:
        _maker(self.name)
        if self.weights is None:
            return
        if not self.weights.endswith(".safetensors"):
            torchvision_weights(self.name, self.weights)

    def check_weights(self) -> None:
        """Raise ValueError when `weights` names a file that is not there."""
        if (
            self.weights
            and self.weights.endswith(".safetensors")
            and not local_path(self.weights, "model.weights").is_file()
        ):
            raise ValueError(f"model.weights={self.weights} is not a file")

    def build(
        self,
        *,
        classes: int,
        shape: Shape,
        seed: int,
        sync: GroupSum | None = None,
        check: Check | None = None,
    ) -> nn.Module:
        """Make the model, in training mode on the CPU; a pure function of its arguments.

        Args:
            classes: outputs of the model, >= 1.
            shape: channels, height and width of the images.
            seed: of the initial weights; torch's global random state is left as it was.
            sync: differentiable sum over the ranks of a client, for `norm: sync`.
            check: called with the outputs for a batch of 2 images in either mode, without content for a model
                by name; None: they must be logits (2, classes).

        Raises:
            ValueError: the model cannot take such images, or the weights do not fit it.
        """
        with drawing_from("model", seed):
            try:
                module = _maker(self.name)(classes, shape)
            except (ValueError, AssertionError) as error:
                if "." in self.name:
                    raise
                raise _cannot_take(self.name, shape, error) from error
            if "." in self.name:
                _materialize(module, self.name, shape)
            self._prepare(module)
            # Without computing where that saves time; a user's model may not work on the meta device.
            device = torch.device("meta") if "." not in self.name and _is_slow(module, shape) else None
            _try(module, self.name, shape, device, check or partial(check_logits, classes))
            return synchronized(module, sync)

    def adapt(
        self,
        module: nn.Module,
        *,
        classes: int,
        shape: Shape,
        seed: int,
        sync: GroupSum | None = None,
        check: Check | None = None,
    ) -> nn.Module:
        """Prepare the user's own `module`, in place, as `build` prepares a named one.

        Load `weights`, convert `norm`, apply `freeze`, and try it on images of `shape`.
        Arguments, result and errors as for `build`.
        """
        with drawing_from("model", seed):
            _materialize(module, type(module).__name__, shape)
            self._prepare(module)
            _try(module, type(module).__name__, shape, None, check or partial(check_logits, classes))
            return synchronized(module, sync)

    def _prepare(self, module: nn.Module) -> None:
        if self.weights is None:
            convert_norm(module, self.norm)
        else:
            self._load(module, read_weights(self.name, self.weights), self.weights)
        self._freeze(module)

    def _load(self, module: nn.Module, state: dict[str, Tensor], source: str) -> None:
        backbone = for_backbone(module, state)
        own = statistics_of(module.state_dict())
        if backbone is not None:
            state = backbone
            own = {name for name in own if name.startswith("backbone.")}
            own -= {name for name in own if name.startswith("backbone.fpn.")}
        # A file of a converted model has the statistics that the conversion leaves.
        converted = statistics_of(state) != own
        if converted:
            convert_norm(module, self.norm)
        if backbone is not None:
            fresh = module.state_dict()
            new = len(fresh.keys() - state.keys())
            state = {**fresh, **state}
            logger.info(
                "model.weights=%s: %d tensors of the backbone; the other %d of the model start at random",
                source,
                len(backbone),
                new,
            )
        load_weights(module, state, source)
        if not converted:
            convert_norm(module, self.norm)

    def _freeze(self, module: nn.Module) -> None:
        for prefix in self.freeze:
            chosen = [
                parameter
                for name, parameter in module.named_parameters()
                if f"{name}.".startswith(f"{prefix.rstrip('.')}.")
            ]
            if not chosen:
                layers = [name for name, _ in module.named_children()]
                raise ValueError(
                    f"model.freeze: there are no parameters named {prefix!r}; "
                    f"the layers are {', '.join(layers)}"
                )
            for parameter in chosen:
                parameter.requires_grad_(False)
        if self.freeze and not any(p.requires_grad for p in module.parameters()):
            raise ValueError(f"model.freeze={self.freeze} leaves nothing to train; freeze less")


# ---- names to makers ----


def _maker(name: str) -> Maker:
    """Return what makes the model `name` from the number of classes and the images' shape.

    Raises:
        ValueError: there is no such model.
    """
    if name in SMALL_MODELS:
        return SMALL_MODELS[name]
    if "." in name:
        return _users_maker(name)
    make = torchvision_zoo.maker(name)
    if make is not None:
        return make
    near = difflib.get_close_matches(name, [*SMALL_MODELS, *torchvision_zoo.usable_names()])
    hint = f"did you mean {' or '.join(near)}?" if near else f"try {', '.join(SMALL_MODELS)}"
    raise ValueError(f"name: unknown model {name!r}; {hint}")


def _users_maker(path: str) -> Maker:
    location, _, attribute = path.rpartition(".")
    try:
        factory: Any = getattr(importlib.import_module(location), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"name: cannot import {path!r}: {error}") from error
    if not callable(factory):
        raise ValueError(f"name: {path!r} is not callable; name a class or a function")

    def make(classes: int, shape: Shape) -> nn.Module:
        offered = {"num_classes": classes, "in_channels": shape[0], "image_size": shape[1:]}
        signature = inspect.signature(factory)
        arguments = {key: value for key, value in offered.items() if key in signature.parameters}
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise ValueError(
                f"model.name={path}: {error}; it is given those of {', '.join(offered)} that it has, and all "
                "others need a default"
            ) from error
        module = factory(**arguments)
        if not isinstance(module, nn.Module):
            raise ValueError(f"model.name={path} returned {type(module).__name__}, not a module")
        return module

    return make


def _materialize(module: nn.Module, name: str, shape: Shape) -> None:
    """Give lazy layers their parameters, by one pass in evaluation mode."""
    if any(isinstance(layer, LazyModuleMixin) for layer in module.modules()):
        device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
        try:
            with torch.no_grad():
                module.eval()(torch.zeros(2, *shape, device=device))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise _cannot_take(name, shape, error) from error


def _is_slow(module: nn.Module, shape: Shape) -> bool:
    """Return whether to compute an image's outputs takes longer than to import what the meta device needs."""
    multiplications = math.prod(shape[1:]) * sum(parameter.numel() for parameter in module.parameters())
    return multiplications > 10**10  # at most: strides, pools and linear layers do fewer


def _try(module: nn.Module, name: str, shape: Shape, device: torch.device | None, check: Check) -> None:
    """Try `module` in both modes, so that a misfit shows before training; leave it in training mode.

    The try is on `device`, with a copy of the state without content; None: with a copy of the state itself.
    """
    state = dict([*module.named_parameters(), *module.named_buffers()])
    images = torch.zeros(2, *shape, device=device or next((t.device for t in state.values()), None))
    for mode in ("evaluation", "training"):
        module.train(mode == "training")
        copy = {
            key: tensor.detach().clone() if device is None else torch.empty_like(tensor, device=device)
            for key, tensor in state.items()
        }
        try:
            with torch.no_grad():
                outputs = torch.func.functional_call(module, copy, (images,))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise _cannot_take(name, shape, error) from error
        except (TypeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"model {name} fails on a batch of images ({type(error).__name__}: {error}); its forward "
                "must take a tensor (batch, C, H, W) and nothing else"
            ) from error
        try:
            check(outputs)
        except ValueError as error:
            wanted, _, got = str(error).partition("; ")
            raise ValueError(
                f"model {name} must return {wanted} in {mode} mode; {got}{_purpose(name)}"
            ) from error


def _purpose(name: str) -> str:
    """Return what a model is for that is not for classes or labels, as an addition to a message."""
    if name == "unet" or name in torchvision_zoo.SEGMENTATION:
        return f" ({name} is for masks: task=Segmentation)"
    if name == "retinanet-tiny" or name in torchvision_zoo.RETINANETS:
        return f" ({name} is for boxes: task=Detection)"
    return ""


def check_logits(classes: int, outputs: Any) -> None:
    """Raise ValueError unless `outputs`, for a batch of 2 images, are logits (2, classes)."""
    got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if got != (2, classes):
        raise ValueError(
            f"logits of shape (batch, classes); for a batch of 2 and {classes} classes it returned {got}"
        )


def _cannot_take(name: str, shape: Shape, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return ValueError(
        f"model {name} cannot take images of {shape_text(shape)} ({reason}); "
        "set another data.image_size (torchvision's models are made for about 224) or model.name"
    )
