"""Deletes content that no row refers to. No counters: what refers to a blob is read off the tables' foreign keys.

SQLite's chunk file does not shrink by it: its free pages take the next uploads. Incremental vacuum was tried, but its
time grows with the square of what is freed (24 MiB took 3.5 s of processor time, a gigabyte would take hours).
"""

import logging

from sqlalchemy import ColumnElement, and_, delete, exists, select
from sqlalchemy.exc import IntegrityError

from db.engine import Database, now
from db.outside import Outside
from db.tables import Base, Blob, Chunk

__all__ = ["collect_garbage", "delete_content"]

BATCH = 16
"""Chunk rows that one transaction deletes."""

log = logging.getLogger(__name__)


def collect_garbage(db: Database, grace_s: float) -> int:
    """Deletes blobs that nothing refers to and nobody touched for ``grace_s`` seconds (half-written ones included), and
    chunks whose blob is gone. Returns how many blobs went. Safe beside uploads, downloads and other collectors.
    """
    with db.read() as s:
        old = Blob.touched_at < now(s) - grace_s
        found = s.execute(select(Blob.id, Blob.outside).where(old, _unreferenced())).all()
    deleted = 0
    for blob_id, outside in found:
        try:
            # Asked again in the deletion itself: an equal upload may have touched it since. A row that came to refer
            # to it in this very moment makes the foreign key refuse.
            with db.begin() as s:
                gone = s.execute(delete(Blob).where(Blob.id == blob_id, old, _unreferenced()).returning(Blob.id))
                if gone.one_or_none() is None:
                    continue
        except IntegrityError:
            continue
        delete_content(db, blob_id, outside=outside)
        deleted += 1
    for blob_id in _orphans(db):
        delete_content(db, blob_id, outside=False)
    return deleted


def delete_content(db: Database, blob_id: str, *, outside: bool) -> None:
    """The bytes of a blob whose row is gone already, a few chunks at a time."""
    if outside:
        if db.blob_url is None:
            log.warning("blob %s stays in an outside store: TENFOLD_BLOB_URL is not set any more", blob_id)
        else:
            Outside(db.blob_url).delete(blob_id)
        return
    while True:
        with db.begin_chunks() as s:
            positions = s.scalars(select(Chunk.position).where(Chunk.blob_id == blob_id).limit(BATCH)).all()
            if positions:
                s.execute(delete(Chunk).where(Chunk.blob_id == blob_id, Chunk.position.in_(positions)))
        if len(positions) < BATCH:
            return


def _unreferenced() -> ColumnElement[bool]:
    columns = [
        column
        for table in Base.metadata.tables.values()
        for column in table.columns
        if any(key.column is Blob.__table__.c.id for key in column.foreign_keys)
    ]
    return and_(*(~exists().where(column == Blob.id) for column in columns))


def _orphans(db: Database) -> list[str]:
    # Chunks are looked at first: a blob's row is committed before its first chunk, so one that is absent *afterwards*
    # was deleted and is not merely new.
    with db.begin_chunks(write=False) as s:
        kept = set(s.scalars(select(Chunk.blob_id).distinct()))
    with db.read() as s:
        return sorted(kept - set(s.scalars(select(Blob.id))))
