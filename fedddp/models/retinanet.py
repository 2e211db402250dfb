"""RetinaNet as a network that maps images to tensors, from torchvision's parts."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedddp.models.norms import group_norm

Shape = tuple[int, int, int]


class RetinaNet(nn.Module):
    """RetinaNet (Lin et al., 2017, arXiv:1708.02002) up to the outputs of its head.

    Maps images (b, C, H, W), normalised, to a dictionary: "cls_logits" (b, A, K), "bbox_regression" (b, A, 4)
    and "anchors" (A, 4): left, top, right and bottom edge in pixels. Parameters have torchvision's names.
    """

    head_layers = ("head.regression_head.bbox_reg", "head.classification_head.cls_logits")
    """The last layer of each branch; see `weights.heads_of`."""

    def __init__(self, backbone: nn.Module, head: nn.Module, anchors: Any) -> None:
        """Join the parts of a network.

        Args:
            backbone: maps images to a dictionary of feature maps.
            head: a `RetinaNetHead` of torchvision.
            anchors: an `AnchorGenerator` of torchvision, with sizes for each feature map.
        """
        super().__init__()
        self.backbone, self.head = backbone, head
        self.levels = len(anchors.cell_anchors)
        # torchvision's generator holds them as attributes, which it replaces on other devices.
        for level, cell in enumerate(anchors.cell_anchors):
            self.register_buffer(f"cell_anchors_{level}", cell, persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs of the head for each anchor, and the anchors."""
        features = list(self.backbone(images).values())
        return {**self.head(features), "anchors": self._anchors(images, features)}

    def _anchors(self, images: Tensor, features: list[Tensor]) -> Tensor:
        """Return the anchors of all cells of all feature maps, as torchvision places them."""
        anchors = []
        for level, feature in enumerate(features):
            cell = self.get_buffer(f"cell_anchors_{level}")
            y, x = (
                torch.arange(cells, device=cell.device, dtype=cell.dtype) * (pixels // cells)
                for pixels, cells in zip(images.shape[2:], feature.shape[2:], strict=True)
            )
            shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([shift_x, shift_y, shift_x, shift_y], -1)
            anchors.append((shifts.view(-1, 1, 4) + cell).view(-1, 4))
        return torch.cat(anchors)


TINY_WIDTH = 12
TINY_SIZES = ((10, 14), (20, 28))
"""Sizes of the anchors of `retinanet_tiny` for its maps of stride 4 and 8: roots of areas, in pixels."""
TINY_RATIOS = (1.0, 1.5)
"""Their height by their width."""


def retinanet_tiny(classes: int, shape: Shape) -> nn.Module:
    """Make a RetinaNet with group norm for objects of 8 to 40 pixels in images of 48 to 64.

    Two feature maps, of stride 4 and 8, with four anchors per cell; 26,684 parameters for RGB and 10 classes.
    """
    if min(shape[1:]) < 16:
        raise ValueError("16x16 is the least")
    detection = {
        name: importlib.import_module(f"torchvision.models.detection.{name}")
        for name in ("retinanet", "anchor_utils")
    }
    anchors = detection["anchor_utils"].AnchorGenerator(TINY_SIZES, (TINY_RATIOS,) * len(TINY_SIZES))
    head = detection["retinanet"].RetinaNetHead(
        TINY_WIDTH, anchors.num_anchors_per_location()[0], classes, norm_layer=group_norm
    )
    return RetinaNet(_TinyBackbone(shape[0]), head, anchors)


class _TinyBackbone(nn.Module):
    """Five convolutions and a feature pyramid of two levels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = TINY_WIDTH
        self.stem = nn.Sequential(*_convolution(channels, width, 2), *_convolution(width, width, 1))
        self.stage1 = nn.Sequential(*_convolution(width, width, 2), *_convolution(width, width, 1))
        self.stage2 = nn.Sequential(*_convolution(width, 2 * width, 2))
        pyramid = importlib.import_module("torchvision.ops").FeaturePyramidNetwork
        self.fpn = pyramid([width, 2 * width], width)

    def forward(self, images: Tensor) -> Mapping[str, Tensor]:
        fine = self.stage1(self.stem(images))
        maps: Mapping[str, Tensor] = self.fpn({"0": fine, "1": self.stage2(fine)})
        return maps


def _convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    return [convolution, group_norm(outputs), nn.ReLU()]


def torchvision_retinanet(name: str, classes: int) -> nn.Module:
    """Make torchvision's RetinaNet `name`, with random weights.

    torchvision counts the background as a class, which no anchor is trained for; here there is none.
    """
    whole = importlib.import_module("torchvision.models").get_model(
        name, weights=None, weights_backbone=None, num_classes=classes
    )
    return RetinaNet(whole.backbone, whole.head, whole.anchor_generator)
