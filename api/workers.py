"""/v1/workers: who computes, on what, in which jail."""

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from api.auth import Admin, Db
from api.conditional import conditional
from api.problems import responses
from db import workers
from db.tables import Worker

__all__ = ["router"]

router = APIRouter(prefix="/v1/workers", tags=["workers"])


class WorkerView(BaseModel):
    id: str
    host: str
    queue: str = Field(description="Device class.")
    device: str
    jail: dict[str, Any] = Field(description="Which layers of the jail its kernel gives.")
    started_at: float
    seen_at: float


class WorkersView(BaseModel):
    items: list[WorkerView]


def worker_view(row: Worker) -> WorkerView:
    return WorkerView(
        id=row.id,
        host=row.host,
        queue=row.queue,
        device=row.device,
        jail=row.jail,
        started_at=row.started_at,
        seen_at=row.seen_at,
    )


@router.get("", operation_id="list_workers", response_model=WorkersView, responses=responses(304, 401, 403))
def list_workers(request: Request, db: Db, caller: Admin) -> Response:
    """The workers seen in the last minute."""
    with db.read() as s:
        return conditional(request, WorkersView(items=[worker_view(row) for row in workers.live(s)]))
