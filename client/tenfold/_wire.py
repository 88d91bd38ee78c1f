"""What the client asks for, as values. Nothing here does I/O, so the sync and the async client share all of it.

An operation is a generator (``Steps``): it yields effects, is sent what came of them, and returns its result. A driver
(``_drivers``) performs the effects; what was tried in vain is raised inside the operation.
"""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import APIError, ConnectionFailed, api_error

if TYPE_CHECKING:
    import httpx

__all__ = ["Call", "Connection", "Download", "Effect", "Request", "Sleep", "Steps", "call", "fetch", "patient", "send"]

T = TypeVar("T")

LONGEST_PAUSE = 30.0
"""Seconds between two tries; a longer Retry-After is given to the caller as the error it is."""
BUSY = (429, 502, 503, 504)


@dataclass(frozen=True)
class Connection:
    """Where the service is, with which key, and how often a lost connection or a busy service is tried again."""

    base_url: str
    headers: Mapping[str, str]
    retries: int

    @classmethod
    def resolve(cls, base_url: str | None, api_key: str | None, retries: int) -> Connection:
        """``None`` reads ``TENFOLD_URL``, then ``http://127.0.0.1:8000``; and ``TENFOLD_API_KEY``."""
        url = (base_url or os.environ.get("TENFOLD_URL") or "http://127.0.0.1:8000").rstrip("/")
        key = (api_key or os.environ.get("TENFOLD_API_KEY") or "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return cls(url if "://" in url else f"http://{url}", headers, retries)


# ------------------------------------------------------------------------------------------------------------ effects


@dataclass(frozen=True)
class Request:
    """One exchange, answered by a ``httpx.Response``. ``file`` is streamed as the body, from its start at each try."""

    method: str
    path: str
    json: Mapping[str, Any] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class Download:
    """Stream a body into ``target``, going on after the bytes that ``target`` has. Answered by a ``Response``."""

    path: str
    target: Path
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class Sleep:
    seconds: float


@dataclass(frozen=True)
class Call:
    """Work that would hold up an event loop: a hash of a file, an export. Answered by what ``function`` returns."""

    function: Callable[[], Any]


Effect = Request | Download | Sleep | Call
Steps = Generator[Effect, Any, T]


# --------------------------------------------------------------------------------------------------------- operations


def send(
    method: str,
    path: str,
    *,
    json: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    file: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Steps[httpx.Response]:
    """One exchange. A POST carries an ``Idempotency-Key``: however often it is sent, it acts once."""
    sent = dict(headers or {})
    if method == "POST":
        sent.setdefault("Idempotency-Key", str(uuid.uuid4()))
    query = {name: value for name, value in (params or {}).items() if value is not None}
    reply: httpx.Response = yield Request(method, path, json, query, sent, file, progress)
    return reply


def fetch(method: str, path: str, **more: Any) -> Steps[dict[str, Any]]:
    """The JSON object that answers one exchange."""
    reply = yield from send(method, path, **more)
    try:
        body = reply.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ConnectionFailed(
            f"{reply.url} did not answer with JSON: is TENFOLD_URL the address of a Tenfold service?"
        )
    return body


def call(function: Callable[[], T]) -> Steps[T]:
    result: T = yield Call(function)
    return result


# -------------------------------------------------------------------------------------------------------------- tries


def patient(steps: Steps[T], retries: int) -> Steps[T]:
    """The same steps, with each exchange tried again while that can help; 4xx and 5xx raise ``APIError``."""
    answer: Any = None
    error: Exception | None = None
    while True:
        try:
            effect = steps.throw(error) if error else steps.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result
        error = answer = None
        try:
            if isinstance(effect, Request | Download):
                answer = yield from _tried(effect, retries)
            else:
                answer = yield effect
        except Exception as raised:
            error = raised


def _tried(effect: Request | Download, retries: int) -> Steps[httpx.Response]:
    lost = False
    for attempt in range(retries + 1):
        failure: APIError | ConnectionFailed
        asked = None
        try:
            reply: httpx.Response = yield effect
        except ConnectionFailed as error:
            failure, lost = error, True
        else:
            gone = reply.status_code == 404 and lost and isinstance(effect, Request) and effect.method == "DELETE"
            if reply.status_code < 400 or gone:  # gone: the try whose answer was lost did it
                return reply
            failure = _problem(reply)
            if reply.status_code not in BUSY and failure.code != "idempotency_key_in_progress":
                raise failure
            asked = _retry_after(reply)
        if attempt == retries or (asked or 0.0) > LONGEST_PAUSE:
            raise failure
        yield Sleep(asked if asked is not None else _pause(attempt))
    raise AssertionError("unreachable")


def _pause(attempt: int) -> float:
    """Seconds: 0.2, 0.4, 0.8 … up to the longest, each shortened at random so that clients do not come in step."""
    return random.uniform(0.5, 1.0) * min(LONGEST_PAUSE, 0.2 * 2.0**attempt)  # noqa: S311


def _retry_after(reply: httpx.Response) -> float | None:
    value: str = reply.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _problem(reply: httpx.Response) -> APIError:
    try:
        problem = reply.json()
    except ValueError:
        problem = {"detail": reply.text[:500]}
    if not isinstance(problem, dict):
        problem = {"detail": str(problem)[:500]}
    return api_error(reply.status_code, problem, reply.headers.get("X-Request-ID"))
