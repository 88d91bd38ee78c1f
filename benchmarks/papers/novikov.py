"""Tensorizing Neural Networks (Novikov, Podoprikhin, Osokin, Vetrov, NIPS 2015).

* VGG's first fully connected layer, 25088 x 4096: parameters by TT-rank and by matrix rank, counted on real layers.
* MNIST, 1024 -> 625 -> 10 (images padded to 32 x 32): the first layer in TT format of several ranks, as a matrix of low
  rank, and dense, at the number of parameters that each has.
* CIFAR-10, the wide net 3072 -> 262,144 -> 4,096 -> 10 whose dense form has 1.88 G weights: a short run that shows that
  it trains; the published figures took 40,000 steps.

The timing of the first layer is in ``benchmarks.layers``.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.datasets import prepare
from benchmarks.papers.table import Settings, Table
from tenfold.layers import LowRankLinear
from tenfold.layers.tensor_train import TTLinear

__all__ = ["run"]

VGG_IN, VGG_OUT = (2, 7, 8, 8, 7, 4), (4, 4, 4, 4, 4, 4)
MNIST_IN, MNIST_OUT = (4, 8, 8, 4), (5, 5, 5, 5)
WIDE = (((4, 4, 4, 4, 4, 3), (8,) * 6), ((8,) * 6, (4,) * 6))
"""In and out modes of both layers."""
EPOCHS, WIDE_SHARE = 5.0, 0.05
"""Of MNIST (the authors' demo: 100), and how many of CIFAR-10 for each of them."""
BATCH, RATE = 100, 2e-3
PUBLISHED_VGG = {"TT rank 4": 50_972, "TT rank 2": 194_622, "TT rank 1": 713_614}
PUBLISHED_MATRIX = {"matrix rank 1": 3_521, "matrix rank 5": 704, "matrix rank 50": 70}
"""Times fewer parameters, computed from the shapes."""
PUBLISHED_WIDE = {2: 69.51, 4: 69.76, 6: 70.55, 10: 71.34, 12: 71.27, 16: 70.16, 20: 68.99}
"""Validation accuracy in %, the authors' logs."""
WIDE_RANKS = (2, 10)


def run(settings: Settings, done: Callable[[Table], None]) -> None:
    torch.set_num_threads(1)
    done(_counts())
    _mnist(settings, done)
    _wide(settings, done)


def _counts() -> Table:
    table = Table("VGG fc6, 25088 x 4096", ("layer", "parameters", "times fewer", "published"))
    dense = 25088 * 4096
    layers: dict[str, nn.Module] = {
        f"TT rank {r}": TTLinear(VGG_IN, VGG_OUT, (r,) * 5, bias=False) for r in (4, 2, 1)
    } | {f"matrix rank {r}": LowRankLinear(25088, 4096, r, bias=False) for r in (1, 5, 50)}
    for name, layer in layers.items():
        parameters = sum(p.numel() for p in layer.parameters())
        published = (PUBLISHED_VGG | PUBLISHED_MATRIX)[name]
        table.rows.append(
            {"layer": name, "parameters": parameters, "times fewer": round(dense / parameters), "published": published}
        )
    table.notes.append("Without biases, as the paper counts.")
    return table


def _mnist(settings: Settings, done: Callable[[Table], None]) -> None:
    epochs = EPOCHS if settings.epochs is None else settings.epochs
    table = Table(
        "MNIST, 1024 -> 625 -> 10",
        ("first layer", "its weights", "times fewer", "test error %", "seed", "seconds"),
        settings={"epochs": epochs, "batch": BATCH, "optimizer": f"Adam {RATE}, cosine", "seeds": settings.seeds},
        notes=[
            "The paper draws this as a figure (its numbers are not at hand): TT above matrix rank at equal parameters.",
            f"{epochs:g} epochs, the authors' demo has 100.",
        ],
    )
    makers: dict[str, Callable[[], nn.Module]] = {"dense": lambda: nn.Linear(1024, 625)}
    for r in (1, 2, 4, 8):
        makers[f"TT rank {r}"] = lambda r=r: TTLinear(MNIST_IN, MNIST_OUT, (r,) * 3)  # type: ignore[misc]
    for r in (1, 2, 4, 8):
        makers[f"matrix rank {r}"] = lambda r=r: LowRankLinear(1024, 625, r)  # type: ignore[misc]
    data = _images("mnist", settings.device)
    for seed in settings.seeds:
        for name, make in makers.items():
            torch.manual_seed(seed)
            first = make().to(settings.device)
            network = nn.Sequential(first, nn.ReLU(), nn.Linear(625, 10)).to(settings.device)
            began = time.monotonic()
            _train(network, data, epochs, seed)
            weights = sum(p.numel() for p in first.parameters()) - 625
            table.rows.append(
                {
                    "first layer": name,
                    "its weights": weights,
                    "times fewer": 1024 * 625 / weights,
                    "test error %": 100 * _error(network, data),
                    "seed": seed,
                    "seconds": round(time.monotonic() - began),
                }
            )
            done(table)


def _wide(settings: Settings, done: Callable[[Table], None]) -> None:
    epochs = WIDE_SHARE * (EPOCHS if settings.epochs is None else settings.epochs)
    table = Table(
        "CIFAR-10, 3072 -> 262,144 -> 4,096 -> 10 in TT format",
        ("TT rank", "core weights", "times fewer", "loss first", "loss last", "test %", "published %", "seed", "s"),
        settings={"epochs": epochs, "batch": BATCH, "optimizer": f"Adam {RATE}, cosine", "seeds": settings.seeds},
        notes=[
            f"{epochs:g} epochs against 88 (40,000 steps of 100): it shows that the net trains, not what it reaches.",
            "Published: validation accuracy, the authors' logs, with batch norm and dropout; ours: 500 test images.",
        ],
    )
    data = _images("cifar10", settings.device, test=500)
    dense = 3072 * 262_144 + 262_144 * 4096
    for seed in settings.seeds:
        for rank in WIDE_RANKS:
            torch.manual_seed(seed)
            trains = [TTLinear(i, o, (rank,) * 5).to(settings.device) for i, o in WIDE]
            network = nn.Sequential(
                trains[0], nn.ReLU(), trains[1], nn.BatchNorm1d(4096), nn.ReLU(), nn.Linear(4096, 10)
            ).to(settings.device)
            began = time.monotonic()
            losses = _train(network, data, epochs, seed)
            weights = sum(core.numel() for train in trains for core in train.cores)
            tenth = max(1, len(losses) // 10)
            table.rows.append(
                {
                    "TT rank": rank,
                    "core weights": weights,
                    "times fewer": round(dense / weights),
                    "loss first": sum(losses[:tenth]) / tenth,
                    "loss last": sum(losses[-tenth:]) / tenth,
                    "test %": 100 - 100 * _error(network, data),
                    "published %": PUBLISHED_WIDE[rank],
                    "seed": seed,
                    "s": round(time.monotonic() - began),
                }
            )
            done(table)


def _images(name: str, device: str, test: int | None = None) -> dict[str, Tensor]:
    """Rows of pixels, standardised; MNIST's padded to 32 x 32. Training and validation images both train."""
    found: dict[str, Tensor] = {}
    with np.load(prepare(name), allow_pickle=False) as arrays:
        for split in ("train", "test"):
            parts = ("train", "val") if split == "train" else ("test",)
            x = torch.from_numpy(np.concatenate([arrays[f"x_{p}"] for p in parts])).permute(0, 3, 1, 2).float() / 255
            y = torch.from_numpy(np.concatenate([arrays[f"y_{p}"] for p in parts]))
            if name == "mnist":
                x = F.pad(x, (2, 2, 2, 2))
            if split == "test" and test is not None:
                x, y = x[:test], y[:test]
            found[f"x_{split}"], found[f"y_{split}"] = x.flatten(1).to(device), y.to(device)
    mean, deviation = found["x_train"].mean(), found["x_train"].std()
    return found | {key: (found[key] - mean) / deviation for key in ("x_train", "x_test")}


def _batches(rows: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(rows, generator=generator)
        yield order[:BATCH]
        order = order[BATCH:]


def _train(network: nn.Module, data: dict[str, Tensor], epochs: float, seed: int) -> list[float]:
    """The loss of each step."""
    network.train()
    rows = len(data["x_train"])
    steps = max(1, round(epochs * rows / BATCH))
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for batch in _batches(rows, steps, seed):
        loss = F.cross_entropy(network(data["x_train"][batch]), data["y_train"][batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def _error(network: nn.Module, data: dict[str, Tensor]) -> float:
    network.eval()
    wrong = 0
    for x, y in zip(data["x_test"].split(BATCH), data["y_test"].split(BATCH), strict=True):
        wrong += int((network(x).argmax(1) != y).sum())
    return wrong / len(data["y_test"])
