"""Blobs on a disk or in an S3-style store: one object each, named by the blob's id."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import obstore
from obstore.store import from_url

from db.errors import LostBlob, StorageFull, says_full

__all__ = ["Outside", "OutsideWriter"]

BUFFER = 8 << 20
"""Bytes of one part of a multi-part upload; S3 takes none below 5 MiB but the last."""


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except (obstore.exceptions.BaseError, OSError) as error:
        if says_full(error):
            raise StorageFull from error
        raise


class Outside:
    """``url``: ``file:///folder`` (made when absent) or ``s3://bucket/prefix`` with the usual AWS_ variables."""

    def __init__(self, url: str) -> None:
        options: dict[str, Any] = {"mkdir": True} if url.startswith("file:") else {}
        self._store = from_url(url, **options)

    def writer(self, blob_id: str) -> "OutsideWriter":
        return OutsideWriter(self._store, _name(blob_id))

    def read(self, blob_id: str, start: int, stop: int, piece: int) -> Iterator[bytes]:
        """Raises ``LostBlob`` (``blob_lost``) when the object is not there."""
        while start < stop:
            end = min(start + piece, stop)
            try:
                yield bytes(obstore.get_range(self._store, _name(blob_id), start=start, end=end))
            except FileNotFoundError as error:
                raise LostBlob("blob_lost", f"blob {blob_id} is not in the outside store any more") from error
            start = end

    def delete(self, blob_id: str) -> None:
        """Nothing happens when it is gone already."""
        try:
            obstore.delete(self._store, _name(blob_id))
        except FileNotFoundError:
            return


class OutsideWriter:
    """An object that appears when it is closed, and never if it is not."""

    def __init__(self, store: Any, name: str) -> None:
        self._writer = cast(Any, obstore.open_writer(store, name, buffer_size=BUFFER))

    def write(self, data: bytes) -> None:
        with _store_errors():
            self._writer.write(data)

    def close(self) -> None:
        with _store_errors():
            self._writer.close()

    def abort(self) -> None:
        self._writer = None


def _name(blob_id: str) -> str:
    return f"blobs/{blob_id}"
