"""One point of the front, trained for long: a pretrained CIFAR-10 ResNet at a given share of its cost.

    python -m benchmarks.point --weights ../shared/weights/resnet20_cifar10.safetensors --kept 0.25 --epochs 60

Profile, allocation and training are the service's own (``search.session``): the allocator splits the cost, the whole
recipe runs, and the last weights are kept, for the 5,000 images held out of training were seen by the original and can
choose nothing. The test images are looked at once before and once after training.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.datasets import prepare
from benchmarks.no_gradient import TRANSFORM, plan_at
from search.bench import read_weights
from search.session import Session
from search.spec import (
    Augmentation,
    Budget,
    DataSpec,
    FineTune,
    JobSpec,
    Rung,
    SearchSpec,
    TrialWork,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--network", choices=("resnet20", "resnet32"), default="resnet20")
    parser.add_argument("--kept", type=float, default=0.25, help="share of the cost")
    parser.add_argument("--macs-share", type=float, default=0.0, help="0: the cost is parameters, 1: MACs")
    parser.add_argument("--epochs", type=float, default=60)
    parser.add_argument("--learning-rate", type=float, default=0.04)
    parser.add_argument("--weight-decay", type=float, default=2e-4)
    parser.add_argument("--distill", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=None, help="kept here, and gone on from if it is there")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/point.json"))
    arguments = parser.parse_args()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    result = measure(arguments)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k not in ("plan", "curve")}, indent=1))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = FineTune(
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        distill=arguments.distill,
    )
    spec = JobSpec(budget=Budget(max_drop=0.5), fine_tune=recipe, search=SearchSpec(seed=arguments.seed))
    kept: Path | None = arguments.checkpoint
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(
            arguments.weights,
            prepare("cifar10"),
            architecture={"name": f"{arguments.network}_cifar10"},
            data_spec=DataSpec(transform=TRANSFORM.model_copy(update={"augment": Augmentation.CROP_FLIP})),
            spec=spec,
            scratch=Path(scratch) / "session",
            save=None if kept is None else lambda path: path.replace(kept),
            report=_tell(),
        )
        profile = session.profile(0, None)
        plan = plan_at(profile, arguments.kept, arguments.macs_share)
        work = TrialWork(number=0, stage=0, parent=None, params={}, plan=plan, rung=Rung.CHEAP)
        cheap = session.trial(work, profile, None, None, None, Path(scratch) / "cheap")
        network, _ = read_weights(session.bench.original, Path(scratch) / "cheap" / "weights.safetensors")
        before = session.bench.verify(network).value
        began = time.monotonic()
        full = session.trial(
            work.model_copy(update={"rung": Rung.FULL, "epochs": arguments.epochs}),
            profile,
            None,
            Path(scratch) / "cheap" / "weights.safetensors",
            kept if kept is not None and kept.exists() else None,
            Path(scratch) / "full",
        )
    costs, dense = cheap.costs, profile.costs
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "parameters": costs.parameters,
        "parameters_kept": round(costs.parameters / dense.parameters, 4),
        "macs": costs.macs,
        "macs_kept": round(costs.macs / dense.macs, 4),
        "original_test": profile.verify_value,
        "untrained_test": before,
        "test": full.verify_value,
        "drop_points": None if full.verify_drop is None else round(100 * full.verify_drop, 2),
        "seconds": round(time.monotonic() - began),
        "notes": list(full.notes),
        "curve": [record.model_dump(mode="json") for record in full.curve],
        "plan": {site: entry.model_dump(mode="json") for site, entry in plan.items()},
    }


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
