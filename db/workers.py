"""Which workers there are, and that SQLite serves those of one host only."""

from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from db.engine import is_sqlite, now
from db.errors import Conflict
from db.tables import Worker

__all__ = ["LIVE_SECONDS", "gone", "live", "seen"]

LIVE_SECONDS = 60.0
"""A worker not seen for this long counts as gone."""
KEEP_SECONDS = 86_400.0


def seen(s: Session, worker_id: str, *, host: str, queue: str, device: str, jail: dict[str, Any]) -> None:
    """Enters a worker or says that it is still there; call it well within ``LIVE_SECONDS``.

    Raises ``Conflict`` (``sqlite_on_several_hosts``) when the database is SQLite and a worker of another host is live:
    file locks do not hold between hosts, and the file would be damaged.
    """
    at = now(s)
    if is_sqlite(s):
        others = select(Worker).where(Worker.host != host, Worker.seen_at > at - LIVE_SECONDS).limit(1)
        other = s.scalar(others)
        if other is not None:
            raise Conflict(
                "sqlite_on_several_hosts",
                f"worker {other.id} on host {other.host!r} uses this SQLite file, and this is host {host!r}: SQLite "
                "serves one host only. Set TENFOLD_DATABASE_URL to a PostgreSQL database, or stop the other host's "
                f"workers and wait {LIVE_SECONDS:.0f} seconds",
            )
    row = s.get(Worker, worker_id)
    if row is None:
        s.execute(delete(Worker).where(Worker.seen_at < at - KEEP_SECONDS))
        s.add(Worker(id=worker_id, host=host, queue=queue, device=device, jail=jail, started_at=at, seen_at=at))
    else:
        row.host, row.queue, row.device, row.jail, row.seen_at = host, queue, device, jail, at
    s.flush()


def gone(s: Session, worker_id: str) -> None:
    """At a clean stop."""
    s.execute(delete(Worker).where(Worker.id == worker_id))


def live(s: Session) -> list[Worker]:
    """By host and id."""
    query = select(Worker).where(Worker.seen_at > now(s) - LIVE_SECONDS)
    return list(s.scalars(query.order_by(Worker.host, Worker.id)))
