"""Perform the effects of ``_wire`` with httpx: one driver blocks, the other awaits. No decision is made here."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import httpx

from ._wire import Call, Connection, Download, Effect, Request, Sleep, Steps, patient
from .errors import ConnectionFailed

__all__ = ["AsyncDriver", "Driver"]

T = TypeVar("T")

CHUNK = 1 << 20
TIMEOUT = httpx.Timeout(60.0, connect=10.0)
UPLOAD_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
"""The service answers an upload once all of it is stored."""


class Driver:
    """Runs operations in the calling thread."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._http = httpx.Client(base_url=connection.base_url, headers=connection.headers, timeout=TIMEOUT)

    def run(self, steps: Steps[T]) -> T:
        tried = patient(steps, self.connection.retries)
        answer: Any = None
        error: BaseException | None = None
        while True:
            try:
                effect = tried.throw(error) if error else tried.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            error = answer = None
            try:
                answer = self._perform(effect)
            except BaseException as raised:
                error = raised

    def close(self) -> None:
        self._http.close()

    def _perform(self, effect: Effect) -> Any:
        if isinstance(effect, Sleep):
            return time.sleep(effect.seconds)
        if isinstance(effect, Call):
            return effect.function()
        with _connected(self.connection):
            return self._download(effect) if isinstance(effect, Download) else self._exchange(effect)

    def _exchange(self, effect: Request) -> httpx.Response:
        with _body(effect) as (body, size):
            content = _pieces(body, effect, size) if body else None
            return _direct(self._http.request(effect.method, effect.path, content=content, **_arguments(effect, size)))

    def _download(self, effect: Download) -> httpx.Response:
        with self._http.stream("GET", effect.path, headers=_range(effect)) as reply:
            if reply.status_code not in (200, 206):
                reply.read()
                return _direct(reply)
            with effect.target.open("ab" if reply.status_code == 206 else "wb") as f:
                for chunk in reply.iter_bytes(CHUNK):
                    f.write(chunk)
                    _tell(effect, reply, f.tell())
            return reply


class AsyncDriver:
    """Runs operations in an event loop, asyncio's or trio's; files are read and written in threads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._http = httpx.AsyncClient(base_url=connection.base_url, headers=connection.headers, timeout=TIMEOUT)

    async def run(self, steps: Steps[T]) -> T:
        tried = patient(steps, self.connection.retries)
        answer: Any = None
        error: BaseException | None = None
        while True:
            try:
                effect = tried.throw(error) if error else tried.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            error = answer = None
            try:
                answer = await self._perform(effect)
            except BaseException as raised:
                error = raised

    async def close(self) -> None:
        await self._http.aclose()

    async def _perform(self, effect: Effect) -> Any:
        if isinstance(effect, Sleep):
            return await anyio.sleep(effect.seconds)
        if isinstance(effect, Call):
            return await anyio.to_thread.run_sync(effect.function)
        with _connected(self.connection):
            return await (self._download(effect) if isinstance(effect, Download) else self._exchange(effect))

    async def _exchange(self, effect: Request) -> httpx.Response:
        with _body(effect) as (body, size):
            content = _threaded(_pieces(body, effect, size)) if body else None
            arguments = _arguments(effect, size)
            return _direct(await self._http.request(effect.method, effect.path, content=content, **arguments))

    async def _download(self, effect: Download) -> httpx.Response:
        async with self._http.stream("GET", effect.path, headers=_range(effect)) as reply:
            if reply.status_code not in (200, 206):
                await reply.aread()
                return _direct(reply)
            with effect.target.open("ab" if reply.status_code == 206 else "wb") as f:
                async for chunk in reply.aiter_bytes(CHUNK):
                    await anyio.to_thread.run_sync(f.write, chunk)
                    _tell(effect, reply, f.tell())
            return reply


# ------------------------------------------------------------------------------------------------- shared by the two


@contextmanager
def _connected(connection: Connection) -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as e:
        raise ConnectionFailed(
            f"no answer from {connection.base_url}: {e or type(e).__name__}. Is the service up (`tenfold-server up`), "
            "and TENFOLD_URL or base_url right?"
        ) from e


def _direct(reply: httpx.Response) -> httpx.Response:
    """A redirect is not followed, because it would carry the key elsewhere: the caller is told."""
    if reply.has_redirect_location:
        raise ConnectionFailed(
            f"{reply.url} redirects to {reply.headers['Location']}: give that address as TENFOLD_URL"
        )
    return reply


@contextmanager
def _body(effect: Request) -> Iterator[tuple[Any, int]]:
    """The open file to send and its size in bytes, or (None, 0)."""
    if effect.file is None:
        yield None, 0
        return
    with effect.file.open("rb") as f:
        yield f, effect.file.stat().st_size


def _arguments(effect: Request, size: int) -> dict[str, Any]:
    headers = dict(effect.headers)
    if effect.file is not None:
        headers |= {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
    timeout = {} if effect.file is None else {"timeout": UPLOAD_TIMEOUT}
    return {"json": effect.json, "params": effect.params or None, "headers": headers, **timeout}


def _pieces(body: Any, effect: Request, size: int) -> Iterator[bytes]:
    done = 0
    while chunk := body.read(CHUNK):
        yield chunk
        done += len(chunk)
        if effect.progress:
            effect.progress(done, size)


async def _threaded(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (chunk := await anyio.to_thread.run_sync(next, pieces, b"")) != b"":
        yield chunk


def _range(effect: Download) -> dict[str, str]:
    start = _size(effect.target)
    return {"Range": f"bytes={start}-"} if start else {}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tell(effect: Download, reply: httpx.Response, done: int) -> None:
    if effect.progress:
        total = reply.headers.get("Content-Range", "").rpartition("/")[2] or reply.headers.get("Content-Length", done)
        effect.progress(done, int(total))
