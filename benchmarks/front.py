"""Tenfold's front beside its peers': accuracy against parameters and MACs, on the same network and images.

    python -m benchmarks.front --network resnet20 --weights ../shared/weights/resnet20_cifar10.safetensors \\
      --no-fine-tuning --peers musco,aimet --json benchmarks/results/front_resnet20_no_gradient.json
    python -m benchmarks.front --network mlp_mnist --epochs 2 --json benchmarks/results/front_mlp_mnist.json

Runs the service's own search (``search.stages.next_work``, carried out as workers do), then the named peers in their
own environments. Every choice is made on held-out training images; the test images are looked at once for each point
that is reported. With ``--epochs`` each of these points, ours and the peers', is trained by the service's recipe for so
many epochs, and so is the dense network, for reference. Writes JSON and, beside it, a picture.
"""

import argparse
import copy
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.datasets import prepare
from benchmarks.drawing import draw
from benchmarks.inprocess import Search, search
from benchmarks.machine import machine
from benchmarks.networks import NETWORKS, trained
from benchmarks.no_gradient import AUGMENTED
from benchmarks.peers import PEERS, PeerFailed, run_peer
from search import cost
from search.bench import Bench, read_weights
from search.front import dominates, front, hypervolume, measured, size
from search.intake.loading import lift_program
from search.pace import planned_epochs
from search.session import Session
from search.spec import (
    Budget,
    Cost,
    DataSpec,
    FineTune,
    JobSpec,
    Rung,
    SearchSpec,
    TrialRecord,
)
from search.tune import fine_tune

__all__ = ["chosen", "main", "measure", "volume"]

COSTS = (Cost.PARAMETERS, Cost.MACS)
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("resnet20", "resnet32", *NETWORKS), help="or give --model and --data")
    parser.add_argument("--weights", type=Path, help="of a ResNet; the others are trained on first use")
    parser.add_argument("--model", type=Path, help="a .pt2 of tenfold.export")
    parser.add_argument("--data", type=Path, help="a data file as the service takes it, for classification")
    parser.add_argument("--data-spec", type=DataSpec.model_validate_json, default=DataSpec(), help="JSON, with --data")
    training = parser.add_mutually_exclusive_group()
    training.add_argument("--epochs", type=float, default=0.0, help="of training, for each point of each front")
    training.add_argument("--no-fine-tuning", dest="epochs", action="store_const", const=0.0)
    parser.add_argument("--trials", type=int, default=16, help="candidates of the search")
    parser.add_argument("--points", type=int, default=10, help="of each front that are trained and tested")
    parser.add_argument("--max-drop", type=float, default=None, help="where the search looks closest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", type=lambda text: tuple(text.split(",")), default=())
    parser.add_argument("--rates", type=float, nargs="+", default=[0.6, 0.5, 0.33, 0.25], help="kept, asked of peers")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    if unknown := sorted({*options.peers} - {*PEERS}):
        parser.error(f"--peers names {', '.join(unknown)}; there are {', '.join(PEERS)}")
    if (options.network is None) == (options.model is None) or (options.model is None) != (options.data is None):
        parser.error("give either --network, or --model and --data")
    if options.network in ("resnet20", "resnet32") and options.weights is None:
        parser.error(f"--network {options.network} needs --weights")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    words = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m benchmarks.front", *(Path(w).name if w.startswith("/") else w for w in words)])
    result = measure(options, command)
    console = Console(width=120, highlight=False)
    for shown in tables(result):
        console.print(shown)
    console.print(summary(result))


def measure(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Everything that is asked for; the JSON and the picture grow with each front."""
    with tempfile.TemporaryDirectory(prefix="tenfold-front-") as scratch:
        folder = Path(scratch)
        session, spec = opened(options, folder)
        bench = session.bench
        result: dict[str, Any] = {
            "command": command,
            "date": date.today().isoformat(),
            "machine": f"{machine()}, load {os.getloadavg()[0]:.1f} at the start",
            "title": options.network or options.model.name,
            "epochs": options.epochs,
            "fronts": {},
        }

        def written() -> None:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
            if "dense" in result:
                draw(result, options.json.with_suffix(".png"))

        found = search(session, spec, folder / "trials", told=lambda s: _tell(s, options.trials))
        dense = found.profile
        chance = 1 / bench.data.info.classes
        result["dense"] = {
            "parameters": dense.costs.parameters,
            "macs": dense.costs.macs,
            "select": bench.on_select.value,
            "test": bench.on_verify.value,
        }
        result["reference"] = {"parameters": 1.0, "macs": 1.0, "accuracy": chance}
        result["choosing"] = choosing(found, bench)
        ours = result["fronts"]["tenfold"] = {"points": [], "evaluations": len(found.history)}
        for record in chosen(found, options.points):
            ours["points"].append(our_point(session, spec, found, record, folder))
            written()
        _close(ours, result)
        if options.epochs:
            result["dense"]["trained_on"] = dense_trained_on(bench, spec)
        for peer in options.peers:
            print(f"peer {peer}", file=sys.stderr, flush=True)
            result["fronts"][peer] = peer_front(peer, bench, spec, options, result["choosing"], folder / peer)
            _close(result["fronts"][peer], result)
            written()
        written()
        return result


def opened(options: argparse.Namespace, folder: Path) -> tuple[Session, JobSpec]:
    """The job as a worker opens it."""
    architecture, model, data, data_spec = None, options.model, options.data, options.data_spec
    if options.network in NETWORKS:
        known = NETWORKS[options.network]
        model, data = trained(options.network), prepare(known.data)
        data_spec = known.spec.model_copy(update={"validation": _held_out(data)})
    elif options.network is not None:
        model, data = options.weights, prepare("cifar10")
        data_spec = DataSpec(transform=AUGMENTED, validation=_held_out(data))
        architecture = {"name": f"{options.network}_cifar10"}
    drop = options.max_drop if options.max_drop is not None else (0.02 if options.epochs else 0.15)
    spec = JobSpec(
        budget=Budget(max_drop=drop),
        minimize=COSTS,
        # Nothing is trained before the points are chosen: the cost of choosing is that of the cheap rung alone.
        fine_tune=FineTune(epochs=options.epochs, short_epochs=0),
        search=SearchSpec(trials=options.trials, seed=options.seed),
    )
    session = Session(
        model, data, architecture=architecture, data_spec=data_spec, spec=spec, scratch=folder / "session"
    )
    if session.bench.data.info.classes is None:
        raise SystemExit(f"--data holds a task of {session.bench.data.info.task}; this compares accuracies of classes")
    return session, spec


def _held_out(data: Path) -> float | None:
    """Share of the training images to choose on, where no others are set apart, rather than half of the test images."""
    with np.load(data) as arrays:
        return None if "x_val" in arrays.files else min(0.5, 5000 / len(arrays["y_train"]))


def chosen(found: Search, points: int) -> list[TrialRecord]:
    """At most ``points`` of the front (parameters, MACs, drop), spread evenly over sizes, largest first."""
    dense = found.profile.costs
    records = front(found.history, COSTS, dense=dense)

    def share(record: TrialRecord) -> float:
        result = measured(record)
        return math.log(size(result.costs, dense, COSTS)) if result else 0.0

    records.sort(key=share, reverse=True)
    while len(records) > max(points, 2):  # the one whose neighbours are nearest to each other goes
        gaps = [share(a) - share(b) for a, b in zip(records, records[2:], strict=False)]
        del records[1 + gaps.index(min(gaps))]
    return records


def our_point(session: Session, spec: JobSpec, found: Search, record: TrialRecord, folder: Path) -> Row:
    """A candidate after the whole recipe (or none), and its one look at the test images."""
    before = found.weights[record.number]
    result = measured(record)
    if spec.fine_tune.trains:
        out = folder / "full" / str(record.number)
        result = session.refine(record, planned_epochs(spec, found.profile), found.profile, None, before, None, out)
        test = result.verify_value
    else:
        network, _ = read_weights(session.bench.original, before)
        test = session.bench.verify(network).value
    assert result is not None
    methods = [entry.method for entry in record.plan.values()]
    return {
        "trial": record.number,
        "from": record.params.get("start", spec.search.sampler.value),
        "parameters": result.costs.parameters,
        "macs": result.costs.macs,
        "untrained_select": record.results[Rung.CHEAP].value,
        "select": result.value,
        "test": test,
        "epochs": result.epochs,
        "methods": {m: methods.count(m) for m in sorted({*methods})},
        "seconds": round(result.seconds, 1),
    }


def choosing(found: Search, bench: Bench) -> dict[str, Any]:
    """What it took to choose ranks, against the time of one training epoch of the original."""
    epoch = epoch_seconds(bench)
    return {
        "wall_s": round(found.wall_s, 1),
        "cpu_s": round(found.cpu_s, 1),
        "profile_wall_s": round(sum(p.seconds for p in found.profiles), 1),
        "trials": len(found.history),
        "images": len(found.history) * len(bench.data.select),
        "epoch_cpu_s": round(epoch, 1),
        "epochs_worth": round(found.cpu_s / epoch, 2),
    }


def epoch_seconds(bench: Bench, steps: int = 6) -> float:
    """Processor seconds of one epoch in which the original trains on labels: the median of some float32 steps."""
    network = copy.deepcopy(bench.original).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    times, size_ = [], bench.spec.fine_tune.batch_size
    for inputs, labels in bench.data.train.batches(size_, shuffle=0, augment=True, limit=steps * size_):
        began = time.process_time()
        loss = nn.functional.cross_entropy(network(*inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.process_time() - began)
    return float(np.median(times)) * len(bench.data.train) / size_


def dense_trained_on(bench: Bench, spec: JobSpec) -> Row:
    """The original after the same epochs of the same recipe: what training alone brings."""
    network = copy.deepcopy(bench.original)
    epochs, seen = _train(network, bench, spec)
    return {"select": seen, "test": bench.verify(network).value, "epochs": epochs}


def peer_front(
    name: str, bench: Bench, spec: JobSpec, options: argparse.Namespace, budget: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """A peer's points, or why there are none."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(bench.original, folder / "network.pt")
    parts = list(bench.data.select.batches(1024))
    np.savez(
        folder / "choosing.npz",
        x=np.concatenate([inputs[0].numpy() for inputs, _ in parts]),
        y=np.concatenate([labels.numpy() for _, labels in parts if labels is not None]),
    )
    request = {
        "network": str(folder / "network.pt"),
        "data": str(folder / "choosing.npz"),
        "rates": options.rates,
        "images": budget["images"],
    }
    said = {"version": PEERS[name].version}
    try:
        rows = run_peer(name, request, folder / "out")
    except PeerFailed as failure:
        return {**said, "error": str(failure), "points": []}
    points, failed = [], []
    for row in rows:
        if "error" in row:
            failed.append(f"{row['wanted']:g}: {row['error']}")
            continue
        try:
            points.append(peer_point(row, bench, spec))
        except Exception as error:  # what a peer made is its own affair; the other points still count
            failed.append(f"{row['wanted']:g}: {type(error).__name__}: {error}".splitlines()[0])
    return {
        **said,
        "points": points,
        "failed": failed,
        "evaluations": sum(r.get("evaluations", 0) for r in rows),
        "images": sum(r.get("images", 0) for r in rows),
        "wall_s": round(sum(r["wall_s"] for r in rows), 1),
        "cpu_s": round(sum(r["cpu_s"] for r in rows), 1),
    }


def peer_point(row: Row, bench: Bench, spec: JobSpec) -> Row:
    # Its own process wrote the file: an operator that is refused from strangers is welcome here.
    network = lift_program(torch.export.load(row["file"]), "pt2").module.eval()
    counted, epochs, select = cost.count(network, bench.example), 0.0, None
    if spec.fine_tune.trains:
        epochs, select = _train(network, bench, spec)
    else:
        select = bench.select(network).value
    return {
        "wanted": row["wanted"],
        "parameters": counted.parameters,
        "macs": counted.macs,
        "select": select,
        "test": bench.verify(network).value,
        "epochs": epochs,
    }


def _train(network: nn.Module, bench: Bench, spec: JobSpec) -> tuple[float, float]:
    """The service's recipe, in place: (epochs, accuracy on the held-out images)."""
    tuned = fine_tune(
        network,
        bench.original,
        bench.data,
        spec.fine_tune,
        epochs=float(spec.fine_tune.epochs),
        seed=spec.search.seed,
        metric=bench.metric,
        runtime=bench.runtime,
        keep="best" if bench.seen_before is None else "last",
    )
    return tuned.epochs, bench.select(network).value


def volume(points: Sequence[Row], dense: Row, chance: float) -> float:
    """Hypervolume of (share of parameters, share of MACs, drop), each of the box up to the reference: the original's
    size, and an accuracy of chance."""
    room = max(dense["test"] - chance, 1e-9)
    inside = [
        (p["parameters"] / dense["parameters"], p["macs"] / dense["macs"], max(dense["test"] - p["test"], 0.0) / room)
        for p in points
        if p["test"] is not None
    ]
    return hypervolume(inside, (1.0, 1.0, 1.0))


def _close(entry: dict[str, Any], result: dict[str, Any]) -> None:
    """Its hypervolume, and which of its points another one of it beats on the test images."""
    dense = result["dense"]
    entry["hypervolume"] = round(volume(entry["points"], dense, result["reference"]["accuracy"]), 4)
    figures = [(p["parameters"], p["macs"], -p["test"]) for p in entry["points"]]
    for point, own in zip(entry["points"], figures, strict=True):
        point["beaten"] = any(dominates(other, own) for other in figures)


def tables(result: dict[str, Any]) -> list[Table]:
    shown = []
    dense = result["dense"]
    for name, entry in result["fronts"].items():
        table = Table(
            title=f"{name} {entry.get('version', '')}, {result['epochs']:g} epochs",
            caption=entry.get("error") or "; ".join(entry.get("failed", [])) or None,
        )
        for column in ("parameters", "÷", "MMACs", "÷", "held-out %", "test %", "from"):
            table.add_column(column, justify="right")
        table.add_row(
            f"{dense['parameters']:,}", "1", f"{dense['macs'] / 1e6:.2f}", "1", f"{100 * dense['select']:.2f}",
            f"{100 * dense['test']:.2f}", "original",
        )  # fmt: skip
        for p in sorted(entry["points"], key=lambda p: -p["parameters"]):
            table.add_row(
                f"{p['parameters']:,}",
                f"{dense['parameters'] / p['parameters']:.2f}",
                f"{p['macs'] / 1e6:.2f}",
                f"{dense['macs'] / max(p['macs'], 1):.2f}",
                f"{100 * p['select']:.2f}",
                f"{100 * p['test']:.2f}",
                str(p.get("from", f"rate {p.get('wanted', 0):g}")),
            )
        shown.append(table)
    return shown


def summary(result: dict[str, Any]) -> str:
    took = result["choosing"]
    lines = [
        f"choosing: {took['cpu_s']:.0f} s of processor ({took['wall_s']:.0f} s of wall time, profile "
        f"{took['profile_wall_s']:.0f} s), {took['trials']} candidates = {took['epochs_worth']:.2f} epochs of the "
        f"original at {took['epoch_cpu_s']:.0f} s",
        f"hypervolume below (all parameters, all MACs, accuracy {100 * result['reference']['accuracy']:g} %):",
    ]
    for name, entry in result["fronts"].items():
        said = entry.get("error") or f"{entry['hypervolume']:.4f}, {len(entry['points'])} points"
        lines.append(f"  {name}: {said}")
    if "trained_on" in result["dense"]:
        lines.append(f"the dense network trained on: {100 * result['dense']['trained_on']['test']:.2f} %")
    return "\n".join(lines)


def _tell(found: Search, trials: int) -> None:
    last = found.history[-1] if found.history else None
    value = measured(last) if last else None
    at = f"trial {last.number} of {trials}: {value.value} with {value.costs.parameters:,}" if last and value else ""
    print(f"{found.wall_s:.0f} s ({found.cpu_s:.0f} s of processor) {at or 'profiled'}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
