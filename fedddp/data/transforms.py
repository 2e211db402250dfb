"""What is done to images: resizing, a client's feature shift, augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from fedddp.rng import stream

v2: Any = functional  # its functions are not typed as exported

Indices = NDArray[np.int64]
Augment = Literal["none", "flip", "crop", "crop-flip"]


def resize(images: Tensor, size: int | None) -> Tensor:
    """Resize the shorter side of (..., C, H, W) to `size` and crop the centre; None: do not."""
    if size is None or tuple(images.shape[-2:]) == (size, size):
        return images
    resized: Tensor = v2.resize(images, [size], antialias=True)
    return v2.center_crop(resized, [size, size])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Look:
    """What one client's camera does to its images."""

    angle: float
    """Rotation in degrees, counter-clockwise."""

    gains: tuple[float, float, float]
    """Factor of each colour channel; gray images take the first."""

    noise: float
    """Standard deviation of the pixel noise, in units of the full range."""


@dataclass(frozen=True, kw_only=True)
class FeatureSkew:
    """Feature skew: each client's images are rotated, tinted and noisy in a way of their own."""

    rotation: float = 0.0
    """Largest angle in degrees, 0 to 180; a client's angle is uniform in [-rotation, rotation]."""

    color: float = 0.0
    """Largest change of a channel's gain, 0 to 1; a client's gains are uniform in 1 ± color."""

    noise: float = 0.0
    """Largest standard deviation of the pixels (1 is white); a client's is in [0, noise]."""

    def __post_init__(self) -> None:
        for name, most in (("rotation", 180), ("color", 1), ("noise", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be between 0 and {most}, got {getattr(self, name)}")

    def look(self, client: int, seed: int) -> Look:
        """Return how `client` sees, a pure function of the fields and the arguments."""
        random = stream("look", seed, client)
        angle = self.rotation * random.uniform(-1, 1)
        red, green, blue = (1 + self.color * random.uniform(-1, 1, 3)).tolist()
        return Look(angle, (red, green, blue), self.noise * random.uniform())


def apply_shift(images: Tensor, look: Look, examples: Indices, seed: int) -> Tensor:
    """Return `images` (b, C, H, W) in 0..1 as a client's camera takes them, in 0..1 again.

    The noise belongs to the example: it is the same in every pass and on any rank.
    """
    if look.angle:
        images = v2.rotate(images, look.angle, InterpolationMode.BILINEAR)
    gains = images.new_tensor(look.gains[: images.shape[1]])
    images = images * gains[:, None, None]
    if look.noise:
        noise = np.stack(
            [
                Generator(Philox(key=np.array([seed, example], dtype=np.uint64))).standard_normal(
                    images.shape[1:], dtype=np.float32
                )
                for example in examples.tolist()
            ]
        )
        images = images + look.noise * torch.from_numpy(noise).to(images.device)
    return images.clamp(0, 1)


def augmented(images: Tensor, draws: Tensor, augment: Augment) -> Tensor:
    """Return `images` (b, C, H, W), each mirrored or moved by its own `draws` (b, 3) in 0..1."""
    if "flip" in augment:
        mirrored = v2.horizontal_flip(images)
        images = torch.where(draws[:, 0, None, None, None] < 0.5, mirrored, images)
    if "crop" in augment:
        count, channels, height, width = images.shape
        margin = [max(1, width // 8), max(1, height // 8)]
        padded = v2.pad(images, margin)
        across, down = (draws[:, 1:] * (2 * draws.new_tensor(margin) + 1)).long().unbind(1)
        device = images.device
        y = (down[:, None] + torch.arange(height, device=device))[:, None, :, None]
        x = (across[:, None] + torch.arange(width, device=device))[:, None, None, :]
        example = torch.arange(count, device=device)[:, None, None, None]
        images = padded[example, torch.arange(channels, device=device)[:, None, None], y, x]
    return images
