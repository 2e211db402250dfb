"""What is done to images: a client's feature shift, augmentation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Interval
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from fedddp.data.resizing import clip_boxes, torchvision_v2
from fedddp.data.targets import IGNORED, Boxes
from fedddp.rng import FEATURE_SHIFT, stream
from fedddp.section import Section

Indices = NDArray[np.int64]
Augment = Literal["none", "flip", "crop", "crop-flip", "color", "color-flip", "color-crop", "color-crop-flip"]


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

    def turn(self, masks: Tensor) -> Tensor:
        """Return `masks` (b, 1, H, W) turned as their images; pixels that move in do not count."""
        if not self.angle:
            return masks
        v2 = torchvision_v2()
        turned: Tensor = v2.rotate(masks, self.angle, v2.InterpolationMode.NEAREST, fill=IGNORED)
        return turned


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


def draw_augmentation(kind: Augment, count: int, rng: Generator) -> Tensor | None:
    """Return the draws of `count` images in [0, 1), (count, 3) or with colours (count, 6); or None."""
    if kind == "none":
        return None
    draws = [rng.random((count, 3), np.float32) for _ in range(1 + ("color" in kind))]
    return torch.from_numpy(np.concatenate(draws, axis=1))


def augment(images: Tensor, draws: Tensor, kind: Augment, *, fill: int = 0) -> Tensor:
    """Return `images` (b, C, H, W), each mirrored or moved by its own `draws` (b, 3 or more) in [0, 1).

    Masks are changed alike by the same draws; `fill` is the value of the pixels that move in.
    """
    if "flip" in kind:
        mirrored = images.flip(-1)
        images = torch.where(draws[:, 0, None, None, None] < 0.5, mirrored, images)
    if "crop" in kind:
        count, channels, height, width = images.shape
        margin = _margins(height, width)
        padded = pad(images, (margin[0], margin[0], margin[1], margin[1]), value=fill)
        across, down = _moves(draws, height, width).unbind(1)
        device = images.device
        y = (down[:, None] + torch.arange(height, device=device))[:, None, :, None]
        x = (across[:, None] + torch.arange(width, device=device))[:, None, None, :]
        example = torch.arange(count, device=device)[:, None, None, None]
        images = padded[example, torch.arange(channels, device=device)[:, None, None], y, x]
    return images


def augment_boxes(boxes: Boxes, draws: Tensor, kind: Augment, height: int, width: int) -> Boxes:
    """Return the boxes of images that `augment` changed by the same draws; parts outside are cut off.

    Boxes of which less than a pixel is left, across or down, are left out.
    """
    corners = boxes.boxes.clone()
    image = torch.repeat_interleave(torch.arange(len(boxes)), boxes.offsets.diff()).to(corners.device)
    if "flip" in kind:
        mirrored = torch.stack(
            [width - corners[:, 2], corners[:, 1], width - corners[:, 0], corners[:, 3]], 1
        )
        corners = torch.where(draws[image, :1] < 0.5, mirrored, corners)
    if "crop" in kind:
        margin = torch.tensor(_margins(height, width), device=corners.device)
        corners += (margin - _moves(draws, height, width))[image].repeat(1, 2)
    return clip_boxes(replace(boxes, boxes=corners), height, width)


def _margins(height: int, width: int) -> list[int]:
    """Return by how many pixels an image moves at most, across and down."""
    return [max(1, width // 8), max(1, height // 8)]


def _moves(draws: Tensor, height: int, width: int) -> Tensor:
    """Return the left and the top edge of each image's crop out of the padded one; (b, 2) int64."""
    return (draws[:, 1:3] * (2 * draws.new_tensor(_margins(height, width)) + 1)).long()


def jitter(images: Tensor, draws: Tensor) -> Tensor:
    """Return float `images` (b, C, H, W) in [0, 1] with their own brightness, contrast and saturation.

    Each is scaled by 0.6 to 1.4, by the last three of the image's draws in [0, 1); the contrast about the
    image's mean grey, the saturation about each pixel's grey, as torchvision's ColorJitter does it.
    """
    brightness, contrast, saturation = (0.6 + 0.8 * draws[:, 3:6]).to(images).T[:, :, None, None, None]
    images = (images * brightness).clamp(0, 1)
    mean = _grey(images).mean((2, 3), keepdim=True)
    images = torch.lerp(mean.expand_as(images), images, contrast.expand_as(images)).clamp(0, 1)
    if images.shape[1] != 3:
        return images
    return torch.lerp(_grey(images).expand_as(images), images, saturation.expand_as(images)).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    """Return the grey of `images` (b, C, H, W), (b, 1, H, W): by ITU-R 601 of RGB, else the mean."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = images.new_tensor([0.2989, 0.587, 0.114])[:, None, None]
    return (images * weights).sum(1, keepdim=True)
