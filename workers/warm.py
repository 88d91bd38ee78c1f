"""The compute process that a worker keeps warm, for one owner and one job, and the scratch folder that goes with it."""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from db.settings import Settings
from db.tables import Task
from workers.device import memory_share
from workers.scratch import Scratch
from workers.supervise import Child

__all__ = ["CLEAN", "COMPUTE", "Processes", "Warm", "scratch_root"]

log = logging.getLogger(__name__)

COMPUTE = ("-m", "workers.compute")
CLEAN = ("-m", "workers.clean")


class Warm:
    """A compute process, its scratch folder, and what it has been used for."""

    def __init__(self, child: Child, scratch: Scratch, task: Task) -> None:
        self.child, self.scratch = child, scratch
        self.owner = task.owner
        self.job_id = task.job_id
        self.opened: dict[str, Any] | None = None
        """The job that it has opened, as it was asked to."""

    def fits(self, task: Task) -> bool:
        """One owner, one job: no upload is opened beside somebody else's, and memory is given back between jobs."""
        return task.owner == self.owner and (self.job_id is None or task.job_id in (None, self.job_id))


class Processes:
    """At most one compute process, started when a task needs one. ``compute``: the interpreter's arguments for it."""

    def __init__(self, settings: Settings, compute: Sequence[str] = COMPUTE) -> None:
        self.settings = settings
        self.warm: Warm | None = None
        self._compute = tuple(compute)

    def for_task(self, task: Task, stop: Callable[[], bool]) -> Warm:
        """The warm one if it fits, else a new one. Raises as ``Child.ready`` does."""
        warm = self.warm
        if warm is not None and warm.child.alive and warm.fits(task):
            warm.job_id = task.job_id or warm.job_id
            return warm
        self.cool()
        scratch = Scratch(scratch_root(self.settings))
        try:
            child = self._start(self._compute, scratch)
        except BaseException:
            scratch.remove()
            raise
        self.warm = Warm(child, scratch, task)
        layers = child.ready(stop=stop)
        log.info("compute process %d, jail: %s", child.pid, ", ".join(k for k, v in layers.items() if v) or "none")
        return self.warm

    def clean(self, scratch: Scratch) -> contextlib.closing[Child]:
        """A process in the same folder that cannot import Tenfold."""
        return contextlib.closing(self._start(CLEAN, scratch))

    def cool(self) -> None:
        """End it and delete its folder."""
        warm, self.warm = self.warm, None
        if warm is not None:
            warm.child.close()
            warm.scratch.remove()

    def _start(self, module: Sequence[str], scratch: Scratch) -> Child:
        limit = int(self.settings.memory_limit or memory_share())
        options = ["--scratch", str(scratch.path), "--jail", self.settings.jail, "--latency-lock", str(_latency_lock())]
        options += ["--memory", str(limit)]
        return Child([sys.executable, *module, *options], scratch.path, memory_bytes=limit)


def scratch_root(settings: Settings) -> Path:
    return settings.data_dir.absolute() / "scratch"


def _latency_lock() -> Path:
    """Held by whoever measures latency on this host, so that parallel trials do not disturb it."""
    root = Path(tempfile.gettempdir()) / f"tenfold-{os.getuid()}"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = root / "latency.lock"
    path.touch(mode=0o600)
    return path
