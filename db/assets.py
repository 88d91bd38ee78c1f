"""What models and data sets have in common."""

from typing import TypeVar

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from db.errors import Conflict
from db.tables import Dataset, Job, Model, Task, TaskKind

__all__ = ["delete_asset", "locked", "of_inspection"]

Asset = TypeVar("Asset", Model, Dataset)


def delete_asset(s: Session, row: Model | Dataset, noun: str) -> None:
    """With its inspection, which is thereby fenced out if it runs; the content goes by garbage collection.

    Raises ``Conflict`` (``model_in_use``, ``dataset_in_use``) naming the jobs that refer to it.
    """
    # The task before the asset, as where an inspection ends; then nobody can start a job while we look for one.
    s.execute(delete(Task).where((Task.model_id if isinstance(row, Model) else Task.dataset_id) == row.id))
    s.refresh(row, with_for_update=True)
    of_it = (Job.model_id if isinstance(row, Model) else Job.dataset_id) == row.id
    jobs = list(s.scalars(select(Job.id).where(of_it).order_by(Job.created_at).limit(4)))
    if jobs:
        shown = ", ".join(jobs[:3]) + (" and others" if len(jobs) > 3 else "")
        raise Conflict(f"{noun}_in_use", f"{noun} {row.id} belongs to {shown}: delete those jobs first")
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
