"""One role of the service in this process."""

import logging
import os
import socket
import sys
from collections.abc import Sequence

from db import workers
from db.engine import Database
from db.settings import Settings
from launch.keys import first_admin_key, make_key
from launch.lifeline import end_with_stdin

__all__ = ["api", "check_worker", "key", "migrate", "worker"]


def api(settings: Settings, *, lifeline: bool = False, descriptor: int | None = None) -> int:
    """Serve HTTP on ``descriptor`` (a listening socket handed down), or on ``settings.host`` and ``port``."""
    import uvicorn

    from api.app import create_app

    _log_to_stderr()
    if lifeline:
        end_with_stdin()
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings),
            host=settings.host,
            port=settings.port,
            log_level="info",
            access_log=False,
            timeout_graceful_shutdown=3,
        )
    )
    server.run(sockets=None if descriptor is None else [socket.socket(fileno=descriptor)])
    return 0 if server.started else 1


def worker(settings: Settings, *, lifeline: bool = False) -> int:
    os.environ.setdefault("REMAP_SIGTERM", "SIGQUIT")
    from workers.app import run_worker

    _log_to_stderr()
    if lifeline:
        end_with_stdin()
    return run_worker(settings)


def migrate(settings: Settings) -> int:
    """Bring the database up to date; the first time, print the first admin key."""
    db = _database(settings)
    try:
        db.migrate()
        secret = first_admin_key(db, settings)
    finally:
        db.close()
    print("the database is up to date")  # noqa: T201
    if secret is not None:
        print(f"admin key, shown this once: {secret}")  # noqa: T201
    return 0


def check_worker(settings: Settings) -> int:
    """0 when a worker of this host has reported to the database within the last minute: a container's health check."""
    db = _database(settings)
    try:
        with db.read() as s:
            here = any(w.host == socket.gethostname() for w in workers.live(s))
    finally:
        db.close()
    if not here:
        print(f"no worker on {socket.gethostname()} has reported lately", file=sys.stderr)  # noqa: T201
    return 0 if here else 1


def key(settings: Settings, *, owner: str, name: str, scopes: Sequence[str]) -> int:
    """Make a key and print its secret, which is shown this once, on standard output."""
    db = _database(settings)
    try:
        db.migrate()
        print(make_key(db, owner=owner, name=name, scopes=scopes))  # noqa: T201
    finally:
        db.close()
    return 0


def _database(settings: Settings) -> Database:
    return Database(settings.database, blob_url=settings.blob_url)


def _log_to_stderr() -> None:
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
