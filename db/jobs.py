"""Jobs as their owner sees them: made, watched, paused, cancelled, extended, deleted.

How a job gets on from task to task is in ``db.progress``.
"""

from pydantic import ValidationError
from sqlalchemy import delete as delete_rows
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from db import tasks
from db.assets import locked
from db.engine import new_id, now
from db.errors import Conflict, NotFound
from db.lifecycle import ACTIVE_JOBS, close_job, end_live, lock_job, set_state, settle, tell
from db.pages import Page, newest_first
from db.progress import Snapshot, advance_snapshot, apply_work, ready_to_advance
from db.tables import (
    TERMINAL_JOBS,
    Artifact,
    AssetState,
    Dataset,
    Event,
    Job,
    JobState,
    Model,
    ProfileRow,
    Task,
    TaskKind,
    TaskState,
    Trial,
)
from search.errors import BadRequest
from search.spec import ExportWork, JobSpec, Profile, SearchSpec, TrialState

__all__ = [
    "UNREADABLE",
    "Snapshot",
    "add",
    "advance_snapshot",
    "apply_work",
    "bump",
    "cancel",
    "delete",
    "extend",
    "get",
    "give_up",
    "live_count",
    "page",
    "pause",
    "profiles",
    "ready_to_advance",
    "request_export",
    "resume",
    "spec_of",
]

UNREADABLE = (
    "this version of Tenfold cannot read what is stored of this job: start the version that wrote it, or delete the job"
)


def add(s: Session, owner: str, *, model_id: str, dataset_id: str, name: str, spec: JobSpec, queue: str = "cpu") -> Job:
    """Accepts a job; it starts when its model and its data are ready: wake ``queue`` after the commit.

    Raises ``NotFound`` (``model_not_found``, ``dataset_not_found``) and ``Conflict`` (``model_rejected``,
    ``dataset_rejected``).
    """
    # Shared locks: a rejection that runs just now either waits and then finds this job, or is seen here.
    model, data = locked(s, Model, model_id, shared=True), locked(s, Dataset, dataset_id, shared=True)
    for noun, id_, row in (("model", model_id, model), ("dataset", dataset_id, data)):
        if row is None or row.owner != owner:
            raise NotFound.of(noun, id_)
        if row.state is AssetState.REJECTED:
            raise Conflict(f"{noun}_rejected", f"{noun} {id_} cannot be used: {row.reason}")
    job = Job(
        id=new_id("job"),
        owner=owner,
        name=name,
        model_id=model_id,
        dataset_id=dataset_id,
        spec=spec.model_dump(mode="json"),
        state=JobState.QUEUED,
        stage=0,
        version=0,
        queue=queue,
        created_at=now(s),
        spent_seconds=0.0,
    )
    s.add(job)
    s.flush()
    tell(s, job, "state", "Accepted.", job.created_at, state=job.state.value)
    s.flush()
    return job


def get(s: Session, owner: str, job_id: str) -> Job:
    """Raises ``NotFound`` (``job_not_found``)."""
    row = s.scalar(select(Job).where(Job.id == job_id, Job.owner == owner))
    if row is None:
        raise NotFound.of("job", job_id)
    return row


def page(s: Session, owner: str, cursor: str | None = None, limit: int = 100) -> Page[Job]:
    """Newest first."""
    return newest_first(s, select(Job).where(Job.owner == owner), Job.created_at, Job.id, cursor, limit)


def spec_of(job: Job) -> JobSpec:
    """Raises ``Conflict`` (``unreadable_job``) for what another version wrote."""
    try:
        return JobSpec.model_validate(job.spec)
    except ValidationError:
        raise Conflict("unreadable_job", UNREADABLE) from None


def live_count(s: Session, owner: str) -> int:
    """Jobs of an owner that are not terminal, for its quota."""
    query = select(func.count()).select_from(Job).where(Job.owner == owner, Job.state.not_in(TERMINAL_JOBS))
    return s.scalar(query) or 0


def profiles(s: Session, owner: str, job_id: str) -> list[Profile]:
    """By stage."""
    query = select(ProfileRow.content).join(Job, Job.id == ProfileRow.job_id)
    query = query.where(Job.owner == owner, Job.id == job_id).order_by(ProfileRow.stage)
    return [Profile.model_validate(content) for content in s.scalars(query)]


def bump(s: Session, job_id: str, version: int) -> bool:
    """Counts a change, if nobody else made one since ``version`` was read."""
    changed = update(Job).where(Job.id == job_id, Job.version == version).values(version=version + 1)
    return s.execute(changed.returning(Job.id)).one_or_none() is not None


def cancel(s: Session, owner: str, job_id: str) -> Job:
    """Ends what waits at once and what runs by the next heartbeat. Cancelling again changes nothing.

    Raises ``Conflict`` (``job_finished``) for a job that is done or has failed.
    """
    job = _locked(s, owner, job_id)
    if job.state in (JobState.CANCELLING, JobState.CANCELLED):
        return job
    _refuse(job, TERMINAL_JOBS, "job_finished", "it cannot be cancelled any more")
    at = now(s)
    end_live(s, job, at, (TaskState.QUEUED,))
    job.resume_to = None
    set_state(s, job, JobState.CANCELLING, at)
    settle(s, job)
    s.flush()
    return job


def pause(s: Session, owner: str, job_id: str) -> Job:
    """Starts no new task. Raises ``Conflict`` (``job_not_active``)."""
    job = _locked(s, owner, job_id)
    if job.state is JobState.PAUSED:
        return job
    _refuse(job, (*TERMINAL_JOBS, JobState.CANCELLING), "job_not_active", "only a job at work can be paused")
    job.resume_to = job.state
    set_state(s, job, JobState.PAUSED, now(s))
    s.flush()
    return job


def resume(s: Session, owner: str, job_id: str) -> Job:
    """Goes on where it was paused: wake ``job.queue`` after the commit. Raises ``Conflict`` (``job_not_paused``)."""
    job = _locked(s, owner, job_id)
    if job.state in ACTIVE_JOBS:
        return job
    _refuse(job, (*TERMINAL_JOBS, JobState.CANCELLING), "job_not_paused", "only a paused job can be resumed")
    set_state(s, job, job.resume_to or JobState.QUEUED, now(s), "Resumed.")
    job.resume_to = None
    s.flush()
    return job


def extend(s: Session, owner: str, job_id: str, *, trials: int, hours: float | None = None) -> Job:
    """More trials (and, where the job has a limit, more hours) for one that is done or has failed: wake its queue.

    Raises ``Conflict`` (``job_not_extendable``, ``unreadable_job``) and ``BadRequest`` (``bad_extension``,
    ``hours_used_up``, ``no_limit_of_hours``).
    """
    job = _locked(s, owner, job_id)
    if job.state not in (JobState.DONE, JobState.FAILED):
        raise Conflict("job_not_extendable", f"job {job.id} is {job.state.value}: only one that is done or has failed")
    for asset in (s.get(Model, job.model_id), s.get(Dataset, job.dataset_id)):
        if asset is None or asset.state is AssetState.REJECTED:
            reason = "" if asset is None else asset.reason
            raise Conflict("job_not_extendable", f"job {job.id} cannot go on, what it works on was rejected: {reason}")
    spec = spec_of(job)
    more = {"trials": spec.search.trials + trials, **_more_hours(job, spec.search.hours, hours)}
    job.spec = spec.model_copy(update={"search": _checked(spec.search, more)}).model_dump(mode="json")
    at = now(s)
    end_live(s, job, at)  # an export asked for since: the search decides anew
    job.reason_code = job.reason = None
    searched = s.scalar(select(ProfileRow.stage).where(ProfileRow.job_id == job.id).limit(1)) is not None
    state = JobState.SEARCHING if searched else JobState.QUEUED
    set_state(s, job, state, at, f"Extended by {trials} trials.", trials=trials)
    s.flush()
    return job


def give_up(s: Session, job_id: str, code: str, reason: str) -> None:
    """Ends a job that cannot be moved on, as failed."""
    job = lock_job(s, job_id)
    if job is not None and job.state in ACTIVE_JOBS:
        close_job(s, job, JobState.FAILED, code, reason, now(s))


def request_export(s: Session, owner: str, job_id: str, number: int) -> Task:
    """Makes files of one more trial of a finished job, which stays finished: wake ``job.queue`` after the commit.

    Raises ``NotFound`` (``trial_not_found``) and ``Conflict`` (``job_not_finished``, ``trial_not_exportable``).
    """
    job = _locked(s, owner, job_id)
    if job.state not in TERMINAL_JOBS:
        raise Conflict("job_not_finished", f"job {job.id} is {job.state.value}: wait for its end, or cancel it")
    trial = s.get(Trial, (job.id, number))
    if trial is None:
        raise NotFound.of("trial", number)
    if trial.state is not TrialState.DONE or trial.weights_blob is None:
        raise Conflict(
            "trial_not_exportable",
            f"trial {number} is {trial.state.value} at its {trial.rung.value} rung and no network of it was kept: "
            "choose one that is done",
        )
    waiting = select(Task).where(Task.job_id == job.id, Task.kind == TaskKind.EXPORT, Task.trial == number)
    running = s.scalar(waiting.where(Task.state.in_((TaskState.QUEUED, TaskState.RUNNING))))
    if running is not None:
        return running
    work = ExportWork(number=number).model_dump(mode="json")
    task = tasks.add(s, TaskKind.EXPORT, owner, queue=job.queue, job_id=job.id, trial=number, work=work)
    tell(s, job, "note", f"Trial {number} will be exported.", task.created_at, trial=number)
    s.flush()
    return task


def delete(s: Session, owner: str, job_id: str) -> None:
    """With its trials, events and artifacts. Raises ``NotFound``, or ``Conflict`` (``job_not_finished``)."""
    job = _locked(s, owner, job_id)
    if job.state not in TERMINAL_JOBS:
        raise Conflict("job_not_finished", f"job {job.id} is {job.state.value}: cancel it first")
    for table in (Artifact, Event, Task, Trial, ProfileRow):
        s.execute(delete_rows(table).where(table.job_id == job.id))
    s.delete(job)
    s.flush()


def _more_hours(job: Job, limit: float | None, hours: float | None) -> dict[str, float]:
    if limit is None:
        if hours is not None:
            raise BadRequest("no_limit_of_hours", f"job {job.id} has no limit of hours: extend it by trials alone")
        return {}
    spent = job.spent_seconds / 3600
    if hours is None and spent >= limit:
        raise BadRequest(
            "hours_used_up",
            f"job {job.id} has used {spent:.3g} of its {limit:.3g} hours, so more trials would have no time: "
            "give the hours to add, too",
        )
    return {"hours": max(limit, spent) + (hours or 0.0), "hours_before": spent}


def _checked(search: SearchSpec, more: dict[str, int | float]) -> SearchSpec:
    try:
        return SearchSpec.model_validate({**search.model_dump(), **more})
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise BadRequest("bad_extension", f"the job cannot be extended to {more}: {told}") from error


def _locked(s: Session, owner: str, job_id: str) -> Job:
    job = lock_job(s, job_id)
    if job is None or job.owner != owner:
        raise NotFound.of("job", job_id)
    return job


def _refuse(job: Job, states: tuple[JobState, ...], code: str, advice: str) -> None:
    if job.state in states:
        raise Conflict(code, f"job {job.id} is {job.state.value}: {advice}")
