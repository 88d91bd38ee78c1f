"""One worker process: a Celery worker that only gets woken, and the loop, sweeper and compute process behind it.

Celery's threads pool with one thread: prefork children could not fork data loaders, and CUDA dies in a fork. This
process never imports torch.
"""

import os

os.environ.setdefault("REMAP_SIGTERM", "SIGQUIT")  # read once by billiard, when Celery's worker is imported

import logging
import secrets
import signal
import socket
import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

from celery.platforms import SecurityWarning
from celery.signals import setup_logging, worker_ready

from db.engine import Database
from db.settings import Settings
from workers import jail
from workers.queue import TASK, broker_url, make_app
from workers.run import Runner
from workers.sweep import Sweeper
from workers.warm import COMPUTE

__all__ = ["run_worker"]

log = logging.getLogger(__name__)


def run_worker(settings: Settings, *, compute: Sequence[str] = COMPUTE) -> int:
    """Work until told to stop (SIGTERM: the task in hand goes back to the queue first). Returns the exit status.

    ``compute``: the arguments of the interpreter that start a compute process.
    """
    if settings.redis_url is None:
        log.error("TENFOLD_REDIS_URL is not set: a worker on its own needs the broker that the API uses")
        return 2
    url = broker_url(settings.redis_url)
    app = make_app(url)
    db = Database(settings.database, blob_url=settings.blob_url)
    db.migrate()
    name = f"{socket.gethostname()[:36]}-{os.getpid()}-{secrets.token_hex(4)}"
    runner = Runner(db, settings, name, compute=compute)
    sweeper = Sweeper(db, settings, name)

    app.task(runner.work, name=TASK, ignore_result=True)

    def ready(**_: Any) -> None:
        _stop_first(runner)
        sweeper.start()

    worker_ready.connect(ready, weak=False)
    setup_logging.connect(_leave_logging_alone, weak=False)
    logging.getLogger("celery").setLevel(logging.WARNING)
    # Celery warns root of pickled messages; only JSON is accepted here, and what opens uploads is in a jail.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    sweeper.be_seen()
    if missing := [name for name, holds in jail.layers(settings.jail).items() if not holds]:
        log.warning("TENFOLD_JAIL=%s: uploads are opened without %s", settings.jail, ", ".join(missing))
    try:
        options = ["--pool=threads", "--concurrency=1", f"--queues={settings.queue}", f"--hostname={name}@%h"]
        quiet = ["--loglevel=WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        app.worker_main(["--quiet", "worker", *options, *quiet])
    except SystemExit as end:
        return _status(end)
    finally:
        worker_ready.disconnect(ready)
        runner.stop()
        sweeper.stop()
        runner.close()
        db.close()
    return 0


def _stop_first(runner: Runner) -> None:
    """Let go of the task in hand before Celery's own handlers wait for the pool's thread to end."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        inner = signal.getsignal(number)

        def handle(n: int, frame: FrameType | None, inner: Any = inner) -> None:
            runner.stop()
            if callable(inner):
                inner(n, frame)

        signal.signal(number, handle)


def _leave_logging_alone(**_: Any) -> None:
    """Celery sets up logging only when nobody else says that he does."""


def _status(end: SystemExit) -> int:
    return end.code if isinstance(end.code, int) else 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.exit(run_worker(Settings()))
