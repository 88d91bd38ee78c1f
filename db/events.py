"""What happened to a job, in sentences. Rows are added by ``db.lifecycle.tell``; here they are read."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.pages import Page, after, encode
from db.tables import Event, Job

__all__ = ["cursor_of", "page"]


def page(s: Session, owner: str, job_id: str, cursor: str | None = None, limit: int = 100) -> Page[Event]:
    """Oldest first. An event that is not there yet comes after every one that is: a cursor never misses one."""
    query = select(Event).join(Job, Job.id == Event.job_id).where(Job.owner == owner, Event.job_id == job_id)
    return after(s, query, Event.id, cursor, limit)


def cursor_of(event: Event) -> str:
    """The cursor right after ``event``: what comes later is news."""
    return encode((event.id,))
