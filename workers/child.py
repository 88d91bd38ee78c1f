"""What every child process of a worker has in common: JSON lines on private pipes, and an end with its parent.

The child reads requests from standard input and writes messages to what was its standard output; both are moved away
from descriptors 0 and 1 first, so that a library that prints cannot spoil the lines. One JSON object a line::

    parent -> child   {"op": "trial", "arguments": {...}}
    child -> parent   {"ready": {...}} once, {"progress": {...}}*, {"checkpoint": "name"}*,
                      then one of {"result": ...}, {"error": {"code", "message"}}, {"crash": "TypeName"}
"""

import ctypes
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["Channel"]

PR_SET_PDEATHSIG = 1


class Channel:
    """The child's side of the pipe.

    From ``watch`` on, end of file on it ends the process at once, even in the middle of a computation. That takes a
    thread, and the jail must be entered before there are threads: hence two steps.
    """

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._descriptor = os.dup(0)
        answers = os.dup(1)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        os.dup2(2, 1)
        self._answers = os.fdopen(answers, "w", encoding="utf-8", buffering=1)
        _end_with_parent_thread()

    def watch(self) -> None:
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def send(self, **message: Any) -> None:
        """Write one message. Infinite and missing numbers become null: they are not JSON."""
        line = json.dumps(_finite(message), allow_nan=False, separators=(",", ":"))
        with self._lock:
            self._answers.write(line + "\n")
            self._answers.flush()

    def requests(self) -> Iterator[dict[str, Any]]:
        """Requests, one after the other, for ever: the process ends when the parent closes the pipe."""
        while True:
            yield self._requests.get()

    def _watch(self) -> None:
        with os.fdopen(self._descriptor, encoding="utf-8") as stream:
            for line in stream:
                self._requests.put(json.loads(line))
        os._exit(0)


def _end_with_parent_thread() -> None:
    """A second line behind the pipe on Linux, for a computation that never lets the watching thread run.

    The signal follows the *thread* that spawned this process: a worker's one pool thread, which lives as long as it.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
