"""Other libraries' decompositions and layers, each in an environment of its own where it needs one.

``Peer`` starts this file with that environment's interpreter and speaks lines of JSON with it, so that its runs can be
interleaved with ours. The file imports nothing of ours: it runs where only torch and the peer are installed. Weights
travel as `.npy` files. Seconds are CPU seconds of a process with one thread.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["DECOMPOSES", "LAYERS", "PEERS", "Peer", "command", "relative_error", "timed"]

PEERS = ("tensorly", "tltorch", "musco")
DECOMPOSES = {
    "tensorly": ("tucker2", "cp3", "cp4", "tt", "svd", "tt_matrix", "r_cp", "r_tucker", "r_tt"),
    "tltorch": ("tucker2", "cp4"),
    "musco": ("tucker2", "cp3"),
}
"""Peer to those of our methods that it has a decomposition for."""
LAYERS = {"tltorch": ("tucker2", "cp4", "tt_matrix")}
"""Likewise, a layer."""


class Peer:
    """One library in a process of its own.

    Raises:
        RuntimeError: it cannot be imported there; the message is its own.
    """

    def __init__(self, name: str, python: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, str(Path(__file__)), "--serve", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._folder = tempfile.TemporaryDirectory()
        self.version = str(self._ask({})["version"])

    def decompose(self, method: str, weight: Tensor, ranks: tuple[Any, ...]) -> tuple[float, float]:
        """Seconds, and ``||W - V|| / ||W||``, of one decomposition at our method's ranks; where channels are reshaped:
        out modes, in modes, ranks."""
        path = Path(self._folder.name) / "weight.npy"
        np.save(path, weight.detach().numpy())
        found = self._ask({"task": "decompose", "method": method, "weight": str(path), "ranks": ranks})
        return found["seconds"], found["error"]

    def layer(self, method: str, layer: nn.Module, ranks: tuple[int, ...], shape: tuple[int, ...], runs: int) -> float:
        """Median seconds of a forward pass of the peer's layer in the place of ``layer`` for inputs of ``shape``."""
        path = Path(self._folder.name) / "layer.pt"
        torch.save(layer, path)
        asked = {"task": "layer", "method": method, "layer": str(path), "ranks": ranks, "shape": shape, "runs": runs}
        return float(self._ask(asked)["seconds"])

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._folder.cleanup()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended without an answer (exit status {self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise RuntimeError(f"{self.name}: {answer['failed']}")
        return answer


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, and what the call returns."""
    began = time.process_time()
    found = call()
    return time.process_time() - began, found


def command(module: str) -> str:
    """What was typed, without the places of files, which are this machine's own."""
    kept, skipping = [], False
    for word in sys.argv[1:]:
        if word.startswith("--"):
            skipping = word in ("--json", "--environment")
        if not skipping:
            kept.append(Path(word).name if "/" in word else word)
    return " ".join(["python -m", module, *kept])


def relative_error(weight: Tensor, found: Tensor) -> float:
    return float((weight.double() - found.double()).norm() / weight.double().norm())


def _tensorly(method: str, weight: Tensor, ranks: list[Any]) -> tuple[float, float]:
    import tensorly as tl
    from tensorly.decomposition import parafac, partial_tucker, tensor_train, tensor_train_matrix, tucker
    from tensorly.tenalg import svd_interface

    tl.set_backend("pytorch")
    if method == "svd":
        matrix = weight.flatten(1)
        seconds, (u, s, v) = timed(lambda: svd_interface(matrix, n_eigenvecs=ranks[0], method="truncated_svd"))
        return seconds, relative_error(matrix, (u * s) @ v)
    if method == "tucker2":
        seconds, ((core, factors), _) = timed(lambda: partial_tucker(weight, rank=ranks[::-1], modes=[0, 1]))
        return seconds, relative_error(weight, tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1]))
    if method in ("cp3", "cp4"):
        tensor = weight.flatten(2) if method == "cp3" else weight
        seconds, found = timed(lambda: parafac(tensor, ranks[0], n_iter_max=100, init="svd"))
        return seconds, relative_error(tensor, tl.cp_to_tensor(found))
    if method == "r_cp":
        out_modes, in_modes, (rank,) = ranks
        digits = weight.reshape(*out_modes, *in_modes, -1).permute(0, 2, 1, 3, 4)
        tensor = digits.reshape(out_modes[0] * in_modes[0], out_modes[1] * in_modes[1], -1)
        seconds, found = timed(lambda: parafac(tensor, rank, n_iter_max=100, init="svd"))
        return seconds, relative_error(tensor, tl.cp_to_tensor(found))
    if method == "r_tucker":
        out_modes, in_modes, (in1, in2, out1, out2) = ranks
        tensor = weight.reshape(*out_modes, *in_modes, -1)
        kept = [out1, out2, in1, in2, tensor.shape[-1]]
        seconds, found = timed(lambda: tucker(tensor, rank=kept))
        return seconds, relative_error(tensor, tl.tucker_to_tensor(found))
    if method == "tt":
        moved = weight.permute(1, 2, 3, 0).contiguous()
        seconds, found = timed(lambda: tensor_train(moved, rank=[1, *ranks, 1]))
        return seconds, relative_error(moved, tl.tt_to_tensor(found))
    if method in ("tt_matrix", "r_tt"):
        out_modes, in_modes, train = ranks
        digits = weight.reshape(*out_modes, *in_modes)
        seconds, found = timed(lambda: tensor_train_matrix(digits, rank=[1, *train, 1]))
        return seconds, relative_error(weight.flatten(1), found.to_matrix())
    raise ValueError(f"no tensorly decomposition for {method}")


def _tltorch(method: str, weight: Tensor, ranks: list[int]) -> tuple[float, float]:
    layer = _conv_of(weight)
    rank = ranks[0] if method == "cp4" else (ranks[1], ranks[0], *weight.shape[2:])
    seconds, found = timed(lambda: _tltorch_conv(layer, "CP" if method == "cp4" else "Tucker", rank, fit=True))
    return seconds, relative_error(weight, found.weight.to_tensor().detach())


def _tltorch_conv(layer: nn.Conv2d, kind: str, rank: Any, *, fit: bool) -> nn.Module:
    import tltorch

    made: nn.Module = tltorch.FactorizedConv.from_conv(
        layer, rank=rank, factorization=kind, decompose_weights=fit, implementation="factorized"
    )
    return made


def _musco(method: str, weight: Tensor, ranks: list[int]) -> tuple[float, float]:
    from musco.pytorch.compressor.decompositions.cp3 import CP3DecomposedLayer
    from musco.pytorch.compressor.decompositions.tucker2 import Tucker2DecomposedLayer

    # The solver that it calls left torch long ago.
    torch.solve = lambda b, a: (torch.linalg.solve(a, b), None)
    layer = _conv_of(weight)
    make, given = {
        "tucker2": (Tucker2DecomposedLayer, {"ranks": ranks[::-1]}),
        "cp3": (CP3DecomposedLayer, {"rank": ranks[0]}),
    }[method]
    seconds, found = timed(lambda: make(layer, "layer", rank_selection="manual", **given))
    return seconds, _output_error(layer, found.new_layers)


def _output_error(layer: nn.Conv2d, found: nn.Module) -> float:
    """The weight error from outputs alone, whatever the links are: one input for each weight of an output."""
    x = torch.eye(layer.weight[0].numel()).reshape(-1, *layer.weight.shape[1:])
    for module in (layer, *found.modules()):
        if isinstance(module, nn.Conv2d):
            module.padding = (0, 0)
    with torch.no_grad():
        return relative_error(layer(x), found(x))


def _conv_of(weight: Tensor) -> nn.Conv2d:
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), padding=1, bias=False)
    layer.weight.data = weight
    return layer


def _layer_of(method: str, layer: nn.Module, ranks: list[int]) -> nn.Module:
    """tensorly-torch's layer of our method's ranks, untrained."""
    import tltorch

    if isinstance(layer, nn.Conv2d):
        kinds = {"cp4": ("CP", ranks[0]), "tucker2": ("Tucker", (*ranks[::-1], *layer.kernel_size))}
        if method not in kinds:
            raise ValueError(f"tensorly-torch has no convolution like {method}")
        return _tltorch_conv(layer, *kinds[method], fit=False)
    if method != "tt_matrix":
        raise ValueError(f"tensorly-torch has no Linear like {method}")
    out_modes, in_modes, ranks = ranks  # type: ignore[assignment]
    made: nn.Module = tltorch.FactorizedLinear(
        in_tensorized_features=tuple(in_modes),  # type: ignore[call-overload]
        out_tensorized_features=tuple(out_modes),  # type: ignore[call-overload]
        bias=True,
        factorization="blocktt",
        rank=(1, *ranks, 1),
        implementation="factorized",
    )
    return made


def _forward_seconds(module: nn.Module, shape: list[int], runs: int) -> float:
    x = torch.randn(shape)
    with torch.no_grad():
        module(x)
        return sorted(timed(lambda: module(x))[0] for _ in range(runs))[runs // 2]


def _serve(name: str) -> None:
    torch.set_num_threads(1)
    decompose = {"tensorly": _tensorly, "tltorch": _tltorch, "musco": _musco}[name]
    # Peers print; only answers may reach the pipe.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if not question:
                answer: dict[str, Any] = {"version": str(__import__(name).__dict__.get("__version__", "installed"))}
            elif question["task"] == "decompose":
                weight = torch.from_numpy(np.load(question["weight"]))
                with torch.no_grad():
                    seconds, error = decompose(question["method"], weight, question["ranks"])
                answer = {"seconds": seconds, "error": error}
            else:
                layer = torch.load(question["layer"], weights_only=False)
                made = _layer_of(question["method"], layer, question["ranks"])
                answer = {"seconds": _forward_seconds(made, question["shape"], question["runs"])}
        except Exception as error:  # whatever a peer raises is its answer
            answer = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", choices=PEERS, required=True)
    _serve(parser.parse_args().serve)
