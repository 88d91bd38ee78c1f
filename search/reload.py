"""Load an exported network where there is no Tenfold, and measure it again.

    python -I reload.py DIR            every model*.pt2 and model*.onnx in DIR, against DIR/check.npz
    python -I reload.py DIR/model.pt2  that one

Prints one JSON object: ``{"model.pt2": {"value", "expected_value", "max_difference", "samples", "latency_ms", …}}``.
Needs numpy, and torch or onnxruntime for the file at hand; imports nothing of ours, and is handed out with the files.

``check.npz`` holds ``input_0`` … (samples first), ``expected`` (what the network answered when it was exported; of
``model-int8.pt2`` it is ``expected_int8``), ``targets`` or ``reference`` (the labels, or the original's answers) and
``facts``, a JSON text. Of several outputs the first counts, or the last where ``facts`` says so.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = list[Any]
Run = Callable[[Arrays], Any]

RUNS = 15
"""Timed runs; the median is reported."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -I reload.py DIR | FILE", file=sys.stderr)  # noqa: T201
        return 2
    path = Path(arguments[0])
    files = [path] if path.is_file() else sorted([*path.glob("model*.pt2"), *path.glob("model*.onnx")])
    if not files:
        print(f"{path} holds no model*.pt2 and no model*.onnx", file=sys.stderr)  # noqa: T201
        return 2
    print(json.dumps({file.name: check(file, file.parent / "check.npz") for file in files}))  # noqa: T201
    return 0


def check(file: Path, samples: Path) -> dict[str, Any]:
    """Run ``file`` on the samples: its metric, the largest difference from the expected answers, its latency."""
    with np.load(samples, allow_pickle=False) as stored:
        facts = json.loads(str(stored["facts"]))
        inputs = [stored[f"input_{i}"] for i in range(facts["inputs"])]
        expected = stored["expected" + file.stem.removeprefix("model").replace("-", "_")]
        truth = stored["targets"] if "targets" in stored else stored["reference"]
    run = (_onnx if file.suffix == ".onnx" else _pt2)(file, -1 if facts["last"] else 0)
    answers = _in_batches(run, inputs, facts["batch"])
    warm = [x[: facts["batch"]] for x in inputs]
    return {
        "runtime": "onnxruntime" if file.suffix == ".onnx" else "torch",
        "metric": facts["metric"],
        "value": measure(facts["metric"], answers, truth),
        "expected_value": measure(facts["metric"], expected, truth),
        "max_difference": float(np.abs(answers - expected).max()),
        "largest_answer": float(np.abs(expected).max()),
        "samples": len(expected),
        "latency_ms": _latency(run, warm),
        "latency_batch": len(warm[0]),
    }


def measure(metric: str, answers: Any, truth: Any) -> float:
    """The metric as the search defines it, in plain numpy."""
    answers = answers.astype(np.float64)
    if metric == "mse":
        return float(np.square(answers - truth.reshape(answers.shape)).mean())
    if metric == "output_error":
        return float(np.square(answers - truth).sum() / np.square(truth - truth.mean(0)).sum())
    if metric == "agreement":
        axis = 1 if answers.ndim == 4 else -1
        return float((answers.argmax(axis) == truth.argmax(axis)).mean())
    if metric == "pck":
        return _pck(answers, truth)
    if metric in ("miou", "pixel_accuracy"):
        return _of_maps(metric, answers.argmax(1), truth)
    if answers.shape[:-1] != truth.shape:
        answers = np.moveaxis(answers, 1, -1)
    if metric == "accuracy":
        return float((answers.argmax(-1) == truth).mean())
    best = np.argsort(-answers, axis=-1)[..., :5]
    return float((best == truth[..., None]).any(-1).mean())


def _of_maps(metric: str, answers: Any, truth: Any) -> float:
    """Of class maps (n, h, w), without the pixels that are 255 in ``truth``."""
    answers, truth = answers[truth != 255], truth[truth != 255]
    if metric == "pixel_accuracy":
        return float((answers == truth).mean())
    overlaps = [((answers == c) & (truth == c)).sum() / ((answers == c) | (truth == c)).sum() for c in np.unique(truth)]
    return float(np.mean(overlaps))


def _pck(maps: Any, joints: Any) -> float:
    """Of heatmaps (n, joints, h, w) and joints (n, joints, 4): x and y as fractions of the image, whether it counts,
    and the distance that does, a fraction of the longer side. Peaks move a quarter cell to the higher neighbour."""
    height, width = maps.shape[2:]
    row, column = np.divmod(maps.reshape(*maps.shape[:2], -1).argmax(-1), width)
    across = np.take_along_axis(maps, row[..., None, None], 2)[..., 0, :]
    down = np.take_along_axis(maps, column[..., None, None], 3)[..., 0]
    off = (
        _nudged(across, column) - (joints[..., 0] * width - 0.5),
        _nudged(down, row) - (joints[..., 1] * height - 0.5),
    )
    found = np.hypot(*off) / max(height, width) <= joints[..., 3]
    return float(found[joints[..., 2] > 0].mean())


def _nudged(profile: Any, peak: Any) -> Any:
    last = profile.shape[-1] - 1
    near, far = (np.take_along_axis(profile, (peak + s).clip(0, last)[..., None], -1)[..., 0] for s in (-1, 1))
    return peak + 0.25 * np.sign(far - near) * ((peak > 0) & (peak < last))


def _pt2(file: Path, which: int) -> Run:
    import torch

    network = torch.export.load(file).module()

    def run(inputs: Arrays) -> Any:
        with torch.no_grad():
            answer = network(*(torch.from_numpy(x) for x in inputs))
        while not isinstance(answer, torch.Tensor):
            answer = list(answer.values() if isinstance(answer, dict) else answer)[which]
        return answer.float().numpy()

    return run


def _onnx(file: Path, which: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))[which]


def _in_batches(run: Run, inputs: Arrays, batch: int) -> Any:
    """All answers; the last batch is padded, since some networks take one size only."""
    size = len(inputs[0])
    answers = []
    for start in range(0, size, batch):
        chunk = [x[start : start + batch] for x in inputs]
        missing = batch - len(chunk[0])
        answers.append(run([np.concatenate([x, np.repeat(x[-1:], missing, 0)]) if missing else x for x in chunk]))
    return np.concatenate(answers)[:size]


def _latency(run: Run, inputs: Arrays) -> float:
    times = []
    for _ in range(RUNS + 3):
        start = time.perf_counter()
        run(inputs)
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times[3:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
