"""The user's own module and datasets of a run, and what its config.yaml records of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from fedddp.config.files import OBJECTS
from fedddp.config.loader import to_dict
from fedddp.config.schema import Config
from fedddp.data.datasets import Images, from_dataset, load
from fedddp.rng import drawing_from
from fedddp.section import ConfigError


@dataclass(frozen=True)
class Objects:
    """What a program passed to `Federation` instead of naming it; each may be None."""

    module: nn.Module | None = None
    train: Dataset[Any] | None = None
    test: Dataset[Any] | None = None

    def __post_init__(self) -> None:
        if self.test is not None and self.train is None:
            raise ConfigError("test is given without train; give both, or data.dataset for both")

    def load_images(self, config: Config) -> tuple[Images, Images | None]:
        """Return the training and the test images: the user's own, or those that `config.data` names.

        Raises:
            ValueError: files are missing or corrupt, or labels or images do not fit.
        """
        if self.train is None:
            return load(config.data, config.task.target)
        options = (config.data, config.task.target)
        images = from_dataset(self.train, *options)
        return images, None if self.test is None else from_dataset(self.test, *options, like=images)

    def record(self, config: Config, train: Images | None, test: Images | None) -> dict[str, Any]:
        """Return what the run's config.yaml holds: `config`, with these objects instead of names.

        Images are needed where the dataset is one of these objects.
        """
        recorded: dict[str, Any] = to_dict(config)
        objects: dict[str, Any] = {}
        if self.module is not None:
            del recorded["model"]["name"]
            objects["module"] = _describe_module(self.module)
        if self.train is not None and train is not None:
            for name in ("dataset", "root", "download"):
                del recorded["data"][name]
            objects["train"] = _describe_images(self.train, train)
        if self.test is not None and test is not None:
            objects["test"] = _describe_images(self.test, test)
        return recorded | ({OBJECTS: objects} if objects else {})


def made(module: object, seed: int) -> nn.Module | None:
    """Return the user's `module`; a function that makes it draws the initial weights by `seed`.

    Raises:
        ConfigError: it is no `nn.Module`, or the function cannot make one.
    """
    result = module
    if callable(module) and not isinstance(module, nn.Module):
        try:
            with drawing_from("model", seed):
                result = module()
        except TypeError as error:
            raise ConfigError(
                f"module: cannot make it without arguments ({error}); pass a function, as in "
                "module=lambda: Net(classes=10)"
            ) from error
    if result is not None and not isinstance(result, nn.Module):
        raise ConfigError(
            f"module must be an nn.Module or a function that makes one, got {type(result).__name__}; name "
            "models by model.name"
        )
    return result


def _describe_module(module: nn.Module) -> dict[str, Any]:
    """Return the class of a module, its size, and a digest of its layers and shapes (not of its weights)."""
    tensors = module.state_dict(keep_vars=True)
    lazy = nn.parameter.is_lazy  # a layer that takes its shape from its first input has none yet
    state = [(name, () if lazy(t) else tuple(t.shape), str(t.dtype)) for name, t in tensors.items()]
    return {
        "class": _qualified_name(module),
        "parameters": sum(p.numel() for p in module.parameters() if not lazy(p)),
        "digest": _digest(repr(module).encode(), repr(state).encode()),
    }


def _describe_images(dataset: Dataset[Any], images: Images) -> dict[str, Any]:
    return {
        "class": _qualified_name(dataset),
        "examples": len(images),
        "shape": list(images.shape),
        "classes": images.classes,
        "digest": images.digest(),
    }


def _qualified_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
