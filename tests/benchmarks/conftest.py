"""A network and data that take a second, for the benchmarks that open them as a job does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tenfold

CLASSES = 4


@pytest.fixture(scope="package")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained MLP of 16 inputs and a data set of Gaussian classes, split in three."""
    folder = tmp_path_factory.mktemp("network")
    chance = np.random.default_rng(0)
    centres = chance.normal(size=(CLASSES, 16))
    arrays = {}
    for part, rows in (("train", 400), ("val", 120), ("test", 120)):
        y = chance.integers(0, CLASSES, rows)
        arrays[f"x_{part}"] = (centres[y] + 0.6 * chance.normal(size=(rows, 16))).astype(np.float32)
        arrays[f"y_{part}"] = y
    np.savez(folder / "data.npz", **arrays)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    x, y = torch.from_numpy(arrays["x_train"]), torch.from_numpy(arrays["y_train"])
    for _ in range(60):
        loss = nn.functional.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tenfold.export(network.eval(), x[:2], folder / "net.pt2"), folder / "data.npz"
