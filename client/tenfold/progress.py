"""A job's progress in the terminal: stage, trial, best so far, time left."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .errors import JobFailed
from .resources import Job

__all__ = ["before_and_after", "figures", "watch"]

_ORDER = ("queued", "profiling", "searching", "refining", "exporting", "done")


def watch(job: Job, *, console: Console | None = None, timeout: float | None = None) -> Job:
    """Show the job live until it ends, also where there is no terminal (then a line at each change).

    Returns the job in whatever state it ended; raises ``WaitTimeout`` only.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        return _watch_lines(job, console, timeout)
    progress = Progress(
        TextColumn("[bold]{task.fields[state]:<9}[/]"),
        BarColumn(bar_width=28),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
    )
    task = progress.add_task("", state=job.state, total=100)

    def draw(now: Job) -> None:
        progress.update(task, state=now.state, completed=100 * _fraction(now.data), description=_line(now.data))

    with Live(progress, console=console, refresh_per_second=4, transient=False):
        _until_ended(job, draw, timeout)
        draw(job)
    return job


def _watch_lines(job: Job, console: Console, timeout: float | None) -> Job:
    last = ""

    def say(now: Job) -> None:
        nonlocal last
        line = f"{now.state:<9} {_line(now.data)}"
        # The time left changes at every look; a line for that alone would only be noise.
        if line.split(" · about")[0] != last:
            last = line.split(" · about")[0]
            console.print(line, highlight=False, soft_wrap=True)

    _until_ended(job, say, timeout)
    return job


def _until_ended(job: Job, show: Callable[[Job], None], timeout: float | None) -> None:
    with suppress(JobFailed):
        job.wait(timeout, on_change=show)


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
    """One point in a phrase: ``97.9 % at ÷3.2``."""
    words = []
    if (value := point.get("value")) is not None:
        words.append(f"{100 * value:.2f} %" if 0 <= value <= 1 else f"{value:.4g}")
    if baseline and point.get("costs") and baseline.get("costs"):
        words.append(f"at ÷{baseline['costs']['parameters'] / max(1, point['costs']['parameters']):.2f} parameters")
    return " ".join(words)


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
    if baseline.get("value") is not None and best.get("value") is not None:
        drop = best["value"] - baseline["value"]
        name = str(baseline.get("metric", "metric"))
        table.add_row(name, f"{baseline['value']:.4f}", f"{best['value']:.4f}", f"{drop:+.4f}")
    for name, unit in (("parameters", ""), ("macs", ""), ("bytes", "")):
        if before.get(name) and after.get(name):
            table.add_row(name + unit, f"{before[name]:,}", f"{after[name]:,}", f"÷{before[name] / after[name]:.2f}")
    if after.get("latency_ms") and after.get("dense_latency_ms"):
        dense, small = after["dense_latency_ms"], after["latency_ms"]
        table.add_row("latency, ms", f"{dense:.2f}", f"{small:.2f}", f"÷{dense / small:.2f}")
    return table
