"""The launcher's children: started with a lifeline, started again when they end by themselves, stopped together."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Group", "Service"]

log = logging.getLogger(__name__)

GRACE_S = 10
LONGEST_PAUSE_S = 30.0
STEADY_S = 60
"""A service that ran this long starts again without a pause."""


@dataclass
class Service:
    """One child. ``log`` is the file its output goes to; None: the terminal."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    pass_fds: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    started: float = 0.0
    again_at: float = 0.0

    def start(self) -> None:
        out = self.log.open("ab") if self.log else None
        try:
            self.process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env=os.environ | dict(self.environment),
                start_new_session=True,
                pass_fds=self.pass_fds,
            )
        finally:
            if out is not None:
                out.close()
        self.started = time.monotonic()

    def forget(self) -> None:
        """It has ended: let go of its lifeline."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)


class Group:
    """Starts services in order, keeps them running, and stops them in the reverse order."""

    def __init__(self) -> None:
        self.services: list[Service] = []
        self.asked_to_stop = threading.Event()
        self._lock = threading.Lock()

    def start(self, service: Service, *, ready: Callable[[], bool] | None = None, timeout_s: float = 60) -> None:
        """Start one and wait until it is ready. Raises ``RuntimeError`` with the end of its log when it is not."""
        with self._lock:
            service.start()
            self.services.append(service)
        deadline = time.monotonic() + timeout_s
        while ready is not None and not ready():
            if self.asked_to_stop.is_set():
                raise KeyboardInterrupt
            if service.process is not None and (code := service.process.poll()) is not None:
                raise RuntimeError(f"{service.name} did not start (exit {code}).{_tail(service)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{service.name} was not ready after {timeout_s:.0f} s.{_tail(service)}")
            time.sleep(0.05)

    def tend(self) -> None:
        """Start again what ended by itself; a service that keeps failing waits longer each time."""
        with self._lock:
            if self.asked_to_stop.is_set():
                return
            for service in self.services:
                self._tend(service, time.monotonic())

    def _tend(self, service: Service, now: float) -> None:
        if service.process is not None:
            code = service.process.poll()
            if code is None:
                return
            steady = now - service.started > STEADY_S
            service.failures = 0 if steady else service.failures + 1
            pause = 0.0 if service.failures == 0 else min(0.5 * 2**service.failures, LONGEST_PAUSE_S)
            service.again_at = now + pause
            service.forget()
            log.warning("%s ended (%s); starting it again in %.0f s", service.name, code, pause)
        if now >= service.again_at:
            service.start()

    def stop(self) -> None:
        """End all in good order: workers and the API first, the broker (started first) last."""
        self.asked_to_stop.set()
        with self._lock:
            _end(self.services[1:])
            _end(self.services[:1])

    def kill(self) -> None:
        """End all at once. Takes no lock: a second Ctrl-C comes in the middle of ``stop``."""
        self.asked_to_stop.set()
        for service in self.services:
            service.signal(signal.SIGKILL)


def _end(services: Sequence[Service]) -> None:
    """Closing the lifeline asks a service to stop; a signal as well would be a second request to Celery."""
    for service in services:
        if service.process is not None and service.process.stdin is not None:
            service.process.stdin.close()
    deadline = time.monotonic() + GRACE_S
    for service in services:
        if service.process is None:
            continue
        try:
            service.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"{service.name} did not stop in {GRACE_S} s: killed", file=sys.stderr)  # noqa: T201
            service.process.kill()
            service.process.wait()


def _tail(service: Service) -> str:
    if service.log is None or not service.log.exists():
        return ""
    lines = service.log.read_text(errors="replace").splitlines()[-15:]
    return f" The end of {service.log}:\n" + "\n".join(lines)
