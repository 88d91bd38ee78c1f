"""Upgrade under a lock: an advisory lock on PostgreSQL, the write lock on SQLite, held until the new tables stand."""

import logging
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, cast

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from db.errors import BadDatabase, storage_errors

if TYPE_CHECKING:
    from db.engine import Database

__all__ = ["config", "migrate"]

LOCK = 0x7E4F01D
"""Number of the PostgreSQL advisory lock; ours alone by being unlikely."""

FOLDER = Path(__file__).parent

log = logging.getLogger(__name__)


def config(connection: Connection) -> Config:
    made = Config()
    made.set_main_option("script_location", str(FOLDER))
    made.set_main_option("path_separator", "os")
    made.attributes["connection"] = connection
    return made


def migrate(db: "Database") -> None:
    """Raises ``BadDatabase`` (``database_newer``) when the tables belong to a later version of the server."""
    with storage_errors(), db.engine.connect() as connection:
        try:
            if db.sqlite:
                # Batch changes drop and rename tables, which foreign keys would turn into deletions; neither statement
                # below has any effect inside a transaction, so they go to the driver before one starts.
                driver = cast(sqlite3.Connection, connection.connection.driver_connection)
                driver.execute("PRAGMA foreign_keys = OFF")
                driver.execute("ATTACH DATABASE ? AS blobs", (str(db.chunk_path),))
                driver.execute("PRAGMA blobs.journal_mode = WAL")
            with connection.begin():
                _upgrade(db, connection)
        finally:
            if db.sqlite:
                connection.invalidate()  # never back to the pool with these settings


def _upgrade(db: "Database", connection: Connection) -> None:
    if not db.sqlite:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
    scripts = ScriptDirectory.from_config(config(connection))
    current = MigrationContext.configure(connection).get_current_revision()
    if current == scripts.get_current_head():
        return
    if current is not None:
        if current not in {script.revision for script in scripts.walk_revisions()}:
            raise BadDatabase(
                "database_newer",
                f"the database is at revision {current!r}, which this version does not know: upgrade the server",
            )
        if db.path is not None:
            _copy(db.path, db.path.with_name(f"{db.path.name}.before-{scripts.get_current_head()}"))
    command.upgrade(config(connection), "head")
    if db.sqlite and (broken := connection.execute(text("PRAGMA foreign_key_check")).fetchall()):
        raise BadDatabase("migration_failed", f"the upgrade would leave {len(broken)} rows without what they refer to")
    log.info("database upgraded from %s to %s", current, scripts.get_current_head())


def _copy(path: Path, to: Path) -> None:
    """What is committed, which in WAL mode can be read while the upgrade holds the write lock."""
    source, target = sqlite3.connect(path), sqlite3.connect(to)
    try:
        source.backup(target)
    finally:
        source.close()
        target.close()
