"""What a result was measured on, in words."""

import os
import platform

import torch

__all__ = ["machine"]


def machine() -> str:
    words = [f"{os.cpu_count()} cores", platform.machine(), f"torch {torch.__version__}"]
    words.append(f"{torch.get_num_threads()} thread(s)")
    if torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    return ", ".join(words)
