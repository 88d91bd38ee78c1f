"""What a worker computes with, in words, without importing torch."""

import os
import platform
from pathlib import Path

__all__ = ["device"]


def device() -> str:
    """``"2 × Intel(R) Xeon(R) …"``, or the names of the NVIDIA GPUs that the driver lists."""
    gpus = [_gpu(folder) for folder in sorted(Path("/proc/driver/nvidia/gpus").glob("*"))]
    if gpus and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        return ", ".join(gpus)[:200]
    return f"{_cores()} × {_processor()}"[:200]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    return _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()


def _gpu(folder: Path) -> str:
    return _field(folder / "information", "Model") or "NVIDIA GPU"


def _field(path: Path, name: str) -> str | None:
    """The value of the first line ``name : value``."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
