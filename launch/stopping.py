"""Ctrl-C: the first stops in good order, the second at once."""

import os
import signal
from types import FrameType

from launch.processes import Group

__all__ = ["stop_on_signals", "usual_workers"]


def stop_on_signals(group: Group, *, interrupt: bool = False) -> None:
    """On the first signal sets ``group.asked_to_stop`` (and raises KeyboardInterrupt with ``interrupt``)."""

    def handle(number: int, frame: FrameType | None) -> None:
        if group.asked_to_stop.is_set():
            group.kill()
            return
        group.asked_to_stop.set()
        if interrupt:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handle)


def usual_workers() -> int:
    """One for every two cores, at least one, at most four."""
    return max(1, min(4, (os.cpu_count() or 2) // 2))
