"""Replies to requests with an Idempotency-Key, so that a repeated POST acts once."""

import hashlib
from typing import Any

from sqlalchemy import delete, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db.engine import now
from db.errors import Conflict
from db.tables import IdempotentReply
from search.errors import BadRequest

__all__ = ["begin", "clean", "finish", "forget", "request_hash"]

ABANDONED_SECONDS = 300.0
"""A first request that gave no answer for this long died: the next one with its key takes its place."""


def request_hash(method: str, path: str, body: bytes) -> str:
    return hashlib.sha256(b"\0".join((method.encode(), path.encode(), body))).hexdigest()


def begin(s: Session, owner: str, key: str, hash_: str) -> IdempotentReply | None:
    """None: this is the first request with the key, act and then ``finish``; else the reply to give again.

    Raises ``Conflict`` (``idempotency_key_in_progress``) while the first still runs, and ``BadRequest``
    (``idempotency_key_reused``) when the key came with another request.
    """
    at = now(s)
    old = s.get(IdempotentReply, (owner, key), with_for_update=True, populate_existing=True)
    if old is None:
        try:
            with s.begin_nested():
                s.add(IdempotentReply(owner=owner, key=key, request_hash=hash_, created_at=at))
        except IntegrityError as error:
            raise _in_progress(key) from error
        return None
    if old.request_hash != hash_:
        raise BadRequest(
            "idempotency_key_reused", f"Idempotency-Key {key!r} came before with another request: make a new one"
        )
    if old.status is not None:
        return old
    if at - old.created_at < ABANDONED_SECONDS:
        raise _in_progress(key)
    old.created_at = at
    s.flush()
    return None


def finish(s: Session, owner: str, key: str, status: int, body: dict[str, Any] | None) -> None:
    """Keeps the reply; in the transaction of what the request did, both stand or fall together."""
    of_key = (IdempotentReply.owner == owner, IdempotentReply.key == key)
    s.execute(update(IdempotentReply).where(*of_key).values(status=status, body=body))


def forget(s: Session, owner: str, key: str) -> None:
    """The request failed without effect: the key may be used again."""
    s.execute(delete(IdempotentReply).where(IdempotentReply.owner == owner, IdempotentReply.key == key))


def clean(s: Session, keep_s: float = 86_400.0) -> None:
    """Forgets replies older than ``keep_s`` seconds."""
    s.execute(delete(IdempotentReply).where(IdempotentReply.created_at < now(s) - keep_s))


def _in_progress(key: str) -> Conflict:
    return Conflict(
        "idempotency_key_in_progress", f"the first request with Idempotency-Key {key!r} still runs: ask again shortly"
    )
