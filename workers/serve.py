"""A child process that answers requests from inside the jail: what ``workers.compute`` and ``workers.clean`` share."""

import argparse
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from search.errors import TenfoldError
from search.spec import Outcome
from workers import jail
from workers.child import Channel

__all__ = ["Operation", "serve"]


class Operation(Protocol):
    def __call__(self, arguments: Mapping[str, Any], context: "Context", /) -> Any: ...


class Context:
    """What an operation has at hand: its scratch folder, a way to report, and the job's session once it is opened."""

    def __init__(self, channel: Channel, scratch: Path, latency_lock: int | None) -> None:
        self.channel = channel
        self.scratch = scratch
        self.latency_lock = latency_lock
        self.session: Any = None

    def report(self, message: str, done: float, of: float) -> None:
        self.channel.send(progress={"message": message, "done": done, "of": of})

    def checkpoint(self, path: Path) -> None:
        """Hand a checkpoint file of the scratch folder to the worker, which stores it for the next attempt."""
        self.channel.send(checkpoint=str(path.relative_to(self.scratch)))

    def there(self, name: str) -> Path:
        """A file of the scratch folder."""
        return self.scratch / name

    def perhaps(self, name: str | None) -> Path | None:
        return None if name is None else self.scratch / name

    def folder(self, name: str) -> Path:
        path = self.scratch / name
        path.mkdir(parents=True, exist_ok=True)
        return path


def serve(operations: Mapping[str, Operation], prepare: Callable[[], None], argv: list[str] | None = None) -> None:
    """Enter the jail, then answer requests until the parent closes the pipe.

    ``prepare`` imports what the operations need. It runs in the jail, which must be entered by a process of one thread,
    before torch starts its own.
    """
    options = _options(argv)
    channel = Channel()
    lock = os.open(options.latency_lock, os.O_RDWR) if options.latency_lock else None
    try:
        layers = _enter(options)
    except jail.JailUnavailable as error:
        channel.send(error={"code": "jail_unavailable", "message": str(error)})
        return
    channel.watch()
    prepare()
    context = Context(channel, options.scratch, lock)
    channel.send(ready=layers)
    for request in channel.requests():
        _answer(operations, request, context)


def _enter(options: argparse.Namespace) -> dict[str, bool]:
    if options.jail == "off":
        return {}
    # CUDA reserves address space by the hundred GiB: there the worker's own watch on memory has to do.
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    memory = None if has_gpu else options.memory
    return jail.enter(options.scratch, memory_bytes=memory, require=options.jail == "require")


def _answer(operations: Mapping[str, Operation], request: Mapping[str, Any], context: Context) -> None:
    try:
        result = operations[request["op"]](request["arguments"], context)
    except TenfoldError as error:
        context.channel.send(error={"code": error.code, "message": error.message})
    except BaseException as error:
        known = _known(error)
        if known is None:
            traceback.print_exc()
            context.channel.send(crash=type(error).__name__)
        else:
            context.channel.send(error=known)
    else:
        context.channel.send(result=result)


def _known(error: BaseException) -> dict[str, str] | None:
    """Failures of the machine that trying again would only repeat, as advice."""
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in str(error):
        return {"code": "out_of_memory", "message": Outcome.OUT_OF_MEMORY.value}
    if isinstance(error, OSError) and error.errno in (28, 122):  # ENOSPC, EDQUOT
        return {"code": "disk_full", "message": "the worker's disk is full: free space, or set TENFOLD_DATA_DIR"}
    return None


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workers.compute")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--jail", choices=("require", "best_effort", "off"), default="require")
    parser.add_argument("--memory", type=int, default=None)
    parser.add_argument("--latency-lock", type=Path, default=None)
    return parser.parse_args(argv)
