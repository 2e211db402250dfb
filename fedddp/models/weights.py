"""Pretrained weights: torchvision's by name, or a local safetensors file."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedddp.section import local_path


def head_of(module: nn.Module) -> tuple[str, nn.Module]:
    """Return name and module of the classifier: the linear layer (or convolution) defined last.

    Raises:
        ValueError: `module` has no such layer.
    """
    layers = [
        (name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no linear layer that could be its head")
    return layers[-1]


def torchvision_weights(name: str, weights: str) -> Any:
    """Return torchvision's enum member `weights` of the model `name`."""
    if Path(weights).suffix or "/" in weights:
        raise ValueError(
            f"weights must be a .safetensors file, got {weights}; a pickled file can run code when "
            "it is read: if you trust it, convert it with safetensors.torch.save_file"
        )
    if name not in torchvision_names():
        raise ValueError(f"weights={weights}: torchvision has none for {name}; name a local file")
    members = torchvision_models().get_model_weights(name).__members__
    if weights not in members:
        raise ValueError(
            f"weights={weights}: {name} has {', '.join(members) or 'none'}; or name a local file"
        )
    return members[weights]


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


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy `state` into `module`, all of it but a head or auxiliary heads that do not fit."""
    wanted = module.state_dict()
    head, _ = head_of(module)
    first = next((k for k, m in module.named_modules() if isinstance(m, nn.Conv2d)), None)
    if not source.endswith(".safetensors"):  # torchvision's auxiliary heads
        state = {key: value for key, value in state.items() if not key.lower().startswith("aux")}
    state = _with_tied(state, wanted)
    stem = f"{first}.weight"
    if stem in state and state[stem].dim() == 4:
        state[stem] = with_channels(state[stem], wanted[stem].shape[1])
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


def with_channels(weight: Tensor, channels: int) -> Tensor:
    """Return a first convolution's `weight`, (out, in, h, w), for images of `channels` channels.

    A gray image gives what it would give as an RGB image of three equal channels.
    """
    given = weight.shape[1]
    if channels in (given, 1):
        return weight if channels == given else weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // given), 1, 1)[:, :channels] * (given / channels)


def torchvision_models() -> Any:
    """Import `torchvision.models` on first use: it takes seconds."""
    return importlib.import_module("torchvision.models")


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classification models."""
    models = torchvision_models()
    names: list[str] = models.list_models(module=models)
    return names


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape as "3x224x224"."""
    return "x".join(map(str, shape))
