"""/v1/jobs: ask for a search, watch it, steer it."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Body, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from api.auth import Db, Reader, Submitter
from api.conditional import Wait, conditional, until_changed
from api.idempotency import Once, Reply
from api.models import Id, Name
from api.paging import Cursor, Limit, PageOf
from api.problems import Problem, responses
from api.views import JobView, job_view
from db import datasets, jobs, overview
from db.engine import Database, now
from db.settings import Settings
from db.tables import Dataset, Job
from search.spec import FRACTIONS, METHOD_NAMES, METRICS_OF_TASK, Budget, DataSpec, JobSpec, Metric

__all__ = ["router"]

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

STEER = responses(401, 403, 404, 409, 422)


class JobRequest(JobSpec):
    """A search: which network, on which data, what may be lost, what has to get small."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "model": "mdl_5c1f0c0f6a7b8d9e0f1a2b3c",
                "dataset": "dat_0a1b2c3d4e5f60718293a4b5",
                "name": "resnet20 at half a point",
                "budget": {"metric": "accuracy", "max_drop": 0.005},
                "minimize": ["parameters"],
                "search": {"trials": 30, "hours": 2, "parallel": 2},
            }
        }
    )

    model: Id
    """Id of a network of yours that was not rejected."""
    dataset: Id
    """Id of a data set of yours that was not rejected."""
    name: Name | None = None
    """For people."""

    def spec(self) -> JobSpec:
        return JobSpec(**{field: getattr(self, field) for field in JobSpec.model_fields})


class ExtendRequest(BaseModel):
    """More of the same search."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"trials": 20, "hours": 2}})

    trials: Annotated[int, Field(ge=1, le=100_000)]
    hours: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="More hours, for a job that was given a limit; needed once they are used up."
    )


# ------------------------------------------------------------------------------------------------------- services


def view(s: Session, row: Job) -> JobView:
    return job_view(row, overview.overviews(s, [row])[row.id], now(s))


def _check_budget(budget: Budget, metric: Metric) -> None:
    for field in ("max_drop", "min_value"):
        value = getattr(budget, field)
        if metric in FRACTIONS and value is not None and value < 0:
            raise Problem(
                422,
                "budget_not_a_fraction",
                f"budget.{field} is {value:g} and {metric.value} is a fraction of 1: give one between 0 and 1.",
            )
        if metric in FRACTIONS and value is not None and value > 1:
            raise Problem(
                422,
                "budget_not_a_fraction",
                f"budget.{field} is {value:g} and {metric.value} is a fraction of 1: half a point is 0.005, so did you "
                f"mean {value / 100:g}?",
            )


def _check(spec: JobSpec, data: Dataset) -> None:
    """Refuses what the data's task or the methods we have already contradict; the worker checks the rest."""
    task = DataSpec.model_validate(data.spec).task
    metric = spec.budget.metric or METRICS_OF_TASK[task][0]
    if metric not in METRICS_OF_TASK[task]:
        allowed = ", ".join(one.value for one in METRICS_OF_TASK[task])
        raise Problem(
            422,
            "metric_contradicts_task",
            f"budget.metric is {metric.value!r} and data set {data.id} is for {task.value}, which allows {allowed}.",
        )
    _check_budget(spec.budget, metric)
    if metric is Metric.TOP5 and (info := datasets.info(data)) and info.classes is not None and info.classes <= 5:
        raise Problem(
            422, "metric_contradicts_task", f"top5 of {info.classes} classes is always 1: use accuracy instead."
        )
    named = {plan.method for plan in spec.layers.fixed.values()} | (
        set() if spec.methods == "auto" else set(spec.methods)
    )
    if unknown := sorted(named - set(METHOD_NAMES)):
        raise Problem(
            422, "unknown_method", f"There is no method {', '.join(unknown)}: there are {', '.join(METHOD_NAMES)}."
        )
    if spec.methods == ():
        raise Problem(422, "no_method", "methods is empty: name some, or leave it out for all of them.")


def _create(owner: str, body: JobRequest, settings: Settings, s: Session) -> Reply:
    spec = body.spec()
    _check(spec, datasets.get(s, owner, body.dataset))
    if (alive := jobs.live_count(s, owner)) >= settings.max_live_jobs:
        raise Problem(
            409,
            "too_many_live_jobs",
            f"You have {alive} unfinished jobs and may have {settings.max_live_jobs}: wait, or cancel some.",
        )
    row = jobs.add(
        s,
        owner,
        model_id=body.model,
        dataset_id=body.dataset,
        name=body.name or "job",
        spec=spec,
        queue=settings.queue,
    )
    return Reply(202, view(s, row), queues=[row.queue])


# ------------------------------------------------------------------------------------------------------ endpoints


@router.post(
    "",
    operation_id="create_job",
    status_code=202,
    response_model=JobView,
    responses=responses(400, 401, 403, 404, 409, 422),
)
def create_job(request: Request, caller: Submitter, body: JobRequest, once: Once) -> Response:
    """Start a search. It begins as soon as its model and data are ready and a worker is free."""
    settings: Settings = request.app.state.settings
    return once(partial(_create, caller.owner, body, settings))


@router.get("", operation_id="list_jobs", response_model=PageOf[JobView], responses=responses(304, 401, 422))
def list_jobs(request: Request, db: Db, caller: Reader, cursor: Cursor = None, limit: Limit = 50) -> Response:
    """Your jobs, newest first."""
    with db.read() as s:
        page = jobs.page(s, caller.owner, cursor, limit)
        seen, at = overview.overviews(s, page.items), now(s)
    items = [job_view(row, seen[row.id], at) for row in page.items]
    return conditional(request, PageOf[JobView](items=items, next=page.next))


def _stamp(db: Database, owner: str, job_id: str) -> object:
    with db.read() as s:
        return overview.stamp(s, owner, job_id)


def _one(request: Request, db: Database, owner: str, job_id: str) -> Response:
    with db.read() as s:
        body = view(s, jobs.get(s, owner, job_id))
    return conditional(request, body)


@router.get("/{job_id}", operation_id="get_job", response_model=JobView, responses=responses(304, 401, 404))
async def get_job(request: Request, db: Db, caller: Reader, job_id: str, wait: Wait = 0) -> Response:
    """State, progress, baseline, best so far, time left, and the reason when it ended badly."""
    return await until_changed(
        request,
        wait,
        stamp=partial(_stamp, db, caller.owner, job_id),
        reply=partial(_one, request, db, caller.owner, job_id),
    )


@router.post("/{job_id}/cancel", operation_id="cancel_job", response_model=JobView, responses=STEER)
def cancel_job(caller: Submitter, job_id: str, once: Once) -> Response:
    """Stop it: what waits ends at once, what runs within seconds. What was found stays."""
    return once(lambda s: Reply(200, view(s, jobs.cancel(s, caller.owner, job_id))))


@router.post("/{job_id}/pause", operation_id="pause_job", response_model=JobView, responses=STEER)
def pause_job(caller: Submitter, job_id: str, once: Once) -> Response:
    """Let running trials finish and start no new one."""
    return once(lambda s: Reply(200, view(s, jobs.pause(s, caller.owner, job_id))))


def _woken(row: Job, s: Session, status: int) -> Reply:
    return Reply(status, view(s, row), queues=[row.queue])


@router.post("/{job_id}/resume", operation_id="resume_job", response_model=JobView, responses=STEER)
def resume_job(caller: Submitter, job_id: str, once: Once) -> Response:
    """Go on where it was paused."""
    return once(lambda s: _woken(jobs.resume(s, caller.owner, job_id), s, 200))


@router.post("/{job_id}/extend", operation_id="extend_job", status_code=202, response_model=JobView, responses=STEER)
def extend_job(caller: Submitter, job_id: str, body: Annotated[ExtendRequest, Body()], once: Once) -> Response:
    """More trials for a job that is done or has failed."""
    return once(lambda s: _woken(jobs.extend(s, caller.owner, job_id, trials=body.trials, hours=body.hours), s, 202))


@router.delete("/{job_id}", operation_id="delete_job", status_code=204, responses=STEER)
def delete_job(db: Db, caller: Submitter, job_id: str) -> None:
    """Delete a finished job with its trials, events and files."""
    with db.begin() as s:
        jobs.delete(s, caller.owner, job_id)
