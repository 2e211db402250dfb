"""Everything a run needs to go on bit for bit: safetensors and JSON, written aside and then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fedddp.topology import World

FACTS = "state.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """How often the run is saved."""

    every: int = 10
    """Rounds between checkpoints, >= 1; the last round, and a stop, are always saved."""

    keep: int = 2
    """Newest checkpoints that stay on disk, >= 1."""

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on disk."""

    folder: Path
    facts: dict[str, Any]

    def tensors(self, file: str) -> dict[str, Tensor]:
        """Return the tensors of `file`, on the CPU."""
        return safetensors.torch.load_file(self.folder / file)

    def files(self, pattern: str) -> list[Path]:
        """Return the checkpoint's files that match `pattern`."""
        return sorted(self.folder.glob(pattern))


class Checkpoints:
    """The checkpoints of one run, in `folder`."""

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, keep, world

    def save(
        self,
        name: str,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        write_shard: Callable[[Path], None],
    ) -> None:
        """Collective. Save under `name`; names sort by age. Either whole, or as if never called.

        The coordinator writes `model`, `tensors` and `facts`; each rank adds its part of the
        clients' state with `write_shard(folder)`.

        Raises:
            OSError: a rank could not write; the earlier checkpoints are untouched.
        """
        aside, final = self.folder / f".{name}.part", self.folder / name
        if self.world.is_coordinator:
            shutil.rmtree(aside, ignore_errors=True)
        self.world.barrier()

        def write_part() -> None:
            aside.mkdir(parents=True, exist_ok=True)
            write_shard(aside)

        problem = self._first(self._attempt(write_part))
        if problem is None and self.world.is_coordinator:
            problem = self._attempt(lambda: self._finish(aside, final, model, tensors, facts))
        problem = self._first(problem)
        if problem is not None:
            if self.world.is_coordinator:
                shutil.rmtree(aside, ignore_errors=True)
            raise OSError(
                f"cannot write checkpoint {final}: {problem}; make room or choose another --output, "
                "then start again with --resume auto (the last checkpoint is whole)"
            )

    def _attempt(self, write: Callable[[], object]) -> str | None:
        try:
            write()
        except (OSError, safetensors.SafetensorError) as error:
            return str(getattr(error, "strerror", None) or error)
        return None

    def _first(self, problem: str | None) -> str | None:
        return next((p for p in self.world.gather(problem) if p is not None), None)

    def _finish(
        self,
        aside: Path,
        final: Path,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
    ) -> None:
        save_model(model, aside / "model.safetensors")
        if tensors:
            save_tensors(tensors, aside / "state.safetensors")
        files = {path.name: _digest(path) for path in sorted(aside.iterdir())}
        with (aside / FACTS).open("w") as out:
            json.dump({**facts, "files": files}, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync(self.folder)
        for old in self._names()[: -self.keep]:
            shutil.rmtree(self.folder / old, ignore_errors=True)

    def _names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("."))

    def open(self, name: str, facts: dict[str, Any]) -> Saved:
        """Return the checkpoint `name`, that another rank found whole."""
        return Saved(self.folder / name, facts)

    def newest(self) -> tuple[Saved | None, list[str]]:
        """Return the newest whole checkpoint, and one line for each damaged one passed over."""
        damaged: list[str] = []
        for name in reversed(self._names()):
            try:
                return Saved(self.folder / name, _verified(self.folder / name)), damaged
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                damaged.append(f"checkpoint {self.folder / name} is damaged ({error}); passed over")
        return None, damaged


def save_model(model: nn.Module, path: Path) -> None:
    """Write the weights of `model` to `path`, atomically; `safetensors.torch.load_model` reads them."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or place not in seen:  # tied weights are written once
            seen.add(place)
            state[name] = tensor
    save_tensors(state, path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write `tensors` to `path`, atomically."""
    aside = path.with_name(f".{path.name}.part")
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    safetensors.torch.save_file(copies, aside)
    _sync(aside)
    aside.replace(path)


def load_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors`, as written by `save_model`, into `model` in place.

    Raises:
        ValueError: a name or a shape does not fit the model.
    """
    state = model.state_dict()
    written = {state[name].data_ptr() for name in tensors if name in state and state[name].numel()}
    missing = [n for n, t in state.items() if n not in tensors and t.data_ptr() not in written]
    unknown = [name for name in tensors if name not in state]
    wrong = [n for n, t in tensors.items() if n in state and state[n].shape != t.shape]
    for what, names in (
        ("misses", missing),
        ("does not know", unknown),
        ("has another shape for", wrong),
    ):
        if names:
            raise ValueError(f"the checkpoint is of another model: the model {what} {names[0]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def _verified(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    for file, digest in facts["files"].items():
        if _digest(folder / file) != digest:
            raise ValueError(f"{file} is not what was written")
    return facts


def _digest(path: Path) -> str:
    _sync(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of `tensors` together."""
    return sum(t.numel() * t.element_size() for t in tensors)
