"""The worker's side of a child process: start it, talk to it in JSON lines, watch it, and end it.

What the child says is not trusted: lines have a longest length, files are named inside its scratch folder and opened
without following links, and what it returns is checked against the vocabulary by the caller.
"""

import contextlib
import json
import logging
import math
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

__all__ = ["Broken", "Child", "Crashed", "Failed", "Stopped"]

log = logging.getLogger(__name__)

TICK_S = 0.2
LONGEST_LINE = 64 * 2**20
LISTENS_S = 2.0
WAITING_LINES = 8
"""Read ahead at most: a child that floods us waits at its own pipe."""
KEPT_VARIABLES = {
    *("PATH", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
}
"""What a child may know of this process's environment. Everything else may be a secret."""


class Broken(Exception):
    """The child did not answer. The process is gone when this is raised."""


class Failed(Exception):
    """The child says that the work cannot be done, with a stable code and advice; trying again would not mend it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Crashed(Broken):
    """The child died, or failed in a way that nobody foresaw: one attempt is lost."""


class Stopped(Broken):
    """The child was ended because ``stop`` said so: cancelled, the lease lost, the worker shutting down."""


class Child:
    """One child process. Not thread safe, except ``kill``."""

    def __init__(
        self,
        command: Sequence[str],
        scratch: Path,
        *,
        memory_bytes: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.scratch = scratch
        self.memory_bytes = memory_bytes
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING_LINES)
        self._writer: threading.Thread | None = None
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=scratch,
            env=_environment(scratch) | dict(environment or {}),
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._reader = threading.Thread(
            target=self._read, args=(self._process.stdout,), name="child-lines", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ready(self, *, stop: Callable[[], bool] = lambda: False, timeout_s: float = 120) -> dict[str, bool]:
        """Wait until it has started. Returns the layers of the jail that hold it. Raises ``Failed``, ``Broken``."""
        layers = self._answer("ready", {}, stop, timeout_s, "starting")
        return {str(k): bool(v) for k, v in dict(layers).items()}

    def call(
        self,
        operation: str,
        arguments: Mapping[str, Any],
        *,
        on: Mapping[str, Callable[[Any], None]] | None = None,
        stop: Callable[[], bool] = lambda: False,
        timeout_s: float | None = None,
    ) -> Any:
        """Have the child do one thing and return its result.

        ``on``: what to do with messages on the way (``progress``, ``checkpoint``). ``stop`` is asked five times a
        second. Raises ``Failed`` (the child lives on), or ``Crashed`` and ``Stopped`` (it does not).
        """
        if not self._listened():
            raise self._crashed()  # it answered a request that it has not read
        request = json.dumps({"op": operation, "arguments": arguments}, separators=(",", ":"))
        # On a thread, for a child that does not listen would keep us here, where nothing asks ``stop``.
        self._writer = threading.Thread(target=self._write, args=(request,), name="child-request", daemon=True)
        self._writer.start()
        return self._answer("result", on or {}, stop, timeout_s, operation)

    def kill(self) -> None:
        """End it at once, with whatever it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except PermissionError:  # macOS: the group holds only a zombie
            self._process.kill()

    def close(self) -> None:
        """Close its pipe, which ends it; kill it if it does not."""
        if not self._listened():
            self.kill()
        if self._process.stdin is not None and self._listened():
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        self._let_reader_end()

    def _listened(self) -> bool:
        """Whether it has read the last request. On a busy machine its answer may come before our thread has ended."""
        if self._writer is not None:
            self._writer.join(LISTENS_S)
        return self._writer is None or not self._writer.is_alive()

    def _let_reader_end(self) -> None:
        """It may wait for room."""
        deadline = time.monotonic() + 2
        while self._reader.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                self._lines.get(timeout=0.02)
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)

    def _write(self, request: str) -> None:
        try:
            print(request, file=self._process.stdin, flush=True)
        except (OSError, ValueError):
            self._lines.put(None)

    def _read(self, stream: IO[str]) -> None:
        try:
            while line := stream.readline(LONGEST_LINE):
                self._lines.put(line)
        except (OSError, ValueError):
            pass
        stream.close()
        self._lines.put(None)

    def _answer(
        self,
        wanted: str,
        on: Mapping[str, Callable[[Any], None]],
        stop: Callable[[], bool],
        timeout_s: float | None,
        what: str,
    ) -> Any:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            message = self._next()
            if message is not None:
                if wanted in message:
                    return message[wanted]
                self._event(message, on)
            if stop():
                self.kill()
                self.close()
                raise Stopped(what)
            if deadline is not None and time.monotonic() > deadline:
                self.kill()
                self.close()
                raise Failed("time_limit", f"{what} took longer than {timeout_s:.0f} s and was stopped")
            self._check_memory(what)

    def _event(self, message: Mapping[str, Any], on: Mapping[str, Callable[[Any], None]]) -> None:
        if "error" in message:
            raise Failed(str(message["error"]["code"])[:64], str(message["error"]["message"])[:4000])
        if "crash" in message:
            self.kill()
            self.close()
            raise Crashed(f"the computation failed unexpectedly ({message['crash']}); the worker's log has the details")
        for kind, handle in on.items():
            if kind in message:
                handle(message[kind])

    def _next(self) -> dict[str, Any] | None:
        """The next message, or None when there is none yet."""
        try:
            line = self._lines.get(timeout=TICK_S)
        except queue.Empty:
            return None
        if line is None:
            raise self._crashed()
        try:
            message = json.loads(line, parse_float=_finite, parse_constant=_finite)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            self.kill()
            self.close()
            raise Crashed("the compute process answered with something that is not a message")
        return message

    def _crashed(self) -> Crashed:
        self.kill()
        self.close()
        return Crashed(f"the compute process ended unexpectedly ({_how(self._process.returncode)})")

    def _check_memory(self, what: str) -> None:
        if self.memory_bytes is None:
            return
        try:
            memory = psutil.Process(self.pid).memory_info()
        except psutil.Error:
            return
        used = memory.rss - getattr(memory, "shared", 0)  # pages of mapped files can be given back at any time
        if used > self.memory_bytes:
            self.kill()
            self.close()
            raise Failed(
                "out_of_memory",
                f"{what} used {used / 2**20:.0f} MiB of the {self.memory_bytes / 2**20:.0f} MiB allowed: lower "
                "batch_size or calibration_samples, or raise TENFOLD_MEMORY_LIMIT on the worker",
            )


def _finite(text: str) -> float:
    """A number that can be stored and sent on: neither database nor API takes others. Ours send null instead."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def _how(code: int | None) -> str:
    if code is None:
        return "still running"
    return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _environment(scratch: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k in KEPT_VARIABLES or k.startswith("LC_")}
    temporary = scratch / "tmp"
    temporary.mkdir(exist_ok=True)
    return kept | {
        "HOME": str(scratch),
        "TMPDIR": str(temporary),
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        # The clean process starts in a folder that the compute process wrote to: nothing is imported from there.
        "PYTHONSAFEPATH": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONFAULTHANDLER": "1",
    }
