"""POST /v1/uploads: a raw body goes straight to the blob store, one chunk in memory at a time."""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import Annotated

import anyio
from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api.auth import Caller, Db, Reader, Submitter
from api.conditional import conditional
from api.idempotency import KEY_HEADER, Reply, Run, Stored
from api.paging import Cursor, Limit, PageOf, page_of
from api.problems import Problem, responses
from db import blobs, replies, uploads
from db.engine import Database
from db.settings import Settings
from db.tables import Upload

__all__ = ["router"]

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/=]+):")
"""One member of a Content-Digest header (RFC 9530)."""
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
SHA256 = re.compile(r"[0-9a-f]{64}")


class UploadView(BaseModel):
    id: str
    filename: str
    size: int
    sha256: str
    created_at: float
    links: dict[str, str]


def upload_view(row: Upload, blob: blobs.BlobInfo) -> UploadView:
    return UploadView(
        id=row.id,
        filename=row.filename,
        size=blob.size,
        sha256=blob.sha256,
        created_at=row.created_at,
        links={"self": f"/v1/uploads/{row.id}"},
    )


def _promised(content_digest: str | None, sha256: str | None) -> str | None:
    """The SHA-256 that the caller says the body has, as hex; 400 for one that cannot be read."""
    if sha256 is not None:
        if not SHA256.fullmatch(sha256.lower()):
            raise Problem(400, "bad_digest", f"X-Content-SHA256 is {sha256[:80]!r}: 64 hexadecimal digits are needed.")
        return sha256.lower()
    if content_digest is None or (found := DIGEST.search(content_digest)) is None:
        return None  # other algorithms may be ignored (RFC 9530, 2)
    try:
        digest = base64.b64decode(found[1], validate=True)
    except binascii.Error:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise Problem(400, "bad_digest", f"Content-Digest has {found[1][:80]!r}: base64 of 32 bytes is needed.")
    return digest.hex()


@dataclass(frozen=True)
class Room:
    """How many bytes an owner may still send."""

    held: int
    most: int | None

    def check(self, more: int) -> None:
        """Raises 413 when ``more`` bytes do not fit."""
        if self.most is not None and self.held + more > self.most:
            raise Problem(
                413,
                "quota_exceeded",
                f"You keep {self.held:,} bytes of uploads and may keep {self.most:,}: delete some first.",
            )


def _room(db: Database, settings: Settings, owner: str) -> Room:
    if settings.max_stored_bytes is None:
        return Room(0, None)
    with db.read() as s:
        return Room(uploads.stored_bytes(s, owner), int(settings.max_stored_bytes))


async def _stream(request: Request, db: Database, room: Room, promised: str | None) -> blobs.BlobInfo:
    """The body as a blob; nothing is left of one that breaks off, is too large or is not what was promised."""
    writer = await run_in_threadpool(blobs.Writer, db)
    try:
        size = 0
        async for piece in request.stream():
            size += len(piece)
            room.check(size)
            if piece:
                await run_in_threadpool(writer.feed, piece)
        declared = request.headers.get("content-length")
        if declared is not None and int(declared) != size:
            raise Problem(
                400, "upload_cut_off", f"{size:,} bytes arrived and Content-Length promised {declared}: send it again."
            )
        if not size:
            raise Problem(422, "empty_upload", "The body is empty: send the file's bytes as the request's body.")
        info = await run_in_threadpool(writer.finish)
    except BaseException as error:
        with anyio.CancelScope(shield=True):  # the server may be stopping: what was written has to go all the same
            await run_in_threadpool(writer.abort)
        if isinstance(error, ClientDisconnect):
            raise Problem(400, "upload_cut_off", "The connection ended before the body did: send it again.") from error
        raise
    if promised is not None and promised != info.sha256:
        # The blob is finished but nobody refers to it: garbage collection takes it, unless it is someone's already.
        raise Problem(
            422, "digest_mismatch", f"The body has SHA-256 {info.sha256}, promised was {promised}: send it again."
        )
    return info


@router.post(
    "",
    operation_id="create_upload",
    status_code=201,
    response_model=UploadView,
    responses=responses(400, 401, 403, 409, 413, 422, 507),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def create_upload(
    request: Request,
    db: Db,
    caller: Submitter,
    filename: Annotated[str, Query(max_length=1000, description="The file's own name, for people.")] = "",
    content_digest: Annotated[str | None, Header(description="`sha-256=:BASE64:`, checked (RFC 9530).")] = None,
    x_content_sha256: Annotated[str | None, Header(description="SHA-256 in hexadecimal, checked.")] = None,
    idempotency_key: Annotated[str | None, KEY_HEADER] = None,
) -> Response:
    """Upload one file as the raw body of the request (no multipart form); it is streamed to the store.

    The answer's ``id`` is what models and data sets are made of.
    """
    settings: Settings = request.app.state.settings
    filename = CONTROL.sub("_", filename)
    promised = _promised(content_digest, x_content_sha256)
    # The body can be hashed only while it streams by: a repeat's is compared with the kept SHA-256 instead.
    run = Run(
        db, settings, caller.owner, idempotency_key, replies.request_hash("POST", "/v1/uploads", filename.encode())
    )
    stored = await run_in_threadpool(run.begin)
    if stored is not None:
        return await _again(request, stored)
    try:
        room = await run_in_threadpool(_room, db, settings, caller.owner)
        room.check(int(request.headers.get("content-length") or 0))
        info = await _stream(request, db, room, promised)
        return await run_in_threadpool(run.finish, lambda s: _named(s, caller, filename, info))
    except BaseException:
        with anyio.CancelScope(shield=True):
            await run_in_threadpool(run.forget)
        raise


def _named(s: Session, caller: Caller, filename: str, info: blobs.BlobInfo) -> Reply:
    return Reply(201, upload_view(uploads.add(s, caller.owner, filename, info.id), info))


async def _again(request: Request, stored: Stored) -> Response:
    digest = hashlib.sha256()
    async for piece in request.stream():
        digest.update(piece)
    if digest.hexdigest() != stored.body["sha256"]:
        raise Problem(
            422, "idempotency_key_reused", "This Idempotency-Key came before with another file: make a new one."
        )
    return stored.response()


@router.get("", operation_id="list_uploads", response_model=PageOf[UploadView], responses=responses(401, 422))
def list_uploads(request: Request, db: Db, caller: Reader, cursor: Cursor = None, limit: Limit = 100) -> Response:
    """Your uploads, newest first."""
    with db.read() as s:
        page = uploads.page(s, caller.owner, cursor, limit)
        return conditional(request, page_of(page, lambda row: upload_view(row, blobs.info(s, row.blob_id))))


@router.get("/{upload_id}", operation_id="get_upload", response_model=UploadView, responses=responses(401, 404))
def get_upload(request: Request, db: Db, caller: Reader, upload_id: str) -> Response:
    """One upload."""
    with db.read() as s:
        row = uploads.get(s, caller.owner, upload_id)
        return conditional(request, upload_view(row, blobs.info(s, row.blob_id)))


@router.delete("/{upload_id}", operation_id="delete_upload", status_code=204, responses=responses(401, 403, 404))
def delete_upload(db: Db, caller: Submitter, upload_id: str) -> None:
    """Forget an upload. Models and data sets made of it stay."""
    with db.begin() as s:
        uploads.delete(s, caller.owner, upload_id)
