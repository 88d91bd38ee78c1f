"""Pages by opaque cursor: the cursor holds the sort key of the last row seen, so rows that come or go shift nothing."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from search.errors import BadRequest

__all__ = ["Page", "after", "newest_first", "take"]

Row = TypeVar("Row")


@dataclass(frozen=True)
class Page(Generic[Row]):
    items: list[Row]
    next: str | None
    """Cursor of the page after this one; None at the end."""


def encode(key: Sequence[str | int | float]) -> str:
    return base64.urlsafe_b64encode(json.dumps(list(key)).encode()).decode().rstrip("=")


def decode(cursor: str, kinds: tuple[type, ...]) -> list[Any]:
    """Raises ``BadRequest`` (``bad_cursor``) for anything that ``encode`` did not make for this kind of page."""
    try:
        key = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        if isinstance(key, list) and [type(k) for k in key] == list(kinds) and all(map(_storable, key)):
            return key
    except ValueError:
        pass
    raise BadRequest("bad_cursor", f"cursor {cursor[:80]!r} is not one of ours: take it from 'next' of the page before")


def _storable(value: str | int | float) -> bool:
    """Whether both databases can compare with it: a cursor may have been made by hand."""
    return "\0" not in value and value.isprintable() if isinstance(value, str) else abs(value) < 2**63


def newest_first(
    s: Session,
    query: Select[Row],
    created: InstrumentedAttribute[float],
    id_: InstrumentedAttribute[str],
    cursor: str | None,
    limit: int,
) -> Page[Row]:
    """Sorted by (created, id), newest first."""
    if cursor is not None:
        query = query.where(tuple_(created, id_) < tuple_(*decode(cursor, (float, str))))
    query = query.order_by(created.desc(), id_.desc())
    return take(s, query, limit, lambda row: (float(getattr(row, created.key)), str(getattr(row, id_.key))))


def after(
    s: Session, query: Select[Row], column: InstrumentedAttribute[int], cursor: str | None, limit: int
) -> Page[Row]:
    """Sorted by a rising number, oldest first."""
    if cursor is not None:
        query = query.where(column > decode(cursor, (int,))[0])
    return take(s, query.order_by(column), limit, lambda row: (int(getattr(row, column.key)),))


def take(s: Session, query: Select[Row], limit: int, key: Callable[[Row], Sequence[str | int | float]]) -> Page[Row]:
    rows = list(s.scalars(query.limit(limit + 1)))
    more = len(rows) > limit
    rows = rows[:limit]
    return Page(rows, encode(key(rows[-1])) if more else None)
