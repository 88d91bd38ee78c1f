"""What a worker computes with, in words, without importing torch."""

import os
import platform
from pathlib import Path

__all__ = ["device", "memory_share"]

USABLE = 0.8
"""Of the memory, by compute processes; the rest is for the service and the system."""


def device() -> str:
    """``"2 × Intel(R) Xeon(R) …"``, or the names of the NVIDIA GPUs that the driver lists."""
    gpus = [_gpu(folder) for folder in sorted(Path("/proc/driver/nvidia/gpus").glob("*"))]
    if gpus and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        return ", ".join(gpus)[:200]
    return f"{_cores()} × {_processor()}"[:200]


def memory_share(processes: int = 1) -> int:
    """Bytes for each of ``processes`` compute processes, of what this host or container has."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        limit = physical
    return int(USABLE * min(physical, limit) / processes)


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
