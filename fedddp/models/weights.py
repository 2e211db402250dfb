"""Pretrained weights: torchvision's by name, or a local safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedddp.models import torchvision_zoo
from fedddp.section import local_path


def heads_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that give the outputs of `module`, by name.

    Those that its attribute `head_layers` names, such as ("head.boxes", "head.classes"); or else one: the
    linear layer (or convolution) defined last. RetinaNet has two, one for boxes and one for classes; LR-ASPP
    has one per resolution, and adds their logits.

    Raises:
        ValueError: `module` has no such layer.
    """
    named = getattr(module, "head_layers", None)
    if isinstance(named, tuple):
        return {name: module.get_submodule(name) for name in named}
    layers = [
        (name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no linear layer that could be its head")
    return dict(layers[-1:])


def head_of(module: nn.Module) -> tuple[str, nn.Module]:
    """Return name and module of the classifier: the last of `heads_of`.

    Raises:
        ValueError: `module` has no such layer.
    """
    return list(heads_of(module).items())[-1]


def torchvision_weights(name: str, weights: str) -> Any:
    """Return torchvision's enum member `weights` of the model `name`, or else of its backbone."""
    if Path(weights).suffix or "/" in weights:
        raise ValueError(
            f"weights must be a .safetensors file, got {weights}; a pickled file can run code when "
            "it is read: if you trust it, convert it with safetensors.torch.save_file"
        )
    return torchvision_zoo.weights_of(name, weights)


def read_weights(name: str, weights: str) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of torchvision's `weights` for the model `name`.

    Raises:
        ValueError: they cannot be read or downloaded.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if weights.endswith(".safetensors"):
            return load_file(local_path(weights, "model.weights"))
        member = torchvision_weights(name, weights)
        # torchvision publishes pickles: only tensors are read from them, after a check of the hash.
        state: dict[str, Tensor] = member.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model.weights={weights} cannot be read: {error}") from error
    return state


def statistics_of(state: dict[str, Tensor]) -> set[str]:
    """Return the names of the running means in a state dict."""
    return {name for name in state if name.endswith("running_mean")}


def for_backbone(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the part of a classifier's `state` that is the backbone of `module`, by the names it has there.

    None if `state` is not that of a classifier, or `module` has no backbone, or another one. Names must be
    those of `module.backbone` or `module.backbone.body`, as in torchvision's models.
    """
    wanted = module.state_dict().keys()
    if state.keys() & wanted:
        return None
    for prefix in ("backbone.body.", "backbone."):
        own = {name for name in wanted if name.startswith(prefix) and not _is_count(name)}
        for stem in ("", "features."):
            renamed = {
                f"{prefix}{name.removeprefix(stem)}": value
                for name, value in state.items()
                if name.startswith(stem)
            }
            learnt = {name for name in own if not _is_statistic(name)}
            if learnt and learnt <= renamed.keys():
                return {
                    name: value
                    for name, value in renamed.items()
                    if name in wanted or _is_statistic(name) or _is_count(name)
                }
    return None


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy `state` into `module`, all of it but a head or auxiliary heads that do not fit."""
    wanted = module.state_dict()
    first = next((k for k, m in module.named_modules() if isinstance(m, nn.Conv2d)), None)
    state = _without_auxiliary(state, wanted, source)
    state = _with_tied(_of_this_version(state, wanted), wanted)
    stem = f"{first}.weight"
    if stem in state and state[stem].dim() == 4:
        state[stem] = torchvision_zoo.with_channels(state[stem], wanted[stem].shape[1])
    for head in heads_of(module):
        if any(wanted[key].shape != state[key].shape for key in _inside(head, state) & wanted.keys()):
            state |= {key: wanted[key] for key in _inside(head, wanted)}
    wrong = [
        f"{key} {_fault(wanted.get(key), state.get(key))}"
        for key in sorted(wanted.keys() | state.keys())
        if _fault(wanted.get(key), state.get(key))
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"model.weights={source} do not fit the model: {', '.join(wrong[:3])}{more}")
    module.load_state_dict(state)


def _without_auxiliary(state: dict[str, Tensor], wanted: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return `state` without the auxiliary heads of torchvision's models, which are not built here."""
    dropped = "aux_classifier." if source.endswith(".safetensors") else "aux"
    return {k: v for k, v in state.items() if k in wanted or not k.lower().startswith(dropped)}


def _of_this_version(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the names that today's torchvision has, and with the counts of batch norms.

    Frozen batch norms, which torchvision's detectors were published with, do not count batches; the heads of
    the first RetinaNet have fewer levels of names.
    """
    renamed = {}
    for name, value in state.items():
        branch, found, rest = name.partition("_head.conv.")
        number, _, leaf = rest.partition(".")
        modern = f"{branch}_head.conv.{int(number) // 2}.0.{leaf}" if found and number.isdigit() else name
        renamed[name if name in wanted or modern not in wanted else modern] = value
    if not any(_is_count(name) for name in renamed):
        renamed |= {name: value for name, value in wanted.items() if _is_count(name)}
    return renamed


def _is_count(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


def _with_tied(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with every name of a tied tensor of `wanted`, which a file holds once."""
    by_memory = {wanted[name].data_ptr(): value for name, value in state.items() if name in wanted}
    tied = {
        n: by_memory[t.data_ptr()] for n, t in wanted.items() if n not in state and t.data_ptr() in by_memory
    }
    return {**state, **{name: value for name, value in tied.items() if value.shape == wanted[name].shape}}


def _inside(prefix: str, state: dict[str, Tensor]) -> set[str]:
    return {key for key in state if key.startswith(f"{prefix}.")}


def _fault(wanted: Tensor | None, given: Tensor | None) -> str:
    if wanted is None or given is None:
        return "is missing" if given is None else "is unknown"
    sizes = [shape_text(tuple(t.shape)) or "scalar" for t in (given, wanted)]
    return "" if sizes[0] == sizes[1] else f"is {sizes[0]}, not {sizes[1]}"


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape as "3x224x224"."""
    return "x".join(map(str, shape))
