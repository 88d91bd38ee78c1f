"""Networks that nobody tuned the search on: small ones of several families, trained here once and kept in the cache.

``trained(name)`` gives a ``.pt2`` of ``tenfold.export``; the recipe is short and plain (labels, SGD-Nesterov, one
cycle), for what matters is a network that has learnt its task, not a record.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tenfold
from benchmarks import scenes
from benchmarks.datasets import CACHE, prepare
from search.data import read_data
from search.intake.architectures import mlp
from search.spec import Augmentation, DataSpec, Task, Transform

__all__ = ["NETWORKS", "Network", "mnist_mlp", "mobilenet", "segmenter", "trained", "vgg", "vit"]

MNIST = Transform(scale=1 / 255, mean=(0.1307,), std=(0.3081,), layout="nhwc")
CIFAR = Transform(
    scale=1 / 255,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.247, 0.2435, 0.2616),
    layout="nhwc",
    augment=Augmentation.CROP_FLIP,
)


def mnist_mlp() -> nn.Module:
    """784-256-256-10, as Novikov's (2015) smaller ones."""
    return nn.Sequential(nn.Flatten(), *mlp(784, 256, 2))


def vgg(width: int = 16) -> nn.Module:
    """VGG-like: six 3×3 convolutions in three stages, pooled between, and two Linears."""
    layers: list[nn.Module] = []
    inputs = 3
    for stage in range(3):
        for _ in range(2):
            channels = width << stage
            layers += [nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            inputs = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * inputs, 128), nn.ReLU(), nn.Linear(128, 10))


class _Inverted(nn.Module):
    """MobileNetV2's block: 1×1 expansion, depthwise 3×3, 1×1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        wide = expansion * inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.keeps = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.keeps else y


def mobilenet() -> nn.Module:
    """MobileNetV2-like for 32×32 images, of which the stem, as there, takes every other pixel."""
    blocks = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 40, 2), (40, 40, 1)]
    stem = [nn.Conv2d(3, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
    head = [nn.Conv2d(40, 160, 1, bias=False), nn.BatchNorm2d(160), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stem, *(_Inverted(*block) for block in blocks), *head, nn.Linear(160, 10))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class _Encoder(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class _ViT(nn.Module):
    """A vision transformer of 4×4 patches: 64 tokens, learnt positions, mean over tokens."""

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 64, width) / math.sqrt(width))
        self.blocks = nn.Sequential(*(_Encoder(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        y: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return y


def vit() -> nn.Module:
    return _ViT()


class _Segmenter(nn.Module):
    """(batch, 3, height, width) → logits of the classes at each pixel: two scales and the way back, as a U-Net's."""

    def __init__(self, classes: int, width: int = 24) -> None:
        super().__init__()
        self.fine = nn.Sequential(*_stage(3, width), *_stage(width, width))
        self.coarse = nn.Sequential(nn.MaxPool2d(2), *_stage(width, 2 * width), *_stage(2 * width, 2 * width))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.joined = nn.Sequential(*_stage(2 * width, width), *_stage(width, width))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        y: Tensor = self.head(self.joined(torch.cat([fine, self.up(self.coarse(fine))], 1)))
        return y


def _stage(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def segmenter() -> nn.Module:
    return _Segmenter(len(scenes.CLASSES))


@dataclass(frozen=True)
class Network:
    make: Callable[[], nn.Module]
    data: str
    """A name of ``benchmarks.datasets``."""
    spec: DataSpec
    epochs: int
    learning_rate: float
    example: tuple[int, ...]
    batch: int = 128


NETWORKS = {
    "mlp_mnist": Network(mnist_mlp, "mnist", DataSpec(transform=MNIST), 5, 0.05, (2, 1, 28, 28)),
    "vgg_cifar10": Network(vgg, "cifar10", DataSpec(transform=CIFAR), 3, 0.05, (2, 3, 32, 32)),
    "mobilenet_cifar10": Network(mobilenet, "cifar10", DataSpec(transform=CIFAR), 10, 0.1, (2, 3, 32, 32)),
    "segmenter_scenes": Network(
        segmenter,
        "scenes",
        DataSpec(task=Task.SEGMENTATION, transform=Transform(scale=1 / 255, layout="nhwc")),
        15,
        0.05,
        (2, 3, scenes.SIDE, scenes.SIDE),
        batch=32,
    ),
    "vit_cifar10": Network(vit, "cifar10", DataSpec(transform=CIFAR), 10, 0.02, (2, 3, 32, 32)),
}


def trained(name: str, *, cache: Path = CACHE) -> Path:
    """The exported network, trained on the training split when the cache has none.

    Raises ValueError for another name.
    """
    if name not in NETWORKS:
        raise ValueError(f"there is no network {name!r}; choose one of {', '.join(NETWORKS)}")
    path = cache / f"{name}.pt2"
    if path.exists():
        return path
    known = NETWORKS[name]
    torch.manual_seed(0)
    network = _arranged(known.make(), torch.channels_last)  # two thirds of the time on a CPU
    data = read_data(prepare(known.data), known.spec, scratch=cache)
    steps = len(data.train) // known.batch
    optimizer = torch.optim.SGD(
        network.parameters(), lr=known.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, known.learning_rate, total_steps=known.epochs * (steps + 1))
    began = time.monotonic()
    for epoch in range(known.epochs):
        network.train()
        for inputs, labels in data.train.batches(known.batch, shuffle=epoch, augment=True):
            assert labels is not None
            loss = F.cross_entropy(network(*inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
        print(f"{name}: epoch {epoch + 1} of {known.epochs}, {time.monotonic() - began:.0f} s", flush=True)
    return tenfold.export(_arranged(network.eval(), torch.contiguous_format), torch.zeros(known.example), path)


def _arranged(network: nn.Module, images: torch.memory_format) -> nn.Module:
    return network.to(memory_format=images)  # type: ignore[call-overload, no-any-return]
