"""What a job found: its trials, the trade-off front, every layer before and after, and what happened."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from api.auth import Db, Reader, Submitter
from api.conditional import Wait, conditional, until_changed
from api.idempotency import Once, Reply
from api.jobs import view as job_as_it_is
from api.paging import Cursor, Limit, PageOf, page_of
from api.problems import Problem, responses
from api.views import (
    Baseline,
    Best,
    JobView,
    TrialDetail,
    TrialView,
    baseline_view,
    best_view,
    trial_detail,
    trial_view,
)
from db import events, jobs, models, trials
from db.engine import Database
from db.tables import Event
from search.front import front
from search.spec import Cost, LayerInfo, Profile, SitePlan, TrialRecord, entry_of

__all__ = ["router"]

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["results"])

Number = Annotated[int, Path(ge=0, le=2**31 - 1, description="The trial's number.")]
FOUND = responses(304, 401, 404)


class FrontView(BaseModel):
    """The points that nothing beats: no other is both smaller and better."""

    baseline: Baseline | None = Field(description="Null until the original is measured.")
    minimize: list[Cost]
    points: list[Best] = Field(description="Cheapest first. Those that are not `verified` are predictions so far.")


class LayerView(BaseModel):
    """One layer as it was and as the trial makes it."""

    name: str
    kind: str
    weight: tuple[int, ...]
    parameters: int
    macs: int
    compressible: bool
    reason: str
    sensitivity: float | None = Field(description="Predicted rise of the loss per unit of relative output error.")
    method: str | None = Field(description="What replaces it; null: it stays as it is.")
    ranks: tuple[int, ...]
    options: dict[str, str | int | float | bool]
    together: tuple[str, ...] = Field(description="The layers that share its factors, itself among them.")
    parameters_after: int | None
    macs_after: int | None
    error: float | None = Field(description="Predicted relative output error of the replacement.")


class LayersView(BaseModel):
    trial: int | None = Field(description="Whose plan is shown; null while there is none.")
    layers: list[LayerView]


class EventView(BaseModel):
    id: int
    at: float
    kind: str
    message: str
    data: dict[str, Any]


class EventsView(BaseModel):
    items: list[EventView]
    next: str | None = Field(description="Cursor of the page after this one; null at the end.")
    last: str | None = Field(description="Cursor after the last event there is: wait for news with it.")


# ------------------------------------------------------------------------------------------------------- services


def _front(s: Session, owner: str, job_id: str, costs: Sequence[Cost]) -> FrontView:
    job = jobs.get(s, owner, job_id)
    profiles = jobs.profiles(s, owner, job_id)
    minimize = list(costs) or list(jobs.spec_of(job).minimize)
    dense = profiles[0].costs if profiles else None
    points = front(trials.all_records(s, owner, job_id), minimize, dense=dense)
    return FrontView(
        baseline=baseline_view(profiles[0]) if profiles else None,
        minimize=minimize,
        points=[point for record in points if (point := best_view(record))],
    )


def _layer(info: LayerInfo, profile: Profile | None, trial: TrialRecord | None) -> LayerView:
    site = next((site for site in profile.sites if site.site == info.name), None) if profile else None
    plan = entry_of(trial.plan, info.name) if trial else None
    after = _after(info.name, plan, profile) if plan and profile else None
    stays = trial is not None and plan is None
    return LayerView(
        name=info.name,
        kind=info.kind,
        weight=info.weight,
        parameters=info.parameters,
        macs=info.macs,
        compressible=info.compressible,
        reason=info.reason,
        sensitivity=site.sensitivity if site else None,
        method=plan.method if plan else None,
        ranks=plan.ranks if plan else (),
        options=plan.options if plan else {},
        together=tuple(plan.members) if plan else (),
        parameters_after=after[0] if after else info.parameters if stays else None,
        macs_after=after[1] if after else info.macs if stays else None,
        error=after[2] if after else 0.0 if stays else None,
    )


def _after(layer: str, plan: SitePlan, profile: Profile) -> tuple[int, int, float] | None:
    """Parameters, MACs and error of a replaced layer; of what several share, each has a part like that of what they had
    together."""
    for site in (*profile.sites, *profile.groups):
        if site.members.keys() != plan.members.keys() or not (site.site == layer or layer in site.members):
            continue
        point = next((point for point in site.curves.get(plan.method, ()) if point.ranks == plan.ranks), None)
        if point is None or not site.members:
            return None if point is None else (point.parameters, point.macs, point.error)
        before = {s.site: (s.dense_parameters, s.dense_macs) for s in profile.sites}
        alike = (1, 1) if any(name not in before for name in site.members) else None
        had = [alike or before[name] for name in site.members]
        position = list(site.members).index(layer)
        parameters = _part(point.parameters, [p for p, _ in had], position)
        return parameters, _part(point.macs, [m for _, m in had], position), point.errors[position]
    return None


def _part(total: int, shares: Sequence[int], position: int) -> int:
    """Of ``total`` in whole parts like ``shares``, of which the first takes the remainder."""
    shares = shares if any(shares) else [1] * len(shares)
    parts = [total * share // sum(shares) for share in shares]
    parts[0] += total - sum(parts)
    return parts[position]


def _layers(s: Session, owner: str, job_id: str, number: int | None) -> LayersView:
    job = jobs.get(s, owner, job_id)
    info = models.info(models.get(s, owner, job.model_id))
    chosen = job.best if number is None else number
    trial = None if chosen is None else trials.record(trials.get(s, owner, job_id, chosen))
    profiles = {profile.stage: profile for profile in jobs.profiles(s, owner, job_id)}
    profile = profiles.get(trial.stage if trial else 0)
    return LayersView(trial=chosen, layers=[_layer(layer, profile, trial) for layer in (info.layers if info else ())])


def _export(owner: str, job_id: str, number: int, s: Session) -> Reply:
    task = jobs.request_export(s, owner, job_id, number)
    return Reply(202, job_as_it_is(s, jobs.get(s, owner, job_id)), queues=[task.queue])


# ------------------------------------------------------------------------------------------------------ endpoints


@router.get("/trials", operation_id="list_trials", response_model=PageOf[TrialView], responses=FOUND)
def list_trials(
    request: Request, db: Db, caller: Reader, job_id: str, cursor: Cursor = None, limit: Limit = 100
) -> Response:
    """Every candidate in the order of its number, each with the result of the highest rung it reached."""
    with db.read() as s:
        jobs.get(s, caller.owner, job_id)
        page = trials.page(s, caller.owner, job_id, cursor, limit)
    return conditional(request, page_of(page, trial_view))


@router.get("/trials/{number}", operation_id="get_trial", response_model=TrialDetail, responses=FOUND)
def get_trial(request: Request, db: Db, caller: Reader, job_id: str, number: Number) -> Response:
    """One candidate: its plan, the results of every rung, and its learning curves."""
    with db.read() as s:
        jobs.get(s, caller.owner, job_id)
        return conditional(request, trial_detail(trials.get(s, caller.owner, job_id, number)))


@router.post(
    "/trials/{number}/export",
    operation_id="export_trial",
    status_code=202,
    response_model=JobView,
    responses=responses(401, 403, 404, 409, 422),
)
def export_trial(caller: Submitter, job_id: str, number: Number, once: Once) -> Response:
    """Make files of one more trial of a finished job; they appear among its artifacts."""
    return once(partial(_export, caller.owner, job_id, number))


@router.get("/front", operation_id="get_front", response_model=FrontView, responses=FOUND)
def get_front(
    request: Request,
    db: Db,
    caller: Reader,
    job_id: str,
    cost: Annotated[list[Cost] | None, Query(description="Look along other costs than the job minimizes.")] = None,
) -> Response:
    """The trade-off front: drop against cost."""
    with db.read() as s:
        return conditional(request, _front(s, caller.owner, job_id, cost or ()))


@router.get("/layers", operation_id="get_layers", response_model=LayersView, responses=FOUND)
def get_layers(
    request: Request,
    db: Db,
    caller: Reader,
    job_id: str,
    trial: Annotated[
        int | None, Query(ge=0, le=2**31 - 1, description="Whose plan; the best one's when left out.")
    ] = None,
) -> Response:
    """Every layer before and after: what replaces it, at which ranks, at which cost."""
    with db.read() as s:
        return conditional(request, _layers(s, caller.owner, job_id, trial))


def _events(request: Request, db: Database, owner: str, job_id: str, cursor: str | None, limit: int) -> Response:
    with db.read() as s:
        jobs.get(s, owner, job_id)
        page = events.page(s, owner, job_id, cursor, limit)
    body = EventsView(
        items=[_event(row) for row in page.items],
        next=page.next,
        last=events.cursor_of(page.items[-1]) if page.items else cursor,
    )
    return conditional(request, body)


def _event(row: Event) -> EventView:
    return EventView(id=row.id, at=row.at, kind=row.kind, message=row.message, data=row.data)


def _version(db: Database, owner: str, job_id: str) -> int:
    with db.read() as s:
        return jobs.get(s, owner, job_id).version


@router.get("/events", operation_id="list_events", response_model=EventsView, responses=FOUND)
async def list_events(
    request: Request,
    db: Db,
    caller: Reader,
    job_id: str,
    cursor: Cursor = None,
    limit: Limit = 100,
    wait: Wait = 0,
) -> Response:
    """What happened, oldest first. With `cursor` (from `last`) and `wait`, the reply comes with the next event."""
    if wait and cursor is None and "if-none-match" not in request.headers:
        raise Problem(422, "cursor_needed", "`wait` came alone: give the `last` of the page before as `cursor` too.")
    return await until_changed(
        request,
        wait,
        stamp=partial(_version, db, caller.owner, job_id),
        reply=partial(_events, request, db, caller.owner, job_id, cursor, limit),
        unchanged=lambda response: response.status_code == 304 or b'"items":[]' in response.body,
    )
