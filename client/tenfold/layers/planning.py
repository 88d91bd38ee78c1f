"""Which of several ways to compute the same is the quickest, from sizes alone.

Multiplications are not what a chain of small factors waits for: it writes and reads what is between its factors, with
matrices too narrow for the processor's vectors. A way costs

    sum over its operators of  CALL + VIEWS + items (ITEM + m k max(n, LANES) / RATE) + what it writes and half of what
    it reads

for ``items`` products (m, k) by (k, n), and likewise for convolutions. The constants were measured on one thread of an
x86-64 processor with AVX-512 (float32, torch 2.13), which other work shared. Only their ratios matter, and they decide
between ways that differ by factors.

Sizes are those of the input at hand. Where they are traced, the batch is unknown and the way is that of one sample;
so it is within ``one_sample``, for counting what such a file does.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Work", "batch_of", "convolution", "copy", "in_pieces", "one_sample", "product", "quickest", "rows_of"]

RATE = 60.0
"""Multiply-accumulates a nanosecond of a large product."""
CONVOLVED = 80.0
"""Of a large convolution."""
LANES = 16
"""Columns that a product takes at once: fewer are no quicker."""
BLOCK = 16
"""Channels."""
SMALL = 20480
"""Elements of an image's first two axes: a single one of at most so many torch convolves by itself, not with oneDNN."""
CALL, VIEWS, ITEM = 10_000.0, 10_000.0, 100.0
"""Nanoseconds that an operator takes whatever its size, the views around a product or a copy, and each product of
a batch."""
CACHED = 2**19
"""Elements in the second cache of one of a processor's cores."""
LARGE = 3 << 20
"""Elements of a state beyond which a chain waits for memory that the C library has handed back after each call."""
WRITTEN = ((CACHED, 0.4), (2**23, 0.8), (float("inf"), 1.6))
"""Nanoseconds an element of a result of at most so many: in the second cache, in memory at hand, in memory that the
system hands out anew (at 32 MiB)."""
SHUFFLED = 0.5
"""Nanoseconds more an element that changes its place."""

Way = TypeVar("Way", bound=Hashable)

_one_sample: ContextVar[bool] = ContextVar("one_sample", default=False)


@dataclass(frozen=True)
class Work:
    """What operators take together."""

    macs: int = 0
    ns: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.macs + other.macs, self.ns + other.ns)


def product(m: int, k: int, n: int, items: int = 1) -> Work:
    """``items`` products of (m, k) by (k, n)."""
    macs = items * m * k * n
    padded = macs // n * max(n, LANES)
    moved = _written(items * m * n) + _written(items * k * n) / 2
    return Work(macs, CALL + VIEWS + items * ITEM + padded / RATE + moved)


def convolution(
    out: int, in_: int, kernel: tuple[int, ...], positions: tuple[int, int], images: int, groups: int = 1
) -> Work:
    """Of ``in_`` channels to ``out``, of each group, from ``positions`` of an input to those of an output.

    Images go to blocks of ``BLOCK`` channels, all of which are computed, and come back; fewer than a block are read as
    they are, but written as one. A single small image is unfolded, and its patches are multiplied.
    """
    before, behind = (images * groups * n for n in positions)
    taps = math.prod(kernel)
    macs = out * in_ * taps * behind
    # Torch counts an image's first two axes, of about so many positions, and looks at the kernel's last two.
    plane = positions[0] ** (min(2, len(kernel)) / len(kernel))
    if images == groups == 1 and in_ * plane <= SMALL and min((1, *kernel)[-2:]) <= 3:
        return Work(macs, CALL + macs / RATE + _written(in_ * taps * behind) + _written(out * behind))
    read, written = in_ if in_ < BLOCK else _blocked(in_), _blocked(out)
    moved = _written(read * before) + _written(written * behind) + _written(out * behind)
    return Work(macs, CALL + written * read * taps * behind / CONVOLVED + moved)


def copy(elements: int) -> Work:
    """To another order of the axes."""
    return Work(0, CALL + VIEWS + _written(elements) + SHUFFLED * elements)


def quickest(ways: Mapping[Way, tuple[Work, Work]], macs: int) -> Way:
    """``ways``: the work of each, and of making what it takes from the factors, which a file does at each call.

    ``macs``: the dense layer's. No way that multiplies more is taken: that would save neither.
    """
    able = [(run.ns + make.ns, i) for i, (run, make) in enumerate(ways.values()) if run.macs <= macs]
    return list(ways)[min(able)[1]]


def batch_of(x: Tensor) -> int:
    """How many samples to plan for."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return 1 if traced or _one_sample.get() else max(1, x.shape[0])


def in_pieces(run: Callable[[Tensor], Tensor], x: Tensor, state: int) -> Tensor:
    """``run(x)``; without gradients on a processor, a large batch goes in pieces whose states stay in its caches.

    ``state``: elements between two operators, of one sample.
    """
    batch = batch_of(x)
    if batch == 1 or batch * state <= LARGE or x.device.type != "cpu" or torch.is_grad_enabled():
        return run(x)
    samples = max(1, torch.get_num_threads() * CACHED // state)
    return torch.cat([run(piece) for piece in x.split(samples)])  # type: ignore[no-untyped-call]


def rows_of(x: Tensor) -> int:
    """How many rows of (batch, ..., features) to plan for; a size that a graph leaves free counts as one."""
    return batch_of(x) * math.prod(size for size in x.shape[1:-1] if isinstance(size, int))


@contextmanager
def one_sample() -> Iterator[None]:
    """Layers take the way of one sample, as exported files with a free batch do."""
    token = _one_sample.set(True)
    try:
        yield
    finally:
        _one_sample.reset(token)


def _written(elements: int) -> float:
    return next(ns for most, ns in WRITTEN if elements <= most) * elements


def _blocked(channels: int) -> int:
    return -(-channels // BLOCK) * BLOCK
