"""The folder that `predict` writes: its `predictions.json` lists the files of one call."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedddp.commands.use_options import write_json, writing
from fedddp.inference.pictures import PREDICTIONS
from fedddp.section import ConfigError
from fedddp.storage.history import read_json


def default_folder(run: str, client: str | None, best: bool | str) -> Path:
    """Return where a call writes without `--output`: each model of a run has a folder of its own."""
    name = "predictions" if client is None else f"predictions-{_escaped(client)}"
    if best:
        name += "+best" if best is True else f"+best-{best.replace('/', '-')}"
    return Path(run).expanduser() / name


def _escaped(client: str) -> str:
    """Return a client's name as a part of a file's: different ones stay different, none ends in +best."""
    return re.sub(r'[%+/\\:*?"<>|\x00-\x1f]', lambda found: f"%{ord(found[0]):02X}", client)


class PredictionFolder:
    """What one call writes. It replaces what the call before listed, and no other file."""

    def __init__(self, path: Path, names: Iterable[str], images: Sequence[Path]) -> None:
        """Check that a folder can be written, before any image is read.

        Args:
            path: the folder, which need not exist.
            names: the names of all files that may be written.
            images: the files that are predicted.

        Raises:
            ConfigError: it holds one of the images, or a file that would be replaced but is not listed.
        """
        self.path = path
        self.staging = path
        """Where files are written; they are moved when all are there."""
        if path.resolve() in {parent.resolve() for parent in {image.parent for image in images}}:
            raise ConfigError(f"{path} holds images to predict; write to another folder (--output FOLDER)")
        present = set(os.listdir(path)) if path.is_dir() else set()
        taken = sorted(present.intersection(names) - set(_listed(path)))
        if taken:
            raise ConfigError(
                f"{path / taken[0]} exists, and {PREDICTIONS} does not list it; move it, or write to another "
                "folder (--output FOLDER)"
            )

    @contextlib.contextmanager
    def open(self) -> Iterator[PredictionFolder]:
        """Make the folder, and in it a hidden one for the files until `publish`.

        Raises:
            ConfigError: it cannot be written.
        """
        with (
            writing(str(self.path), folder=True),
            tempfile.TemporaryDirectory(prefix=".writing-", dir=self.path) as staging,
        ):
            self.staging = Path(staging)
            yield self

    def publish(self, model: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Replace the files that are listed by those in `staging`; return the new `predictions.json`.

        Args:
            model: which model predicted.
            rows: what is known of each image.
        """
        old, new = _listed(self.path), sorted(os.listdir(self.staging))
        file = str(self.path / PREDICTIONS)
        # Both lists at first: after an interruption the next call may still delete what is there.
        write_json(file, {**model, "files": sorted({*old, *new}), "predictions": rows})
        for name in set(old) - set(new):
            (self.path / name).unlink(missing_ok=True)
        for name in new:
            os.replace(self.staging / name, self.path / name)
        content = {**model, "files": new, "predictions": rows}
        write_json(file, content)
        return content


def _listed(folder: Path) -> list[str]:
    """Return the names of the files in a folder that its `predictions.json` lists, itself not among them.

    Raises:
        ConfigError: fedddp did not write that file.
    """
    file = folder / PREDICTIONS
    if not os.path.lexists(file):
        return []
    try:
        names = read_json(file)["files"]
        # A path could lead out of the folder.
        wrong = [name for name in names if Path(name).name != name or name in ("..", PREDICTIONS)]
        if wrong or not isinstance(names, list):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{file} is no list of files by this version of fedddp; move it, or write to another folder "
            "(--output FOLDER)"
        ) from None
    return list(names)
