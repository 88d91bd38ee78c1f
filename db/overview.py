"""What a list of jobs shows of each, in a fixed number of small queries however many trials there are."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from pydantic import ValidationError
from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from db import jobs
from db.lifecycle import LIVE
from db.tables import Job, ProfileRow, Task, Trial
from db.trials import record
from search.spec import JobSpec, Profile, Rung, TrialRecord, TrialState

__all__ = ["Overview", "job_counts", "overviews", "stamp", "task_counts"]


T = TypeVar("T")


@dataclass
class Overview:
    readable: bool = True
    """False where another version wrote what this one cannot read; that is None below."""
    spec: JobSpec | None = None
    profile: Profile | None = None
    """Of stage 0: the original network."""
    best: TrialRecord | None = None
    """The trial that ``job.best`` names."""
    trials: int = 0
    measured: int = 0
    """Trials that ended, or have a result and were taken further."""
    failed: int = 0
    tasks: list[Task] = field(default_factory=list)
    """Queued and running ones, running first."""


def overviews(s: Session, rows: Sequence[Job]) -> dict[str, Overview]:
    """By job id."""
    found = {job.id: Overview() for job in rows}

    def read(job_id: str, content: Callable[[], T]) -> T | None:
        try:
            return content()
        except ValidationError:
            found[job_id].readable = False
            return None

    for job in rows:
        found[job.id].spec = read(job.id, partial(JobSpec.model_validate, job.spec))
    profiles = select(ProfileRow).where(ProfileRow.job_id.in_(found), ProfileRow.stage == 0)
    for profile in s.scalars(profiles):
        found[profile.job_id].profile = read(profile.job_id, partial(Profile.model_validate, profile.content))
    chosen = [(job.id, job.best) for job in rows if job.best is not None]
    for trial in s.scalars(select(Trial).where(tuple_(Trial.job_id, Trial.number).in_(chosen))) if chosen else ():
        found[trial.job_id].best = read(trial.job_id, partial(record, trial))
    columns = (Trial.job_id, Trial.state, Trial.rung)
    for job_id, state, rung, count in s.execute(
        select(*columns, func.count()).where(Trial.job_id.in_(found)).group_by(*columns)
    ):
        of_job = found[job_id]
        of_job.trials += count
        of_job.failed += count if state is TrialState.FAILED else 0
        waiting = state in (TrialState.QUEUED, TrialState.RUNNING)
        of_job.measured += 0 if waiting and rung is Rung.CHEAP else count
    tasks = select(Task).where(Task.job_id.in_(found), Task.state.in_(LIVE))
    for task in s.scalars(tasks.order_by(Task.state.desc(), Task.created_at, Task.trial, Task.id)):
        if task.job_id is not None:
            found[task.job_id].tasks.append(task)
    return found


def stamp(s: Session, owner: str, job_id: str) -> Hashable:
    """Differs whenever the job's overview may differ. Raises ``NotFound``."""
    version = jobs.get(s, owner, job_id).version
    live = select(Task.id, Task.attempt, Task.state, Task.progress)
    tasks = s.execute(live.where(Task.job_id == job_id, Task.state.in_(LIVE)).order_by(Task.id))
    return version, tuple((id_, attempt, state, repr(progress)) for id_, attempt, state, progress in tasks)


def job_counts(s: Session) -> dict[str, int]:
    """All owners' jobs by state."""
    rows = s.execute(select(Job.state, func.count()).group_by(Job.state))
    return {state.value: count for state, count in rows}


def task_counts(s: Session) -> dict[tuple[str, str], int]:
    """Tasks that wait or run, by (queue, state)."""
    query = select(Task.queue, Task.state, func.count()).where(Task.state.in_(LIVE)).group_by(Task.queue, Task.state)
    return {(queue, state.value): count for queue, state, count in s.execute(query)}
