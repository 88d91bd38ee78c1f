"""How fast a factorized layer runs, beside its dense one, rebuilding the dense weight, and tensorly-torch.

    python -m benchmarks.layers --batches 1 32 256
    python -m benchmarks.layers --peers tltorch --environment tltorch=VENV/bin/python

Each of our methods at a half, a quarter and an eighth of the dense layer's parameters: seconds forward, and forward
with backward in training; the part of the saved multiplications that is saved in time, too ((dense seconds / seconds) /
(dense MACs / MACs)); and for each method and batch the least saving in MACs at which it was faster than the dense
layer.
Then the timing of Novikov et al. (2015), section 6.3: 25088 x 4096 at TT-rank 4, 1 and 100 images.

Seconds are CPU seconds of a process with one thread, medians of runs that take turns. Forward, a convolution gets its
images in both layouts and each way of computing it has the quicker one, as the files of a network have
(``search/layout.py``).
"""

import argparse
import copy
import json
import platform
import random
import statistics
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.decompose import started
from benchmarks.libraries import LAYERS, Peer, command, timed
from benchmarks.shapes import Shape
from search.decompose import METHODS
from tenfold.layers import FactorizedLayer, factorized_like
from tenfold.layers.tensor_train import TTLinear

__all__ = ["compare", "crossovers"]

SHAPES = (
    Shape(64, 64, 3, 28),
    Shape(256, 256, 3, 14),
    Shape(512, 512, 3, 7),
    Shape(256, 1024, 1, 14),
    Shape(768, 3072),
    Shape(4096, 4096),
)
SHARES = (0.5, 0.25, 0.125)
"""Of the dense parameters."""
RUNS, LONG, ENOUGH = 7, 0.7, 3e-3
"""Of each, the seconds after which three are enough, and those that one takes at least."""
TT_IN, TT_OUT = (2, 7, 8, 8, 7, 4), (4, 4, 4, 4, 4, 4)
PUBLISHED_MS = {1: (16.1, 1.2), 100: (97.2, 94.7)}
"""Novikov et al. 2015, table 3, from memory and unverified: dense and TT on a CPU, in milliseconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=sorted(METHODS))
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="which, counted from 0")
    parser.add_argument("--forward-only", action="store_true", help="do not train")
    parser.add_argument("--peers", nargs="*", choices=["tltorch"], default=[])
    parser.add_argument("--environment", nargs="*", default=[], metavar="PEER=PYTHON", help="a peer's own interpreter")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/layers.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=150)
    peers = started(arguments.peers, arguments.environment, console)
    rows: list[dict[str, Any]] = []
    fully_connected = novikov(sorted({1, 100}))
    for row in fully_connected:
        console.print(row)
    for batch in arguments.batches:
        for shape in (SHAPES[i] for i in arguments.shapes):
            found = compare(shape, batch, arguments.methods, peers, train=not arguments.forward_only)
            rows += found
            console.print(shown(f"{shape}, batch {batch}", found))
            facts = {
                "date": date.today().isoformat(),
                "machine": f"{platform.machine()}, one thread of a machine shared with other work, CPU seconds",
                "torch": torch.__version__,
                "command": command("benchmarks.layers"),
                "peers": {peer.name: peer.version for peer in peers},
                "novikov": fully_connected,
                "crossovers": crossovers(rows),
                "slower_than_rebuilding": sum(r["forward"] > 1.05 * r["rebuild"] for r in rows),
            }
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    for peer in peers:
        peer.close()
    console.print(shown("least saving in MACs at which it is faster than dense", crossovers(rows)))


def compare(
    shape: Shape, batch: int, methods: Sequence[str], peers: Sequence[Peer], *, train: bool = True
) -> list[dict[str, Any]]:
    """A row for each method and share that this layer can have."""
    layer = shape.layer().eval()
    x = torch.randn(batch, shape.inputs, *(shape.size,) * 2) if shape.kernel else torch.randn(batch, shape.inputs)
    with torch.no_grad():
        y = layer(x)
    positions = y[0, 0].numel() if shape.kernel else 1
    macs = layer.weight.numel() * positions
    layouts = {"channels first": x}
    if shape.kernel:
        layouts["channels last"] = x.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], object]] = {
        f"dense forward, {layout}": partial(_forward, layer, laid) for layout, laid in layouts.items()
    }
    if train:
        calls["dense train"] = partial(_train, copy.deepcopy(layer).train(), x)
    made: dict[str, tuple[str, FactorizedLayer, int, int]] = {}
    for name in methods:
        method = METHODS[name]
        if method.applies_to(layer) is not None:
            continue
        sizes = tuple(x.shape[2:])
        costs = {r: method.cost(layer, r, positions, input_sizes=sizes) for r in method.ranks(layer)}
        for share in SHARES:
            able = [r for r, (p, _) in costs.items() if p <= share * layer.weight.numel()]
            if not able:
                continue
            ranks = max(able, key=lambda r: costs[r][0])
            if ranks in {module.ranks for other, module, *_ in made.values() if other == name}:
                continue
            module = factorized_like(layer, name, ranks).eval()
            key = f"{name} {share}"
            made[key] = (name, module, *costs[ranks])
            for layout, laid in layouts.items():
                calls[f"{key} forward, {layout}"] = partial(_forward, module, laid)
                calls[f"{key} rebuild, {layout}"] = partial(_rebuilt, module, layer, laid)
            if train:
                calls[f"{key} train"] = partial(_train, copy.deepcopy(module).train(), x)
    seconds = medians(calls)

    def quicker(what: str) -> tuple[float, str]:
        return min((seconds[f"{what}, {layout}"], layout) for layout in layouts)

    dense, _ = quicker("dense forward")
    rows = []
    for key, (name, module, parameters, own) in made.items():
        forward, layout = quicker(f"{key} forward")
        row: dict[str, Any] = {
            "layer": str(shape),
            "batch": batch,
            "method": name,
            "ranks": module.ranks,
            "parameters": parameters / layer.weight.numel(),
            "macs_saved": macs / own,
            "layout": layout,
            "dense": dense,
            "forward": forward,
            "rebuild": quicker(f"{key} rebuild")[0],
            "speedup": dense / forward,
            "achieved": dense / forward / (macs / own),
        }
        if train:
            row["train_speedup"] = seconds["dense train"] / seconds[f"{key} train"]
        for peer in (peer for peer in peers if name in LAYERS[peer.name]):
            given: Any = module.ranks
            if isinstance(module, TTLinear):
                given = (module.shape.out_modes, module.shape.in_modes, module.ranks)
            try:
                row[peer.name] = peer.layer(name, layer, given, tuple(x.shape), 3)
            except RuntimeError as error:
                row[f"{peer.name}_failed"] = str(error)
        rows.append(row)
    return rows


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """CPU seconds of each, in turns, each time in another order: what ran before leaves its traces in the caches."""
    order, draw = list(calls), random.Random(0)
    past: dict[str, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call()
    # As often in a row as the clock needs to tell.
    often = {key: max(1, round(ENOUGH / max(timed(call)[0], ENOUGH / 100))) for key, call in calls.items()}
    for run in range(RUNS):
        draw.shuffle(order)
        for key in order:
            if run < 3 or past[key][0] < LONG:
                past[key].append(timed(partial(_repeat, calls[key], often[key]))[0] / often[key])
    return {key: statistics.median(times) for key, times in past.items()}


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def _rebuilt(module: FactorizedLayer, layer: nn.Linear | nn.Conv2d, x: Tensor) -> None:
    """The factorized layer as its dense one, the weight made anew."""
    with torch.no_grad():
        weight = module.dense_weight()
        if isinstance(layer, nn.Linear):
            F.linear(x, weight, module.output_bias)
        else:
            layer._conv_forward(x, weight, module.output_bias)


def _train(layer: nn.Module, x: Tensor) -> None:
    layer.zero_grad(set_to_none=True)
    layer(x.requires_grad_()).square().mean().backward()


def crossovers(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By method and batch: the least saving in MACs beyond which every layer was faster than the dense one."""
    found = []
    for method, batch in dict.fromkeys((r["method"], r["batch"]) for r in rows):
        own = sorted((r for r in rows if (r["method"], r["batch"]) == (method, batch)), key=lambda r: r["macs_saved"])
        slow = [r["macs_saved"] for r in own if r["speedup"] < 1]
        faster = [r["macs_saved"] for r in own if not slow or r["macs_saved"] > max(slow)]
        found.append(
            {
                "method": method,
                "batch": batch,
                "faster_from_macs_saved": min(faster) if faster else None,
                "achieved_median": statistics.median(r["achieved"] for r in own),
                "faster_layers": f"{sum(r['speedup'] >= 1 for r in own)} of {len(own)}",
            }
        )
    return found


def novikov(batches: Sequence[int]) -> list[dict[str, Any]]:
    """VGG's first fully connected layer as a train of rank 4."""
    dense = nn.Linear(25088, 4096)
    train = TTLinear(TT_IN, TT_OUT, (4,) * 5)
    rows = []
    for batch in batches:
        x = torch.randn(batch, 25088)
        seconds = medians({"dense": partial(_forward, dense, x), "tt": partial(_forward, train, x)})
        published = PUBLISHED_MS[batch]
        rows.append(
            {
                "images": batch,
                "dense_ms": 1e3 * seconds["dense"],
                "tt_ms": 1e3 * seconds["tt"],
                "speedup": seconds["dense"] / seconds["tt"],
                "published_unverified_ms": published,
                "published_unverified_speedup": published[0] / published[1],
            }
        )
    return rows


def shown(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title)
    columns = [c for c in dict.fromkeys(c for row in rows for c in row) if c not in ("layer", "dense")]
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    return table


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)[:40]


if __name__ == "__main__":
    main()
