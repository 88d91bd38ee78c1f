"""Measured time of a forward pass, compared within one machine only: the original is timed each time too.

Also of some layers within it, so that each is timed on the input, in the layout and beside the work that it has there.
"""

import fcntl
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from search.spec import BEYOND_CHANCE
from tenfold.layers.planning import one_sample

__all__ = ["Latency", "measure", "measure_parts", "pause_while_measuring"]

WARM_S = 0.3
"""Warm-up of the pair. Also the time that others on this host get to reach their next pause."""
PATIENCE_S = 120.0
"""Longest wait for the lock; one measurement holds it for half a minute at most."""

MEDIAN_ERROR = 1.2533 * 1.4826
"""Standard error of a median of ``n`` normal figures, times the root of ``n`` and in median absolute deviations."""


@dataclass(frozen=True)
class Latency:
    """Of one batch, by two networks that ran alternately."""

    compressed_ms: float
    """Milliseconds, the median of the runs."""
    dense_ms: float
    noise: float
    """Standard error of ``ratio``, as a share of it, by how much the runs differ among themselves."""

    @property
    def ratio(self) -> float:
        return self.compressed_ms / self.dense_ms

    @property
    def is_slower(self) -> bool:
        """The compressed one, by more than chance explains."""
        return self.compressed_ms > self.dense_ms * (1 + BEYOND_CHANCE * self.noise)


_Run = Callable[[], Mapping[str, float]]
"""Runs a network once; milliseconds of each part."""


def measure(
    dense: nn.Module,
    compressed: nn.Module,
    example: Sequence[Tensor],
    *,
    lock: Path | int | None = None,
    threads: int | None = None,
    seconds: float = 2.0,
    at_least: int = 9,
) -> Latency:
    """Median milliseconds of one batch.

    The two run alternately, so that a slow moment of the machine falls on both, and in swapped order each round.
    ``lock``: a file, or an open descriptor of one (the jail opens no files); while held, trainings on this host that
    call ``pause_while_measuring`` stand still; two minutes in vain, and it measures without. Each process must have
    opened it by itself: descriptors inherited
    from one ``open`` share the lock. ``threads``: of this process, during the measurement. ``seconds``: about how
    long to measure; ``at_least`` rounds are made unless that takes eleven times as long.
    """
    parts = {"all": ("",)}
    found = measure_parts(
        dense, compressed, example, parts, lock=lock, threads=threads, seconds=seconds, at_least=at_least
    )
    return found["all"]


def measure_parts(
    dense: nn.Module,
    compressed: nn.Module,
    example: Sequence[Tensor],
    parts: Mapping[str, Sequence[str]],
    *,
    lock: Path | int | None = None,
    threads: int | None = None,
    seconds: float = 2.0,
    at_least: int = 9,
) -> dict[str, Latency]:
    """As ``measure``, of each part by itself: the layers of these names, which both networks have ("": the network).

    A part's time is that of all calls of all of its layers in one run of the whole network.
    """
    before = torch.get_num_threads()
    states = [(m, m.training) for m in (dense, compressed)]
    for module, _ in states:
        module.eval()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        # What is exported goes one way for all batches, so that is timed.
        with (
            _held(lock),
            torch.inference_mode(),
            one_sample(),
            _clocked(compressed, parts, example) as first,
            _clocked(dense, parts, example) as second,
        ):
            runs = _interleaved(first, second, seconds=seconds, at_least=at_least)
        return {part: _compared(*([run[part] for run in each] for each in runs)) for part in parts}
    finally:
        torch.set_num_threads(before)
        for module, training in states:
            module.train(training)


def pause_while_measuring(lock: int | None) -> None:
    """Stand still while another process on this host measures latency. Costs two system calls otherwise.

    The shared lock is given back at once and never held over work, so a measuring process is never kept waiting by
    many busy ones; it allows for a step under way by its warm-up.
    """
    if lock is not None and _lock(lock, fcntl.LOCK_SH, PATIENCE_S):
        fcntl.flock(lock, fcntl.LOCK_UN)


def _lock(descriptor: int, kind: int, patience_s: float) -> bool:
    """Whether it was got. Whoever holds it may hang, or be hostile: nothing waits for it for ever."""
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        else:
            return True


def _interleaved(
    first: _Run, second: _Run, *, seconds: float, at_least: int
) -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    pair = (first, second)
    end = time.perf_counter() + WARM_S
    rounds = 0
    while rounds < 2 or time.perf_counter() < end:
        for run in pair:
            run()
        rounds += 1
    times: tuple[list[Mapping[str, float]], list[Mapping[str, float]]] = ([], [])
    end = time.perf_counter() + seconds
    hard_end = end + 10 * seconds
    while len(times[0]) < 3 or time.perf_counter() < (end if len(times[0]) >= at_least else hard_end):
        order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
        for which in order:
            times[which].append(pair[which]())
    return times


def _compared(compressed: Sequence[float], dense: Sequence[float]) -> Latency:
    medians = statistics.median(compressed), statistics.median(dense)
    spread = (
        statistics.median(abs(ms - median) for ms in times) / (median * math.sqrt(len(times)))
        for times, median in zip((compressed, dense), medians, strict=True)
    )
    return Latency(*medians, noise=MEDIAN_ERROR * math.hypot(*spread))


@contextmanager
def _clocked(network: nn.Module, parts: Mapping[str, Sequence[str]], example: Sequence[Tensor]) -> Iterator[_Run]:
    """Runs of ``network`` with a clock at each layer of its parts."""
    cuda = example[0].is_cuda
    marks: dict[str, list[Any]] = {part: [] for part in parts}

    def mark(part: str) -> None:
        """On a GPU the clock is its own: its work goes on while the next is being asked for."""
        if cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            marks[part].append(event)
        else:
            marks[part].append(time.perf_counter())

    def run() -> Mapping[str, float]:
        for times in marks.values():
            times.clear()
        if cuda:
            torch.cuda.synchronize()
        network(*example)
        if cuda:
            torch.cuda.synchronize()
        return {part: sum(map(_ms, times[::2], times[1::2])) for part, times in marks.items()}

    handles = []
    for part, names in parts.items():
        for layer in map(network.get_submodule, names):
            handles.append(layer.register_forward_pre_hook(lambda *_, part=part: mark(part)))
            handles.append(layer.register_forward_hook(lambda *_, part=part: mark(part)))
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def _ms(start: Any, stop: Any) -> float:
    return float((stop - start) * 1e3 if isinstance(start, float) else start.elapsed_time(stop))


@contextmanager
def _held(lock: Path | int | None) -> Iterator[None]:
    if lock is None:
        yield
        return
    descriptor = lock if isinstance(lock, int) else os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock(descriptor, fcntl.LOCK_EX, PATIENCE_S)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        if not isinstance(lock, int):
            os.close(descriptor)
