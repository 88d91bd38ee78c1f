"""Everything a worker needs to run one claimed task, in one read."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from db import trials
from db.errors import NotFound
from db.tables import Dataset, Job, Model, ProfileRow, Task, Trial
from search.spec import DataSpec, JobSpec, Profile, TrialRecord

__all__ = ["Assignment", "DataFile", "ModelFile", "of"]


@dataclass(frozen=True)
class ModelFile:
    id: str
    blob_id: str
    format: str
    architecture: dict[str, Any] | None


@dataclass(frozen=True)
class DataFile:
    id: str
    blob_id: str
    spec: DataSpec


@dataclass(frozen=True)
class Assignment:
    task_id: str
    attempt: int
    model: ModelFile | None
    data: DataFile | None
    spec: JobSpec | None
    """The job's; None for inspections."""
    profile: Profile | None
    """Of the stage that the task belongs to, where it is made already."""
    parent_weights: str | None
    """Blob of the fine-tuned network that the stage starts from; None: the original."""
    record: TrialRecord | None
    """The trial as known so far (trial, refine, export)."""
    weights: str | None
    """Blob of the trial's network at the highest rung that kept one."""
    checkpoint: str | None
    """Blob that an earlier attempt at this task left."""


def of(s: Session, task: Task) -> Assignment:
    """Raises ``NotFound`` when the job, model or data were deleted in the meantime."""
    job = s.get(Job, task.job_id) if task.job_id is not None else None
    if task.job_id is not None and job is None:
        raise NotFound.of("job", task.job_id)
    trial = s.get(Trial, (task.job_id, task.trial)) if task.trial is not None else None
    stage, parent = (task.work.get("stage"), task.work.get("parent")) if trial is None else (trial.stage, trial.parent)
    profile = s.get(ProfileRow, (job.id, stage)) if job is not None and stage is not None else None
    start = s.get(Trial, (task.job_id, parent)) if job is not None and parent is not None else None
    return Assignment(
        task_id=task.id,
        attempt=task.attempt,
        model=_model(s, job.model_id if job else task.model_id),
        data=_data(s, job.dataset_id if job else task.dataset_id),
        spec=None if job is None else JobSpec.model_validate(job.spec),
        profile=None if profile is None else Profile.model_validate(profile.content),
        parent_weights=None if start is None else start.weights_blob,
        record=None if trial is None else trials.record(trial),
        weights=None if trial is None else trial.weights_blob,
        checkpoint=task.checkpoint_blob,
    )


def _model(s: Session, model_id: str | None) -> ModelFile | None:
    if model_id is None:
        return None
    row = s.get(Model, model_id)
    if row is None:
        raise NotFound.of("model", model_id)
    return ModelFile(row.id, row.blob_id, row.format, row.architecture)


def _data(s: Session, dataset_id: str | None) -> DataFile | None:
    if dataset_id is None:
        return None
    row = s.get(Dataset, dataset_id)
    if row is None:
        raise NotFound.of("dataset", dataset_id)
    return DataFile(row.id, row.blob_id, DataSpec.model_validate(row.spec))
