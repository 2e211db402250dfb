"""Decoded pixels in files, which the ranks of a node map into memory."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger(__name__)

PIXELS, SIZES = "pixels-", "sizes-"
"""Files of decoded pixels, and of the sizes of the same images before they were resized."""

KEPT = 4
"""Files of decoded pixels that a data folder keeps: the training and test sets of two ways to read them."""
ZEROS = bytes(1 << 20)


def _remove_old(folder: Path) -> None:
    """Remove all but the newest files of decoded pixels, and what killed processes of this host left."""
    files = sorted(folder.glob(f"{PIXELS}*.npy"), key=lambda file: file.stat().st_mtime_ns)
    parts = [part for part in folder.glob(f"*.{socket.gethostname()}-*.part") if not _alive(part)]
    sizes = [file.with_name(SIZES + file.name.removeprefix(PIXELS)) for file in files[:-KEPT]]
    for file in [*files[:-KEPT], *sizes, *parts]:
        file.unlink(missing_ok=True)


def _alive(part: Path) -> bool:
    try:
        os.kill(int(part.suffixes[-2].rpartition("-")[2]), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


def mapped(file: Path, fill: Callable[[NDArray[np.uint8]], None], shape: tuple[int, ...]) -> Tensor:
    """Return the array in `file`, mapped into memory; if there is none, or it is corrupt, `fill` it first."""
    found = _load(file, shape) if file.exists() else None
    if found is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{socket.gethostname()}-{os.getpid()}.part")
        try:
            pixels = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
            with part.open("r+b") as allocated:
                _reserve(allocated, pixels.offset, part.stat().st_size)
            fill(pixels)
            pixels.flush()
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
        _remove_old(file.parent)
        found = np.load(file, mmap_mode="c", allow_pickle=False)
    # Copy-on-write, because torch wants writable memory; without a write the pages stay shared.
    return torch.from_numpy(found)


def _load(file: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """Return the array in `file`, or None if it is not of that shape."""
    try:
        pixels: NDArray[np.uint8] = np.load(file, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        logger.warning("decoded pixels in %s are corrupt (%s); decoding the images again", file, error)
        return None
    if pixels.shape == shape and pixels.dtype == np.uint8:
        return pixels
    logger.warning("decoded pixels in %s are of another shape or type; decoding the images again", file)
    return None


def _reserve(file: BinaryIO, start: int, end: int) -> None:
    """Allocate the bytes from `start` to `end`: a mapped page that finds the disk full kills the process."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(file.fileno(), 0, end)
        return
    file.seek(start)
    for offset in range(start, end, len(ZEROS)):
        file.write(ZEROS[: end - offset])
