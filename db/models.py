"""Uploaded networks: made, inspected by a task, ready or rejected."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from db import tasks, uploads
from db.assets import delete_asset
from db.engine import new_id, now
from db.errors import NotFound
from db.pages import Page, newest_first
from db.tables import AssetState, Model, TaskKind
from search.spec import ModelInfo

__all__ = ["add", "delete", "get", "info", "page"]


def add(
    s: Session,
    owner: str,
    *,
    upload_id: str,
    name: str,
    format: str = "auto",
    architecture: dict[str, Any] | None = None,
    queue: str = "cpu",
) -> Model:
    """A model of an upload, with the task that inspects it: wake ``queue`` after the commit.

    Raises ``NotFound`` (``upload_not_found``).
    """
    row = Model(
        id=new_id("mdl"),
        owner=owner,
        name=name,
        blob_id=uploads.get(s, owner, upload_id).blob_id,
        format=format,
        architecture=architecture,
        state=AssetState.INSPECTING,
        created_at=now(s),
    )
    s.add(row)
    s.flush()
    tasks.add(s, TaskKind.INSPECT_MODEL, owner, queue=queue, model_id=row.id)
    return row


def get(s: Session, owner: str, model_id: str) -> Model:
    """Raises ``NotFound`` (``model_not_found``)."""
    row = s.scalar(select(Model).where(Model.id == model_id, Model.owner == owner))
    if row is None:
        raise NotFound.of("model", model_id)
    return row


def info(row: Model) -> ModelInfo | None:
    return None if row.info is None else ModelInfo.model_validate(row.info)


def page(s: Session, owner: str, cursor: str | None = None, limit: int = 100) -> Page[Model]:
    """Newest first."""
    return newest_first(s, select(Model).where(Model.owner == owner), Model.created_at, Model.id, cursor, limit)


def delete(s: Session, owner: str, model_id: str) -> None:
    """Raises ``NotFound``, or ``Conflict`` (``model_in_use``) while a job refers to it."""
    delete_asset(s, get(s, owner, model_id), "model")
