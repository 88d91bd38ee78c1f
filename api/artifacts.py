"""Downloads: whole or in ranges, tagged with the SHA-256 of the content."""

import re
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from api.auth import Db, Reader
from api.conditional import conditional, matches
from api.paging import Cursor, Limit, PageOf, page_of
from api.problems import Problem, responses
from db import artifacts, blobs, jobs
from db.tables import Artifact

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["artifacts"])

RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class ArtifactView(BaseModel):
    id: str
    job: str
    trial: int
    format: str
    filename: str
    media_type: str
    size: int
    sha256: str
    facts: dict[str, Any] = Field(description="What loading it again in a clean process measured.")
    created_at: float
    links: dict[str, str]


def artifact_view(row: Artifact, blob: blobs.BlobInfo) -> ArtifactView:
    path = f"/v1/artifacts/{row.id}"
    return ArtifactView(
        id=row.id,
        job=row.job_id,
        trial=row.trial,
        format=row.format,
        filename=row.filename,
        media_type=row.media_type,
        size=blob.size,
        sha256=blob.sha256,
        facts=row.facts,
        created_at=row.created_at,
        links={"self": path, "content": f"{path}/content", "job": f"/v1/jobs/{row.job_id}"},
    )


def wanted_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last; None for the whole: no Range, several of them, or one we cannot read.

    Raises 416 for a range that lies outside of the ``size`` bytes (RFC 9110, 14.2).
    """
    found = RANGE.fullmatch(header.replace(" ", "")) if header else None
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < start:
            return None  # an invalid specifier is ignored
    if start >= size or start >= stop:
        raise Problem(
            416,
            "range_not_satisfiable",
            f"Range {header!r} lies outside of the {size:,} bytes there are.",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, stop


def _disposition(filename: str) -> str:
    plain = re.sub(r'[^\x20-\x7e]|["\\]', "_", filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


@router.get(
    "/jobs/{job_id}/artifacts",
    operation_id="list_artifacts",
    response_model=PageOf[ArtifactView],
    responses=responses(304, 401, 404),
)
def list_artifacts(
    request: Request,
    db: Db,
    caller: Reader,
    job_id: str,
    trial: Annotated[int | None, Query(ge=0, le=2**31 - 1, description="Only this trial's.")] = None,
    cursor: Cursor = None,
    limit: Limit = 100,
) -> Response:
    """The files of a job, newest first."""
    with db.read() as s:
        jobs.get(s, caller.owner, job_id)
        page = artifacts.page(s, caller.owner, job_id, cursor, limit, trial=trial)
        return conditional(request, page_of(page, lambda row: artifact_view(row, blobs.info(s, row.blob_id))))


@router.get(
    "/artifacts/{artifact_id}",
    operation_id="get_artifact",
    response_model=ArtifactView,
    responses=responses(304, 401, 404),
)
def get_artifact(request: Request, db: Db, caller: Reader, artifact_id: str) -> Response:
    """One file's name, size, SHA-256 and what was measured of it."""
    with db.read() as s:
        row = artifacts.get(s, caller.owner, artifact_id)
        return conditional(request, artifact_view(row, blobs.info(s, row.blob_id)))


@router.get(
    "/artifacts/{artifact_id}/content",
    operation_id="download_artifact",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        206: {"description": "Partial Content"},
        **responses(304, 401, 404, 416),
    },
)
def download_artifact(
    request: Request,
    db: Db,
    caller: Reader,
    artifact_id: str,
    range_: Annotated[str | None, Header(alias="Range", description="`bytes=FIRST-LAST`, one range.")] = None,
    if_range: Annotated[str | None, Header(description="The range counts only while the ETag is this one.")] = None,
) -> Response:
    """The file itself. The ETag is its SHA-256."""
    with db.read() as s:
        row = artifacts.get(s, caller.owner, artifact_id)
        blob = blobs.info(s, row.blob_id)
    etag = f'"{blob.sha256}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": _disposition(row.filename),
    }
    if matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    part = wanted_range(range_, blob.size) if if_range is None or if_range == etag else None
    start, stop = part or (0, blob.size)
    headers["Content-Length"] = str(stop - start)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
    return StreamingResponse(
        blobs.read(db, row.blob_id, start, stop),
        status_code=206 if part else 200,
        media_type=row.media_type,
        headers=headers,
    )
