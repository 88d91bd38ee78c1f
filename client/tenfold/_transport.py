"""HTTP with retries where repeating is safe, and problems turned into exceptions."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from httpx_retries import Retry, RetryTransport

from .errors import ConnectionFailed, api_error

__all__ = ["Transport"]

_TIMEOUT = httpx.Timeout(60.0, connect=10.0)
_RETRIED = ("GET", "HEAD", "DELETE", "POST")
"""POST too: each carries an Idempotency-Key, so a repeat gives the first one's answer. Uploads are not retried here:
their body is a stream that cannot be sent twice."""


class Transport:
    """Talks to one service with one key.

    Args:
        base_url: address of the service; None reads ``TENFOLD_URL``, then ``http://127.0.0.1:8000``.
        api_key: None reads ``TENFOLD_API_KEY``.
        retries: how often a failed connection, 429, 502, 503 or 504 is tried again, with jittered back-off.
    """

    def __init__(self, base_url: str | None, api_key: str | None, *, retries: int = 5) -> None:
        self.base_url = (base_url or os.environ.get("TENFOLD_URL") or "http://127.0.0.1:8000").rstrip("/")
        key = api_key or os.environ.get("TENFOLD_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Proxies from the environment still apply: a custom transport alone would switch them off for every host.
        retry = Retry(total=retries, backoff_factor=0.3, allowed_methods=_RETRIED)
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=headers,
            timeout=_TIMEOUT,
            transport=RetryTransport(transport=httpx.HTTPTransport(), retry=retry),
        )
        self._once = httpx.Client(base_url=self.base_url, headers=headers, timeout=httpx.Timeout(600.0, connect=10.0))

    def request(
        self,
        method: str,
        path: str,
        *,
        json: dict[str, Any] | None = None,
        params: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """One exchange; raises ``APIError`` for 4xx and 5xx. 304 is a normal answer."""
        sent = dict(headers or {})
        if method == "POST":
            sent.setdefault("Idempotency-Key", str(uuid.uuid4()))
        query = {k: v for k, v in (params or {}).items() if v is not None}
        with self._connected():
            return _checked(self._http.request(method, path, json=json, params=query, headers=sent))

    def upload(self, path: str, body: Iterator[bytes], size: int, filename: str) -> dict[str, Any]:
        """Stream ``size`` bytes."""
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        with self._connected():
            reply = self._once.post(path, content=body, headers=headers, params={"filename": filename})
        return dict(_checked(reply).json())

    @contextmanager
    def download(self, path: str, *, start: int = 0) -> Iterator[httpx.Response]:
        """Stream a body from byte ``start`` on."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._connected(), self._http.stream("GET", path, headers=headers) as reply:
            if reply.status_code >= 400:
                reply.read()
            yield _checked(reply)

    def close(self) -> None:
        self._http.close()
        self._once.close()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as e:
            raise ConnectionFailed(
                f"no answer from {self.base_url}: {e or type(e).__name__}. Is the service up (`tenfold-server up`), "
                "and TENFOLD_URL or base_url right?"
            ) from e


def _checked(reply: httpx.Response) -> httpx.Response:
    if reply.status_code < 400:
        return reply
    try:
        problem = reply.json()
    except ValueError:
        problem = {"detail": reply.text[:500]}
    if not isinstance(problem, dict):
        problem = {"detail": str(problem)[:500]}
    raise api_error(reply.status_code, problem, reply.headers.get("X-Request-ID"))


def chunks_of(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    with path.open("rb") as f:
        while chunk := f.read(size):
            yield chunk
