"""Files by content: written in fixed-size chunks, one short transaction each, and shared when equal.

A blob is invisible until ``Writer.finish`` gives it its SHA-256. If equal content is there already, the new copy is
dropped and the old one *touched*, which keeps garbage collection away from it (``db.garbage``).
"""

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db.engine import Database, new_id, now
from db.errors import LostBlob, NotFound, TooLarge
from db.garbage import collect_garbage, delete_content
from db.outside import Outside, OutsideWriter
from db.tables import Blob, Chunk

__all__ = ["CHUNK", "BlobInfo", "Writer", "collect_garbage", "info", "read", "write"]

CHUNK = 1 << 20
"""Bytes of a chunk row; every chunk of a blob but its last has exactly this many, which is what makes ranges cheap."""

TOUCH_SECONDS = 60.0
"""How often a slow upload says that it is still being written; far below any grace period of garbage collection."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlobInfo:
    id: str
    sha256: str
    size: int
    """Bytes."""


class Writer:
    """Takes content piece by piece. Call ``finish`` or ``abort``; as a context manager it aborts on an exception.

    ``limit``: bytes after which ``feed`` raises ``TooLarge`` (``upload_too_large``). ``feed`` and ``finish`` raise
    ``StorageFull`` when there is no room. Not for several threads at once; every call blocks for one transaction.
    """

    def __init__(self, db: Database, *, limit: int | None = None) -> None:
        self._db = db
        self._limit = limit
        self._hash = hashlib.sha256()
        self._size = 0
        self._pending = bytearray()
        self._position = 0
        self._done = False
        self._id = new_id("blb")
        outside = Outside(db.blob_url) if db.blob_url else None
        with db.begin() as s:
            at = now(s)
            s.add(Blob(id=self._id, size=0, outside=outside is not None, created_at=at, touched_at=at))
        self._touched = time.monotonic()
        self._outside: OutsideWriter | None = outside.writer(self._id) if outside else None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not self._done:
            try:
                self.abort()
            except Exception:  # what went wrong first is what the caller must hear of; collection does the rest
                log.warning("an upload could not be cleaned up; garbage collection will do it", exc_info=True)

    def feed(self, data: bytes) -> None:
        self._size += len(data)
        if self._limit is not None and self._size > self._limit:
            raise TooLarge("upload_too_large", f"got more than the {self._limit} bytes that one upload may have")
        self._hash.update(data)
        self._pending += data
        while len(self._pending) >= CHUNK:
            self._put(bytes(self._pending[:CHUNK]))
            del self._pending[:CHUNK]

    def finish(self) -> BlobInfo:
        """Makes the blob readable, or finds the equal one. The caller then has a grace period to refer to it."""
        if self._pending:
            self._put(bytes(self._pending))
            self._pending.clear()
        if self._outside is not None:
            self._outside.close()
        digest = self._hash.hexdigest()
        found: str | None = None
        for last_try in (False, False, True):
            try:
                with self._db.begin() as s:
                    found = _publish(s, self._id, digest, self._size)
                break
            except IntegrityError:  # another writer of the same content was faster: use its blob
                if last_try:
                    raise
        self._done = True
        if found is not None:
            delete_content(self._db, self._id, outside=self._outside is not None)
        return BlobInfo(found or self._id, digest, self._size)

    def abort(self) -> None:
        """Leaves nothing behind."""
        self._done = True
        if self._outside is not None:
            self._outside.abort()
        with self._db.begin() as s:
            s.execute(delete(Blob).where(Blob.id == self._id))
        delete_content(self._db, self._id, outside=self._outside is not None)

    def _put(self, data: bytes) -> None:
        if self._outside is not None:
            self._outside.write(data)
        else:
            with self._db.begin_chunks() as s:
                s.add(Chunk(blob_id=self._id, position=self._position, data=data))
        self._position += 1
        self._touch()

    def _touch(self) -> None:
        if time.monotonic() - self._touched < TOUCH_SECONDS:
            return
        with self._db.begin() as s:
            still = s.execute(update(Blob).where(Blob.id == self._id).values(touched_at=now(s)).returning(Blob.id))
            if still.one_or_none() is None:
                raise LostBlob("upload_abandoned", "this upload stood still for too long and was removed: start again")
        self._touched = time.monotonic()


def _publish(s: Session, id_: str, sha256: str, size: int) -> str | None:
    """Returns the id of the equal blob that takes this one's place, or None if this one now stands for the content."""
    at = now(s)
    # The conditional UPDATE either comes before garbage collection's conditional DELETE, which then sees the new
    # touched_at and lets go, or after it, and then finds nothing.
    equal = s.execute(update(Blob).where(Blob.sha256 == sha256).values(touched_at=at).returning(Blob.id))
    found = equal.scalar_one_or_none()
    if found is not None:
        s.execute(delete(Blob).where(Blob.id == id_))
        return str(found)
    mine = s.execute(
        update(Blob).where(Blob.id == id_).values(sha256=sha256, size=size, touched_at=at).returning(Blob.id)
    )
    if mine.one_or_none() is None:
        raise LostBlob("upload_abandoned", "this upload stood still for too long and was removed: start again")
    return None


def write(db: Database, chunks: Iterable[bytes], *, limit: int | None = None) -> BlobInfo:
    """All of ``chunks`` (pieces of any size) as one blob; memory stays at one chunk whatever the size."""
    with Writer(db, limit=limit) as writer:
        for data in chunks:
            writer.feed(data)
        return writer.finish()


def info(s: Session, blob_id: str) -> BlobInfo:
    """Raises ``NotFound`` (``blob_not_found``), also for one that is still being written."""
    blob = s.get(Blob, blob_id)
    if blob is None or blob.sha256 is None:
        raise NotFound("blob_not_found", f"there is no finished blob {blob_id!r}")
    return BlobInfo(blob.id, blob.sha256, blob.size)


def read(db: Database, blob_id: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Bytes ``start`` (inclusive) to ``stop`` (exclusive; None: the end), a chunk at a time, one transaction each.

    Raises ``NotFound`` at once, or ``LostBlob`` (``blob_lost``) when content is missing.
    """
    with db.read() as s:
        size = info(s, blob_id).size
        outside = s.scalar(select(Blob.outside).where(Blob.id == blob_id))
    start, stop = max(start, 0), size if stop is None else min(stop, size)
    if outside:
        if db.blob_url is None:
            raise LostBlob("blob_lost", f"blob {blob_id} was put in an outside store: set TENFOLD_BLOB_URL again")
        return Outside(db.blob_url).read(blob_id, start, stop, CHUNK)
    return _read_chunks(db, blob_id, start, stop)


def _read_chunks(db: Database, blob_id: str, start: int, stop: int) -> Iterator[bytes]:
    while start < stop:
        position, offset = divmod(start, CHUNK)
        with db.begin_chunks(write=False) as s:
            data = s.scalar(select(Chunk.data).where(Chunk.blob_id == blob_id, Chunk.position == position))
        piece = b"" if data is None else data[offset : offset + stop - start]
        if not piece:
            raise LostBlob("blob_lost", f"chunk {position} of blob {blob_id} is missing: the upload must be made again")
        yield piece
        start += len(piece)
