"""API keys: ``tf_`` and 256 random bits, shown once, stored as SHA-256 (the secret is random, so no salt is needed)."""

import hashlib
import secrets
from collections.abc import Sequence
from enum import StrEnum

from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from db.engine import is_sqlite, new_id, now
from db.errors import NotFound
from db.pages import Page, newest_first
from db.tables import Key

__all__ = ["Scope", "add", "allows", "ensure_admin", "find", "get", "page", "revoke", "touch"]

FIRST_KEY_LOCK = 0x7E4F01E


class Scope(StrEnum):
    READ = "read"
    """See what the owner has."""
    SUBMIT = "submit"
    """… and upload, start, change and delete it."""
    ADMIN = "admin"
    """… and manage everyone's keys, and see the workers."""


GRANTS = {
    Scope.READ: {Scope.READ},
    Scope.SUBMIT: {Scope.READ, Scope.SUBMIT},
    Scope.ADMIN: {Scope.READ, Scope.SUBMIT, Scope.ADMIN},
}


def add(s: Session, owner: str, name: str, scopes: Sequence[Scope], *, secret: str | None = None) -> tuple[Key, str]:
    """A new key and its secret, which nobody can read again."""
    secret = secret or f"tf_{secrets.token_urlsafe(32)}"
    row = Key(
        id=new_id("key"),
        owner=owner,
        name=name,
        hash=_hash(secret),
        scopes=[Scope(scope).value for scope in scopes],
        created_at=now(s),
    )
    s.add(row)
    s.flush()
    return row, secret


def find(s: Session, secret: str) -> Key | None:
    """The key of this secret unless it was revoked. Looked up by its hash, so timing tells nothing of the secret."""
    return s.scalar(select(Key).where(Key.hash == _hash(secret), Key.revoked_at.is_(None)))


def allows(key: Key, scope: Scope) -> bool:
    return any(scope in GRANTS[Scope(given)] for given in key.scopes)


def touch(s: Session, key_id: str) -> None:
    """Remembers the use, to the minute."""
    at = now(s)
    recent = Key.last_used_at.is_(None) | (Key.last_used_at < at - 60)
    s.execute(update(Key).where(Key.id == key_id, recent).values(last_used_at=at))


def ensure_admin(s: Session, *, owner: str = "admin", secret: str | None = None) -> str | None:
    """The secret of a new admin key when no key exists yet, else None: for the first start, however many start at once.

    ``secret``: use this one instead of a random one.
    """
    if not is_sqlite(s):  # where BEGIN IMMEDIATE has not already made this the only writer
        s.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": FIRST_KEY_LOCK})
    if s.scalar(select(Key.id).limit(1)) is not None:
        return None
    return add(s, owner, "first key", [Scope.ADMIN], secret=secret)[1]


def get(s: Session, owner: str | None, key_id: str) -> Key:
    """``owner`` None: anyone's, for admins. Raises ``NotFound`` (``key_not_found``)."""
    row = s.get(Key, key_id)
    if row is None or (owner is not None and row.owner != owner):
        raise NotFound.of("key", key_id)
    return row


def page(s: Session, owner: str | None, cursor: str | None = None, limit: int = 100) -> Page[Key]:
    """Newest first, revoked ones included; ``owner`` None: everyone's, for admins."""
    query = select(Key) if owner is None else select(Key).where(Key.owner == owner)
    return newest_first(s, query, Key.created_at, Key.id, cursor, limit)


def revoke(s: Session, owner: str | None, key_id: str) -> Key:
    """For good. Raises ``NotFound``."""
    row = get(s, owner, key_id)
    row.revoked_at = row.revoked_at or now(s)
    s.flush()
    return row


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
