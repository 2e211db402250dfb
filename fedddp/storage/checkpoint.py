"""Everything a run needs to go on bit for bit: safetensors and JSON, written aside and then renamed."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fedddp.distributed.world import World

FACTS = "state.json"

NAME = re.compile(r"[a-z]+(-\d+)+")
"""What a checkpoint is called: a word, and numbers by which it is older or newer than another."""


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
        """Return the tensors of `file`, on the CPU; none if the checkpoint has no such file."""
        return safetensors.torch.load_file(self.folder / file) if file in self.facts["files"] else {}

    def files(self, pattern: str) -> list[Path]:
        """Return the checkpoint's own files that match `pattern`."""
        return [self.folder / name for name in sorted(fnmatch.filter(self.facts["files"], pattern))]


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
        write_shard: Callable[[Path], Iterable[Path]],
    ) -> None:
        """Collective. Save under `name`, e.g. "round-00010"; either whole, or as if never called.

        Numbers in a name sort by age. A whole checkpoint of that name is left alone: it is of the
        same point of the same run. The coordinator writes `model`, `tensors` and `facts`; each rank
        adds its part of the clients' state with `write_shard(folder)`, which returns its files.

        Raises:
            OSError: a rank could not write; the earlier checkpoints are untouched.
        """
        aside, final = self.folder / f".{name}.part", self.folder / name
        if self.world.is_coordinator:
            self._clean()
        self.world.barrier()
        files: dict[str, str] = {}

        def write_part() -> None:
            aside.mkdir(parents=True, exist_ok=True)
            files.update({path.name: _digest(path, sync=True) for path in write_shard(aside)})

        # Ranks tell what they wrote: a network file system may show it to the coordinator too late.
        told = self.world.gather((_attempt(write_part), files))
        problem = next((problem for problem, _ in told if problem is not None), None)
        if problem is None:
            if self.world.is_coordinator:
                facts = {
                    **facts,
                    "files": {name: digest for _, part in told for name, digest in part.items()},
                }
                problem = _attempt(lambda: self._finish(aside, final, model, tensors, facts))
            problem = self.world.gather(problem)[0]
        if problem is not None:
            if self.world.is_coordinator:
                self._clean()
            raise OSError(
                f"cannot write checkpoint {final}: {problem}; make room or choose another --output, "
                "then start again with --resume auto (the last checkpoint is whole)"
            )

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
        for name in ("model.safetensors", *(["state.safetensors"] if tensors else [])):
            facts["files"][name] = _digest(aside / name)
        plain = json.loads(json.dumps(facts))  # as they will be read, all keys being strings
        write_text(aside / FACTS, json.dumps({"digest": _digest_facts(plain), "facts": plain}, indent=1))
        _sync(aside)
        if final.exists() and not isinstance(_whole(final), str):
            self._clean()
            return
        self._set_aside(final)
        aside.rename(final)
        _sync(self.folder)
        for old in self._names()[: -self.keep]:
            (self.folder / old).rename(self.folder / f".{old}.part")
        self._clean()

    def _clean(self) -> None:
        """Delete what a killed run left half written or half deleted."""
        for part in self.folder.glob(".*.part"):
            shutil.rmtree(part, ignore_errors=True)

    def _set_aside(self, damaged: Path) -> Path | None:
        """Rename a `damaged` checkpoint, if there is one, so that it is never looked at again."""
        if not damaged.exists():
            return None
        numbers = (damaged.with_name(f".damaged-{n}-{damaged.name}") for n in itertools.count(1))
        target = next(path for path in numbers if not path.exists())
        damaged.rename(target)
        return target

    def _names(self) -> list[str]:
        """Return the names of the checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        names = [path.name for path in self.folder.iterdir()]
        ages = {name: [int(n) for n in re.findall(r"\d+", name)] for name in names if NAME.fullmatch(name)}
        return sorted(ages, key=lambda name: ages[name])

    def open(self, name: str, facts: dict[str, Any]) -> Saved:
        """Return the checkpoint `name`, that another rank found whole."""
        return Saved(self.folder / name, facts)

    def newest(self) -> tuple[Saved | None, list[str]]:
        """Return the newest whole checkpoint, and one line for each damaged one, which is set aside."""
        damaged: list[str] = []
        for name in reversed(self._names()):
            facts = _whole(self.folder / name)
            if not isinstance(facts, str):
                return Saved(self.folder / name, facts), damaged
            try:
                target = self._set_aside(self.folder / name)
                what = f"set aside as {target.name if target else name}"
            except OSError:
                what = "passed over"
            damaged.append(f"checkpoint {self.folder / name} is damaged ({facts}); {what}")
        return None, damaged


def _attempt(write: Callable[[], object]) -> str | None:
    try:
        write()
    except (OSError, safetensors.SafetensorError) as error:
        return str(getattr(error, "strerror", None) or error)
    return None


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
    try:
        safetensors.torch.save_file(copies, aside)
    except safetensors.SafetensorError as error:
        aside.unlink(missing_ok=True)
        number = re.search(r"\(os error (\d+)\)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
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


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, atomically: a kill leaves the file as it was or as it shall be."""
    aside = path.with_name(f".{path.name}.part")
    with aside.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    aside.replace(path)


def _whole(folder: Path) -> dict[str, Any] | str:
    """Return the facts of the checkpoint in `folder`, or what is wrong with it; reads all its bytes."""
    try:
        written = json.loads((folder / FACTS).read_bytes())
        facts: dict[str, Any] = written["facts"]
        if written["digest"] != _digest_facts(facts):
            return f"{FACTS} is not what was written"
        for file, digest in facts["files"].items():
            if _digest(folder / file) != digest:
                return f"{file} is not what was written"
    except OSError as error:
        return f"{Path(error.filename or FACTS).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{FACTS} is not what was written"
    return facts


def _digest_facts(facts: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _digest(path: Path, *, sync: bool = False) -> str:
    if sync:
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
