"""``tenfold-server up``: start everything, say where it is, keep it running, stop it in good order."""

import sys

from rich.console import Console

from db.settings import Settings
from launch.keys import first_admin_key
from launch.stopping import stop_on_signals, usual_workers
from launch.up import AlreadyRunning, Stack

__all__ = ["serve"]

TEND_S = 0.5


def serve(settings: Settings, *, workers: int | None, verbose: bool) -> int:
    """Returns the exit status. Ctrl-C stops in good order; a second one stops at once."""
    console = Console(highlight=False, soft_wrap=True)
    stack = Stack(settings, workers=workers or usual_workers(), verbose=verbose)
    stop_on_signals(stack.group)
    try:
        with stack:
            _greet(console, stack)
            while not stack.group.asked_to_stop.wait(TEND_S):
                stack.group.tend()
            console.print("stopping (Ctrl-C again to stop at once)")
    except (AlreadyRunning, OSError, RuntimeError) as error:
        print(f"tenfold-server: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _greet(console: Console, stack: Stack) -> None:
    db = stack.database()
    try:
        secret = first_admin_key(db, stack.settings)
    finally:
        db.close()
    console.print(f"Tenfold is up: {stack.url}  (data in {stack.data}, {stack.workers} workers)")
    if secret is not None:
        console.print(f"admin key, shown this once: {secret}")
    console.print("Ctrl-C stops it.")
