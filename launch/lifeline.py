"""Ending with the launcher: each of its children holds a pipe as standard input that closes when it is gone."""

import os
import signal
import threading

__all__ = ["end_with_stdin"]

GRACE_S = 8


def end_with_stdin() -> None:
    """Stop this process in good order at end of file on standard input, and at once when that takes too long."""
    threading.Thread(target=_watch, name="lifeline", daemon=True).start()


def _watch() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(GRACE_S)
    os._exit(1)
