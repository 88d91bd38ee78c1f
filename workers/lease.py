"""Keeping a claimed task: heartbeats on a thread, which also bring back whether its job is being cancelled."""

import logging
import threading
import time
from types import TracebackType
from typing import Any, Self

from sqlalchemy.exc import SQLAlchemyError

from db import tasks
from db.engine import Database
from search.errors import TenfoldError

__all__ = ["Lease"]

log = logging.getLogger(__name__)

BEATS = 4
"""Heartbeats in one lease, at least: three may go missing before somebody else takes the task."""
SLOWEST_S = 3.0
"""From one heartbeat to the next, however long the lease is: they also carry progress out and cancelling in."""


class Lease:
    """While entered, extends the lease of one attempt and carries its progress to the database."""

    def __init__(self, db: Database, task_id: str, attempt: int, seconds: float) -> None:
        self.lost = False
        """Somebody else has the task by now, or may have: stop at once, nothing written will be taken."""
        self.cancelled = False
        """The job was asked to stop."""
        self._db, self._task_id, self._attempt, self._seconds = db, task_id, attempt, seconds
        self._progress: dict[str, Any] | None = None
        self._sure_until = time.monotonic() + seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease-{task_id[:8]}", daemon=True)

    def progress(self, value: dict[str, Any]) -> None:
        """Remember what the next heartbeat tells."""
        try:
            self._progress = {
                "message": str(value["message"])[:500],
                "done": float(value["done"]),
                "of": float(value["of"]),
            }
        except (KeyError, TypeError, ValueError):
            log.warning("a progress message made no sense: %.200r", value)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._end.wait(min(self._seconds / BEATS, SLOWEST_S)):
            self.beat()
            if self.lost:
                return

    def beat(self) -> None:
        """One heartbeat. A database that is away is borne for as long as the lease surely stands."""
        asked = time.monotonic()
        try:
            with self._db.begin() as session:
                beat = tasks.heartbeat(session, self._task_id, self._attempt, self._seconds, self._progress)
        except (SQLAlchemyError, TenfoldError) as error:
            log.warning("heartbeat of task %s failed: %s", self._task_id, error)
            self.lost = time.monotonic() > self._sure_until
            return
        if beat is None:
            self.lost = True
        else:
            self._sure_until = asked + self._seconds
            self.cancelled = beat.cancel
