"""Storing what a task found: one transaction each, fenced by (task, attempt), the job moved on with it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from db.assets import of_inspection
from db.engine import new_id, now
from db.lifecycle import end_task, hold, settle, tell, trial_of
from db.tables import Artifact, AssetState, Job, ProfileRow, Task, TaskState, Trial
from db.trials import keeps_budget, record, smallest
from search.spec import (
    DataInfo,
    ExportFormat,
    JobSpec,
    ModelInfo,
    Outcome,
    Profile,
    ProfileWork,
    Rung,
    TrialRecord,
    TrialResult,
    TrialState,
)

__all__ = ["NewArtifact", "complete_export", "complete_inspection", "complete_profile", "complete_trial"]


@dataclass(frozen=True)
class NewArtifact:
    format: ExportFormat
    filename: str
    media_type: str
    blob_id: str
    facts: dict[str, Any] = field(default_factory=dict)


def complete_inspection(s: Session, task_id: str, attempt: int, info: ModelInfo | DataInfo) -> bool:
    """The model or the data set is ready. Jobs that wait for it may advance. False: fenced out."""
    held = hold(s, task_id, attempt)
    if held is None:
        return False
    task, _ = held
    asset = of_inspection(s, task)
    if asset is not None:
        asset.state, asset.info = AssetState.READY, info.model_dump(mode="json")
        asset.reason_code = asset.reason = None
    end_task(task, TaskState.DONE, now(s))
    return True


def complete_profile(s: Session, task_id: str, attempt: int, profile: Profile) -> bool:
    """A stage's profile. False: fenced out."""
    held = _hold_in_job(s, task_id, attempt)
    if held is None:
        return False
    task, job = held
    at = now(s)
    work = ProfileWork.model_validate(task.work)
    content = profile.model_dump(mode="json")
    s.merge(ProfileRow(job_id=job.id, stage=work.stage, parent=work.parent, content=content))
    end_task(task, TaskState.DONE, at)
    network = "original network" if work.parent is None else f"network of trial {work.parent}"
    message = (
        f"Stage {work.stage}: the {network} has {profile.metric.value} {profile.value:.4g}; "
        f"{len(profile.sites)} layers can be compressed."
    )
    tell(s, job, "note", message, at, stage=work.stage, value=profile.value)
    settle(s, job)
    return True


def complete_trial(
    s: Session, task_id: str, attempt: int, result: TrialResult, weights_blob: str | None = None
) -> bool:
    """What one rung of a trial measured, for trial and refine tasks; a result without a value fails the trial.

    ``weights_blob``: the network's safetensors; None keeps those of the rung before. False: fenced out.
    """
    held = _hold_in_job(s, task_id, attempt)
    if held is None:
        return False
    task, job = held
    trial = trial_of(s, task)
    if trial is None:
        return False
    at = now(s)
    usable = result.value is not None
    trial.results = {**trial.results, result.rung.value: result.model_dump(mode="json")}
    trial.plan = result.built(trial.plan)
    trial.rung, trial.finished_at = result.rung, at
    trial.state = TrialState.DONE if usable else TrialState.FAILED
    trial.error = None if result.outcome is Outcome.OK else result.outcome.value
    trial.weights_blob = weights_blob or trial.weights_blob
    end_task(task, TaskState.DONE, at)
    s.flush()
    _choose_best(s, job, trial)
    tell(s, job, "trial", _sentence(trial.number, result), at, trial=trial.number, rung=result.rung.value)
    settle(s, job)
    return True


def complete_export(s: Session, task_id: str, attempt: int, artifacts: Sequence[NewArtifact]) -> bool:
    """A trial's files; those of an earlier export of the same trial are replaced. False: fenced out."""
    held = _hold_in_job(s, task_id, attempt)
    if held is None:
        return False
    task, job = held
    at = now(s)
    s.execute(delete(Artifact).where(Artifact.job_id == job.id, Artifact.trial == task.trial))
    for made in artifacts:
        s.add(
            Artifact(
                id=new_id("art"),
                owner=job.owner,
                job_id=job.id,
                trial=task.trial,
                format=made.format.value,
                filename=made.filename,
                media_type=made.media_type,
                blob_id=made.blob_id,
                facts=made.facts,
                created_at=at,
            )
        )
    end_task(task, TaskState.DONE, at)
    names = ", ".join(made.filename for made in artifacts)
    tell(s, job, "note", f"Trial {task.trial} is exported: {names}.", at, trial=task.trial)
    settle(s, job)
    return True


def _hold_in_job(s: Session, task_id: str, attempt: int) -> tuple[Task, Job] | None:
    held = hold(s, task_id, attempt)
    return None if held is None or held[1] is None else (held[0], held[1])


def _choose_best(s: Session, job: Job, trial: Trial) -> None:
    """The smallest trial so far that keeps the budget, by the first cost that is minimised."""
    profile = s.get(ProfileRow, (job.id, 0))
    if profile is None:
        return
    max_drop = float(profile.content["max_drop"])
    cost = JobSpec.model_validate(job.spec).minimize[0]
    rivals: list[TrialRecord]
    if job.best == trial.number and not keeps_budget(record(trial), max_drop):
        # The best one lost its place at a higher rung: look at all the others again.
        rivals = [record(row) for row in s.scalars(select(Trial).where(Trial.job_id == job.id))]
    else:
        best = None if job.best is None else s.get(Trial, (job.id, job.best))
        rivals = [record(row) for row in (best, trial) if row is not None]
    job.best = smallest(rivals, max_drop, cost)


def _sentence(number: int, result: TrialResult) -> str:
    if result.value is None:
        return f"Trial {number} ({result.rung.value}) gave no usable network: {result.outcome.value}."
    told = f"Trial {number} ({result.rung.value}): value {result.value:.4g}"
    if result.drop is not None:
        told += f", drop {result.drop:.4g}"
    told += f", {result.costs.parameters:,} parameters"
    if result.rung is Rung.FULL and result.keeps_budget is not None:
        told += "; on unseen data it keeps the budget" if result.keeps_budget else "; on unseen data it does not"
    return told + "."
