"""A small network for masks."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedddp.models.norms import group_norm

WIDTHS = (32, 32, 48)
"""Channels at half, quarter and eighth resolution."""


class UNet(nn.Module):
    """U-Net (Ronneberger et al., 2015, arXiv:1505.04597) with group norm, for any image size from 8 x 8 on.

    Works at half resolution: every 2 x 2 pixels are one position with four times the channels, and so are
    their logits. 127,592 parameters for RGB images and 10 classes. Maps (b, C, H, W) to logits
    (b, classes, H, W).
    """

    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        """Make the network for images of shape[0] channels."""
        super().__init__()
        if min(shape[1:]) < 8:
            raise ValueError("8x8 is the least")
        inputs = (4 * shape[0], *WIDTHS[:-1])
        self.down = nn.ModuleList(_double(i, o) for i, o in zip(inputs, WIDTHS, strict=True))
        pairs = [(coarse + fine, fine) for fine, coarse in itertools.pairwise(WIDTHS)]
        self.up = nn.ModuleList(_double(i, o) for i, o in reversed(pairs))
        self.head = nn.Conv2d(WIDTHS[0], 4 * classes, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                # Small: before a norm only the direction of weights counts, and small ones turn faster.
                nn.init.normal_(layer.weight, std=0.02)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (b, classes, H, W) for images (b, C, H, W)."""
        height, width = x.shape[-2:]
        x = F.pixel_unshuffle(F.pad(x, (0, width % 2, 0, height % 2)), 2)
        maps: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            maps.append(x)
        for block, fine in zip(self.up, reversed(maps[:-1]), strict=True):
            # To the size of the finer map, which is odd where pooling has dropped a row. The nearest value,
            # as the gradient of a linear mix is not deterministic on a GPU.
            x = block(torch.cat([F.interpolate(x, size=fine.shape[-2:]), fine], 1))
        return F.pixel_shuffle(self.head(x), 2)[..., :height, :width]


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), group_norm(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
