"""The queue of everything that computes: one claim, one heartbeat, one fence.

A worker that holds a task writes with ``(task_id, attempt)``. When its lease ran out and another attempt began, or the
job was ended, every such write is refused: it returns False or None and changes nothing.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from db.claiming import claim, waiting_queues
from db.engine import new_id, now
from db.errors import NotFound
from db.failing import fail, release, requeue_or_fail
from db.lifecycle import LIVE, end_task, hold, settle, tell
from db.results import NewArtifact, complete_export, complete_inspection, complete_profile, complete_trial
from db.tables import Job, JobState, Task, TaskKind, TaskState

__all__ = [
    "Beat",
    "NewArtifact",
    "add",
    "claim",
    "complete_export",
    "complete_inspection",
    "complete_profile",
    "complete_trial",
    "expired",
    "fail",
    "finish",
    "get",
    "heartbeat",
    "live",
    "release",
    "requeue_or_fail",
    "save_checkpoint",
    "waiting_queues",
]

MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class Beat:
    cancel: bool
    """The job is being cancelled: end the computation, then call ``fail`` with any code (it counts as cancelled)."""
    lease_until: float


def add(
    s: Session,
    kind: TaskKind,
    owner: str,
    *,
    queue: str,
    job_id: str | None = None,
    model_id: str | None = None,
    dataset_id: str | None = None,
    trial: int | None = None,
    work: dict[str, Any] | None = None,
    max_attempts: int = MAX_ATTEMPTS,
) -> Task:
    """Queues a task. The row is its own outbox: wake the queue's workers after the commit."""
    task = Task(
        id=new_id("tsk"),
        kind=kind,
        owner=owner,
        job_id=job_id,
        model_id=model_id,
        dataset_id=dataset_id,
        trial=trial,
        work=work or {},
        queue=queue,
        state=TaskState.QUEUED,
        attempt=0,
        max_attempts=max_attempts,
        created_at=now(s),
    )
    s.add(task)
    s.flush()
    return task


def get(s: Session, task_id: str) -> Task:
    """For workers, whatever the owner. Raises ``NotFound`` (``task_not_found``)."""
    task = s.get(Task, task_id, populate_existing=True)
    if task is None:
        raise NotFound.of("task", task_id)
    return task


def live(s: Session, job_id: str) -> list[Task]:
    """Queued and running tasks of a job, running ones first: what its progress is made of."""
    query = select(Task).where(Task.job_id == job_id, Task.state.in_(LIVE))
    return list(s.scalars(query.order_by(Task.state.desc(), Task.created_at, Task.trial, Task.id)))


def heartbeat(
    s: Session, task_id: str, attempt: int, lease_s: float, progress: dict[str, Any] | None = None
) -> Beat | None:
    """Moves the lease on and says whether to stop; None: the lease was lost, end the computation and write nothing.

    ``progress``: {"message": …, "done": n, "of": m}; None leaves it as it was.
    """
    until = now(s) + lease_s
    values: dict[str, Any] = {"lease_until": until}
    if progress is not None:
        values["progress"] = progress
    held = update(Task).where(Task.id == task_id, Task.attempt == attempt, Task.state == TaskState.RUNNING)
    row = s.execute(held.values(values).returning(Task.job_id)).one_or_none()
    if row is None:
        return None
    state = s.scalar(select(Job.state).where(Job.id == row.job_id)) if row.job_id else None
    return Beat(cancel=state is JobState.CANCELLING, lease_until=until)


def save_checkpoint(s: Session, task_id: str, attempt: int, blob_id: str) -> bool:
    """Where the next attempt goes on if this one is lost."""
    held = update(Task).where(Task.id == task_id, Task.attempt == attempt, Task.state == TaskState.RUNNING)
    return s.execute(held.values(checkpoint_blob=blob_id).returning(Task.id)).one_or_none() is not None


def finish(s: Session, task_id: str, attempt: int) -> bool:
    """Done, with nothing to store; what has a result ends by its ``complete_…``."""
    held = hold(s, task_id, attempt)
    if held is None:
        return False
    task, job = held
    at = now(s)
    end_task(task, TaskState.DONE, at)
    if job is not None:
        tell(s, job, "note", f"A task ({task.kind.value}) ended.", at)
        settle(s, job)
    return True


def expired(s: Session) -> list[Task]:
    """Running tasks whose worker has been silent for longer than its lease; give each to ``requeue_or_fail``."""
    query = select(Task).where(Task.state == TaskState.RUNNING, Task.lease_until < now(s))
    return list(s.scalars(query.order_by(Task.lease_until)))
