"""Candidates of a job: rows to ``TrialRecord``, pages, counts, and which one is the best so far."""

import math
from collections.abc import Iterable

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from db.errors import NotFound
from db.pages import Page, after
from db.tables import Job, Trial
from search.spec import Cost, Rung, TrialRecord, TrialResult, TrialState

__all__ = ["all_records", "counts", "get", "keeps_budget", "latest", "page", "record", "smallest"]


def record(row: Trial) -> TrialRecord:
    return TrialRecord.model_validate(
        {
            "number": row.number,
            "stage": row.stage,
            "parent": row.parent,
            "params": row.params,
            "plan": row.plan,
            "state": row.state,
            "rung": row.rung,
            "results": row.results,
        }
    )


def get(s: Session, owner: str, job_id: str, number: int) -> Trial:
    """Raises ``NotFound`` (``trial_not_found``)."""
    row = s.scalar(_of(owner, job_id).where(Trial.number == number))
    if row is None:
        raise NotFound.of("trial", number)
    return row


def page(s: Session, owner: str, job_id: str, cursor: str | None = None, limit: int = 100) -> Page[Trial]:
    """In the order of their numbers."""
    return after(s, _of(owner, job_id), Trial.number, cursor, limit)


def all_records(s: Session, owner: str, job_id: str) -> list[TrialRecord]:
    """Every trial, for the front and for charts."""
    return [record(row) for row in s.scalars(_of(owner, job_id).order_by(Trial.number))]


def counts(s: Session, job_id: str) -> dict[TrialState, int]:
    """How many trials are in each state; states without one are absent."""
    query = select(Trial.state, func.count()).where(Trial.job_id == job_id).group_by(Trial.state)
    return {state: count for state, count in s.execute(query)}  # noqa: C416  (dict() takes a Result for a mapping)


def latest(trial: TrialRecord) -> TrialResult | None:
    """The result of the highest rung that was measured."""
    return next((trial.results[rung] for rung in reversed(Rung) if rung in trial.results), None)


def keeps_budget(trial: TrialRecord, max_drop: float) -> bool:
    """By the highest rung's verdict on unseen data where there is one, else by its drop on the select split."""
    result = latest(trial)
    if result is None or result.drop is None:
        return False
    return result.drop <= max_drop if result.keeps_budget is None else result.keeps_budget


def smallest(trials: Iterable[TrialRecord], max_drop: float, cost: Cost) -> int | None:
    """Number of the cheapest trial that keeps the budget; of equals the earliest."""
    fitting = []
    for trial in trials:
        result = latest(trial)
        if result is not None and keeps_budget(trial, max_drop):
            value = result.costs.of(cost)
            fitting.append((math.inf if math.isnan(value) else value, trial.number))
    return min(fitting)[1] if fitting else None


def _of(owner: str, job_id: str) -> Select[Trial]:
    return select(Trial).join(Job, Job.id == Trial.job_id).where(Job.owner == owner, Trial.job_id == job_id)
