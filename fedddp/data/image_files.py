"""Files of images and masks: what Pillow reads, NumPy arrays, and TIFF files of several bands."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torch import Tensor

from fedddp.data.pixels import Range, channels_first, numbers, to_bytes, to_uint8

TIFF = (".tif", ".tiff")
_BITS, _SAMPLES, _EXTRA = 258, 277, 338  # tags of a TIFF file


def is_image(file: Path) -> bool:
    """Return whether a file is an image, by its ending, that can be read."""
    ending = file.suffix.lower()
    # Pillow knows endings, such as .pdf, that it only writes.
    return Image.registered_extensions().get(ending) in Image.OPEN or ending == ".npy"


def is_hidden(file: Path) -> bool:
    """Return whether a file, or one of the folders of its path, is hidden."""
    return any(part.startswith(".") for part in file.parts)


def read_image(path: str, value_range: Range | None = None) -> Tensor:
    """Return what `read_bands` returns, and grey pictures, but no arrays, as RGB among others."""
    pixels = read_bands(path, value_range)
    grey = len(pixels) == 1 and Path(path).suffix.lower() != ".npy"
    return pixels.expand(3, -1, -1) if grey else pixels


def read_bands(path: str, value_range: Range | None = None) -> Tensor:
    """Return the image in a file as uint8 (C, H, W): grey or RGB of a picture, all bands of other files.

    A picture is what Pillow reads intact. A `.npy` file has an array (H, W), (C, H, W) or (H, W, C); of a
    TIFF file with several bands or pages, all are channels, and none is taken for transparency.

    Args:
        path: the file.
        value_range: as for `to_uint8`.

    Raises:
        ValueError: as `to_uint8`; or the file needs tifffile, which is not installed.
        OSError: it cannot be read as an image.
    """
    ending = Path(path).suffix.lower()
    if ending == ".npy":
        values = numbers(np.load(path, allow_pickle=False), path)
        if values.dim() not in (2, 3):
            raise ValueError(f"{path} has shape {tuple(values.shape)}; give (H, W), (C, H, W) or (H, W, C)")
        return to_bytes(channels_first(values[None], path), path, value_range)[0]
    if ending in TIFF and _has_bands(path):
        return to_bytes(numbers(_tiff(path), path), path, value_range)
    with Image.open(path) as picture:
        return to_uint8(picture, path, value_range)


def read_mask(path: str) -> NDArray[np.int64]:
    """Return the mask in a file: a class per pixel, (H, W).

    Raises:
        ValueError: it is a picture of colours, or its pixels are no whole numbers.
        OSError: it cannot be read.
    """
    ending = Path(path).suffix.lower()
    if ending in (".jpg", ".jpeg", ".jfif"):
        raise ValueError(
            f"{path} is a JPEG file, which does not keep the numbers of classes; save masks as PNG"
        )
    values: NDArray[Any]
    if ending == ".npy":
        values = np.load(path, allow_pickle=False)
    elif ending in TIFF and _has_bands(path):
        values = _tiff(path)
    else:
        with Image.open(path) as picture:
            if picture.mode not in ("1", "L", "P", "I") and not picture.mode.startswith("I;16"):
                raise ValueError(
                    f"{path} is a mask of colours (mode {picture.mode}); save one whose pixels are the "
                    "numbers of classes, 0, 1, ... and 255 for what does not count (mode L or P)"
                )
            values = np.array(picture)
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise ValueError(
            f"{path} is a mask of {values.dtype} values of shape {values.shape}; give integers (H, W)"
        )
    return values.astype(np.int64)


def size_of(path: str) -> tuple[int, int] | None:
    """Return height and width by the header of a file; None where only reading it shows them."""
    if Path(path).suffix.lower() in (*TIFF, ".npy"):
        return None
    with Image.open(path) as picture:
        return picture.height, picture.width


def _has_bands(path: str) -> bool:
    """Return whether a TIFF file has bands that Pillow would drop, cut to 8 bits, or not read at all."""
    try:
        with open(path, "rb") as file:
            header = file.read(8)
            if header[2:3] == b"\x2b" or header[3:4] == b"\x2b":  # BigTIFF
                header += file.read(8)
            tags = ImageFileDirectory_v2(header)
            file.seek(tags.next)
            tags.load(file)
            samples, bits = int(tags.get(_SAMPLES, 1)), max(tags.get(_BITS, (1,)))
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return False  # no TIFF file: Pillow has the error, or reads what it is
    if samples == 1:
        return bool(tags.next)
    return bits > 8 or samples > 4 or 0 in tags.get(_EXTRA, ())


def _tiff(path: str) -> NDArray[Any]:
    """Return the bands of a TIFF file, (C, H, W)."""
    try:
        import tifffile
    except ImportError:
        raise ValueError(
            f"{path} has several bands, or colours of more than 8 bits, and needs tifffile: pip install "
            "'fedddp[tiff]'"
        ) from None
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        axes, values = series.axes, np.asarray(series.asarray())
    if values.ndim == 2:
        return values[None]
    if values.ndim != 3 or not {"Y", "X"} < set(axes):
        raise ValueError(
            f"{path} has the dimensions {axes} of {values.shape}; give one image of several bands"
        )
    (bands,) = (number for number, axis in enumerate(axes) if axis not in "YX")
    return np.moveaxis(values, bands, 0)
