"""Other compressors on the same network, each in its own environment: a folder of packages, a process of its own.

A peer gets the network as a pickled ``fx.GraphModule`` of plain torch modules (our own file), the images that it may
choose on, and the shares of parameters wanted; it writes one exported program for each share. Counting, evaluation and
fine-tuning of what it made are ours, the same for everybody.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PEERS", "Peer", "PeerFailed", "run_peer"]

CACHE = Path.home() / ".cache" / "tenfold" / "peers"
ROOT = Path(__file__).parents[2]
HOURS = 3


class PeerFailed(Exception):
    """A peer could not be installed or did not run; the text is the last line of its error."""


@dataclass(frozen=True)
class Peer:
    version: str
    packages: tuple[str, ...]
    """Installed without their dependencies: the torch that runs this process is theirs too."""
    dependencies: tuple[str, ...] = ()
    """Installed with theirs."""
    stub: str | None = None
    """A package that is imported but never used, put there empty."""


PEERS: Mapping[str, Peer] = {
    "musco": Peer(
        "musco-pytorch 1.0.6",
        (
            *("numpy==1.23.5", "scipy==1.10.1", "tensorly==0.4.5", "scikit-tensor-py3", "absl-py"),
            *("musco-pytorch==1.0.6", "flopco-pytorch"),
        ),
    ),
    "aimet": Peer(
        "aimet-torch 2.42.0",
        ("aimet-torch==2.42.0",),
        (
            *("Jinja2", "PyYAML", "bokeh>=3.3,<=3.6.3", "cvxpy", "holoviews", "hvplot>=0.10", "jsonschema"),
            *("matplotlib", "networkx", "numpy", "onnx", "onnx_ir", "onnxscript", "osqp", "pandas", "psutil"),
            *("pybind11", "safetensors", "scikit-learn", "scipy", "tensorboard", "tqdm"),
        ),
        stub="torchvision",
    ),
    "tltorch": Peer("tensorly-torch 0.5.0", ("tensorly", "tensorly-torch==0.5.0", "packaging")),
}
STUB = {
    "__init__.py": "from . import datasets, models, ops, transforms\n__version__ = '0.28.0'\n",
    "transforms/__init__.py": "Compose = ToTensor = Normalize = Resize = CenterCrop = object\n",
    "ops/__init__.py": "RoIPool = RoIAlign = object\n",
    "models/__init__.py": "",
    "datasets/__init__.py": "ImageFolder = CIFAR10 = object\n",
}


def run_peer(name: str, request: Mapping[str, Any], folder: Path, *, cache: Path = CACHE) -> list[dict[str, Any]]:
    """The peer's rows: ``{"wanted", "file", "evaluations", ...}``, ``file`` an exported program in ``folder``.

    Raises PeerFailed with the last line that the peer, or the installer, said.
    """
    if name not in PEERS:
        raise PeerFailed(f"there is no peer {name!r}; there are {', '.join(PEERS)}")
    folder.mkdir(parents=True, exist_ok=True)
    asked, answered = folder / "request.json", folder / "rows.json"
    asked.write_text(json.dumps({**request, "folder": str(folder)}))
    packages = _installed(name, cache)
    path = os.pathsep.join([str(packages), str(ROOT), str(ROOT / "client")])
    _run([sys.executable, "-m", f"benchmarks.peers.{name}", str(asked), str(answered)], {"PYTHONPATH": path}, folder)
    rows: list[dict[str, Any]] = json.loads(answered.read_text())
    return rows


def _installed(name: str, cache: Path) -> Path:
    """The folder of the peer's packages, filled on first use; a mark tells that it was filled to the end."""
    peer, folder = PEERS[name], cache / name
    if (folder / "installed").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(folder)]
    for options, packages in ((("--upgrade",), peer.dependencies), (("--upgrade", "--no-deps"), peer.packages)):
        if packages:
            _run([*pip, *options, *packages], {})
    if peer.stub is not None:
        for file, text in STUB.items():
            target = folder / peer.stub / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    (folder / "installed").touch()
    return folder


def _run(command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None) -> None:
    """``folder``: where it runs, for some write files beside themselves."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=HOURS * 3600,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PeerFailed(f"it did not end within {HOURS} hours") from None
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise PeerFailed(said[-1].strip() if said else f"it ended with {done.returncode} and said nothing")
