"""ETag, 304 and long polling for JSON replies.

The tag is made of the content itself, so it is right whatever changed; figures that move with the clock alone
(``eta_seconds``) are left out of it, which is why it is a weak one.
"""

import hashlib
import json
from collections.abc import Callable, Hashable
from typing import Annotated, Any

import anyio
from fastapi import Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

__all__ = ["Wait", "conditional", "matches", "until_changed"]

Wait = Annotated[
    float,
    Query(
        ge=0,
        le=60,
        description="Long polling, seconds: with If-None-Match, the reply waits this long for a change.",
    ),
]
LOOK_EVERY = 0.5
"""Seconds between two looks at the database: one short indexed read each, no thread is held meanwhile."""
CLOCK_FIELDS = ("eta_seconds",)


def _etag(body: dict[str, Any]) -> str:
    steady = {name: value for name, value in body.items() if name not in CLOCK_FIELDS}
    text = json.dumps(steady, sort_keys=True, separators=(",", ":"))
    return f'W/"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'


def matches(header: str | None, etag: str) -> bool:
    """If-None-Match against one tag, by weak comparison (RFC 9110, 8.8.3.2)."""
    if not header:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag.removeprefix("W/") in tags


def conditional(request: Request, body: BaseModel | dict[str, Any]) -> Response:
    """The body with its tag, or 304 when the caller has it already."""
    content = body.model_dump(mode="json") if isinstance(body, BaseModel) else body
    etag = _etag(content)
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    return JSONResponse(content, headers=headers)


async def until_changed(
    request: Request,
    wait: float,
    *,
    stamp: Callable[[], Hashable],
    reply: Callable[[], Response],
    unchanged: Callable[[Response], bool] = lambda response: response.status_code == 304,
) -> Response:
    """Answer as soon as ``reply`` has news, after ``wait`` seconds at the latest.

    ``stamp`` is a cheap read that differs when the content may differ; only then is ``reply`` asked again.
    """
    seen = await run_in_threadpool(stamp)
    response: Response = await run_in_threadpool(reply)
    if not wait:
        return response
    with anyio.move_on_after(wait):
        while unchanged(response) and not await request.is_disconnected():
            await anyio.sleep(LOOK_EVERY)
            now = await run_in_threadpool(stamp)
            if now != seen:
                seen, response = now, await run_in_threadpool(reply)
    return response
