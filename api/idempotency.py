"""Idempotency-Key on every POST: the first request does the work, a repeat gets the first one's reply.

Only replies of success are kept: a refused request changed nothing, so it may simply be tried again.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Header, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.orm import Session
from starlette.background import BackgroundTask

from api.auth import Db, Submitter
from api.problems import Problem
from db import replies
from db.engine import Database
from db.settings import Settings
from workers.queue import wake

__all__ = ["KEY_HEADER", "Once", "Reply", "Run", "Stored"]

KEY_HEADER = Header(
    min_length=1,
    max_length=200,
    description="A repeat with the same key and body gets the first reply and does nothing (kept for a day).",
)
RETRY_AFTER_SECONDS = 1


@dataclass(frozen=True)
class Reply:
    """What a service answers. ``Location`` is the body's own ``links.self``."""

    status: int
    body: BaseModel
    queues: Sequence[str] = ()
    """Queues whose workers are woken once the transaction stands."""
    forget: Sequence[str] = field(default=())
    """Fields that a kept reply must not hold (a secret): they are null in a repeat."""


@dataclass(frozen=True)
class Stored:
    status: int
    body: dict[str, Any]

    def response(self) -> JSONResponse:
        return respond(self.status, self.body, replayed=True)


def respond(status: int, body: dict[str, Any], *, replayed: bool = False) -> JSONResponse:
    """The HTTP form of a reply, the same for the first one and its repeats."""
    headers = {"Idempotency-Replayed": "true"} if replayed else {}
    if status in {201, 202}:
        headers["Location"] = body["links"]["self"]
    if status == 202:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return JSONResponse(body, status_code=status, headers=headers)


class Run:
    """One POST under its key, if it came with one."""

    def __init__(self, db: Database, settings: Settings, owner: str, key: str | None, hash_: str) -> None:
        self._db = db
        self._settings = settings
        self._owner = owner
        self._key = key
        self._hash = hash_

    def begin(self) -> Stored | None:
        """The kept reply of a repeat; None: do the work. Raises ``Conflict`` while the first still runs, and
        ``BadRequest`` when the key came with another request."""
        if self._key is None:
            return None
        with self._db.begin() as s:
            known = replies.begin(s, self._owner, self._key, self._hash)
        return None if known is None or known.status is None else Stored(known.status, known.body or {})

    def finish(self, work: Callable[[Session], Reply]) -> JSONResponse:
        """The work and the keeping of its reply, in one transaction; then workers are woken."""
        with self._db.begin() as s:
            reply = work(s)
            body = reply.body.model_dump(mode="json")
            if self._key is not None:
                kept = {name: None if name in reply.forget else value for name, value in body.items()}
                replies.finish(s, self._owner, self._key, reply.status, kept)
        response = respond(reply.status, body)
        # After the reply: a broker that is away costs seconds, and the sweeper finds the row anyway.
        response.background = BackgroundTask(self._wake, reply.queues)
        return response

    def _wake(self, queues: Sequence[str]) -> None:
        for queue in dict.fromkeys(queues):
            wake(queue, self._settings.redis_url)

    def forget(self) -> None:
        """After a failure: the same key may be tried again."""
        if self._key is not None:
            with self._db.begin() as s:
                replies.forget(s, self._owner, self._key)

    def __call__(self, work: Callable[[Session], Reply]) -> JSONResponse:
        stored = self.begin()
        if stored is not None:
            return stored.response()
        try:
            return self.finish(work)
        except BaseException:
            self.forget()
            raise


async def _request_hash(request: Request) -> str:
    body = await request.body()
    if b"\\ud" in body.lower():
        _refuse_half_characters(body)
    return replies.request_hash(request.method, request.url.path, body)


def _refuse_half_characters(body: bytes) -> None:
    """JSON can spell half of a surrogate pair; no reply could repeat it and PostgreSQL cannot keep it."""
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = str(error.object[error.start : error.end]).encode(errors="backslashreplace").decode()
        raise Problem(
            422, "unstorable_value", f"The body has {half}, which is half a character: send whole ones."
        ) from error
    except ValueError:
        return  # what is not JSON is told so where the body is read


def _once(
    request: Request,
    db: Db,
    caller: Submitter,
    hash_: Annotated[str, Depends(_request_hash)],
    idempotency_key: Annotated[str | None, KEY_HEADER] = None,
) -> Run:
    return Run(db, request.app.state.settings, caller.owner, idempotency_key, hash_)


Once = Annotated[Run, Depends(_once)]
"""``once(work)`` in an endpoint: does the work, or repeats the reply."""
