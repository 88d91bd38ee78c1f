"""Which queued task a worker gets."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session

from db.engine import now
from db.lifecycle import ACTIVE_JOBS
from db.tables import TERMINAL_JOBS, Job, Task, TaskKind, TaskState, Trial
from search.spec import TrialState

__all__ = ["claim", "waiting_queues"]

PATIENCE_SECONDS = 60.0
"""How long a worker may stay with its warm job (model, data, statistics loaded) while another owner waits unserved."""

INSPECTIONS = (TaskKind.INSPECT_MODEL, TaskKind.INSPECT_DATA)


def claim(s: Session, worker: str, queue: str, lease_s: float, warm_job: str | None = None) -> Task | None:
    """Gives the best waiting task of ``queue`` to ``worker`` for ``lease_s`` seconds by the database's clock.

    Inspections first, since a person waits for them; then ``warm_job``; then by owner: fewest running tasks, longest
    unserved; within an owner the oldest. Two workers never get one row: the change is conditional on it being queued.
    """
    at = now(s)
    pool = [_claimable(), Task.queue == queue]
    if s.scalar(select(Task.id).where(*pool, Task.kind.in_(INSPECTIONS)).limit(1)) is not None:
        pool.append(Task.kind.in_(INSPECTIONS))
    owners = _owners_by_need(s, pool)
    if warm_job is not None and _may_stay_warm(s, pool, warm_job, owners, at):
        task = _take(s, [*pool, Task.job_id == warm_job], worker, lease_s, at)
        if task is not None:
            return task
    for owner, _ in owners:
        task = _take(s, [*pool, Task.owner == owner], worker, lease_s, at)
        if task is not None:
            return task
    return None


def waiting_queues(s: Session) -> list[str]:
    """Queues with a task that could start now; the sweeper wakes their workers again."""
    return sorted(s.scalars(select(Task.queue).where(_claimable()).distinct()))


def _claimable() -> ColumnElement[bool]:
    """Queued, and of no job, of a job at work, or an export asked for after its job ended."""
    return and_(
        Task.state == TaskState.QUEUED,
        or_(
            Task.job_id.is_(None),
            Task.job_id.in_(select(Job.id).where(Job.state.in_(ACTIVE_JOBS))),
            and_(Task.kind == TaskKind.EXPORT, Task.job_id.in_(select(Job.id).where(Job.state.in_(TERMINAL_JOBS)))),
        ),
    )


def _owners_by_need(s: Session, pool: Sequence[ColumnElement[bool]]) -> list[tuple[str, float]]:
    """Owners with waiting tasks, neediest first, each with the time since which it has not been served."""
    waiting = s.execute(select(Task.owner, func.min(Task.created_at)).where(*pool).group_by(Task.owner)).all()
    at_work = select(Task.owner, func.count()).where(Task.state == TaskState.RUNNING).group_by(Task.owner)
    running = {owner: count for owner, count in s.execute(at_work)}  # noqa: C416  (dict() takes a Result for a mapping)
    needs = []
    for owner, oldest in waiting:
        served = s.scalar(select(func.max(Task.started_at)).where(Task.owner == owner)) or 0.0
        needs.append((running.get(owner, 0), max(served, oldest), owner))
    return [(owner, since) for _, since, owner in sorted(needs)]


def _may_stay_warm(
    s: Session, pool: Sequence[ColumnElement[bool]], job_id: str, owners: Sequence[tuple[str, float]], at: float
) -> bool:
    mine = s.scalar(select(Task.owner).where(*pool, Task.job_id == job_id).limit(1))
    return mine is not None and all(at - since <= PATIENCE_SECONDS for owner, since in owners if owner != mine)


def _take(s: Session, pool: Sequence[ColumnElement[bool]], worker: str, lease_s: float, at: float) -> Task | None:
    # SKIP LOCKED (PostgreSQL) spares waiting for rows that others are claiming; on SQLite BEGIN IMMEDIATE means that
    # there are no others. The condition on the state is what decides on either.
    oldest = select(Task.id).where(*pool).order_by(Task.created_at, Task.trial, Task.id).limit(1)
    task_id = s.scalar(oldest.with_for_update(skip_locked=True, key_share=True))
    if task_id is None:
        return None
    taken = s.scalar(
        update(Task)
        .where(Task.id == task_id, Task.state == TaskState.QUEUED)
        .values(
            state=TaskState.RUNNING,
            attempt=Task.attempt + 1,
            worker=worker,
            lease_until=at + lease_s,
            started_at=at,
            progress=None,
        )
        .returning(Task)
        .execution_options(populate_existing=True)
    )
    if taken is not None and taken.kind in (TaskKind.TRIAL, TaskKind.REFINE):
        running = update(Trial).where(Trial.job_id == taken.job_id, Trial.number == taken.trial)
        s.execute(running.values(state=TrialState.RUNNING))
    return taken
