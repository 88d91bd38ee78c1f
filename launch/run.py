"""``tenfold-server run``: the same service for one job. Start, submit, watch, download, stop."""

import argparse
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from db import keys
from db.settings import Settings
from launch.options import submission
from launch.stopping import stop_on_signals, usual_workers
from launch.up import AlreadyRunning, Stack
from tenfold import Client
from tenfold.errors import BadRequest, Rejected, TenfoldError
from tenfold.progress import before_and_after, watch

__all__ = ["run"]

TEND_S = 0.5


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. The uploads are the local user's own, so a kernel without the jail's layers will do."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for path in (options.model, options.data):
        if not path.is_file():
            console.print(f"tenfold-server: there is no file {path}")
            return 2
    workers = options.workers or usual_workers()
    try:
        asked = submission(options, workers)
    except ValueError as error:
        console.print(f"tenfold-server: {error}")
        return 2
    try:
        with _folder(options.data_dir) as data:
            settings = Settings(data_dir=data, port=0, **_jail())
            with Stack(settings, workers=workers) as stack, _tended(stack):
                return _one_job(stack, options, asked, console)
    except Rejected as error:
        console.print(f"tenfold-server: {error}")
        return 3
    except BadRequest as error:
        console.print(f"tenfold-server: {error}")
        return 2
    except TenfoldError as error:
        console.print(f"tenfold-server: {error}")
        return 1
    except (AlreadyRunning, OSError, RuntimeError) as error:
        console.print(f"tenfold-server: {error}")
        return 1


def _one_job(stack: Stack, options: argparse.Namespace, asked: dict[str, Any], console: Console) -> int:
    with Client(stack.url, _key(stack)) as client:
        job = client.submit(options.model, options.data, **asked)
        watch(job, console=console)
        if job.state != "done":
            console.print(f"tenfold-server: {job.data.get('reason')} [{job.data.get('reason_code')}]")
            if options.json:
                _print_json(job.data)
            return 1
        files = job.download(options.out)
        if options.json:
            _print_json({**job.data, "files": [str(f) for f in files]})
        else:
            console.print(before_and_after(job["baseline"], job["best"]))
            console.print(f"{len(files)} files in {options.out}")
    return 0


def _key(stack: Stack) -> str:
    db = stack.database()
    try:
        with db.begin() as s:
            return keys.add(s, "local", "tenfold-server run", [keys.Scope.SUBMIT])[1]
    finally:
        db.close()


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    path = Path(tempfile.mkdtemp(prefix="tenfold-run-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _tended(stack: Stack) -> Iterator[None]:
    """Keeps the service running beside the main thread, which watches the job; signals interrupt that thread."""
    stop_on_signals(stack.group, interrupt=True)
    end = threading.Event()

    def tend() -> None:
        while not end.wait(TEND_S):
            stack.group.tend()

    thread = threading.Thread(target=tend, name="tend", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _jail() -> dict[str, Any]:
    """Best effort, unless the environment says otherwise."""
    return {} if "jail" in Settings().model_fields_set else {"jail": "best_effort"}


def _print_json(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")
