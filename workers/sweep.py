"""What every worker looks after now and then, so that nothing waits for a process that died."""

import logging
import socket
import threading
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from db import blobs, replies, tasks, workers
from db.engine import Database
from db.settings import Settings
from search.errors import TenfoldError
from workers import jail, scratch
from workers.advance import advance, advance_waiting
from workers.device import device
from workers.queue import wake
from workers.warm import scratch_root

__all__ = ["Sweeper"]

log = logging.getLogger(__name__)

SWEEPS = 3
"""In one lease."""
SLOWEST_S = 20.0
"""From one sweep to the next, however long the lease is: a worker that was not seen for a minute counts as gone."""
NUDGE_S = 5.0
"""How often workers are woken for rows that wait."""
GARBAGE_EVERY = 20
"""Sweeps from one collection of garbage to the next."""


class Sweeper:
    """A thread of a worker. Every step is safe beside the same step of other workers."""

    def __init__(self, db: Database, settings: Settings, name: str) -> None:
        self.db, self.settings, self.name = db, settings, name
        self._device = device()
        self._jail: dict[str, object] = {"mode": settings.jail, **jail.layers(settings.jail)}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="sweeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(5)
        self._guarded(self.be_gone)

    def _loop(self) -> None:
        every = min(self.settings.lease_seconds / SWEEPS, SLOWEST_S)
        pause = min(NUDGE_S, every)
        ticks = 0
        while True:
            if ticks % max(1, round(every / pause)) == 0:
                self.sweep(collect=ticks % GARBAGE_EVERY == 0)
            self._guarded(self.nudge)
            ticks += 1
            if self._end.wait(pause):
                return

    def sweep(self, *, collect: bool = False) -> None:
        """Once: be seen, take up what dead workers held, move stalled jobs on, clean up."""
        for step in (self.be_seen, self.take_up_lost, self.move_on, self.clean_scratch):
            self._guarded(step)
        if collect:
            self._guarded(self.collect_garbage)

    def nudge(self) -> None:
        """Wake workers for queued rows: the message that was sent after the commit may be lost."""
        with self.db.read() as s:
            waiting = tasks.waiting_queues(s)
        for queue in waiting:
            wake(queue, self.settings.redis_url)

    def take_up_lost(self) -> None:
        """Leases that ran out: the task waits again, or has failed after its last attempt."""
        with self.db.read() as s:
            lost = [(t.id, t.attempt, t.job_id) for t in tasks.expired(s)]
        for task_id, attempt, job_id in lost:
            with self.db.begin() as s:
                state = tasks.requeue_or_fail(s, task_id, attempt)
            if state is not None:
                log.warning("task %s attempt %d lost its worker: %s", task_id, attempt, state.value)
                if job_id is not None:
                    advance(self.db, self.settings, job_id)

    def move_on(self) -> None:
        advance_waiting(self.db, self.settings)

    def clean_scratch(self) -> None:
        scratch.sweep(scratch_root(self.settings))

    def collect_garbage(self) -> None:
        blobs.collect_garbage(self.db, self.settings.blob_grace_seconds)
        with self.db.begin() as s:
            replies.clean(s)

    def be_seen(self) -> None:
        """Raises ``Conflict`` when the database is SQLite and another host works on it."""
        with self.db.begin() as s:
            workers.seen(
                s,
                self.name,
                host=socket.gethostname(),
                queue=self.settings.queue,
                device=self._device,
                jail=self._jail,
            )

    def be_gone(self) -> None:
        with self.db.begin() as s:
            workers.gone(s, self.name)

    def _guarded(self, step: Callable[[], object]) -> None:
        try:
            step()
        except (SQLAlchemyError, TenfoldError, OSError) as error:
            log.warning("sweeping: %s: %s", getattr(step, "__name__", step), error)
        except Exception:
            log.exception("sweeping: %s", getattr(step, "__name__", step))
