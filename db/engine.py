"""One database, SQLite or PostgreSQL, and its short transactions.

SQLite runs in WAL mode with every writing transaction opened by ``BEGIN IMMEDIATE``: it waits for its turn at the start
instead of failing in the middle with a stale snapshot. Chunks of blobs live in a second file with an engine of its own,
because ``BEGIN IMMEDIATE`` locks every attached file and a long upload would then hold up claims and heartbeats.
"""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session, sessionmaker

from db.errors import BadDatabase, storage_errors

__all__ = ["Database", "is_sqlite", "new_id", "now"]

BUSY_SECONDS = 30.0
"""How long a SQLite transaction waits for another to end."""

_CLOCK = {
    "sqlite": text("SELECT (julianday('now') - 2440587.5) * 86400.0"),
    "postgresql": text("SELECT extract(epoch FROM clock_timestamp())::float8"),
}


def now(s: Session) -> float:
    """UTC seconds by the database's clock, the only one that leases and orders are decided by."""
    return float(s.execute(_CLOCK[s.get_bind().dialect.name]).scalar_one())


def is_sqlite(s: Session) -> bool:
    return s.get_bind().dialect.name == "sqlite"


def new_id(prefix: str) -> str:
    """``job_3f…``: 96 random bits, so that an id cannot be guessed."""
    return f"{prefix}_{secrets.token_hex(12)}"


class Database:
    """``url``: ``sqlite:///folder/tenfold.sqlite`` or ``postgresql://user:password@host/name``.

    ``blob_url`` (``file:///folder`` or ``s3://bucket/prefix``) keeps the content of new blobs outside of the database.
    ``pool_size``: connections kept open; as many again may be opened for a moment.

    Raises ``BadDatabase`` (``bad_database_url``) for any other kind of URL.
    """

    def __init__(self, url: str, *, blob_url: str | None = None, pool_size: int = 10) -> None:
        self.url = _parsed(url)
        self.blob_url = blob_url
        self.sqlite = self.url.get_backend_name() == "sqlite"
        if self.sqlite:
            self.path: Path | None = Path(self.url.database or "")
            self.chunk_path: Path | None = self.path.with_name(f"{self.path.stem}-blobs.sqlite")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.engine = _sqlite_engine(self.path, pool_size)
            self.chunk_engine = _sqlite_engine(self.chunk_path, pool_size)
        else:
            self.path = self.chunk_path = None
            self.engine = self.chunk_engine = create_engine(
                self.url, pool_size=pool_size, max_overflow=pool_size, pool_pre_ping=True, pool_recycle=1800
            )
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        self._chunk_sessions = sessionmaker(self.chunk_engine, expire_on_commit=False)

    @contextmanager
    def begin(self) -> Iterator[Session]:
        """One short writing transaction: committed at the end, rolled back on an exception.

        Rows stay readable after it. Do not open another one (or write a blob) inside: on SQLite it would wait for
        itself until ``BUSY_SECONDS`` are over. Raises ``StorageFull`` when there is no room.
        """
        with storage_errors(), self._sessions.begin() as session:
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """One transaction that cannot write, and on SQLite does not wait for those that do."""
        with _reading(self._sessions) as session:
            yield session

    @contextmanager
    def begin_chunks(self, *, write: bool = True) -> Iterator[Session]:
        """As ``begin`` or ``read``, for the table of chunks alone."""
        if write:
            with storage_errors(), self._chunk_sessions.begin() as session:
                yield session
        else:
            with _reading(self._chunk_sessions) as session:
                yield session

    def now(self, session: Session) -> float:
        return now(session)

    def migrate(self) -> None:
        """Brings the tables up to date; safe to call from every process at its start."""
        from db.migrations.run import migrate

        migrate(self)

    def close(self) -> None:
        self.engine.dispose()
        self.chunk_engine.dispose()


@contextmanager
def _reading(sessions: sessionmaker[Session]) -> Iterator[Session]:
    with sessions() as session:
        session.connection(execution_options={"tenfold_read": True, "postgresql_readonly": True})
        yield session


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    if parsed is not None and parsed.get_backend_name() == "sqlite":
        if parsed.database and parsed.database != ":memory:":
            return parsed.set(drivername="sqlite")
        raise BadDatabase("bad_database_url", f"{url!r} is in memory: several processes must see it, name a file")
    if parsed is not None and parsed.get_backend_name() in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    shown = "something that is not a URL" if parsed is None else parsed.render_as_string(hide_password=True)
    raise BadDatabase("bad_database_url", f"got {shown}: give sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME")


def _sqlite_engine(path: Path, pool_size: int) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        pool_size=pool_size,
        max_overflow=pool_size,
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
    )
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    return engine


def _on_connect(connection: Any, _: object) -> None:
    # The driver must not open transactions by itself: ``_on_begin`` does.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    _use_wal(connection)


def _use_wal(connection: Any) -> None:
    # Switching to WAL ignores the busy timeout when another process switches at the same moment.
    for attempt in range(50):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except Exception as error:
            if "locked" not in str(error) or attempt == 49:
                raise
            time.sleep(0.02)


def _on_begin(connection: Connection) -> None:
    reading = connection.get_execution_options().get("tenfold_read", False)
    connection.exec_driver_sql(f"PRAGMA query_only = {'ON' if reading else 'OFF'}")
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
