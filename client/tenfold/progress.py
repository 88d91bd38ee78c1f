"""A job's progress in the terminal: stage, trial, best so far, time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .errors import JobFailed
from .plotting import FRACTIONS
from .resources import Job, JobOperations

__all__ = ["Lines", "before_and_after", "figures", "shown", "watch"]

PAUSE = 60.0
"""Seconds between lines that tell how far a long step is."""
_ORDER = ("queued", "profiling", "searching", "refining", "exporting", "done")


def watch(job: Job, *, console: Console | None = None, timeout: float | None = None) -> Job:
    """Show the job live until it ends, also where there is no terminal (see ``Lines``).

    Returns the job in whatever state it ended; raises ``WaitTimeout`` only.
    """
    with shown(job, console) as show, suppress(JobFailed):
        job.wait(timeout, on_change=show)
    return job


@contextmanager
def shown(job: JobOperations[Any], console: Console | None = None) -> Iterator[Callable[[JobOperations[Any]], None]]:
    """Gives the function that shows the job's present state: what ``on_change`` of ``wait`` is made for."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield Lines(console)
        return
    progress = Progress(
        TextColumn("[bold]{task.fields[state]:<9}[/]"),
        BarColumn(bar_width=28),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
    )
    task = progress.add_task("", state=job.state, total=100)

    def draw(now: JobOperations[Any]) -> None:
        line = escape(_line(now.data))
        progress.update(task, state=now.state, completed=100 * _fraction(now.data), description=line)

    with Live(progress, console=console, refresh_per_second=4, transient=False):
        yield draw


class Lines:
    """A line when the job's state changes or its best candidate does; of all else one a minute. For files and logs."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self.known: tuple[Any, ...] = ()
        self.last, self.at = "", -inf

    def __call__(self, now: JobOperations[Any]) -> None:
        line, at = f"{now.state:<9} {_line(now.data)}", self.clock()
        known = (now.state, figures(now.data.get("best") or {}, now.data.get("baseline")))
        # The time left changes at every look; a line for that alone would only be noise.
        said = line.split(" · about")[0]
        if known != self.known or (said != self.last and at - self.at >= PAUSE):
            self.known, self.last, self.at = known, said, at
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)


def _fraction(data: dict[str, Any]) -> float:
    """How far it is, in [0, 1]: the stages' usual shares, trials counted within the search."""
    starts = {"queued": 0.0, "profiling": 0.02, "searching": 0.1, "refining": 0.7, "exporting": 0.95, "done": 1.0}
    state = str(data["state"])
    if state not in starts:
        return 1.0 if state in Job.TERMINAL else 0.5
    begin = starts[state]
    end = starts[_ORDER[min(_ORDER.index(state) + 1, len(_ORDER) - 1)]]
    progress = data.get("progress") or {}
    asked = progress.get("trials_asked") or 0
    part = (progress.get("trials_done") or 0) / asked if state == "searching" and asked else _running_part(progress)
    return begin + (end - begin) * min(1.0, part)


def _running_part(progress: dict[str, Any]) -> float:
    parts = [r["done"] / r["of"] for r in progress.get("running", []) if r.get("of")]
    return sum(parts) / len(parts) if parts else 0.0


def _line(data: dict[str, Any]) -> str:
    progress = data.get("progress") or {}
    words = []
    if progress.get("trials_asked"):
        words.append(f"trial {progress.get('trials_done', 0)} of {progress['trials_asked']}")
    if best := data.get("best"):
        words.append(f"best {figures(best, data.get('baseline'))}")
    words += [str(r["message"]) for r in progress.get("running", [])[:1] if r.get("message")]
    if data.get("eta_seconds") is not None and data["state"] not in Job.TERMINAL:
        words.append(f"about {time_left(float(data['eta_seconds']))} left")
    if data["state"] in ("failed", "cancelled") and data.get("reason"):
        words = [str(data["reason"])]
    return " · ".join(words)


def figures(point: dict[str, Any], baseline: dict[str, Any] | None) -> str:
    """One point in a phrase: ``97.90 % at ÷3.20 parameters``."""
    baseline = baseline or {}
    words = []
    if (value := point.get("value")) is not None:
        words.append(_value(value, baseline.get("metric")))
    if point.get("costs") and baseline.get("costs"):
        words.append(f"at ÷{baseline['costs']['parameters'] / max(1, point['costs']['parameters']):.2f} parameters")
    return " ".join(words)


def _value(value: float, metric: str | None) -> str:
    return f"{100 * value:.2f} %" if metric in FRACTIONS else f"{value:.4g}"


def time_left(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def before_and_after(baseline: dict[str, Any], best: dict[str, Any]) -> Table:
    """Before and after, side by side."""
    table = Table(title="Before and after", show_edge=False, pad_edge=False)
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    before, after = baseline["costs"], best["costs"]
    metric = str(baseline.get("metric", "metric"))
    for name, field in ((metric, "value"), (f"{metric} on unseen data", "verify_value")):
        if baseline.get(field) is not None and best.get(field) is not None:
            change = best[field] - baseline[field]
            table.add_row(name, f"{baseline[field]:.4f}", f"{best[field]:.4f}", f"{change:+.4f}")
    for name in ("parameters", "macs", "bytes"):
        if before.get(name) and after.get(name):
            table.add_row(name, f"{before[name]:,}", f"{after[name]:,}", f"÷{before[name] / after[name]:.2f}")
    if after.get("latency_ms") and after.get("dense_latency_ms"):
        dense, small = after["dense_latency_ms"], after["latency_ms"]
        table.add_row("latency, ms", f"{dense:.2f}", f"{small:.2f}", f"÷{dense / small:.2f}")
    return table
