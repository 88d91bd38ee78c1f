"""What every change of a job, a task or a trial shares: the order of locks, and the invariants.

* Locks are taken in one order: the job's row, then its tasks, then its trials. Claiming and heartbeats take the task's
  row alone. So nothing can wait in a circle.
* A terminal job has no live trial and no live task, except exports that were asked for after it ended.
* Events are added, and ``version`` moves, only while the job's row is locked: both rise in commit order.
"""

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db.engine import now
from db.tables import TERMINAL_JOBS, Event, Job, JobState, Task, TaskState, Trial
from search.spec import Rung, TrialState

__all__ = ["ACTIVE_JOBS", "LIVE", "close_job", "end_live", "hold", "live_count", "lock_job", "set_state", "settle"]

LIVE = (TaskState.QUEUED, TaskState.RUNNING)
ACTIVE_JOBS = (JobState.QUEUED, JobState.PROFILING, JobState.SEARCHING, JobState.REFINING, JobState.EXPORTING)
"""The states in which a job's tasks may start."""

NAMES = {
    JobState.QUEUED: "Waiting for the model, the data and a worker.",
    JobState.PROFILING: "Measuring the starting network.",
    JobState.SEARCHING: "Searching.",
    JobState.REFINING: "Refining the chosen point and checking it on unseen data.",
    JobState.EXPORTING: "Writing files and loading them again in a clean process.",
    JobState.PAUSED: "Paused: running trials finish, no new one starts.",
    JobState.CANCELLING: "Cancelling: ending what runs.",
    JobState.CANCELLED: "Cancelled.",
}


def lock_job(s: Session, job_id: str) -> Job | None:
    """The job as it is now, locked until the transaction ends (its keys stay readable to foreign keys)."""
    query = select(Job).where(Job.id == job_id).with_for_update(key_share=True)
    return s.scalar(query.execution_options(populate_existing=True))


def hold(s: Session, task_id: str, attempt: int) -> tuple[Task, Job | None] | None:
    """The task and its job, both locked, if this attempt still holds the lease; None: the caller was fenced out."""
    job_id = s.scalar(select(Task.job_id).where(Task.id == task_id))
    job = lock_job(s, job_id) if job_id is not None else None
    query = select(Task).where(Task.id == task_id, Task.attempt == attempt, Task.state == TaskState.RUNNING)
    task = s.scalar(query.with_for_update(key_share=True).execution_options(populate_existing=True))
    return None if task is None else (task, job)


def tell(s: Session, job: Job, kind: str, message: str, at: float, **data: Any) -> None:
    """Records an event and counts the change. The job must be locked."""
    job.version += 1
    s.add(Event(job_id=job.id, at=at, kind=kind, message=plain(message), data=data))


def plain(message: str) -> str:
    """PostgreSQL text cannot hold NUL, which error messages about binary files sometimes do."""
    return message.replace("\x00", "\\0")


def set_state(s: Session, job: Job, state: JobState, at: float, message: str | None = None, **data: Any) -> None:
    """Moves a locked job to ``state`` and keeps its clock of active time; nothing if it is there already."""
    if job.state is state:
        return
    working = state in ACTIVE_JOBS and state is not JobState.QUEUED
    if working and job.active_since is None:
        job.active_since = at
        job.started_at = at if job.started_at is None else job.started_at
    elif not working and job.active_since is not None:
        job.spent_seconds += max(0.0, at - job.active_since)
        job.active_since = None
    job.state = state
    job.finished_at = at if state in TERMINAL_JOBS else None
    tell(s, job, "state", message or NAMES[state], at, state=state.value, **data)


def live_count(s: Session, job_id: str) -> int:
    query = select(func.count()).select_from(Task).where(Task.job_id == job_id, Task.state.in_(LIVE))
    return s.scalar(query) or 0


def end_live(s: Session, job: Job, at: float, states: tuple[TaskState, ...] = LIVE) -> None:
    """Cancels the job's tasks in ``states`` and their trials. A worker that runs one is fenced out from now on."""
    query = select(Task).where(Task.job_id == job.id, Task.state.in_(states)).order_by(Task.id)
    for task in s.scalars(query.with_for_update(key_share=True).execution_options(populate_existing=True)):
        end_task(task, TaskState.CANCELLED, at)
        stop_trial(s, task, at)


def end_task(task: Task, state: TaskState, at: float) -> None:
    task.state = state
    task.finished_at = at
    task.lease_until = None
    task.progress = None
    task.checkpoint_blob = None


def trial_of(s: Session, task: Task) -> Trial | None:
    """The trial that a trial or refine task computes; an export only reads its trial, so it has none here."""
    if task.trial is None or task.kind.value not in ("trial", "refine"):
        return None
    return s.get(Trial, (task.job_id, task.trial), populate_existing=True)


def stop_trial(s: Session, task: Task, at: float) -> None:
    """The trial of a cancelled task: one that was measured before goes back to the rung it had reached."""
    trial = trial_of(s, task)
    if trial is None:
        return
    reached = [rung for rung in Rung if rung.value in trial.results]
    trial.state = TrialState.DONE if reached else TrialState.CANCELLED
    trial.rung = reached[-1] if reached else trial.rung
    trial.finished_at = at


def close_job(
    s: Session, job: Job, state: JobState, code: str, reason: str, at: float, *, best: int | None = None
) -> None:
    """Ends a locked job, and with it everything of it that is live."""
    end_live(s, job, at)
    job.reason_code, job.reason = code, plain(reason)
    job.best = best if best is not None else job.best
    job.resume_to = None
    set_state(s, job, state, at, reason, code=code)


def settle(s: Session, job: Job) -> None:
    """A cancelling job whose last task has ended is cancelled."""
    s.flush()
    if job.state is JobState.CANCELLING and live_count(s, job.id) == 0:
        close_job(s, job, JobState.CANCELLED, "cancelled", "Cancelled on request.", now(s))
