"""How a job gets on: read at a version, ask the search what to do, write it if the version still stands.

No lock is held while the search thinks. ``apply_work`` refuses when anything happened in between; look again then.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from db import trials
from db.engine import new_id, now
from db.lifecycle import ACTIVE_JOBS, LIVE, close_job, live_count, lock_job, set_state, tell
from db.tables import (
    AssetState,
    Dataset,
    Job,
    JobState,
    Model,
    ProfileRow,
    Task,
    TaskKind,
    TaskState,
    Trial,
)
from search.spec import (
    AskedWork,
    ExportWork,
    Finished,
    JobSpec,
    Profile,
    ProfileWork,
    RefineWork,
    Rung,
    TrialRecord,
    TrialState,
    TrialWork,
)

__all__ = ["Snapshot", "advance_snapshot", "apply_work", "ready_to_advance"]


@dataclass(frozen=True)
class Snapshot:
    """Everything that decides what a job does next, as it stood at ``version``."""

    job_id: str
    version: int
    spec: JobSpec
    state: JobState
    stage: int
    queue: str
    profiles: tuple[Profile, ...]
    """By stage."""
    history: tuple[TrialRecord, ...]
    """By number, without gaps."""
    running: int
    """Tasks queued or running."""
    exported: tuple[int, ...]
    """Numbers of the trials whose files are written."""
    failed_profiles: tuple[int, ...]
    """Later stages whose profile was given up."""
    elapsed_hours: float
    """Time at work; pauses and the time between the end and an extension do not count."""

    @property
    def free(self) -> int:
        """How many more tasks ``search.parallel`` allows."""
        return max(0, self.spec.search.parallel - self.running)


def advance_snapshot(s: Session, job_id: str) -> Snapshot | None:
    """None for a job that cannot advance now: gone, paused, ending, ended, or its model or data is not ready."""
    row = s.execute(
        select(Job, Model.state, Dataset.state)
        .join(Model, Model.id == Job.model_id)
        .join(Dataset, Dataset.id == Job.dataset_id)
        .where(Job.id == job_id)
        .execution_options(populate_existing=True)
    ).one_or_none()
    if row is None or row[0].state not in ACTIVE_JOBS or {row[1], row[2]} != {AssetState.READY}:
        return None
    job: Job = row[0]
    profiles = s.scalars(select(ProfileRow.content).where(ProfileRow.job_id == job_id).order_by(ProfileRow.stage))
    history = s.scalars(
        select(Trial).where(Trial.job_id == job_id).order_by(Trial.number).execution_options(populate_existing=True)
    )
    active = 0.0 if job.active_since is None else max(0.0, now(s) - job.active_since)
    return Snapshot(
        job_id=job.id,
        version=job.version,
        spec=JobSpec.model_validate(job.spec),
        state=job.state,
        stage=job.stage,
        queue=job.queue,
        profiles=tuple(Profile.model_validate(content) for content in profiles),
        history=tuple(trials.record(trial) for trial in history),
        running=live_count(s, job_id),
        exported=tuple(
            s.scalars(
                select(Task.trial)
                .where(Task.job_id == job_id, Task.kind == TaskKind.EXPORT, Task.state == TaskState.DONE)
                .distinct()
                .order_by(Task.trial)
            )
        ),
        failed_profiles=_failed_profiles(s, job_id),
        elapsed_hours=(job.spent_seconds + active) / 3600,
    )


def _failed_profiles(s: Session, job_id: str) -> tuple[int, ...]:
    """Of the stages after the first, whose failure ended the job."""
    given_up = select(Task.work).where(
        Task.job_id == job_id, Task.kind == TaskKind.PROFILE, Task.state == TaskState.FAILED
    )
    stages = {ProfileWork.model_validate(work).stage for work in s.scalars(given_up)}
    return tuple(sorted(stages - {0}))


def ready_to_advance(s: Session, *, stalled: bool = False) -> list[str]:
    """Jobs for which ``advance_snapshot`` is not None, oldest first: what the sweeper looks after.

    ``stalled``: only those without a live task, which nothing else will move on.
    """
    query = (
        select(Job.id)
        .join(Model, Model.id == Job.model_id)
        .join(Dataset, Dataset.id == Job.dataset_id)
        .where(Job.state.in_(ACTIVE_JOBS), Model.state == AssetState.READY, Dataset.state == AssetState.READY)
    )
    if stalled:
        query = query.where(~exists().where(Task.job_id == Job.id, Task.state.in_(LIVE)))
    return list(s.scalars(query.order_by(Job.created_at)))


def apply_work(s: Session, job_id: str, version: int, work: Sequence[AskedWork]) -> bool:
    """Adds the trials and tasks that ``work`` asks for, moves the job's state, or ends it; all or nothing.

    False, and nothing is changed, when the job is not at ``version`` any more. Raises ``ValueError`` when the search
    asks for what cannot be (a gap in the numbers, a trial that does not exist or is at work already).
    """
    job = lock_job(s, job_id)
    if job is None or job.version != version or job.state not in ACTIVE_JOBS:
        return False
    at = now(s)
    job.version += 1
    for asked in work:
        if isinstance(asked, Finished):
            state = JobState.DONE if asked.ok else JobState.FAILED
            close_job(s, job, state, asked.code, asked.reason, at, best=asked.best)
        else:
            _queue(s, job, asked, at)
    s.flush()
    return True


def _queue(s: Session, job: Job, asked: ProfileWork | TrialWork | RefineWork | ExportWork, at: float) -> None:
    number = None if isinstance(asked, ProfileWork) else asked.number
    if isinstance(asked, ProfileWork):
        kind = TaskKind.PROFILE
        job.stage = asked.stage
        set_state(s, job, JobState.PROFILING, at, f"Stage {asked.stage}: measuring the starting network.")
    elif isinstance(asked, TrialWork):
        kind = TaskKind.TRIAL
        _enter_trial(s, job, asked, at)
        set_state(s, job, JobState.SEARCHING, at)
    elif isinstance(asked, RefineWork):
        kind = TaskKind.REFINE
        _raise_trial(s, job, asked.number, Rung.FULL, at)
        set_state(s, job, JobState.REFINING, at, _refining(asked))
    else:
        kind = TaskKind.EXPORT
        _existing(s, job, asked.number)
        set_state(s, job, JobState.EXPORTING, at, f"Writing the files of trial {asked.number} and loading them again.")
    s.add(
        Task(
            id=new_id("tsk"),
            kind=kind,
            owner=job.owner,
            job_id=job.id,
            trial=number,
            work=asked.model_dump(mode="json"),
            queue=job.queue,
            state=TaskState.QUEUED,
            attempt=0,
            max_attempts=3,
            created_at=at,
        )
    )


def _refining(asked: RefineWork) -> str:
    how = f"training it for {asked.epochs:g} epochs and " if asked.epochs else ""
    return f"Refining trial {asked.number}: {how}checking it on unseen data."


def _enter_trial(s: Session, job: Job, asked: TrialWork, at: float) -> None:
    following = s.scalar(select(func.count()).select_from(Trial).where(Trial.job_id == job.id)) or 0
    if asked.number < following:
        _raise_trial(s, job, asked.number, asked.rung, at)
        return
    if asked.number > following:
        raise ValueError(f"asked for trial {asked.number}, but the next number is {following}")
    s.add(
        Trial(
            job_id=job.id,
            number=asked.number,
            stage=asked.stage,
            parent=asked.parent,
            params=asked.params,
            plan={site: plan.model_dump(mode="json") for site, plan in asked.plan.items()},
            state=TrialState.QUEUED,
            rung=asked.rung,
            results={},
            created_at=at,
        )
    )


def _raise_trial(s: Session, job: Job, number: int, rung: Rung, at: float) -> None:
    trial = _existing(s, job, number)
    if trial.state in (TrialState.QUEUED, TrialState.RUNNING):
        raise ValueError(f"asked to take trial {number} to its {rung.value} rung while it is {trial.state.value}")
    trial.state, trial.rung, trial.finished_at = TrialState.QUEUED, rung, None
    tell(s, job, "trial", f"Trial {number} goes on to its {rung.value} rung.", at, trial=number, rung=rung.value)


def _existing(s: Session, job: Job, number: int) -> Trial:
    trial = s.get(Trial, (job.id, number), populate_existing=True)
    if trial is None:
        raise ValueError(f"asked for trial {number}, which job {job.id} does not have")
    return trial
