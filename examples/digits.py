"""The demo's network and data: scikit-learn's 8×8 digits and a small CNN, trained here in a few seconds."""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

__all__ = ["DigitsNet", "save", "split", "train"]

Arrays = dict[str, np.ndarray]


class DigitsNet(nn.Module):
    """Three 3×3 convolutions and two Linears, (batch, 1, 8, 8) → 10 logits."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(8 * width, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.features(x))
        return logits


def split(seed: int = 0) -> Arrays:
    """1,797 scans as uint8 (n, 1, 8, 8), values 0…16: 60 % train, 20 % validation, 20 % test."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    x = digits.images[order, None].astype(np.uint8)
    y = digits.target[order].astype(np.int64)
    a, b = int(0.6 * len(x)), int(0.8 * len(x))
    return {
        "x_train": x[:a],
        "y_train": y[:a],
        "x_val": x[a:b],
        "y_val": y[a:b],
        "x_test": x[b:],
        "y_test": y[b:],
    }


def train(data: Arrays, *, epochs: int = 12, seed: int = 0) -> DigitsNet:
    torch.manual_seed(seed)
    net = DigitsNet()
    x, y = torch.tensor(data["x_train"], dtype=torch.float32) / 16, torch.tensor(data["y_train"])
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


def save(data: Arrays, path: Path) -> None:
    np.savez(path, **data)
