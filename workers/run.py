"""What a woken worker does: claim the best row, run it, go on until no row is left."""

import contextlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
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
from workers.scratch import Scratch
from workers.supervise import Child, Crashed, Failed, Stopped

__all__ = ["Runner", "scratch_root"]

log = logging.getLogger(__name__)

IDLE_S = 300.0
"""How long a compute process stays warm when nothing comes for it."""
INSPECTION_S = 1800.0
"""Time limit of reading an upload."""
RELOAD_S = 1800.0
COMPUTE = ("-m", "workers.compute")
CLEAN = ("-m", "workers.clean")
INSPECTIONS = (TaskKind.INSPECT_MODEL, TaskKind.INSPECT_DATA)


class Runner:
    """One worker's hands: at most one task at a time, in a compute process that stays warm for a job.

    ``compute``: the arguments of the interpreter that start a compute process.
    """

    def __init__(self, db: Database, settings: Settings, name: str, *, compute: Sequence[str] = COMPUTE) -> None:
        self.db, self.settings, self.name = db, settings, name
        self._compute = tuple(compute)
        self._busy = threading.Lock()
        self._stopping = threading.Event()
        self._warm: _Warm | None = None
        self._idle: threading.Timer | None = None

    def work(self) -> int:
        """Run tasks until none is left. Returns how many. Another call while one works returns at once."""
        if not self._busy.acquire(blocking=False):
            return 0
        try:
            self._end_idle_timer()
            done = 0
            advance_waiting(self.db, self.settings)
            while not self._stopping.is_set() and (task := self._claim()) is not None:
                self._run(task)
                done += 1
            return done
        except SQLAlchemyError as error:
            log.warning("the database is away, the sweeper will look again: %s", error)
            return 0
        finally:
            self._start_idle_timer()
            self._busy.release()

    def stop(self) -> None:
        """Take no more tasks, and give the one in hand back to the queue. May be called in a signal handler."""
        self._stopping.set()

    def close(self) -> None:
        """After ``stop``: wait for the task in hand to be given back, end the compute process."""
        with self._busy:
            self._end_idle_timer()
            self._cool()

    # ------------------------------------------------------------------------------------------------ one task

    def _claim(self) -> Task | None:
        warm_job = self._warm.job_id if self._warm else None
        with self.db.begin() as s:
            return tasks.claim(s, self.name, self.settings.queue, self.settings.lease_seconds, warm_job)

    def _run(self, task: Task) -> None:
        log.info("%s %s of %s, attempt %d", task.kind.value, task.id, task.job_id or task.owner, task.attempt)
        with Lease(self.db, task.id, task.attempt, self.settings.lease_seconds) as lease:
            try:
                kept = self._try(task, lease)
            except Stopped:
                self._cool()
                kept = self._after_stop(task, lease)
            except Failed as failure:
                kept = self._fail(task, failure.code, failure.message, retry=False)
            except Crashed as crash:
                self._cool()
                kept = self._fail(task, "crashed", str(crash), retry=True)
            except OSError as error:
                self._cool()
                kept = self._fail(task, *self._machine(error), retry=error.errno not in FULL)
            except StorageFull as full:
                self._cool()
                kept = self._fail(task, full.code, full.message, retry=False)
            except TenfoldError as error:
                kept = self._fail(task, error.code, error.message, retry=False)
            except SQLAlchemyError as error:
                log.warning("task %s: the database is away, its lease will run out: %s", task.id, error)
                return
            except Exception:
                log.exception("task %s", task.id)
                self._cool()
                message = "the worker failed unexpectedly; its log has the details"
                kept = self._fail(task, "internal_error", message, retry=True)
        if not kept:
            log.info("task %s was no longer ours: nothing was written", task.id)
        if task.job_id is not None:
            advance(self.db, self.settings, task.job_id)
        else:
            advance_waiting(self.db, self.settings)

    def _try(self, task: Task, lease: Lease) -> bool:
        stop = self._stop_for(lease)
        limit = INSPECTION_S if task.kind in INSPECTIONS else None
        warm = self._warmed(task, stop)
        handlers = {"progress": lease.progress, "checkpoint": self._keeps_checkpoints(task, warm)}

        def ask(operation: str, arguments: Mapping[str, Any]) -> Any:
            return warm.child.call(operation, arguments, on=handlers, stop=stop, timeout_s=limit)

        def ask_clean(operation: str, arguments: Mapping[str, Any]) -> Any:
            with self._child(CLEAN, warm.scratch) as child:
                child.ready(stop=stop)
                return child.call(operation, arguments, stop=stop, timeout_s=RELOAD_S)

        with self.db.read() as s:
            given = assignments.of(s, task)
        hands = Hands(self.db, task, given, warm.scratch, ask, ask_clean)
        if task.job_id is not None:
            wanted = opening(hands)
            if warm.opened != wanted:
                ask("open", wanted)
                warm.opened = wanted
        return HANDLERS[task.kind](hands)

    def _stop_for(self, lease: Lease) -> Any:
        return lambda: lease.lost or lease.cancelled or self._stopping.is_set()

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

    def _keeps_checkpoints(self, task: Task, warm: "_Warm") -> Any:
        def keep(name: str) -> None:
            blob_id = warm.scratch.store(self.db, name)
            with self.db.begin() as s:
                tasks.save_checkpoint(s, task.id, task.attempt, blob_id)

        return keep

    def _machine(self, error: OSError) -> tuple[str, str]:
        if error.errno in FULL:
            folder = scratch_root(self.settings)
            return "disk_full", f"the disk of the worker's scratch folder {folder} is full: free some space"
        log.error("the worker failed", exc_info=error)
        return "internal_error", "the worker failed unexpectedly; its log has the details"

    # ------------------------------------------------------------------------------------------------ the process

    def _warmed(self, task: Task, stop: Any) -> "_Warm":
        """The compute process for this task: the warm one if it has seen nothing but this job and this owner."""
        warm = self._warm
        if warm is not None and warm.child.alive and warm.fits(task):
            warm.job_id = task.job_id or warm.job_id
            return warm
        self._cool()
        scratch = Scratch(scratch_root(self.settings))
        try:
            child = self._start(self._compute, scratch)
        except BaseException:
            scratch.remove()
            raise
        self._warm = _Warm(child, scratch, task)
        layers = child.ready(stop=stop)
        log.info("compute process %d, jail: %s", child.pid, ", ".join(k for k, v in layers.items() if v) or "none")
        return self._warm

    def _start(self, module: Sequence[str], scratch: Scratch) -> Child:
        limit = None if self.settings.memory_limit is None else int(self.settings.memory_limit)
        options = ["--scratch", str(scratch.path), "--jail", self.settings.jail, "--latency-lock", str(_latency_lock())]
        if limit is not None:
            options += ["--memory", str(limit)]
        return Child([sys.executable, *module, *options], scratch.path, memory_bytes=limit)

    def _child(self, module: Sequence[str], scratch: Scratch) -> Any:
        return contextlib.closing(self._start(module, scratch))

    def _cool(self) -> None:
        warm, self._warm = self._warm, None
        if warm is not None:
            warm.child.close()
            warm.scratch.remove()

    def _start_idle_timer(self) -> None:
        if self._warm is None or self._stopping.is_set():
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
                self._cool()
            finally:
                self._busy.release()


class _Warm:
    """A compute process, its scratch folder, and what it has been used for."""

    def __init__(self, child: Child, scratch: Scratch, task: Task) -> None:
        self.child, self.scratch = child, scratch
        self.owner = task.owner
        self.job_id = task.job_id
        self.opened: dict[str, Any] | None = None

    def fits(self, task: Task) -> bool:
        """One owner, one job: no upload is opened beside somebody else's, and memory is given back between jobs."""
        return task.owner == self.owner and (self.job_id is None or task.job_id in (None, self.job_id))


FULL = (28, 122)
"""ENOSPC and EDQUOT."""


def scratch_root(settings: Settings) -> Path:
    return settings.data_dir.absolute() / "scratch"


def _latency_lock() -> Path:
    """Held by whoever measures latency on this host, so that parallel trials do not disturb it."""
    root = Path(tempfile.gettempdir()) / f"tenfold-{os.getuid()}"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = root / "latency.lock"
    path.touch(mode=0o600)
    return path
