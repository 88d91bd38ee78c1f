"""What follows when an attempt at a task ends without a result."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.assets import of_inspection
from db.engine import now
from db.lifecycle import close_job, end_task, hold, lock_job, plain, settle, stop_trial, tell, trial_of
from db.tables import (
    TERMINAL_JOBS,
    AssetState,
    Job,
    JobState,
    Model,
    Task,
    TaskKind,
    TaskState,
)
from search.spec import TrialState

__all__ = ["fail", "release", "requeue_or_fail"]

INSPECTIONS = (TaskKind.INSPECT_MODEL, TaskKind.INSPECT_DATA)


def fail(s: Session, task_id: str, attempt: int, code: str, message: str, *, retry: bool) -> bool:
    """Ends an attempt. With ``retry`` the task waits for the next one while it has attempts left; else it has failed:
    an inspection rejects its model or data (and the jobs that wait for it), the first profile or an export fails the
    job, a trial, a refinement or the profile of a later stage fails alone. False: fenced out.

    In a job that is being cancelled, every failure is the cancellation.
    """
    held = hold(s, task_id, attempt)
    if held is None:
        return False
    task, job = held
    at = now(s)
    task.error_code, task.error = code, plain(message)
    if job is not None and job.state is JobState.CANCELLING:
        end_task(task, TaskState.CANCELLED, at)
        stop_trial(s, task, at)
        settle(s, job)
    elif retry and task.attempt < task.max_attempts:
        _again(s, task, job, at, f"{_named(task)}: {message} Trying again ({task.attempt + 1} of {task.max_attempts}).")
    else:
        end_task(task, TaskState.FAILED, at)
        _give_up(s, task, job, code, message, at)
    return True


def release(s: Session, task_id: str, attempt: int) -> bool:
    """Gives a task back unfinished without costing an attempt: the worker is asked to stop."""
    held = hold(s, task_id, attempt)
    if held is None:
        return False
    task, job = held
    at = now(s)
    if job is not None and job.state is JobState.CANCELLING:
        end_task(task, TaskState.CANCELLED, at)
        stop_trial(s, task, at)
        settle(s, job)
        return True
    task.max_attempts += 1
    _again(s, task, job, at, f"{_named(task)} goes to another worker: {task.worker} is stopping.")
    return True


def requeue_or_fail(s: Session, task_id: str, attempt: int) -> TaskState | None:
    """For a task out of ``tasks.expired``: queued again, or failed with ``worker_lost`` after its last attempt.

    Returns its new state; None when its worker spoke up, or another sweeper was faster.
    """
    held = hold(s, task_id, attempt)
    if held is None or (held[0].lease_until or 0.0) >= now(s):
        return None
    task = held[0]
    message = f"Worker {task.worker} stopped answering."
    if task.attempt >= task.max_attempts:
        message += (
            f" That was attempt {task.attempt} of {task.max_attempts}: it may need more memory than the worker has "
            "(lower batch_size or calibration_samples), or the machine is failing."
        )
    fail(s, task_id, attempt, "worker_lost", message, retry=True)
    return task.state


def _again(s: Session, task: Task, job: Job | None, at: float, message: str) -> None:
    task.state = TaskState.QUEUED
    task.worker = task.lease_until = task.progress = None
    trial = trial_of(s, task)
    if trial is not None:
        trial.state = TrialState.QUEUED
    if job is not None:
        tell(s, job, "attempt", message, at, task=task.id, attempt=task.attempt, code=task.error_code)


def _give_up(s: Session, task: Task, job: Job | None, code: str, message: str, at: float) -> None:
    if task.kind in INSPECTIONS:
        _reject(s, task, code, message, at)
        return
    if job is None:
        return
    trial = trial_of(s, task)
    if trial is not None:
        trial.state, trial.error, trial.finished_at = TrialState.FAILED, plain(message), at
        tell(s, job, "trial", f"{_named(task)} failed: {message}", at, trial=trial.number, code=code)
    elif job.state in TERMINAL_JOBS or (task.kind is TaskKind.PROFILE and task.work["stage"] > 0):
        tell(s, job, "note", f"{_named(task)} failed: {message}", at, trial=task.trial, code=code)
    else:
        close_job(s, job, JobState.FAILED, code, message, at)


def _reject(s: Session, task: Task, code: str, message: str, at: float) -> None:
    asset = of_inspection(s, task)
    if asset is None:
        return
    asset.state, asset.reason_code, asset.reason = AssetState.REJECTED, code, plain(message)
    model = isinstance(asset, Model)
    noun, of_it = ("model", Job.model_id == asset.id) if model else ("data set", Job.dataset_id == asset.id)
    for job_id in s.scalars(select(Job.id).where(of_it).order_by(Job.id)).all():
        job = lock_job(s, job_id)
        if job is not None and job.state not in TERMINAL_JOBS:
            close_job(s, job, JobState.FAILED, code, f"The {noun} was rejected: {message}", at)


def _named(task: Task) -> str:
    """How people call it: ``Trial 7``, ``Refining trial 7``, ``Profiling``."""
    return {
        TaskKind.TRIAL: f"Trial {task.trial}",
        TaskKind.REFINE: f"Refining trial {task.trial}",
        TaskKind.EXPORT: f"Exporting trial {task.trial}",
        TaskKind.PROFILE: "Profiling",
    }.get(task.kind, "Inspection")
