"""Checkpoints: all that a run needs to resume bit for bit, as safetensors and JSON."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fedddp.distributed.world import World
from fedddp.section import PositiveInt, Section
from fedddp.storage.history import check_file, parse_json, read_text

METADATA = "state.json"

NAME = re.compile(r"[a-z]+(-\d+)+")
"""Names of checkpoints: a word, and numbers that sort by age."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """How often the run is saved."""

    key = "checkpoint"

    every: PositiveInt = 10
    """Rounds between checkpoints, >= 1; the last round, and a stop, are always saved."""

    keep: PositiveInt = 2
    """Newest checkpoints that stay on disk, >= 1."""

    best: list[str] | str | None = None
    """Metric of an evaluation, such as eval/accuracy, by which the best model is kept as best.safetensors;
    the lowest value is the best for a name that ends in loss, else the highest. Of a list, such as
    [eval/iou, eval/dice], the first is that metric; the best by the others are kept beside it, as
    best-eval-dice.safetensors. What clients with models of their own had then is in best-clients."""

    @property
    def metrics(self) -> list[str]:
        """The metrics of `best`, the decisive one first; empty for none."""
        return [self.best] if isinstance(self.best, str) else self.best or []


@dataclass(frozen=True)
class Saved:
    """An intact checkpoint on disk."""

    folder: Path
    metadata: dict[str, Any]

    def tensors(self, file: str) -> dict[str, Tensor]:
        """Return the tensors of `file`, on the CPU; none if the checkpoint has no such file."""
        return safetensors.torch.load_file(self.folder / file) if file in self.metadata["files"] else {}

    def files(self, pattern: str) -> list[Path]:
        """Return the checkpoint's own files that match `pattern`."""
        return [self.folder / name for name in sorted(fnmatch.filter(self.metadata["files"], pattern))]


class Checkpoints:
    """The checkpoints of one run, in `folder`; training continues while the coordinator writes one."""

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, keep, world
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[str | None] | None = None
        """Of the checkpoint that is being written, on the coordinator: an error, or None."""

    def save(
        self,
        name: str,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        write_shard: Callable[[Path], Iterable[Path]],
    ) -> None:
        """Collective. Save under `name`, e.g. "round-00010"; a failure leaves no trace.

        Numbers in a name sort by age. An intact checkpoint of that name is kept: it is of the same
        point of the same run. Each rank writes its part of the clients' state with `write_shard(folder)`,
        which returns its files. The coordinator copies `model`, `tensors` and `metadata`, which a thread
        writes: the checkpoint is on disk after `finish`, with which the next `save` begins.

        Raises:
            OSError: a rank could not write this checkpoint or the one before; earlier ones are untouched.
        """
        self.finish()
        aside = self.folder / f".{name}.part"
        files: dict[str, str] = {}

        def write_part() -> None:
            self.folder.mkdir(exist_ok=True)  # not the run directory, should it have been deleted
            aside.mkdir(exist_ok=True)
            files.update({path.name: _digest(path, sync=True) for path in write_shard(aside)})

        # Ranks report what they wrote: a network file system may show it to the coordinator too late.
        reports = self.world.gather((_attempt(write_part), files))
        problem = next((problem for problem, _ in reports if problem is not None), None)
        if self.world.is_coordinator and problem is None:
            written = {name: digest for _, part in reports for name, digest in part.items()}
            # As it will be read, all keys being strings.
            plain = json.loads(json.dumps({**metadata, "files": written}))
            parts = {"model.safetensors": distinct_state(model), "state.safetensors": tensors}
            copies = {file: _copied(part) for file, part in parts.items() if part}
            self._written = self._writer.submit(self._write, name, copies, plain)
        elif problem is not None:
            if self.world.is_coordinator:
                self._clean()
            raise OSError(self._error(name, problem))

    def finish(self) -> None:
        """Collective. Wait until the checkpoint that is being written is on disk.

        Raises:
            OSError: it could not be written; the earlier ones are untouched.
        """
        error = self.wait()
        if self.world.is_coordinator:
            self._clean()
        error = self.world.gather(error)[0]
        if error is not None:
            raise OSError(error)

    def wait(self) -> str | None:
        """Wait until no checkpoint is being written; return the error of the last one, once."""
        written, self._written = self._written, None
        return None if written is None else written.result()

    def _error(self, name: str, problem: str) -> str:
        return (
            f"cannot write checkpoint {self.folder / name}: {problem}; make room or choose another --output, "
            "then resume with --resume auto (the last checkpoint is intact)"
        )

    def _write(
        self, name: str, files: Mapping[str, Mapping[str, Tensor]], metadata: dict[str, Any]
    ) -> str | None:
        """Write the coordinator's part of a checkpoint, to which the shards belong; return an error."""
        problem = _attempt(lambda: self._complete(name, files, metadata))
        return None if problem is None else self._error(name, problem)

    def _complete(
        self, name: str, files: Mapping[str, Mapping[str, Tensor]], metadata: dict[str, Any]
    ) -> None:
        aside, final = self.folder / f".{name}.part", self.folder / name
        for file, tensors in files.items():
            write_tensors(tensors, aside / file)
            metadata["files"][file] = _digest(aside / file)
        content = {"digest": _digest_json(metadata), "metadata": metadata}
        write_text(aside / METADATA, json.dumps(content, indent=1))
        _sync(aside)
        if final.exists() and not isinstance(_verified(final), str):
            self._clean()
            return
        self._set_aside(final)
        aside.rename(final)
        _sync(self.folder)
        for old in self._names()[: -self.keep]:
            (self.folder / old).rename(self.folder / f".{old}.part")
        self._clean()

    def _clean(self) -> None:
        """Delete the partial folders of a killed run."""
        for part in self.folder.glob(".*.part"):
            shutil.rmtree(part, ignore_errors=True)

    def _set_aside(self, corrupt: Path) -> Path | None:
        """Rename a `corrupt` checkpoint, if there is one, so that it is never used."""
        if not corrupt.exists():
            return None
        numbers = (corrupt.with_name(f".corrupt-{n}-{corrupt.name}") for n in itertools.count(1))
        target = next(path for path in numbers if not path.exists())
        corrupt.rename(target)
        return target

    def _names(self) -> list[str]:
        """Return the names of the checkpoints, oldest first."""
        return _names(self.folder)

    def open(self, name: str, metadata: dict[str, Any]) -> Saved:
        """Return the checkpoint `name`, which another rank found intact."""
        return Saved(self.folder / name, metadata)

    def newest(self) -> tuple[Saved | None, list[str]]:
        """Return the newest intact checkpoint, and one line for each corrupt one, which is set aside."""
        corrupt: list[str] = []
        self._clean()
        for name in reversed(self._names()):
            metadata = _verified(self.folder / name)
            if not isinstance(metadata, str):
                return Saved(self.folder / name, metadata), corrupt
            try:
                target = self._set_aside(self.folder / name)
                action = f"set aside as {target.name if target else name}"
            except OSError:
                action = "skipped"
            corrupt.append(f"checkpoint {self.folder / name} is corrupt ({metadata}); {action}")
        return None, corrupt


def newest_intact(folder: Path) -> Saved | None:
    """Return the newest intact checkpoint in `folder`, and leave corrupt ones where they are."""
    for name in reversed(_names(folder)):
        metadata = _verified(folder / name)
        if not isinstance(metadata, str):
            return Saved(folder / name, metadata)
    return None


def _names(folder: Path) -> list[str]:
    """Return the names of the checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir()]
    ages = {name: [int(n) for n in re.findall(r"\d+", name)] for name in names if NAME.fullmatch(name)}
    return sorted(ages, key=lambda name: ages[name])


def _attempt(write: Callable[[], object]) -> str | None:
    try:
        write()
    except (OSError, safetensors.SafetensorError) as error:
        return str(getattr(error, "strerror", None) or error)
    return None


def save_model(model: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the weights of `model` to `path`, atomically; `safetensors.torch.load_model` reads them.

    Args:
        model: its state dict is written; tied tensors are written once.
        path: a .safetensors file.
        metadata: texts that go into the file's header.
    """
    save_tensors(distinct_state(model), path, metadata)


def distinct_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of `model` with each tied tensor once, under its first name."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or memory not in seen:
            seen.add(memory)
            state[name] = tensor
    return state


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` to the .safetensors file `path`, atomically, with texts for its header."""
    write_tensors(_copied(tensors), path, metadata)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of `tensors` on the CPU, dense and without shared memory, as safetensors needs them."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write dense `tensors` without shared memory, as `save_tensors` does, but without copies.

    Raises:
        OSError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        safetensors.torch.save_file(dict(tensors), aside, None if metadata is None else dict(metadata))
    except safetensors.SafetensorError as error:
        aside.unlink(missing_ok=True)
        number = re.search(r"\(os error (\d+)\)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    _order_metadata(aside)
    share(aside)
    _sync(aside)
    aside.replace(path)


def share(path: Path) -> None:
    """Give a file the rights of any new file; safetensors makes it readable for the owner only."""
    # To ask for the umask means to change it, for all threads.
    new = path.with_name(f".{path.name}.rights")
    new.touch()
    path.chmod(new.stat().st_mode & 0o777)
    new.unlink()


def _order_metadata(path: Path) -> None:
    """Sort the texts in the header of a .safetensors file, which are written in random order: equal bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            assert len(ordered) <= length
            file.seek(8)
            file.write(ordered.ljust(length))


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
    """Write `text` to `path`, atomically: a kill leaves the old file or the new one."""
    aside = path.with_name(f".{path.name}.part")
    aside.unlink(missing_ok=True)
    with aside.open("x", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    aside.replace(path)


def _verified(folder: Path) -> dict[str, Any] | str:
    """Return the metadata of the checkpoint in `folder`, or how it is corrupt; reads all its bytes."""
    changed = "is not as it was written"
    try:
        written = parse_json(read_text(folder / METADATA))
        if "facts" in written:
            return "it is of fedddp before 0.1.0, which names its parts otherwise"
        metadata: dict[str, Any] = written["metadata"]
        if written["digest"] != _digest_json(metadata):
            return f"{METADATA} {changed}"
        for file, digest in metadata["files"].items():
            if _digest(folder / file) != digest:
                return f"{file} {changed}"
    except OSError as error:
        return f"{Path(error.filename or METADATA).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{METADATA} {changed}"
    return metadata


def _digest_json(metadata: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=16).hexdigest()


def _digest(path: Path, *, sync: bool = False) -> str:
    if sync:
        _sync(path)
    check_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
