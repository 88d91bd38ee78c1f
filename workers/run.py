"""What a woken worker does: claim the best row, run it, go on until no row is left."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from db import assignments, tasks
from db.engine import Database
from db.errors import StorageFull
from db.settings import Settings
from db.tables import Task, TaskKind
from search.errors import TenfoldError
from workers.advance import advance, advance_waiting
from workers.kinds import HANDLERS, Hands, opening
from workers.lease import Lease
from workers.supervise import Crashed, Failed, Stopped
from workers.warm import COMPUTE, Processes, Warm, scratch_root

__all__ = ["Runner"]

log = logging.getLogger(__name__)

IDLE_S = 300.0
"""How long a compute process stays warm when nothing comes for it."""
INSPECTION_S = 1800.0
"""Time limit of reading an upload, and of loading exported files again."""
INSPECTIONS = (TaskKind.INSPECT_MODEL, TaskKind.INSPECT_DATA)
FULL = (28, 122)
"""ENOSPC and EDQUOT."""
UNFORESEEN = "internal_error", "the worker failed unexpectedly; its log has the details"


class Runner:
    """One worker's hands: at most one task at a time.

    ``compute``: the arguments of the interpreter that start a compute process.
    """

    def __init__(self, db: Database, settings: Settings, name: str, *, compute: Sequence[str] = COMPUTE) -> None:
        self.db, self.settings, self.name = db, settings, name
        self.processes = Processes(settings, compute)
        self._busy = threading.Lock()
        self._stopping = threading.Event()
        self._idle: threading.Timer | None = None

    def work(self) -> int:
        """Run tasks until none is left. Returns how many. Another call while one works returns at once."""
        if not self._busy.acquire(blocking=False):
            return 0
        done = 0
        try:
            self._end_idle_timer()
            advance_waiting(self.db, self.settings)
            while not self._stopping.is_set() and (task := self._claim()) is not None:
                self._run(task)
                done += 1
        except (SQLAlchemyError, TenfoldError) as error:
            log.warning("the database cannot be used just now, the sweeper will look again: %s", error)
        finally:
            self._start_idle_timer()
            self._busy.release()
        return done

    def stop(self) -> None:
        """Take no more tasks, and give the one in hand back to the queue. May be called in a signal handler."""
        self._stopping.set()

    def close(self) -> None:
        """After ``stop``: wait for the task in hand to be given back, end the compute process."""
        with self._busy:
            self._end_idle_timer()
            self.processes.cool()

    # ------------------------------------------------------------------------------------------------ one task

    def _claim(self) -> Task | None:
        warm = self.processes.warm
        with self.db.begin() as s:
            return tasks.claim(
                s, self.name, self.settings.queue, self.settings.lease_seconds, warm.job_id if warm else None
            )

    def _run(self, task: Task) -> None:
        log.info("%s %s of %s, attempt %d", task.kind.value, task.id, task.job_id or task.owner, task.attempt)
        with Lease(self.db, task.id, task.attempt, self.settings.lease_seconds) as lease:
            try:
                kept = self._try(task, lease)
            except SQLAlchemyError as error:
                log.warning("task %s: the database is away, its lease will run out: %s", task.id, error)
                return
            except Exception as error:
                kept = self._after(error, task, lease)
        if not kept:
            log.info("task %s was no longer ours: nothing was written", task.id)
        if task.job_id is not None:
            advance(self.db, self.settings, task.job_id)
        else:
            advance_waiting(self.db, self.settings)

    def _try(self, task: Task, lease: Lease) -> bool:
        def stop() -> bool:
            return lease.lost or lease.cancelled or self._stopping.is_set()

        limit = INSPECTION_S if task.kind in INSPECTIONS else self.settings.task_hours * 3600
        warm = self.processes.for_task(task, stop)
        keep = self._keeps_checkpoints(task, warm)
        on: dict[str, Callable[[Any], None]] = {"progress": lease.progress, "checkpoint": keep}

        def ask(operation: str, arguments: Mapping[str, Any]) -> Any:
            return warm.child.call(operation, arguments, on=on, stop=stop, timeout_s=limit)

        def ask_clean(operation: str, arguments: Mapping[str, Any]) -> Any:
            with self.processes.clean(warm.scratch) as child:
                child.ready(stop=stop)
                return child.call(operation, arguments, stop=stop, timeout_s=INSPECTION_S)

        with self.db.read() as s:
            given = assignments.of(s, task)
        hands = Hands(self.db, task, given, warm.scratch, ask, ask_clean)
        if task.job_id is not None:
            wanted = opening(hands)
            if warm.opened != wanted:
                ask("open", wanted)
                warm.opened = wanted
        return HANDLERS[task.kind](hands)

    def _after(self, error: Exception, task: Task, lease: Lease) -> bool:
        """Write what became of an attempt that ended without a result. Returns whether the write was taken."""
        match error:
            case Stopped():
                self.processes.cool()
                return self._after_stop(task, lease)
            case Crashed():
                self.processes.cool()
                return self._fail(task, "crashed", str(error), retry=True)
            case OSError(errno=number) if number in FULL:
                self.processes.cool()
                folder = scratch_root(self.settings)
                again = "upload it again" if task.kind in INSPECTIONS else "extend the job or start another"
                message = f"the disk of the worker's scratch folder {folder} is full: free some space, then {again}"
                return self._fail(task, "disk_full", message, retry=False)
            case Failed() | TenfoldError():
                if isinstance(error, StorageFull) or error.code in ("out_of_memory", "disk_full"):
                    self.processes.cool()
                return self._fail(task, error.code, error.message, retry=False)
        log.error("task %s", task.id, exc_info=error)
        self.processes.cool()
        return self._fail(task, *UNFORESEEN, retry=True)

    def _after_stop(self, task: Task, lease: Lease) -> bool:
        if lease.lost:
            return False
        if lease.cancelled:
            return self._fail(task, "cancelled", "cancelled on request", retry=False)
        with self.db.begin() as s:
            return tasks.release(s, task.id, task.attempt)

    def _fail(self, task: Task, code: str, message: str, *, retry: bool) -> bool:
        log.warning("task %s attempt %d: %s: %s", task.id, task.attempt, code, message)
        try:
            with self.db.begin() as s:
                return tasks.fail(s, task.id, task.attempt, code, message, retry=retry)
        except (SQLAlchemyError, StorageFull) as error:
            log.warning("task %s: its failure could not be written, its lease will run out: %s", task.id, error)
            return False

    def _keeps_checkpoints(self, task: Task, warm: Warm) -> Callable[[str], None]:
        def keep(name: str) -> None:
            try:
                blob_id = warm.scratch.store(self.db, name)
                with self.db.begin() as s:
                    tasks.save_checkpoint(s, task.id, task.attempt, blob_id)
            except (OSError, SQLAlchemyError, StorageFull) as error:
                log.warning("task %s: a checkpoint was not kept: %s", task.id, error)

        return keep

    # ------------------------------------------------------------------------------------------------ being idle

    def _start_idle_timer(self) -> None:
        if self.processes.warm is None or self._stopping.is_set():
            return
        self._idle = threading.Timer(IDLE_S, self._cool_if_idle)
        self._idle.daemon = True
        self._idle.start()

    def _end_idle_timer(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _cool_if_idle(self) -> None:
        if self._busy.acquire(blocking=False):
            try:
                self.processes.cool()
            finally:
                self._busy.release()
