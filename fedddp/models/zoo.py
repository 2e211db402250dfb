"""Small networks of the federated learning literature."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from fedddp.models.norms import group_norm
from fedddp.models.retinanet import retinanet_tiny
from fedddp.models.unet import UNet

Shape = tuple[int, int, int]
"""Channels, height and width of an image, in pixels."""

Maker = Callable[[int, Shape], nn.Module]
"""Makes a model from the number of classes and the shape of the images."""


def lenet(classes: int, shape: Shape) -> nn.Module:
    """Make LeNet with 20 and 50 filters: 431,080 parameters for 28 x 28 gray images, 10 classes.

    Images under 16 pixels are padded so that they survive both convolutions; the least is 4 x 4.
    """
    padding = 2 if min(shape[1:]) < 16 else 0
    return _two_convolutions(classes, shape, filters=(20, 50), hidden=500, padding=padding)


def cnn(classes: int, shape: Shape) -> nn.Module:
    """Make the CNN of McMahan et al. (2017): 1,663,370 parameters for 28 x 28 gray, 10 classes."""
    return _two_convolutions(classes, shape, filters=(32, 64), hidden=512, padding=2)


def _two_convolutions(
    classes: int, shape: Shape, *, filters: tuple[int, int], hidden: int, padding: int
) -> nn.Module:
    channels, height, width = shape
    for _ in filters:  # a 5 x 5 convolution and a 2 x 2 pool
        height, width = (height + 2 * padding - 4) // 2, (width + 2 * padding - 4) // 2
    if min(height, width) < 1:
        raise ValueError("4x4 is the least")
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, filters[0], 5, padding=padding),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(filters[0], filters[1], 5, padding=padding),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(filters[1] * height * width, hidden),
            relu3=nn.ReLU(),
            fc2=nn.Linear(hidden, classes),
        )
    )


def two_nn(classes: int, shape: Shape) -> nn.Module:
    """Make the 2NN of McMahan et al. (2017): 199,210 parameters for 28 x 28 gray, 10 classes."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(shape[0] * shape[1] * shape[2], 200),
            relu1=nn.ReLU(),
            fc2=nn.Linear(200, 200),
            relu2=nn.ReLU(),
            fc3=nn.Linear(200, classes),
        )
    )


class ResNetGN(nn.Sequential):
    """ResNet for CIFAR (He et al., 2016) with group norm: 6 `blocks` + 2 layers, any image size."""

    def __init__(self, classes: int, shape: Shape, *, blocks: int) -> None:
        """Make three stages of `blocks` residual blocks with 16, 32 and 64 filters."""
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=_conv3x3(shape[0], 16, 1), norm1=group_norm(16), relu=nn.ReLU()
        )
        channels = 16
        for stage, filters in enumerate((16, 32, 64), start=1):
            layers[f"stage{stage}"] = nn.Sequential(
                _Block(channels, filters, stride=1 if stage == 1 else 2),
                *(_Block(filters, filters, stride=1) for _ in range(blocks - 1)),
            )
            channels = filters
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(channels, classes)
        super().__init__(layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is projected where the shape changes."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels, filters, stride)
        self.norm1 = group_norm(filters)
        self.conv2 = _conv3x3(filters, filters, 1)
        self.norm2 = group_norm(filters)
        self.shortcut: nn.Module = nn.Identity()
        if channels != filters:
            projection = nn.Conv2d(channels, filters, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, group_norm(filters))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


def _conv3x3(channels: int, filters: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)


SMALL_MODELS: dict[str, Maker] = {
    "lenet": lenet,
    "2nn": two_nn,
    "cnn": cnn,
    "resnet8-gn": partial(ResNetGN, blocks=1),
    "resnet20-gn": partial(ResNetGN, blocks=3),
    "unet": UNet,
    "retinanet-tiny": retinanet_tiny,
}
"""The models of this project by name."""
