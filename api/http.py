"""Around every request: an id, a limit on its body, security headers, one log line, a 500 that is a problem."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.metrics import Metrics
from api.problems import Problem, problem_response

__all__ = ["API_POLICY", "PAGE_POLICY", "Envelope"]

log = logging.getLogger("tenfold.api")

API_POLICY = "default-src 'none'; frame-ancestors 'none'"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data:; font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""For the dashboard and /docs. Inline *styles* only: plotly.js writes them, it needs no inline script."""

HEADERS = {
    "Content-Security-Policy": API_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Only where the reply did not set its own."""

UPLOAD_PATH = "/v1/uploads"
USABLE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Envelope:
    """ASGI middleware. ``json_limit`` and ``upload_limit``: bytes of a request's body."""

    def __init__(self, app: ASGIApp, *, json_limit: int, upload_limit: int, metrics: Metrics) -> None:
        self.app = app
        self.json_limit = json_limit
        self.upload_limit = upload_limit
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if USABLE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        limit = self.upload_limit if scope["path"].rstrip("/") == UPLOAD_PATH else self.json_limit
        status, began, arrived = 0, time.perf_counter(), 0

        async def limited() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > limit:
                raise too_large(limit, f"more than {limit:,} bytes")
            return message

        async def dressed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                reply = MutableHeaders(scope=message)
                reply["X-Request-ID"] = request_id
                if scope["path"].startswith("/static/"):
                    reply.setdefault("Cache-Control", "no-cache")
                for name, value in HEADERS.items():
                    reply.setdefault(name, value)
            await send(message)

        try:
            declared = headers.get("content-length", "")
            if declared.isdigit() and int(declared) > limit:
                refusal = too_large(limit, f"Content-Length: {int(declared):,}")
                await problem_response(scope, refusal)(scope, receive, dressed)
            else:
                await self.app(scope, limited, dressed)
        except Exception:
            log.exception("request %s failed: %s %s", request_id, scope["method"], scope["path"])
            if status:  # the reply has begun: all that is left is to cut the connection
                raise
            broken = Problem(
                500, "internal_error", f"Something broke on our side; the server's log has it under {request_id}."
            )
            await problem_response(scope, broken)(scope, receive, dressed)
        finally:
            seconds = time.perf_counter() - began
            self.metrics.observe(scope, status, seconds)
            log.info("%s %s %d %.0f ms %s", scope["method"], scope["path"], status, seconds * 1000, request_id)


def too_large(limit: int, arrived: str) -> Problem:
    """The 413 for a body past ``limit`` bytes; ``arrived`` says what came."""
    return Problem(413, "body_too_large", f"This server takes at most {limit:,} bytes here; {arrived} arrived.")
