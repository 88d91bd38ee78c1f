"""One role of the service in this process."""

import logging
import os
import socket
import sys
from collections.abc import Sequence

from db.engine import Database
from db.settings import Settings
from launch.lifeline import end_with_stdin

__all__ = ["api", "key", "migrate", "worker"]


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
    db = _database(settings)
    try:
        db.migrate()
    finally:
        db.close()
    print("the database is up to date")  # noqa: T201
    return 0


def key(settings: Settings, *, owner: str, name: str, scopes: Sequence[str]) -> int:
    """Make a key and print its secret, which is shown this once, on standard output."""
    from launch.keys import make_key

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
