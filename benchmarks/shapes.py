"""Layers' shapes of well-known networks, each once with how often it occurs."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["NETWORKS", "Shape"]


@dataclass(frozen=True)
class Shape:
    """A Linear (``kernel`` 0) or a square convolution."""

    inputs: int
    outputs: int
    kernel: int = 0
    size: int = 1
    """Height and width of its input."""

    def __str__(self) -> str:
        kind = f" {self.kernel}x{self.kernel} at {self.size}" if self.kernel else " linear"
        return f"{self.inputs}-{self.outputs}{kind}"

    def layer(self, seed: int = 0) -> nn.Linear | nn.Conv2d:
        """Random weights, as torch starts a layer."""
        torch.manual_seed(seed)
        if not self.kernel:
            return nn.Linear(self.inputs, self.outputs)
        stride = self.kernel if self.kernel > 7 else 1
        padding = self.kernel // 2 if self.kernel < 8 else 0
        return nn.Conv2d(self.inputs, self.outputs, self.kernel, padding=padding, stride=stride, bias=False)


def _vgg16() -> list[Shape]:
    found, channels, size = [], 3, 224
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            found.append(Shape(channels, width, 3, size))
            channels = width
        size //= 2
    return [*found, Shape(25088, 4096), Shape(4096, 4096), Shape(4096, 1000)]


def _resnet50() -> list[Shape]:
    found, channels, size = [Shape(3, 64, 7, 224)], 64, 56
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(count):
            found += [Shape(channels, width, 1, size), Shape(width, width, 3, size), Shape(width, 4 * width, 1, size)]
            if block == 0:
                found.append(Shape(channels, 4 * width, 1, size))
            channels = 4 * width
        size //= 2
    return [*found, Shape(2048, 1000)]


def _vit_b() -> list[Shape]:
    block = [Shape(768, 2304), Shape(768, 768), Shape(768, 3072), Shape(3072, 768)]
    return [Shape(3, 768, 16, 224), *block * 12, Shape(768, 1000)]


NETWORKS: dict[str, Counter[Shape]] = {
    "vgg16": Counter(_vgg16()),
    "resnet50": Counter(_resnet50()),
    "vit_b": Counter(_vit_b()),
}
"""VGG-16 (configuration D), ResNet-50 and ViT-B/16 at 224 x 224."""
