"""From one image, as a picture, an array or a tensor, to uint8 pixels (C, H, W)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedddp.data.transforms import torchvision_v2

SIXTEEN_BIT = 257
"""65535 / 255: the factor between the full ranges of 16 and 8 bits."""


def to_uint8(image: Any, where: str) -> Tensor:
    """Return one image as uint8 (C, H, W).

    16-bit values are scaled from their full range 0..65535; transparent pixels are composed on black.

    Args:
        image: a PIL image of any mode, or an array or tensor (H, W), (H, W, C) or (C, H, W) of uint8, of
            uint16, or floating in 0..1. The channels are the smaller of the outer dimensions.
        where: names the image in errors.

    Raises:
        ValueError: it is none of these, its values are out of range, or its channels are ambiguous.
    """
    if isinstance(image, Image.Image):
        return _picture(image, where)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image))  # a copy: torch wants writable memory
    if not isinstance(image, Tensor) or image.dim() not in (2, 3):
        kind = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{where} is {kind}; expected a PIL image or a tensor (C, H, W)")
    return to_bytes(channels_first(image[None], where), where)[0]


def _picture(image: Image.Image, where: str) -> Tensor:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit, 32-bit and floating grey
        values = torch.from_numpy(np.array(image).astype(np.float64))
        low, high = float(values.min()), float(values.max())
        top = 1.0 if image.mode == "F" else 65535.0
        if not (low >= 0 and high <= top):
            raise ValueError(
                f"{where} has {image.mode} values from {low:g} to {high:g}, but must be in 0..{top:g}; "
                "rescale it"
            )
        return (values * (255 / top)).round().to(torch.uint8)[None]
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


def to_bytes(images: Tensor, where: str) -> Tensor:
    """Return images of any shape as uint8; uint16 is scaled from its full range, floats from 0..1.

    Raises:
        ValueError: values of another type or range.
    """
    if images.dtype == torch.uint8:
        return images
    if images.dtype == torch.uint16:
        return (images.double() / SIXTEEN_BIT).round().to(torch.uint8)
    if images.dtype == torch.bool:
        return images.to(torch.uint8) * 255
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
        low, high = images.min().item(), images.max().item()
        raise ValueError(
            f"{where} has {str(images.dtype).removeprefix('torch.')} values from {low:g} to "
            f"{high:g}; give uint8, or floating values 0..1 without Normalize (fedddp normalises)"
        )
    return (images * 255).round().to(torch.uint8)


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
