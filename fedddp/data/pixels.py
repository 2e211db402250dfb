"""From one image, as a picture, an array or a tensor, to uint8 pixels (C, H, W)."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fedddp.data.resizing import torchvision_v2

FULL = 65535
"""Largest 16-bit value."""

LEAST = 0.25
"""Share of the full range that the values of a 16-bit image must reach, if no range is set."""

_BYTES = {
    "RGB;16B": ("RGB;16B", "RGB;16L"),
    "RGBA;16B": ("RGBA;16B", "RGBA;16L"),
    "LA;16B": ("RGBA",),
}
"""How Pillow stores 16-bit colours in a PNG file, and how it reads the higher and the lower bytes of them."""

Range = tuple[float, float]
"""The values that become black and white."""


def to_uint8(image: Any, where: str, value_range: Range | None = None) -> Tensor:
    """Return one image as uint8 (C, H, W).

    8-bit values stay as they are. 16-bit and floating ones are scaled from `value_range`, and clipped, or
    from their full range. Transparent pixels are composed on black.

    Args:
        image: a PIL image of any mode, or an array or tensor (H, W), (H, W, C) or (C, H, W) of numbers. The
            channels are the smaller of the outer dimensions.
        where: names the image in errors.
        value_range: the values low and high, low < high, that become 0 and 255; None: 0 and 65535 of 16-bit
            images, 0 and 1 of floating ones.

    Raises:
        ValueError: it is none of these, its channels are ambiguous, or its values are out of range or use
            little of the full 16-bit range.
    """
    if isinstance(image, Image.Image):
        colours = full_depth(image)
        if colours is None:
            return _picture(image, where, value_range)
        return to_bytes(colours, where, value_range)
    if isinstance(image, np.ndarray):
        image = numbers(image, where)
    if not isinstance(image, Tensor) or image.dim() not in (2, 3):
        kind = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{where} is {kind}; expected a PIL image or a tensor (C, H, W)")
    return to_bytes(channels_first(image[None], where), where, value_range)[0]


def numbers(array: NDArray[Any], where: str) -> Tensor:
    """Return a copy of an array as a tensor that torch can compute with.

    Raises:
        ValueError: it holds no numbers.
    """
    if array.dtype.kind not in "buif":
        raise ValueError(f"{where} holds {array.dtype} values; give real numbers")
    if array.dtype.kind == "u" and array.dtype.itemsize > 2:
        array = array.astype(np.int64)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def full_depth(image: Image.Image) -> Tensor | None:
    """Return a PNG picture of 16-bit colours, of which Pillow keeps 8, as uint16 (C, H, W); None: any other.

    Only a file that was opened, and not read yet, still has all of its bits.
    """
    tiles, stream = getattr(image, "tile", None), getattr(image, "fp", None)
    if image.format != "PNG" or not tiles or stream is None or tiles[0][3] not in _BYTES:
        return None
    position = stream.seek(0, io.SEEK_CUR)
    stream.seek(0)
    content = stream.read()
    stream.seek(position)
    read = []
    for raw in _BYTES[tiles[0][3]]:
        opened: Any = Image.open(io.BytesIO(content))
        opened.tile = [(*opened.tile[0][:3], raw)]
        read.append(torch.from_numpy(np.array(opened)).permute(2, 0, 1).double())
    # Grey and transparency are read as four bytes: the higher and the lower one of each.
    high, low = (read[0][::2], read[0][1::2]) if len(read) == 1 else read
    values = high * 256 + low
    if len(values) != 3:
        values = values[:-1] * (values[-1:] / FULL)
    return values.round().to(torch.uint16)


def _picture(image: Image.Image, where: str, value_range: Range | None) -> Tensor:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit, 32-bit and floating grey
        values = torch.from_numpy(np.array(image).astype(np.float64))[None]
        if value_range is not None:
            return _scaled(values, where, value_range)
        low, high = float(values.min()), float(values.max())
        top = 1.0 if image.mode == "F" else float(FULL)
        if not (low >= 0 and high <= top):
            raise ValueError(
                f"{where} has {image.mode} values from {low:g} to {high:g}, but must be in 0..{top:g}; "
                "rescale it, or set data.value_range"
            )
        if image.mode != "F":
            _check_depth(high, where)
        return _scaled(values, where, (0, top))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        grey = image.mode in ("LA", "La", "L", "1")
        opaque = Image.new("RGBA", image.size, "black")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque.convert("L" if grey else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    converted = image if image.mode in ("L", "RGB") else image.convert("RGB")
    pixels: Tensor = torchvision_v2().pil_to_tensor(converted)
    return pixels


def to_bytes(images: Tensor, where: str, value_range: Range | None = None) -> Tensor:
    """Return images of any shape as uint8, scaled as by `to_uint8`.

    Raises:
        ValueError: values of another type or range.
    """
    if images.dtype == torch.uint8:
        return images
    if images.dtype == torch.bool:
        return images.to(torch.uint8) * 255
    if value_range is not None:
        return _scaled(images.double(), where, value_range)
    if images.dtype == torch.uint16:
        values = images.double()
        _check_depth(float(values.max()), where)
        return _scaled(values, where, (0, FULL))
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
        low, high = images.min().item(), images.max().item()
        raise ValueError(
            f"{where} has {str(images.dtype).removeprefix('torch.')} values from {low:g} to "
            f"{high:g}; give uint8, or floating values 0..1 without Normalize (fedddp normalises), or set "
            "data.value_range"
        )
    return (images * 255).round().to(torch.uint8)


def _scaled(values: Tensor, where: str, value_range: Range) -> Tensor:
    """Return float64 `values` as uint8: linear, with the ends of the range at 0 and 255, and clipped."""
    low, high = value_range
    if not torch.isfinite(values).all():
        raise ValueError(f"{where} has values that are not finite, such as nan; replace them by numbers")
    return ((values - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)


def _check_depth(highest: float, where: str) -> None:
    """Refuse a 16-bit image that would be nearly black, such as one of 12 bits in 16.

    A black one is taken: it is black in any range.
    """
    if 0 < highest < LEAST * (FULL + 1):
        bits = math.ceil(math.log2(highest + 1))
        raise ValueError(
            f"{where} has 16-bit values up to {highest:g} of {FULL}, which would leave "
            f"{int(highest / FULL * 255) + 1} of 256 grey levels; set data.value_range, such as "
            f"[0, {2**bits - 1}], or [0, {FULL}] to take it as it is"
        )


def channels_first(images: Tensor, where: str) -> Tensor:
    """Return a stack of images (n, H, W), (n, H, W, C) or (n, C, H, W) as (n, C, H, W).

    The channels are the smallest dimension, where that is the first or the last of an image.

    Raises:
        ValueError: its channels look like its rows.
    """
    if images.dim() == 3:
        return images[:, None]
    first, middle, last = images.shape[1:]
    usual = (1, 3)
    if first in usual or (last not in usual and first < min(middle, last)):
        return images
    if last in usual or last < min(first, middle):
        return images.permute(0, 3, 1, 2).contiguous()
    raise ValueError(
        f"{where} has shape {(first, middle, last)}, whose channels could be the first or the last "
        "dimension; give tensors (C, H, W) with fewer channels than rows and columns"
    )
