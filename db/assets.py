"""What models and data sets have in common."""

from typing import TypeVar

from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.orm import Session

from db.errors import Conflict
from db.tables import Dataset, Job, Model, Task, TaskKind

__all__ = ["delete_asset", "in_use", "locked", "of_inspection"]

Asset = TypeVar("Asset", Model, Dataset)


def in_use(s: Session, noun: str, id_: str, of_it: ColumnElement[bool]) -> None:
    """Raises ``Conflict`` (``model_in_use``, ``dataset_in_use``) naming the jobs that refer to it."""
    jobs = list(s.scalars(select(Job.id).where(of_it).order_by(Job.created_at).limit(4)))
    if jobs:
        shown = ", ".join(jobs[:3]) + (" and others" if len(jobs) > 3 else "")
        raise Conflict(f"{noun}_in_use", f"{noun} {id_} belongs to {shown}: delete those jobs first")


def delete_asset(s: Session, row: Model | Dataset) -> None:
    """With the inspection, which is thereby fenced out if it runs; the content goes by garbage collection."""
    s.execute(delete(Task).where((Task.model_id if isinstance(row, Model) else Task.dataset_id) == row.id))
    s.delete(row)
    s.flush()


def locked(s: Session, kind: type[Asset], id_: str | None, *, shared: bool = False) -> Asset | None:
    """The row as it is now; ``shared`` lets others read it but not change it until the transaction ends."""
    lock = {"read": True} if shared else {"key_share": True}
    return None if id_ is None else s.get(kind, id_, with_for_update=lock, populate_existing=True)


def of_inspection(s: Session, task: Task) -> Model | Dataset | None:
    """What an inspection task inspects, locked."""
    if task.kind is TaskKind.INSPECT_MODEL:
        return locked(s, Model, task.model_id)
    return locked(s, Dataset, task.dataset_id)
