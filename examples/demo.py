"""``make demo``: the main job, end to end, on this machine.

Starts the whole service in a scratch folder, trains a small CNN on scikit-learn's digits, exports and uploads it, asks
for the smallest network that loses at most one point, shows the search live, downloads the result, checks it in a clean
process without Tenfold, and stops everything.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

import tenfold
from examples.digits import save, split, train
from tenfold.progress import before_and_after, watch

console = Console(highlight=False)


@contextmanager
def service(folder: Path, workers: int) -> Iterator[tuple[str, str]]:
    """``tenfold-server up`` with its embedded defaults; gives its address and its first admin key."""
    # A terminated demo must not leave its service behind: SIGTERM unwinds like any exit.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # The uploads are our own, so a kernel without every layer of the jail will do.
    environment = {**os.environ, "TENFOLD_JAIL": "best_effort"}
    log = (folder / "server.log").open("w")
    command = [sys.executable, "-m", "launch.main", "up", "--data", str(folder / "data"), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--workers", str(workers)], stdout=log, stderr=log, env=environment, start_new_session=True
    )
    try:
        yield _greeting(process, folder / "server.log")
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


def _greeting(process: subprocess.Popen[bytes], log: Path) -> tuple[str, str]:
    """The address and the key that the service prints once it is up."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        text = log.read_text()
        url, key = re.search(r"Tenfold is up: (\S+)", text), re.search(r"admin key.*: (tf_\S+)", text)
        if url and key:
            return url[1], key[1]
        time.sleep(0.1)
    sys.exit(f"the service did not start:\n{log.read_text()}")


def accuracy(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-result"), help="where the files go")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tenfold-demo-") as scratch:
        folder = Path(scratch)
        console.print("[bold]1[/] starting the service and training a small CNN on scikit-learn's digits")
        with service(folder, arguments.workers) as (url, key):
            result = run(folder, url, key, arguments)
    print_result(*result, out=arguments.out, seconds=time.monotonic() - began)


def run(folder: Path, url: str, key: str, arguments: argparse.Namespace) -> tuple[tenfold.Job, float, dict[str, float]]:
    data = split()
    net = train(data)
    save(data, folder / "digits.npz")
    test = torch.tensor(data["x_test"], dtype=torch.float32) / 16, torch.tensor(data["y_test"])
    before = accuracy(net, *test)
    tenfold.export(net, test[0][:4], folder / "digits.pt2")
    console.print(f"[bold]2[/] service at {url}; uploading the model and the data")
    with tenfold.Client(url, key) as client:
        job = client.submit(
            folder / "digits.pt2",
            folder / "digits.npz",
            max_drop=0.01,
            data_spec={"transform": {"scale": 1 / 16}},
            search={"trials": arguments.trials, "parallel": arguments.workers, "calibration_samples": 512},
            fine_tune={"epochs": arguments.epochs, "short_epochs": 3, "batch_size": 64},
        )
        console.print(f"[bold]3[/] searching: lose at most 1 point, as few parameters as possible (job {job.id})")
        watch(job, console=console).wait(0.0)
        shutil.rmtree(arguments.out, ignore_errors=True)
        job.download(arguments.out)
    console.print("[bold]4[/] checking model.pt2 and model.onnx in a clean process without Tenfold")
    check = [sys.executable, "-I", str(Path(__file__).with_name("check_files.py"))]
    checked = subprocess.run(
        [*check, str(arguments.out), str(folder / "digits.npz"), str(1 / 16)],
        capture_output=True,
        text=True,
        check=False,
    )
    if checked.returncode:
        sys.exit(f"the files do not load without Tenfold:\n{checked.stderr}")
    return job, before, json.loads(checked.stdout)


def print_result(job: tenfold.Job, before: float, checked: dict[str, float], *, out: Path, seconds: float) -> None:
    baseline, best = job["baseline"], job["best"]
    console.print(before_and_after(baseline, best))
    console.print(
        f"on the test images, in the clean process: .pt2 {checked['pt2_accuracy']:.4f}, "
        f".onnx {checked['onnx_accuracy']:.4f}, original {before:.4f} · {seconds:.0f} s in all",
        soft_wrap=True,
    )
    p, q = baseline["costs"]["parameters"], best["costs"]["parameters"]
    console.print(
        f"demo: accuracy {before:.4f} → {checked['pt2_accuracy']:.4f}, parameters {p:,} → {q:,} "
        f"(×{p / q:.2f} smaller), files in {out}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
