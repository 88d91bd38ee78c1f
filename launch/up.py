"""Everything on one machine: embedded Valkey, migrations, the API, N workers. For ``up`` and for ``run``."""

import fcntl
import http.client
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from db.engine import Database
from db.settings import Settings
from launch import valkey
from launch.processes import Group, Service
from workers.device import memory_share

__all__ = ["AlreadyRunning", "Stack"]


class AlreadyRunning(Exception):
    pass


class Stack:
    """The whole service in child processes, as a context manager. Nothing of it outlives this process.

    ``settings.redis_url`` and ``settings.database_url`` replace the embedded parts. ``verbose`` sends the logs to the
    terminal instead of files in the data folder. Raises ``AlreadyRunning``, ``OSError`` (the port is taken) and
    ``RuntimeError`` (a part did not start; says which, and the end of its log).
    """

    def __init__(self, settings: Settings, *, workers: int, verbose: bool = False) -> None:
        self.settings = settings
        self.workers = workers
        self.verbose = verbose
        self.group = Group()
        self.data = settings.data_dir.absolute()
        self._lock: int | None = None
        self._socket: socket.socket | None = None

    @property
    def url(self) -> str:
        if self._socket is None:
            raise RuntimeError("the stack is not running")
        host, port = self._socket.getsockname()[:2]
        shown = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host  # noqa: S104
        return f"http://{shown}:{port}"

    def database(self) -> Database:
        return Database(self.settings.database, blob_url=self.settings.blob_url)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _start(self) -> None:
        self.data.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _only_one(self.data)
        self._socket = _listening(self.settings.host, self.settings.port)
        db = self.database()
        try:
            db.migrate()
        finally:
            db.close()
        if self.settings.redis_url is None:
            self.group.start(valkey.service(self.data, self._log("valkey")), ready=lambda: valkey.is_up(self.data))
        environment = self._environment()
        self.group.start(self._api(environment, self._socket.fileno()), ready=self._api_answers)
        for n in range(1, self.workers + 1):
            self.group.start(self._worker(n, environment))

    def _end(self) -> None:
        self.group.stop()
        if self._socket is not None:
            self._socket.close()
        if self._lock is not None:
            os.close(self._lock)

    def _api(self, environment: Mapping[str, str], descriptor: int) -> Service:
        command = [*_role("api"), "--lifeline", "--descriptor", str(descriptor)]
        return Service("api", command, environment, self._log("api"), pass_fds=(descriptor,))

    def _worker(self, n: int, environment: Mapping[str, str]) -> Service:
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), "REMAP_SIGTERM": "SIGQUIT"}
        return Service(
            f"worker-{n}", [*_role("worker"), "--lifeline"], {**environment, **own}, self._log(f"worker-{n}")
        )

    def _environment(self) -> dict[str, str]:
        """The settings as the children read them: theirs are this process's, whatever the command line changed."""
        values: dict[str, object] = {
            "DATA_DIR": self.data,
            "DATABASE_URL": self.settings.database,
            "REDIS_URL": self.settings.redis_url or valkey.url(self.data),
            "BLOB_URL": self.settings.blob_url,
            "QUEUE": self.settings.queue,
            "JAIL": self.settings.jail,
            "LEASE_SECONDS": self.settings.lease_seconds,
            "MEMORY_LIMIT": int(self.settings.memory_limit or memory_share(self.workers)),
            "TASK_HOURS": self.settings.task_hours,
        }
        return {f"TENFOLD_{k}": str(v) for k, v in values.items() if v is not None}

    def _log(self, name: str) -> Path | None:
        if self.verbose:
            return None
        folder = self.data / "logs"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.log"
        if path.exists():
            path.replace(path.with_suffix(".log.1"))
        return path

    def _api_answers(self) -> bool:
        asking = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=2)
        try:
            asking.request("GET", "/healthz")
            return asking.getresponse().status == 200
        except (http.client.HTTPException, OSError):
            return False
        finally:
            asking.close()


def _role(name: str) -> list[str]:
    return [sys.executable, "-m", "launch.main", name]


def _only_one(data: Path) -> int:
    descriptor = os.open(data / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AlreadyRunning(f"{data} is in use by another tenfold-server: stop it, or give another --data") from None
    return descriptor


def _listening(host: str, port: int) -> socket.socket:
    """Bound here, so that a taken port is known before anything starts, and port 0 has a number to print."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port} ({error.strerror}): give another --port") from None
    listener.listen(128)
    return listener
