"""Named architectures: what turns a file of bare weights into a network."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search.errors import BadModel

__all__ = ["ARCHITECTURES", "Architecture", "ResNetCIFAR", "build", "mlp", "resnet_cifar", "small_cnn", "vgg16_cifar"]


@dataclass(frozen=True)
class Architecture:
    make: Callable[..., nn.Module]
    options: dict[str, int]
    """Option to its default: all are positive integers."""
    example: Callable[[dict[str, Any]], Tensor]
    """Two samples of input."""


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride
        self.padding = (planes - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding or self.stride != 1:  # shortcut "option A": no parameters
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class ResNetCIFAR(nn.Module):
    """He 2015 (arXiv:1512.03385), section 4.2: 6n + 2 layers of 16, 32 and 64 channels. Input ``(n, 3, 32, 32)``."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, planes, stride)
        return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        y: Tensor = self.linear(x.mean((2, 3)))
        return y


def resnet_cifar(depth: int, classes: int = 10) -> ResNetCIFAR:
    return ResNetCIFAR((depth - 2) // 6, classes)


_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class VGGCIFAR(nn.Module):
    """VGG-16 with batch norm for 32 x 32 images: thirteen convolutions and one linear layer (0 = max pooling)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for channels in _VGG16:
            if channels == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            inputs = channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x).flatten(1))
        return y


def vgg16_cifar(classes: int = 10) -> VGGCIFAR:
    return VGGCIFAR(classes)


def small_cnn(channels: int = 3, size: int = 32, width: int = 32, classes: int = 10) -> nn.Sequential:
    """Three convolutions with batch norm, pooled between, and a linear layer. Input ``(n, channels, size, size)``."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(((channels, width), (width, 2 * width), (2 * width, 2 * width))):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        if i < 2:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes))


def mlp(inputs: int = 784, hidden: int = 256, depth: int = 2, classes: int = 10) -> nn.Sequential:
    """``depth`` hidden layers with ReLU. Input ``(n, inputs)``."""
    sizes = [inputs, *[hidden] * depth]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


_CLASSES = {"classes": 10}


def _image(_: dict[str, Any]) -> Tensor:
    return torch.zeros(2, 3, 32, 32)


ARCHITECTURES: dict[str, Architecture] = {
    **{
        f"resnet{depth}_cifar10": Architecture(
            lambda classes, depth=depth: resnet_cifar(depth, classes), _CLASSES, _image
        )
        for depth in (20, 32, 44, 56, 110)
    },
    "vgg16_cifar10": Architecture(vgg16_cifar, _CLASSES, _image),
    "small_cnn": Architecture(
        small_cnn,
        {"channels": 3, "size": 32, "width": 32, **_CLASSES},
        lambda o: torch.zeros(2, o["channels"], o["size"], o["size"]),
    ),
    "mlp": Architecture(
        mlp,
        {"inputs": 784, "hidden": 256, "depth": 2, **_CLASSES},
        lambda o: torch.zeros(2, o["inputs"]),
    ),
}

_OPTION_MAX = 65_536


def build(name: str, options: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """The network with random weights, and an example of two samples.

    Raises ``BadModel``: an unknown name, an unknown option, or a value that is not a positive integer.
    """
    if name not in ARCHITECTURES:
        raise BadModel(
            "unknown_architecture", f"architecture {name!r} is not one of {', '.join(sorted(ARCHITECTURES))}"
        )
    known = ARCHITECTURES[name]
    values = dict(known.options)
    for option, value in options.items():
        if option not in known.options:
            raise BadModel("bad_option", f"{name} has no option {option!r}; it has {', '.join(known.options)}")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _OPTION_MAX:
            raise BadModel("bad_option", f"{option} of {name} is {value!r}: give an integer from 1 to {_OPTION_MAX}")
        values[option] = value
    return known.make(**values), known.example(values)
