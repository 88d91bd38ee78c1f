"""How a heatmap network is trained on figures, and how well it finds their joints."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from benchmarks.figures import Figures, Floats, decode, heatmaps
from benchmarks.tnet.hourglass import STEM, StackedHourglass

__all__ = ["BATCH", "RATE", "find", "steps_of", "train"]

BATCH = 32

RATE = 8e-3
"""The peak of the one-cycle schedule (Smith and Topin 2018)."""

WARM_UP = 0.2
"""The share of the steps in which the rate rises."""


def steps_of(rows: int, epochs: float, batch: int = BATCH) -> int:
    """How many steps ``train`` takes."""
    return max(1, int(epochs * rows / batch))


def train(
    network: StackedHourglass,
    figures: Figures,
    *,
    epochs: float,
    seed: int = 0,
    rate: float = RATE,
    batch: int = BATCH,
    device: str = "cpu",
    step: Callable[[float], None] = lambda loss: None,
) -> StackedHourglass:
    """Adam on the mean squared error of every stack's heatmaps; in place. ``step`` is told each batch's loss.

    Returns the network, on ``device`` and ready for inference. Raises ValueError for epochs that are not positive.
    """
    if not epochs > 0:
        raise ValueError(f"training takes a number of epochs above 0 (a part of one will do), got {epochs}")
    rows, side = figures.images.shape[:2]
    network.to(device).train()
    steps = steps_of(rows, epochs, batch)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=WARM_UP)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(math.ceil(epochs))])
    for chosen in torch.split(order, batch)[:steps]:
        wanted = torch.from_numpy(heatmaps(figures.keypoints[chosen.numpy()], side, side // STEM)).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            stacks = network(_pixels(figures, chosen.numpy(), device))
        loss = torch.stack([mse_loss(maps.float(), wanted) for maps in stacks]).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        step(float(loss.detach()))
    return network.eval()


def find(network: StackedHourglass, figures: Figures, *, batch: int = 250, device: str = "cpu") -> Floats:
    """The joints that the last stack finds, (rows, 14, 2), in pixels."""
    rows, side = figures.images.shape[:2]
    network.eval()
    with torch.no_grad():
        maps = [
            network(_pixels(figures, np.arange(start, min(start + batch, rows)), device))[-1].float().cpu().numpy()
            for start in range(0, rows, batch)
        ]
    return decode(np.concatenate(maps), side)


def _pixels(figures: Figures, rows: np.ndarray, device: str) -> Tensor:
    """(rows, 3, side, side), from −1 to 1."""
    images = torch.from_numpy(figures.images[rows]).to(device).permute(0, 3, 1, 2)  # channels last already
    return images.float() / 127.5 - 1
