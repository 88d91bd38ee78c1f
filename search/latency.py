"""Measured time of a forward pass, compared within one machine only: the original is timed each time too."""

import fcntl
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from tenfold.layers.planning import one_sample

__all__ = ["measure", "pause_while_measuring"]

WARM_S = 0.3
"""Warm-up of the pair. Also the time that others on this host get to reach their next pause."""
PATIENCE_S = 120.0
"""Longest wait for the lock; one measurement holds it for half a minute at most."""


def measure(
    dense: nn.Module,
    compressed: nn.Module,
    example: Sequence[Tensor],
    *,
    lock: Path | int | None = None,
    threads: int | None = None,
    seconds: float = 2.0,
    at_least: int = 9,
) -> tuple[float, float]:
    """Median milliseconds of one batch: (compressed, dense).

    The two run alternately, so that a slow moment of the machine falls on both, and in swapped order each round.
    ``lock``: a file, or an open descriptor of one (the jail opens no files); while held, trainings on this host that
    call ``pause_while_measuring`` stand still; two minutes in vain, and it measures without. Each process must have
    opened it by itself: descriptors inherited
    from one ``open`` share the lock. ``threads``: of this process, during the measurement. ``seconds``: about how
    long to measure; ``at_least`` rounds are made unless that takes eleven times as long.
    """
    before = torch.get_num_threads()
    states = [(m, m.training) for m in (dense, compressed)]
    for module, _ in states:
        module.eval()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        # What is exported goes one way for all batches, so that is timed.
        with _held(lock), torch.inference_mode(), one_sample():
            return _interleaved(
                lambda: _timed(compressed, example), lambda: _timed(dense, example), seconds=seconds, at_least=at_least
            )
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
    first: Callable[[], float], second: Callable[[], float], *, seconds: float, at_least: int
) -> tuple[float, float]:
    pair = (first, second)
    end = time.perf_counter() + WARM_S
    rounds = 0
    while rounds < 2 or time.perf_counter() < end:
        for run in pair:
            run()
        rounds += 1
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    hard_end = end + 10 * seconds
    while len(times[0]) < 3 or time.perf_counter() < (end if len(times[0]) >= at_least else hard_end):
        order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
        for which in order:
            times[which].append(pair[which]())
    return statistics.median(times[0]), statistics.median(times[1])


def _timed(module: nn.Module, example: Sequence[Tensor]) -> float:
    wait = torch.cuda.synchronize if example[0].is_cuda else None
    if wait:
        wait()
    start = time.perf_counter()
    module(*example)
    if wait:
        wait()
    return (time.perf_counter() - start) * 1e3


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
