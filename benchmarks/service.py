"""The real thing: a pretrained CIFAR-10 ResNet through the running service, as a user would send it.

    python -m benchmarks.service --network resnet20 --weights ../shared/weights/resnet20_cifar10.safetensors

Starts ``tenfold-server up`` in a scratch folder, exports the network with the SDK, uploads it and CIFAR-10 over REST,
waits, and writes the job's report, trials, front and wall times to ``--json``. Half of the test images are used to
choose; the budget is judged on the other half, which no choice has seen.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file

import tenfold
from benchmarks.datasets import prepare
from benchmarks.machine import machine
from examples.demo import service
from search.intake.architectures import build
from tenfold.progress import before_and_after, watch

TRANSFORM = {
    "scale": 1 / 255,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "layout": "nhwc",
    "augment": "crop_flip",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("resnet20", "resnet32"), default="resnet20")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=None, help="default: CIFAR-10, fetched once")
    parser.add_argument("--max-drop", type=float, default=0.005)
    parser.add_argument("--minimize", nargs="+", default=["parameters"])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--hours", type=float, default=None, help="for search and training; decides the epochs")
    parser.add_argument("--short-epochs", type=float, default=None)
    parser.add_argument("--epochs", type=float, default=None)
    parser.add_argument("--storage", nargs="+", default=[])
    parser.add_argument("--workers", type=int, default=1, help="each trains with all cores divided by this")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/service.json"))
    parser.add_argument("--out", type=Path, default=None, help="keep the downloaded files here")
    arguments = parser.parse_args()
    result = run(arguments)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    console = Console(highlight=False)
    net, _ = build(f"{arguments.network}_cifar10", {})
    net.load_state_dict(load_file(arguments.weights))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tenfold-benchmark-") as scratch:
        folder = Path(scratch)
        data = arguments.data or _cifar10(folder / "cifar10.npz")
        tenfold.export(net.eval(), torch.zeros(2, 3, 32, 32), folder / f"{arguments.network}.pt2")
        with service(folder, arguments.workers) as (url, key), tenfold.Client(url, key) as client:
            asked = {name: getattr(arguments, name) for name in ("epochs", "short_epochs")}
            job = client.submit(
                folder / f"{arguments.network}.pt2",
                data,
                max_drop=arguments.max_drop,
                minimize=arguments.minimize,
                data_spec={"transform": TRANSFORM},
                search={
                    "trials": arguments.trials,
                    "parallel": arguments.workers,
                    "stages": arguments.stages,
                    "hours": arguments.hours,
                },
                fine_tune={name: epochs for name, epochs in asked.items() if epochs is not None},
                storage=arguments.storage,
            )
            watch(job, console=console)
            job.download(folder / "out")
            if arguments.out:
                shutil.copytree(folder / "out", arguments.out, dirs_exist_ok=True)
            if job["best"]:
                console.print(before_and_after(job["baseline"], job["best"]))
            trials = [job.trial(t["number"]) for t in job.trials()]
            epochs = sum(r["epochs"] for t in trials for r in t["results"].values())
            return {
                "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
                "date": time.strftime("%Y-%m-%d"),
                "machine": machine(),
                "wall_seconds": round(time.monotonic() - began),
                "epochs_trained": epochs,
                "job": job.data,
                "front": job.front,
                "trials": trials,
                "report": _report(folder / "out" / "report.json"),
            }


def _cifar10(path: Path) -> Path:
    """All 50,000 training images to train on, the 10,000 test images as validation.

    The published weights were trained on every training image, so none of those can tell what compression costs; the
    service keeps half of the validation split for the check at the end, which no choice sees.
    """
    with np.load(prepare("cifar10")) as parts:
        joined = {f"{a}_train": np.concatenate([parts[f"{a}_train"], parts[f"{a}_val"]]) for a in "xy"}
        np.savez(path, **joined, x_val=parts["x_test"], y_val=parts["y_test"])
    return path


def _report(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    main()
