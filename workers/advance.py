"""Moving a job on: ask the search what to do next, write it if nothing happened meanwhile, wake workers for it."""

import logging

from db import jobs
from db.engine import Database
from db.settings import Settings
from search.errors import TenfoldError
from search.spec import AskedWork, Finished
from workers.queue import wake

__all__ = ["advance", "advance_waiting"]

log = logging.getLogger(__name__)

TRIES = 20
"""Every try but the last loses only to another worker that moved the same job on."""
UNREADABLE = "its rows cannot be read by this version of Tenfold, which is a defect; the worker's log has the details"


def advance(db: Database, settings: Settings, job_id: str, *, only_stalled: bool = False) -> bool:
    """Whether anything was asked. ``only_stalled``: leave jobs alone that have a live task, which will advance them."""
    try:
        return _advance(db, settings, job_id, only_stalled)
    except ValueError:  # rows that this version cannot read or write: one job's trouble, not everybody's
        log.exception("job %s cannot be moved on", job_id)
        with db.begin() as s:
            jobs.give_up(s, job_id, "internal_error", UNREADABLE)
        return False


def _advance(db: Database, settings: Settings, job_id: str, only_stalled: bool) -> bool:
    for _ in range(TRIES):
        with db.read() as s:
            snapshot = jobs.advance_snapshot(s, job_id)
        if snapshot is None or snapshot.free == 0 or (only_stalled and snapshot.running):
            return False
        asked = _next(snapshot)
        if not asked:
            return False
        with db.begin() as s:
            applied = jobs.apply_work(s, job_id, snapshot.version, asked)
        if applied:
            wake(snapshot.queue, settings.redis_url, times=sum(not isinstance(a, Finished) for a in asked))
            return True
    log.warning("job %s changes faster than it can be advanced; the sweeper will look again", job_id)
    return False


def advance_waiting(db: Database, settings: Settings) -> int:
    """Advance every job that has no live task: new ones whose uploads became ready, and any that a death left so."""
    with db.read() as s:
        waiting = jobs.ready_to_advance(s, stalled=True)
    return sum(advance(db, settings, job_id, only_stalled=True) for job_id in waiting)


def _next(snapshot: jobs.Snapshot) -> list[AskedWork]:
    from search.stages import next_work  # brings in Optuna, which takes a second

    try:
        return next_work(
            snapshot.spec,
            snapshot.profiles,
            snapshot.history,
            running=snapshot.running,
            k=snapshot.free,
            elapsed_hours=snapshot.elapsed_hours,
            exported=snapshot.exported,
            failed_profiles=snapshot.failed_profiles,
        )
    except TenfoldError as error:
        return [Finished(ok=False, code=error.code, reason=error.message)]
    except Exception:
        log.exception("job %s at version %d: the search failed", snapshot.job_id, snapshot.version)
        if snapshot.running:
            return []
        reason = "the search itself failed, which is a defect of Tenfold; the worker's log has the details"
        return [Finished(ok=False, code="internal_error", reason=reason)]
