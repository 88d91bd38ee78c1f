"""One point of the front, trained for long: a pretrained CIFAR-10 ResNet at a given share of its cost.

    python -m benchmarks.point --weights ../shared/weights/resnet20_cifar10.safetensors --kept 0.25 --epochs 60

Profile, allocation and training are the service's own (``search.session``): the allocator splits the cost, the whole
recipe runs, and the last weights are kept, for the 5,000 images held out of training were seen by the original and can
choose nothing. The test images are looked at once before and once after training. The trained weights lie beside the
JSON. ``--start`` keeps what comes before training (profile, plan, decomposed weights) in a folder, or takes it from
there: trainings on another machine, one with a GPU say, then begin at the same network.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.datasets import prepare
from benchmarks.machine import machine
from benchmarks.no_gradient import AUGMENTED, plan_at
from search.bench import read_weights
from search.session import Session
from search.spec import (
    Budget,
    DataSpec,
    FineTune,
    JobSpec,
    Profile,
    Rung,
    SearchSpec,
    TrialResult,
    TrialWork,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--network", choices=("resnet20", "resnet32"), default="resnet20")
    parser.add_argument("--kept", type=float, default=0.25, help="share of the cost; 1: the original, trained on")
    parser.add_argument("--macs-share", type=float, default=0.0, help="0: the cost is parameters, 1: MACs")
    parser.add_argument("--epochs", type=float, default=60)
    parser.add_argument("--learning-rate", type=float, default=0.04)
    parser.add_argument("--weight-decay", type=float, default=2e-4)
    parser.add_argument("--distill", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, default=None, help="folder of what comes before training")
    parser.add_argument("--only-start", action="store_true", help="make that and end")
    parser.add_argument("--checkpoint", type=Path, default=None, help="kept here, and gone on from if it is there")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/point.json"))
    arguments = parser.parse_args()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    if arguments.only_start:
        with tempfile.TemporaryDirectory() as scratch:
            _start(_session(arguments, Path(scratch)), arguments, arguments.start)
        return
    result = measure(arguments)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k not in ("plan", "curve")}, indent=1))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    kept: Path | None = arguments.checkpoint
    with tempfile.TemporaryDirectory() as scratch:
        session = _session(arguments, Path(scratch))
        profile, cheap, weights = _start(session, arguments, arguments.start or Path(scratch) / "start")
        network, plan = read_weights(session.bench.original, weights)
        before = session.bench.verify(network).value
        began = time.monotonic()
        full = session.trial(
            TrialWork(number=0, stage=0, parent=None, params={}, plan=plan, rung=Rung.FULL, epochs=arguments.epochs),
            profile,
            None,
            weights,
            kept if kept is not None and kept.exists() else None,
            Path(scratch) / "full",
        )
        shutil.copyfile(Path(scratch) / "full" / "weights.safetensors", arguments.json.with_suffix(".safetensors"))
    costs, dense, within = cheap.costs, profile.costs, full.verify_interval
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "settings": {k: v.name if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "parameters": costs.parameters,
        "parameters_kept": round(costs.parameters / dense.parameters, 4),
        "macs": costs.macs,
        "macs_kept": round(costs.macs / dense.macs, 4),
        "original_test": profile.verify_value,
        "untrained_test": before,
        "test": full.verify_value,
        "drop_points": None if full.verify_drop is None else round(100 * full.verify_drop, 2),
        "drop_interval_points": None if within is None else [round(100 * x, 2) for x in (within.low, within.high)],
        "seconds": round(time.monotonic() - began),
        "notes": list(full.notes),
        "curve": [record.model_dump(mode="json") for record in full.curve],
        "plan": {site: entry.model_dump(mode="json") for site, entry in plan.items()},
    }


def _session(arguments: argparse.Namespace, scratch: Path) -> Session:
    kept: Path | None = arguments.checkpoint
    recipe = FineTune(
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        distill=arguments.distill,
    )
    return Session(
        arguments.weights,
        prepare("cifar10"),
        architecture={"name": f"{arguments.network}_cifar10"},
        data_spec=DataSpec(transform=AUGMENTED),
        spec=JobSpec(budget=Budget(max_drop=0.5), fine_tune=recipe, search=SearchSpec(seed=arguments.seed)),
        scratch=scratch / "session",
        save=None if kept is None else lambda path: path.replace(kept),
        report=_tell(),
    )


def _start(session: Session, arguments: argparse.Namespace, folder: Path) -> tuple[Profile, TrialResult, Path]:
    """Profile and cheap rung, as they lie in ``folder`` or made into it."""
    weights = folder / "weights.safetensors"
    if weights.exists():
        profile = Profile.model_validate_json((folder / "profile.json").read_text())
        return profile, TrialResult.model_validate_json((folder / "cheap.json").read_text()), weights
    profile = session.profile(0, None)
    plan = {} if arguments.kept == 1 else plan_at(profile, arguments.kept, arguments.macs_share)
    work = TrialWork(number=0, stage=0, parent=None, params={}, plan=plan, rung=Rung.CHEAP)
    cheap = session.trial(work, profile, None, None, None, folder)
    (folder / "profile.json").write_text(profile.model_dump_json())
    (folder / "cheap.json").write_text(cheap.model_dump_json())
    return profile, cheap, weights


def _tell() -> Any:
    last = 0.0

    def tell(message: str, done: float, of: float) -> None:
        nonlocal last
        if time.monotonic() - last > 60:
            last = time.monotonic()
            print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)

    return tell


if __name__ == "__main__":
    main()
