"""Load ``model.pt2`` and ``model.onnx`` in a process without Tenfold and measure their accuracy on a test set.

    python -I check_files.py FOLDER DATA.npz SCALE

Prints one line of JSON. Needs numpy, torch and onnxruntime; any import of Tenfold fails.
"""

import json
import sys
from pathlib import Path

for name in ("tenfold", "search", "api", "workers", "db", "launch"):
    sys.modules[name] = None  # type: ignore[assignment]

import numpy as np
import onnxruntime
import torch


def main() -> None:
    folder, data, scale = Path(sys.argv[1]), np.load(sys.argv[2]), float(sys.argv[3])
    x = (data["x_test"] * scale).astype(np.float32)
    y = data["y_test"]
    with torch.no_grad():
        pt2 = torch.export.load(folder / "model.pt2").module()(torch.from_numpy(x)).numpy()
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    onnx = session.run(None, {session.get_inputs()[0].name: x})[0]
    report = {
        "pt2_accuracy": float((pt2.argmax(1) == y).mean()),
        "onnx_accuracy": float((onnx.argmax(1) == y).mean()),
        "largest_difference": float(np.abs(pt2 - onnx).max()),
    }
    sys.stdout.write(json.dumps(report) + "\n")


main()
