"""What is done to images: resizing, a client's feature shift, augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Interval
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from fedddp.rng import FEATURE_SHIFT, stream
from fedddp.section import Section

Indices = NDArray[np.int64]
Augment = Literal["none", "flip", "crop", "crop-flip"]


def torchvision_v2() -> Any:
    """Import `torchvision.transforms.v2.functional` on first use: torchvision takes more than a second."""
    from torchvision.transforms.v2 import functional

    return functional


RESIZE = "shorter side to size, bilinear with antialiasing, then the centre"
"""What `resize` does, for the users of an exported model."""


def resize(images: Tensor, size: int | None) -> Tensor:
    """Resize the shorter side of (..., C, H, W) to `size` and crop the centre; None: no change."""
    if size is None or tuple(images.shape[-2:]) == (size, size):
        return images
    v2 = torchvision_v2()
    resized: Tensor = v2.resize(images, [size], antialias=True)
    return v2.center_crop(resized, [size, size])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ImageShift:
    """What the feature shift does to the images of one client."""

    angle: float
    """Rotation in degrees, counter-clockwise."""

    gains: tuple[float, float, float]
    """Factor of each colour channel; grey images take the first."""

    noise: float
    """Standard deviation of the pixel noise, in units of the full range."""

    def apply(self, images: Tensor, examples: Indices, seed: int) -> Tensor:
        """Return shifted `images` (b, C, H, W), float in [0, 1].

        The noise belongs to the example: it is the same in every pass and on any rank.

        Args:
            images: float in [0, 1]; (b, C, H, W).
            examples: index of each image in its dataset; (b,).
            seed: of the noise.
        """
        if self.angle:
            v2 = torchvision_v2()
            images = v2.rotate(images, self.angle, v2.InterpolationMode.BILINEAR)
        gains = images.new_tensor(self.gains[: images.shape[1]])
        images = images * gains[:, None, None]
        if self.noise:
            noise = np.stack(
                [
                    Generator(Philox(key=np.array([seed, example], dtype=np.uint64))).standard_normal(
                        images.shape[1:], dtype=np.float32
                    )
                    for example in examples.tolist()
                ]
            )
            images = images + self.noise * torch.from_numpy(noise).to(images.device)
        return images.clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class FeatureShift(Section):
    """Feature shift: each client's images are rotated, tinted and noisy in their own way."""

    key = "data.feature_shift"

    rotation: Annotated[float, Interval(ge=0, le=180)] = 0.0
    """Largest angle in degrees, 0 to 180; a client's angle is uniform in [-rotation, rotation]."""

    color: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Largest change of a channel's gain, 0 to 1; a client's gains are uniform in 1 ± color."""

    noise: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Largest standard deviation of the pixels (1 is white); a client's is in [0, noise]."""

    def of_client(self, client: int, seed: int) -> ImageShift:
        """Return the shift of `client`, a pure function of the fields and the arguments."""
        rng = stream(FEATURE_SHIFT, seed, client)
        angle = self.rotation * rng.uniform(-1, 1)
        red, green, blue = (1 + self.color * rng.uniform(-1, 1, 3)).tolist()
        return ImageShift(angle, (red, green, blue), self.noise * rng.uniform())


def augment(images: Tensor, draws: Tensor, kind: Augment) -> Tensor:
    """Return `images` (b, C, H, W), each mirrored or moved by its own `draws` (b, 3) in [0, 1)."""
    if "flip" in kind:
        mirrored = images.flip(-1)
        images = torch.where(draws[:, 0, None, None, None] < 0.5, mirrored, images)
    if "crop" in kind:
        count, channels, height, width = images.shape
        margin = [max(1, width // 8), max(1, height // 8)]
        padded = pad(images, (margin[0], margin[0], margin[1], margin[1]))
        across, down = (draws[:, 1:] * (2 * draws.new_tensor(margin) + 1)).long().unbind(1)
        device = images.device
        y = (down[:, None] + torch.arange(height, device=device))[:, None, :, None]
        x = (across[:, None] + torch.arange(width, device=device))[:, None, None, :]
        example = torch.arange(count, device=device)[:, None, None, None]
        images = padded[example, torch.arange(channels, device=device)[:, None, None], y, x]
    return images
