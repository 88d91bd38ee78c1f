"""How long a decomposition takes and what it loses, ours beside other libraries'.

    python -m benchmarks.decompose --networks vgg16 resnet50 vit_b --peers tensorly
    python -m benchmarks.decompose --peers tensorly tltorch musco --environment tltorch=VENV/bin/python ...

For each layer of a network and each method: one fit at some ranks (a quarter and the half of the dense parameters), and
the whole curve of errors over all ranks, in the plain weight norm. A peer is given the same ranks; its curve is the
mean of its fits times the points of ours, as it has to fit each anew. Errors are ``||W - V|| / ||W||`` of real weights.

Seconds are CPU seconds of a process with one thread: a machine that does other work besides changes them less than it
changes the time of day. Runs are interleaved, peer after peer, and medians told.
"""

import argparse
import json
import math
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn

from benchmarks.libraries import DECOMPOSES, PEERS, Peer, command, relative_error, timed
from benchmarks.shapes import NETWORKS
from search.decompose import METHODS, Method
from search.decompose.r_cp import RCP
from search.decompose.r_tucker import RTucker
from search.decompose.reshaping import modes_of
from search.decompose.tt_matrix import TTMatrix

__all__ = ["compare"]

METHODS_COMPARED = ("svd", "tt_matrix", "tucker2", "cp3", "cp4", "tt", "r_cp", "r_tucker", "r_tt")
SHARES = (0.25, 0.5)
"""Of the dense parameters, that the compared ranks keep."""
LONG = 4.0
"""Seconds after which a run is not repeated."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=sorted(NETWORKS))
    parser.add_argument("--weights", type=Path, default=None, help="also the layers of a trained network (safetensors)")
    parser.add_argument("--methods", nargs="+", choices=METHODS_COMPARED, default=METHODS_COMPARED)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["tensorly"])
    parser.add_argument("--environment", nargs="*", default=[], metavar="PEER=PYTHON", help="a peer's own interpreter")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the dense parameters, one fit each")
    parser.add_argument("--smallest", type=float, default=0, help="skip layers of fewer weights")
    parser.add_argument("--largest", type=float, default=math.inf, help="skip layers of more weights")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/decompose.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=150)
    peers = started(arguments.peers, arguments.environment, console)
    rows: list[dict[str, Any]] = []
    for name, layer in layers(arguments.networks, arguments.weights):
        if not arguments.smallest <= layer.weight.numel() <= arguments.largest:
            console.print(f"{name}: skipped, {layer.weight.numel():,} weights")
            continue
        for method in arguments.methods:
            if METHODS[method].applies_to(layer) is not None:
                continue
            row = compare(name, layer, METHODS[method], peers, arguments.repeats, arguments.shares)
            rows.append(row)
            console.print(line(row))
            facts = {
                "date": date.today().isoformat(),
                "machine": f"{platform.machine()}, one thread of a machine shared with other work, CPU seconds",
                "torch": torch.__version__,
                "command": command("benchmarks.decompose"),
                "peers": {peer.name: peer.version for peer in peers},
                "summary": summary(rows),
            }
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    for peer in peers:
        peer.close()
    console.print(shown(summary(rows)))


def started(names: Sequence[str], environments: Sequence[str], console: Console) -> list[Peer]:
    """The peers that can be had; one that cannot is told and left out."""
    pythons = dict(e.split("=", 1) for e in environments)
    found = []
    for name in names:
        try:
            found.append(Peer(name, pythons.get(name, sys.executable)))
        except (RuntimeError, OSError) as error:
            console.print(f"[yellow]{name} is left out: {error}[/]")
    return found


def layers(networks: Sequence[str], weights: Path | None) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Each distinct layer of the networks with random weights, and those of a trained network."""
    if weights is not None:
        seen = set()
        for name, weight in load_file(weights).items():
            if weight.dim() in (2, 4) and weight.shape not in seen:
                seen.add(weight.shape)
                layer = _holding(weight)
                yield f"{weights.stem} {name} {tuple(weight.shape)}", layer
    done = set()
    for network in networks:
        for shape in NETWORKS[network]:
            # A convolution's position in the network does not matter here, only its weight.
            key = (shape.inputs, shape.outputs, shape.kernel)
            if key not in done:
                done.add(key)
                yield f"{network} {shape}", shape.layer()


def _holding(weight: torch.Tensor) -> nn.Linear | nn.Conv2d:
    layer: nn.Linear | nn.Conv2d
    if weight.dim() == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    else:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), padding=1, bias=False)
    layer.weight.data = weight.float().clone()
    return layer


def compare(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    method: Method,
    peers: Sequence[Peer],
    repeats: int,
    shares: Sequence[float],
) -> dict[str, Any]:
    """One row: our curve's time, and for each compared rank everyone's time and error."""
    curves = [timed(lambda: method.curve(layer, None, 196))]
    while len(curves) < repeats and curves[0][0] < LONG:
        curves.append(timed(lambda: method.curve(layer, None, 196)))
    points = curves[0][1]
    row: dict[str, Any] = {
        "layer": name,
        "weights": layer.weight.numel(),
        "method": method.name,
        "curve_seconds": statistics.median(seconds for seconds, _ in curves),
        "curve_points": len(points),
        "fits": [],
    }
    able = [peer for peer in peers if method.name in DECOMPOSES[peer.name]]
    compared: dict[tuple[int, ...], float] = {}
    for share in shares:
        affordable = [p for p in points if p.parameters <= share * layer.weight.numel()]
        if affordable:
            # Where the ranks end below both shares, they are the same.
            compared.setdefault(min(affordable, key=lambda p: p.error).ranks, share)
    modes = reshaped(method, layer)
    for ranks, share in compared.items():
        fit: dict[str, Any] = {"ranks": ranks, "share": share}
        runs: dict[str, list[tuple[float, float]]] = {}
        for repeat in range(repeats):
            for who in (None, *able):
                key = who.name if who else "ours"
                past = runs.setdefault(key, [])
                if repeat and (not past or past[0][0] > LONG):
                    continue
                if who is None:
                    seconds, found = timed(partial(method.factorize, layer, ranks, None))
                    past.append((seconds, relative_error(layer.weight, found.module.dense_weight())))
                    continue
                try:
                    past.append(who.decompose(method.name, layer.weight, (*modes, ranks) if modes else ranks))
                except RuntimeError as error:
                    fit[f"{key}_failed"] = str(error)
        for key, past in runs.items():
            if past:
                fit[key] = {"seconds": statistics.median(s for s, _ in past), "error": past[0][1], "runs": len(past)}
        row["fits"].append(fit)
    for peer in able:
        times = [fit[peer.name]["seconds"] for fit in row["fits"] if peer.name in fit]
        if times:
            row[f"{peer.name}_curve_seconds"] = statistics.mean(times) * len(points)
    return row


def reshaped(method: Method, layer: nn.Module) -> tuple[Any, ...]:
    """The sizes of the modes that a method makes of the outputs and of the inputs; empty where it reshapes nothing."""
    if isinstance(method, TTMatrix):
        return method.modes(layer)
    if isinstance(method, (RCP, RTucker)):
        modes = modes_of(layer)
        return modes.t, modes.s
    return ()


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By method and peer: how much faster we are, and how our error compares, over all layers."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        for peer in PEERS:
            own = [row for row in rows if row["method"] == method]
            fits = [fit for row in own for fit in row["fits"] if peer in fit]
            if not fits:
                continue
            curves = [row for row in own if f"{peer}_curve_seconds" in row]
            ratios = [fit[peer]["seconds"] / fit["ours"]["seconds"] for fit in fits]
            errors = [fit["ours"]["error"] / max(fit[peer]["error"], 1e-12) for fit in fits]
            curve = [row[f"{peer}_curve_seconds"] / row["curve_seconds"] for row in curves]
            found.append(
                {
                    "method": method,
                    "peer": peer,
                    "layers": len(curves),
                    "fit_speedup_median": statistics.median(ratios),
                    "fit_speedup_least": min(ratios),
                    "curve_speedup_median": statistics.median(curve),
                    "curve_speedup_least": min(curve),
                    "error_ratio_median": statistics.median(errors),
                    "error_ratio_worst": max(errors),
                }
            )
    return found


def line(row: dict[str, Any]) -> str:
    parts = [f"{row['layer']:34} {row['method']:8} curve {row['curve_seconds']:.2f} s, {row['curve_points']} points"]
    for fit in row["fits"]:
        who = [k for k in ("ours", *PEERS) if k in fit]
        parts.append(" ".join(f"{k} {fit[k]['seconds']:.3f} s {fit[k]['error']:.4f}" for k in who))
        parts += [f"{value}" for key, value in fit.items() if key.endswith("_failed")]
    return " | ".join(parts)


def shown(found: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Times theirs / ours, errors ours / theirs")
    columns = list(found[0]) if found else []
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in found:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    return table


if __name__ == "__main__":
    main()
