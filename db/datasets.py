"""Uploaded data: made, inspected by a task, ready or rejected."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from db import tasks, uploads
from db.assets import delete_asset
from db.engine import new_id, now
from db.errors import NotFound
from db.pages import Page, newest_first
from db.tables import AssetState, Dataset, TaskKind
from search.spec import DataInfo, DataSpec

__all__ = ["add", "delete", "get", "info", "page"]


def add(s: Session, owner: str, *, upload_id: str, name: str, spec: DataSpec, queue: str = "cpu") -> Dataset:
    """A data set of an upload, with the task that inspects it: wake ``queue`` after the commit.

    Raises ``NotFound`` (``upload_not_found``).
    """
    row = Dataset(
        id=new_id("dat"),
        owner=owner,
        name=name,
        blob_id=uploads.get(s, owner, upload_id).blob_id,
        spec=spec.model_dump(mode="json"),
        state=AssetState.INSPECTING,
        created_at=now(s),
    )
    s.add(row)
    s.flush()
    tasks.add(s, TaskKind.INSPECT_DATA, owner, queue=queue, dataset_id=row.id)
    return row


def get(s: Session, owner: str, dataset_id: str) -> Dataset:
    """Raises ``NotFound`` (``dataset_not_found``)."""
    row = s.scalar(select(Dataset).where(Dataset.id == dataset_id, Dataset.owner == owner))
    if row is None:
        raise NotFound.of("dataset", dataset_id)
    return row


def info(row: Dataset) -> DataInfo | None:
    return None if row.info is None else DataInfo.model_validate(row.info)


def page(s: Session, owner: str, cursor: str | None = None, limit: int = 100) -> Page[Dataset]:
    """Newest first."""
    return newest_first(s, select(Dataset).where(Dataset.owner == owner), Dataset.created_at, Dataset.id, cursor, limit)


def delete(s: Session, owner: str, dataset_id: str) -> None:
    """Raises ``NotFound``, or ``Conflict`` (``dataset_in_use``) while a job refers to it."""
    delete_asset(s, get(s, owner, dataset_id), "dataset")
