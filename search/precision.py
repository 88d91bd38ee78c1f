"""Number format and memory layout of training: whichever makes real steps of this network quickest on this machine."""

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum

import torch
from torch import Tensor, nn

__all__ = ["Precision", "choose", "synchronize"]

Forward = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]

WORTH_S = 15.0
"""A run expected to be shorter than this is not worth trying formats for."""
CLEARLY = 0.9
"""Another format must take less than this share of float32's time."""
HOPELESS = 2.0
"""Times the time to beat: bfloat16 on a processor without it."""


class Precision(StrEnum):
    FLOAT32 = "float32"
    FLOAT32_CHANNELS_LAST = "float32_channels_last"
    BFLOAT16 = "bfloat16"
    BFLOAT16_CHANNELS_LAST = "bfloat16_channels_last"

    @property
    def channels_last(self) -> bool:
        return self in (Precision.FLOAT32_CHANNELS_LAST, Precision.BFLOAT16_CHANNELS_LAST)

    def prepare(self, module: nn.Module) -> None:
        if self.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def arrange(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.ndim == 4 else x

    def autocast(self, inputs: tuple[Tensor, ...]) -> AbstractContextManager[object]:
        if self in (Precision.FLOAT32, Precision.FLOAT32_CHANNELS_LAST):
            return nullcontext()
        return torch.autocast(inputs[0].device.type, dtype=torch.bfloat16)


def choose(
    forward: Forward, module: nn.Module, original: nn.Module, inputs: tuple[Tensor, ...], steps: int
) -> tuple[Precision, float]:
    """The quickest for ``steps`` training steps on batches like ``inputs``, and its seconds a step.

    Copies are timed, nothing is changed. A format in which the network does not run (a ``view`` that channels-last
    forbids, an operator without bfloat16) is passed over.
    """
    dense = _seconds(Precision.FLOAT32, forward, module, original, inputs)
    if dense is None or dense * steps < WORTH_S:
        return Precision.FLOAT32, dense or 0.0
    images = any(x.ndim == 4 for x in inputs)
    layouts = [Precision.FLOAT32_CHANNELS_LAST, Precision.BFLOAT16_CHANNELS_LAST] * images
    candidates = [*layouts, Precision.BFLOAT16]
    best, best_time = Precision.FLOAT32, dense
    for precision in candidates:
        limit = min(best_time, CLEARLY * dense)
        seconds = _seconds(precision, forward, module, original, inputs, limit)
        if seconds is not None and seconds < limit:
            best, best_time = precision, seconds
    return best, best_time


def _seconds(
    precision: Precision,
    forward: Forward,
    module: nn.Module,
    original: nn.Module,
    inputs: tuple[Tensor, ...],
    limit: float = math.inf,
) -> float | None:
    """Of the quickest of three steps, or of the first that takes ``HOPELESS`` times ``limit``; None if none runs."""
    student, teacher = copy.deepcopy(module).train(), copy.deepcopy(original).eval()
    precision.prepare(student)
    precision.prepare(teacher)
    arranged = tuple(precision.arrange(x) for x in inputs)
    times = []
    try:
        for _ in range(4):
            synchronize(inputs[0])
            start = time.perf_counter()
            with precision.autocast(arranged):
                with torch.no_grad():
                    wanted = forward(teacher, arranged)
                answer = forward(student, arranged)
            (answer.float() - wanted.float()).square().mean().backward()  # type: ignore[no-untyped-call]
            synchronize(inputs[0])
            times.append(time.perf_counter() - start)
            if len(times) > 1 and times[-1] > HOPELESS * limit:
                break
    except (RuntimeError, NotImplementedError):
        if precision is Precision.FLOAT32:
            raise
        return None
    return min(times[1:])


def synchronize(x: Tensor) -> None:
    """Wait until the device of ``x`` has done what it was asked, so that a clock can be read."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
