"""Who is asking: bearer keys and their scopes. What belongs to another owner does not exist (404, never 403)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.limits import RateLimit
from api.problems import Problem
from db import keys
from db.engine import Database
from db.keys import Scope
from db.tables import Key

__all__ = ["Admin", "Caller", "Db", "Reader", "Submitter", "database"]


TOUCH_SECONDS = 60.0
"""How exactly a key's last use is known: not every request is a write."""

bearer = HTTPBearer(scheme_name="key", description="An API key: `Authorization: Bearer tf_…`", auto_error=False)


@dataclass(frozen=True)
class Caller:
    key: Key

    @property
    def owner(self) -> str:
        return self.key.owner


def database(request: Request) -> Database:
    """The application's database."""
    db: Database = request.app.state.db
    return db


Db = Annotated[Database, Depends(database)]


def _unauthorized(code: str, detail: str) -> Problem:
    return Problem(401, code, detail, headers={"WWW-Authenticate": 'Bearer realm="tenfold"'})


def caller(
    request: Request, db: Db, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> Caller:
    """The key that came with the request; 401 without a usable one."""
    if credentials is None or not credentials.credentials:
        if header := request.headers.get("authorization"):
            raise _unauthorized(
                "malformed_authorization",
                f"Authorization starts with {header.split()[0][:20]!r}: send `Authorization: Bearer KEY`.",
            )
        raise _unauthorized(
            "missing_key", "No API key arrived: send `Authorization: Bearer KEY` (clients read TENFOLD_API_KEY)."
        )
    secret = credentials.credentials.strip()
    with db.read() as s:
        key = keys.find(s, secret)
        stale = key is not None and (key.last_used_at is None or db.now(s) - key.last_used_at > TOUCH_SECONDS)
    if key is None:
        raise _unauthorized(
            "unknown_key",
            f"The API key that begins with {secret[:6]!r} is not known here, or it was revoked: check "
            "TENFOLD_API_KEY and the server's address, or ask an admin for a new key.",
        )
    limits: RateLimit = request.app.state.limits
    limits.spend(key.id)
    if stale:
        with db.begin() as s:
            keys.touch(s, key.id)
    return Caller(key)


def _holding(scope: Scope) -> Callable[[Caller], Caller]:
    def check(found: Annotated[Caller, Depends(caller)]) -> Caller:
        if not keys.allows(found.key, scope):
            raise Problem(
                403,
                "scope_missing",
                f"This needs the scope {scope.value!r}; key {found.key.name!r} holds {', '.join(found.key.scopes)}: "
                "ask an admin for another key.",
            )
        return found

    return check


Reader = Annotated[Caller, Depends(_holding(Scope.READ))]
Submitter = Annotated[Caller, Depends(_holding(Scope.SUBMIT))]
Admin = Annotated[Caller, Depends(_holding(Scope.ADMIN))]
