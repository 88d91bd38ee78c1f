"""What the database layer refuses, each with a stable code and a sentence.

::

    search.errors.TenfoldError
    ├── NotFound          no such row, or it belongs to another owner (the two look the same on purpose)
    ├── Conflict          the row's state does not allow it
    ├── TooLarge          a quota or a size limit
    ├── StorageFull       the disk or the database has no room
    ├── BadDatabase       the database itself cannot be used as asked
    └── LostBlob          content that a row refers to is not in the store
"""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError

from search.errors import TenfoldError

__all__ = ["BadDatabase", "Conflict", "LostBlob", "NotFound", "StorageFull", "TooLarge", "storage_errors"]


class NotFound(TenfoldError):
    @classmethod
    def of(cls, what: str, id_: str | int) -> "NotFound":
        """``what``: the noun people know, such as ``model``; gives the code ``model_not_found``."""
        return cls(f"{what.replace(' ', '_')}_not_found", f"there is no {what} {id_!r} of yours")


class Conflict(TenfoldError):
    pass


class TooLarge(TenfoldError):
    pass


class StorageFull(TenfoldError):
    def __init__(self, code: str = "storage_full", message: str = "") -> None:
        super().__init__(code, message or "the storage is full: free some space or delete old jobs, then try again")


class BadDatabase(TenfoldError):
    pass


class LostBlob(TenfoldError):
    pass


_FULL = ("disk is full", "no space left", "disk full", "could not extend file", "os error 28")


def says_full(error: BaseException) -> bool:
    """Whether a driver's or a store's error means that there is no room (SQLITE_FULL, SQLSTATE 53100, ENOSPC)."""
    text = str(error).lower()
    return any(sign in text for sign in _FULL)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turns "no room" of either database into ``StorageFull``; other errors pass."""
    try:
        yield
    except DBAPIError as error:
        if says_full(error):
            raise StorageFull from error
        raise
