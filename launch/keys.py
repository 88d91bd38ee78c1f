"""API keys made from the terminal of the machine that holds the database."""

from collections.abc import Sequence

from db import keys
from db.engine import Database
from db.settings import Settings

__all__ = ["first_admin_key", "make_key"]


def first_admin_key(db: Database, settings: Settings) -> str | None:
    """The secret of the admin key that the first start makes; None on every later start, for it is shown once."""
    given = None if settings.admin_key is None else settings.admin_key.get_secret_value()
    with db.begin() as s:
        return keys.ensure_admin(s, secret=given)


def make_key(db: Database, *, owner: str, name: str, scopes: Sequence[str]) -> str:
    """A new key's secret. Scopes include the lesser ones: admin, submit, read."""
    with db.begin() as s:
        _, secret = keys.add(s, owner, name, [keys.Scope(scope) for scope in scopes])
    return secret
