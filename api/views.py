"""What a job and its trials look like from outside: pure functions from rows to reply bodies."""

import math
from typing import Any

from pydantic import BaseModel, Field

from db.jobs import UNREADABLE
from db.overview import Overview
from db.tables import Job, JobState, Task, TaskState, Trial
from db.trials import latest, record
from search.front import measured
from search.spec import (
    DEFAULT_EPOCHS,
    Costs,
    Interval,
    JobSpec,
    Metric,
    Profile,
    Rung,
    TrialRecord,
    TrialResult,
    TrialState,
)

__all__ = [
    "Baseline",
    "Best",
    "JobView",
    "Progress",
    "Running",
    "TrialDetail",
    "TrialView",
    "baseline_view",
    "best_view",
    "job_view",
    "trial_detail",
    "trial_view",
]


class Baseline(BaseModel):
    """The original network on the job's data."""

    metric: Metric
    value: float = Field(description="On the select split.")
    verify_value: float = Field(description="On the verify split, which is never used for choosing.")
    max_drop: float = Field(description="The budget as a drop.")
    costs: Costs


class Best(BaseModel):
    """The smallest network so far that keeps the budget."""

    trial: int
    stage: int
    rung: Rung
    value: float | None = Field(description="The metric on the select split.")
    drop: float | None = Field(description="How much worse than the original, in the budget's units.")
    costs: Costs
    verified: bool = Field(description="Checked on the verify split; before that the figures are a prediction.")
    verify_value: float | None = None
    verify_drop: float | None = None
    verify_interval: Interval | None = None
    keeps_budget: bool | None = Field(default=None, description="Decided on the verify split.")


class Running(BaseModel):
    task: str
    kind: str
    trial: int | None
    attempt: int
    message: str = ""
    done: float | None = None
    of: float | None = None


class Progress(BaseModel):
    trials_done: int
    trials_failed: int
    trials_asked: int | None
    queued: int = Field(description="Tasks that wait for a worker.")
    running: list[Running]


class JobView(BaseModel):
    id: str
    name: str
    model: str
    dataset: str
    state: JobState
    stage: int
    progress: Progress
    baseline: Baseline | None
    best: Best | None
    eta_seconds: float | None = Field(description="An estimate from the trials so far; null while there is none.")
    reason_code: str | None
    reason: str | None
    spec: JobSpec | None = Field(description="Null where this version cannot read it; ``reason`` says so.")
    version: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    links: dict[str, str]


class TrialView(BaseModel):
    """One candidate with the result of the highest rung it reached."""

    number: int
    stage: int
    parent: int | None
    state: TrialState
    rung: Rung
    params: dict[str, Any]
    plan: dict[str, Any]
    result: TrialResult | None = Field(description="Its ``curve`` is left out here: ask for the trial alone.")
    error: str | None
    created_at: float
    finished_at: float | None


class TrialDetail(TrialView):
    results: dict[Rung, TrialResult]


def baseline_view(profile: Profile) -> Baseline:
    """``profile``: of stage 0."""
    return Baseline(
        metric=profile.metric,
        value=profile.value,
        verify_value=profile.verify_value,
        max_drop=profile.max_drop,
        costs=profile.costs,
    )


def best_view(trial: TrialRecord) -> Best | None:
    """The trial that the job's ``best`` names."""
    result = measured(trial)
    if result is None:
        return None
    return Best(
        trial=trial.number,
        stage=trial.stage,
        rung=result.rung,
        value=result.value,
        drop=result.drop,
        costs=result.costs,
        verified=result.verify_value is not None,
        verify_value=result.verify_value,
        verify_drop=result.verify_drop,
        verify_interval=result.verify_interval,
        keeps_budget=result.keeps_budget,
    )


def _eta(job: Job, spec: JobSpec, seen: Overview, now: float) -> float | None:
    """Seconds left: the pace of the trials so far, then one full fine-tuning at the speed of the best one's short.

    Where the hours decide how long that is, what is left of them.
    """
    active = 0.0 if job.active_since is None else max(0.0, now - job.active_since)
    working, hours, epochs = job.spent_seconds + active, spec.search.hours, spec.fine_tune.epochs
    elapsed = max(0.0, working - (seen.profile.seconds if seen.profile else 0.0))
    if job.state is JobState.REFINING:
        return next((left for task in seen.tasks if (left := _left(task, now)) is not None), None)
    if job.state is not JobState.SEARCHING or not seen.measured:
        return None
    remaining = math.inf if hours is None else max(0.0, hours * 3600 - working)
    if hours is not None and epochs == "auto":
        return round(remaining)
    left = min(elapsed / seen.measured * max(0, spec.search.trials - seen.measured), remaining)
    trained = next((r for r in seen.best.results.values() if r.epochs), None) if seen.best else None
    if trained is not None:
        left += (DEFAULT_EPOCHS if epochs == "auto" else epochs) * trained.seconds / trained.epochs
    return round(left)


def _left(task: Task, now: float) -> float | None:
    progress = task.progress or {}
    if not progress.get("done") or not progress.get("of") or task.started_at is None:
        return None
    done, of = float(progress["done"]), float(progress["of"])
    return round(max(0.0, now - task.started_at) * (of - done) / done)


def _running(task: Task) -> Running:
    seen = task.progress or {}
    return Running(
        task=task.id,
        kind=task.kind,
        trial=task.trial,
        attempt=task.attempt,
        message=str(seen.get("message", "")),
        done=seen.get("done"),
        of=seen.get("of"),
    )


def job_view(job: Job, seen: Overview, now: float) -> JobView:
    """``now``: the database's clock."""
    spec, profile = seen.spec, seen.profile
    path = f"/v1/jobs/{job.id}"
    return JobView(
        id=job.id,
        name=job.name,
        model=job.model_id,
        dataset=job.dataset_id,
        state=job.state,
        stage=job.stage,
        progress=Progress(
            trials_done=seen.measured,
            trials_failed=seen.failed,
            trials_asked=None if spec is None else spec.search.trials,
            queued=sum(task.state is TaskState.QUEUED for task in seen.tasks),
            running=[_running(task) for task in seen.tasks if task.state is TaskState.RUNNING],
        ),
        baseline=None if profile is None else baseline_view(profile),
        best=None if seen.best is None else best_view(seen.best),
        eta_seconds=None if spec is None else _eta(job, spec, seen, now),
        reason_code=job.reason_code if seen.readable else "unreadable_job",
        reason=job.reason if seen.readable else UNREADABLE,
        spec=spec,
        version=job.version,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        links={
            "self": path,
            "model": f"/v1/models/{job.model_id}",
            "dataset": f"/v1/datasets/{job.dataset_id}",
            **{name: f"{path}/{name}" for name in ("trials", "front", "layers", "events", "artifacts")},
        },
    )


def trial_view(row: Trial) -> TrialView:
    """A row of the trial table."""
    result = latest(record(row))
    return TrialView(
        number=row.number,
        stage=row.stage,
        parent=row.parent,
        state=row.state,
        rung=row.rung,
        params=row.params,
        plan=row.plan,
        result=result and result.model_copy(update={"curve": ()}),
        error=row.error,
        created_at=row.created_at,
        finished_at=row.finished_at,
    )


def trial_detail(row: Trial) -> TrialDetail:
    """One trial with everything known of it, curves included."""
    known = record(row)
    view = trial_view(row).model_dump(exclude={"result"})
    return TrialDetail(**view, result=latest(known), results=known.results)
