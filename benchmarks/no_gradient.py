"""Accuracy without a single gradient step: ResNet-20 at parameters ÷2, ÷3, ÷4 by the service's own profile and trials.

    python -m benchmarks.no_gradient --weights ../shared/weights/resnet20_cifar10.safetensors

Opens the network and CIFAR-10 as a job does (``search.session``), profiles it, lets the allocator split each budget of
parameters, and runs the cheap rung of a trial (decompose, reconstruct in sequence on the calibration images,
recalibrate if that helps). All choices see training images only (5,000 of them are held out for choosing); the test
images are looked at once for each row. ``--seeds`` draws other calibration images.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.datasets import prepare
from search.allocate import allocate
from search.bench import read_weights
from search.session import Session
from search.spec import (
    Augmentation,
    Budget,
    Cost,
    DataSpec,
    JobSpec,
    Plan,
    Profile,
    Rung,
    SearchSpec,
    Transform,
    TrialWork,
)

TRANSFORM = Transform(
    scale=1 / 255,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    layout="nhwc",
    augment=Augmentation.NONE,
)
AUGMENTED = TRANSFORM.model_copy(update={"augment": Augmentation.CROP_FLIP})
"""For training."""
PROTOTYPE = {2.0: 87.1, 3.0: 77.8, 4.0: 66.3}
"""DESIGN 3.3, the numbers to beat (first 4,000 test images there, all 10,000 here)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--network", choices=("resnet20", "resnet32"), default="resnet20")
    parser.add_argument("--data", type=Path, default=None, help="an .npz of benchmarks.datasets; default: CIFAR-10")
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--calibration", type=int, default=1024, help="training images that statistics are taken on")
    parser.add_argument("--methods", nargs="+", default=None, help="default: all, mixed layer by layer")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/no_gradient.json"))
    arguments = parser.parse_args()
    rows = [row for seed in arguments.seeds for row in measure(arguments, seed)]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    facts = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    settings = {"network": arguments.network, "calibration": arguments.calibration, "methods": arguments.methods}
    arguments.json.write_text(json.dumps({**facts, **settings, "rows": rows}, indent=1) + "\n")
    Console(width=110).print(table(rows))


def measure(arguments: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """The rows of one calibration set."""
    spec = JobSpec(
        budget=Budget(max_drop=0.5),
        methods=tuple(arguments.methods) if arguments.methods else "auto",
        search=SearchSpec(seed=seed, calibration_samples=arguments.calibration),
    )
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(
            arguments.weights,
            arguments.data or prepare("cifar10"),
            architecture={"name": f"{arguments.network}_cifar10"},
            data_spec=DataSpec(transform=TRANSFORM),
            spec=spec,
            scratch=Path(scratch) / "session",
        )
        profile = session.profile(0, None)
        return [row(session, profile, ratio, seed, Path(scratch) / f"{ratio}") for ratio in arguments.ratios]


def row(session: Session, profile: Profile, ratio: float, seed: int, out: Path) -> dict[str, Any]:
    """One trial's cheap rung, then its one look at the test images."""
    plan = plan_at(profile, 1 / ratio)
    work = TrialWork(number=0, stage=0, parent=None, params={}, plan=plan, rung=Rung.CHEAP)
    result = session.trial(work, profile, None, None, None, out)
    network, _ = read_weights(session.bench.original, out / "weights.safetensors")
    began = time.perf_counter()
    test = session.bench.verify(network)
    methods = [entry.method for entry in plan.values() for _ in entry.members or (None,)]
    return {
        "ratio": ratio,
        "seed": seed,
        "parameters": result.costs.parameters,
        "counted_ratio": round(profile.costs.parameters / result.costs.parameters, 3),
        "macs": result.costs.macs,
        "dense_macs": profile.costs.macs,
        "select_accuracy": result.value,
        "test_accuracy": test.value,
        "original_test_accuracy": profile.verify_value,
        "methods": {m: methods.count(m) for m in sorted(set(methods))},
        "notes": list(result.notes),
        "profile_s": round(profile.seconds, 1),
        "trial_s": round(result.seconds, 1),
        "test_s": round(time.perf_counter() - began, 1),
        "plan": {site: entry.model_dump(mode="json") for site, entry in plan.items()},
    }


def plan_at(profile: Profile, kept: float, macs_share: float = 0.0) -> Plan:
    """The allocator's plan at a share of the cost: parameters, with multiply-accumulates for ``macs_share`` of it."""
    return allocate(
        profile.sites,
        kept,
        groups=profile.groups,
        cost={Cost.PARAMETERS: 1 - macs_share, Cost.MACS: macs_share},
        fixed_parameters=profile.costs.parameters - sum(s.dense_parameters for s in profile.sites),
        fixed_macs=profile.costs.macs - sum(s.dense_macs for s in profile.sites),
    )


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="No gradient step, all 10,000 test images")
    for name in (
        "parameters ÷",
        "seed",
        "counted ÷",
        "MMACs",
        "held-out %",
        "test %",
        "prototype %",
        "profile s",
        "trial s",
    ):
        shown.add_column(name, justify="right")
    for r in rows:
        shown.add_row(
            f"{r['ratio']:g}",
            str(r["seed"]),
            f"{r['counted_ratio']:.3f}",
            f"{r['macs'] / 1e6:.1f} / {r['dense_macs'] / 1e6:.1f}",
            f"{100 * r['select_accuracy']:.2f}",
            f"{100 * r['test_accuracy']:.2f}",
            f"{PROTOTYPE.get(r['ratio'], float('nan')):.1f}",
            f"{r['profile_s']:.0f}",
            f"{r['trial_s']:.0f}",
        )
    return shown


if __name__ == "__main__":
    main()
