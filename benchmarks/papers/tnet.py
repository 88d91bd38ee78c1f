"""T-Net (Kossaifi, Bulat, Tzimiropoulos and Pantic, CVPR 2019): a stacked hourglass whose kernels are one tensor.

The paper's comparison, from scratch and with equal epochs: dense kernels; one Tucker or MPS tensor of all kernels; each
kernel a Tucker form of its own. The paper's task is human pose on MPII; ours is ``benchmarks.figures``, drawn here,
because MPII cannot be fetched by a command. ``--size paper`` is the paper's network, for a GPU.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.figures import JOINTS, Floats, hits, render
from benchmarks.papers.table import Settings, Table
from benchmarks.tnet.hourglass import PATHWAYS, StackedHourglass, compact
from benchmarks.tnet.kernels import Dense, Factored, JointMPS, JointTucker, LayerwiseTucker, Shape
from benchmarks.tnet.training import find, train

__all__ = ["PAPER", "SMALL", "Size", "run"]

RATIOS = (1.35, 1.8, 4.0, 10.0)
"""The parameters of dense kernels ÷ those of the form: the paper's three, and one beyond them."""

FORMS: dict[str, type[Factored]] = {
    "joint Tucker": JointTucker,
    "layer-wise Tucker": LayerwiseTucker,
    "joint MPS": JointMPS,
}

HALF = "joint Tucker, half of the architecture's ranks"

NEGLIGIBLE = 1.0
"""Points of PCKh: what we take "negligible loss" to mean, and what a difference must exceed to count. Two networks of
the same kind differ by about as much from the test figures alone."""


@dataclass(frozen=True)
class Size:
    """What is trained, and on how much."""

    stacks: int
    depth: int
    features: int
    side: int
    """Of an image, pixels."""
    rows: int
    """Figures to train on."""
    test_rows: int
    epochs: float
    batch: int
    rate: float
    """The peak of the learning rate, the same for every form."""

    @property
    def shape(self) -> Shape:
        return self.stacks, self.depth, len(PATHWAYS), 2, self.features, self.features, 3, 3


SMALL = Size(
    stacks=2, depth=2, features=32, side=64, rows=3000, test_rows=1000, epochs=10, batch=32, rate=8e-3
)  # the rate: the best of 1e-3, 4e-3 and 8e-3 for dense kernels, 5 epochs, on figures that are not the test's
PAPER = Size(stacks=4, depth=4, features=128, side=256, rows=20_000, test_rows=2000, epochs=30, batch=32, rate=1e-3)


def run(settings: Settings, done: Callable[[Table], None], size: Size | None = None) -> None:
    """Every form at every ratio, ``done`` called after each training."""
    size = size or (SMALL if settings.small else PAPER)
    epochs = size.epochs if settings.epochs is None else settings.epochs
    table = Table(
        title="T-Net from scratch: joints of figures",
        columns=(
            "kernels",
            "seed",
            "ranks",
            "kernel parameters",
            "kernels ÷",
            "network parameters",
            "network ÷",
            "MMACs",
            "PCKh@0.5 %",
            "to dense, points",
            "± (95 %)",
        ),
        settings={**asdict(size), "epochs": epochs, "seeds": list(settings.seeds)},
    )
    test = render(size.test_rows, side=size.side, seed=2**31)
    for seed in settings.seeds:
        figures = render(size.rows, side=size.side, seed=seed)
        dense: Floats | None = None
        for name, form in _forms(size.shape, seed):
            network = StackedHourglass(form, len(JOINTS))
            train(
                network,
                figures,
                epochs=epochs,
                rate=size.rate,
                batch=size.batch,
                seed=seed,
                device=settings.device,
            )
            # Of each figure: what the differences are paired over.
            shares = hits(find(network, test, device=settings.device), test).mean(1, dtype=np.float32)
            dense = shares if dense is None else dense
            table.rows.append({"kernels": name, "seed": seed, **_sizes(network, size), **_scores(shares, dense)})
            table.notes = _notes(table.rows)
            done(table)


def _forms(shape: Shape, seed: int) -> Iterator[tuple[str, Factored]]:
    """The rows of one seed; the dense one first."""
    torch.manual_seed(seed)
    yield "dense", Dense(shape)
    for name, form in FORMS.items():
        for ratio in RATIOS:
            torch.manual_seed(seed)
            yield name, form.at(shape, ratio)
    torch.manual_seed(seed)
    yield HALF, JointTucker(shape, _halved(shape, RATIOS[-1]))


def _halved(shape: Shape, ratio: float) -> tuple[int, ...]:
    """Half of each rank of the architecture's modes, rounded up, and the feature rank that then fits the ratio."""
    halves = tuple(math.ceil(size / 2) for size in shape[:4])
    candidates = [(*halves, rank, rank, *shape[6:]) for rank in range(1, shape[4] + 1)]
    target = math.prod(shape) / ratio
    return min(candidates, key=lambda ranks: abs(JointTucker.parameters_of(shape, ranks) - target))


def _sizes(network: StackedHourglass, size: Size) -> dict[str, Any]:
    form = network.kernels
    assert isinstance(form, Factored)
    kernels, dense = (sum(p.numel() for p in form.parameters()), math.prod(size.shape))
    total = sum(p.numel() for p in network.parameters())
    return {
        "ranks": "×".join(map(str, form.ranks)) or None,
        "kernel parameters": kernels,
        "kernels ÷": dense / kernels,
        "network parameters": total,
        "network ÷": (total - kernels + dense) / total,
        "MMACs": _macs(network, size.side) / 1e6,
    }


def _macs(network: StackedHourglass, side: int) -> int:
    """Multiplications and additions of one image at inference, each layer the chain that it is then."""
    small, device = compact(network), next(network.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(torch.zeros(1, 3, side, side, device=device))
    return int(counter.get_total_flops()) // 2


def _scores(shares: Floats, dense: Floats) -> dict[str, float | None]:
    """The score, and what it is above the dense network's: a mean of paired differences over the test figures."""
    gains = 100 * (shares - dense).astype(np.float64)
    error = 1.96 * gains.std(ddof=1) / math.sqrt(len(gains))
    same = shares is dense
    return {
        "PCKh@0.5 %": 100 * float(shares.mean()),
        "to dense, points": None if same else float(gains.mean()),
        "± (95 %)": None if same else float(error),
    }


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """The paper's three claims, held against the rows; means over the seeds that are there."""
    notes = [
        "± is over the test figures; what another seed of the training would change is not in it.",
        "Published: PCKh@0.5 of 87.5 % for Tucker T-Net on MPII, another task and network size, so no column here.",
    ]
    gains = _gains(rows)
    for name in ("joint Tucker", "joint MPS"):
        ratios = [ratio for ratio in RATIOS if (name, ratio) in gains]
        mild = {ratio: gains[name, ratio] for ratio in ratios if ratio < 2}
        if mild:
            verdict = _verdict(max(mild.values()))
            notes.append(f"Better than dense at small compression, {name}: {verdict} ({_list(mild)}).")
        high = {ratio: gains[name, ratio] for ratio in ratios if ratio > 2}
        if high:
            verdict = "shown" if min(high.values()) > -NEGLIGIBLE else "NOT shown"
            notes.append(
                f"Negligible loss (under {NEGLIGIBLE:g} point) at high compression, {name}: {verdict} ({_list(high)})."
            )
        beside = {
            r: gains[name, r] - gains["layer-wise Tucker", r] for r in ratios if ("layer-wise Tucker", r) in gains
        }
        if beside:
            verdict = _verdict(min(beside.values()))
            notes.append(f"Better than layer-wise Tucker, {name}: {verdict} ({_list(beside)}).")
    return notes


def _gains(rows: list[dict[str, Any]]) -> dict[tuple[str, float], float]:
    """Points to dense by form and asked ratio, the one nearest to the counted one; means over seeds."""
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if row["to dense, points"] is not None:
            ratio = min(RATIOS, key=lambda asked: abs(math.log(asked / row["kernels ÷"])))
            found.setdefault((row["kernels"], ratio), []).append(row["to dense, points"])
    return {key: sum(values) / len(values) for key, values in found.items()}


def _verdict(points: float) -> str:
    if abs(points) < NEGLIGIBLE:
        return "NOT decided, less than a point"
    return "shown" if points > 0 else "NOT shown"


def _list(points: dict[float, float]) -> str:
    return ", ".join(f"÷{ratio:g}: {value:+.2f}" for ratio, value in points.items())
