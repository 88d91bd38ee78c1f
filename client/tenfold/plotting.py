"""The trade-off as a picture, with matplotlib (``pip install 'tenfold[plot]'``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import TenfoldError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COSTS", "FRACTIONS", "draw"]

COSTS = {"parameters": "parameters", "macs": "macs", "bytes": "bytes", "latency": "latency_ms"}
"""A cost as a job names it, and its field among the figures of a network."""
FRACTIONS = ("accuracy", "top5", "agreement", "miou", "pixel_accuracy", "pck")
RUNGS = {
    "cheap": ("untrained", "#9aa7b8"),
    "short": ("short training", "#5b8def"),
    "full": ("fully trained", "#1a7f4b"),
}
INK = "#1c2430"


def draw(
    job: dict[str, Any],
    trials: Sequence[dict[str, Any]],
    front: Sequence[dict[str, Any]],
    cost: str,
    path: str | Path | None,
) -> Figure:
    """Every measured candidate by how far it was trained, the front, the original and the budget.

    Args:
        job: its JSON. trials, front: items of those listings.
        cost: one of ``COSTS``; on a linear axis from 0.
        path: where the picture is saved (its ending names the format); None saves nothing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise TenfoldError("plots are drawn by matplotlib, which is not installed: pip install 'tenfold[plot]'") from e

    metric = (job.get("baseline") or {}).get("metric") or "metric"
    scale = 100.0 if metric in FRACTIONS else 1.0
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    measured = [t["result"] for t in trials if t.get("result") and t["result"]["value"] is not None]
    for rung, (name, color) in RUNGS.items():
        some = _xy([r for r in measured if r["rung"] == rung], cost, scale)
        if some:
            xs, ys = zip(*some, strict=True)
            axes.scatter(xs, ys, s=46 if rung == "full" else 26, color=color, alpha=0.8, label=name)
    line = sorted(_xy(front, cost, scale))
    if line:
        axes.plot(*zip(*line, strict=True), color="#c2700a", drawstyle="steps-post", label="front", zorder=1)
    if job.get("baseline"):
        _original(axes, job["baseline"], cost, scale, metric)
    axes.set_xlim(left=0)
    axes.set_xlabel("latency, ms" if cost == "latency" else cost)
    axes.set_ylabel(f"{metric}, %" if scale == 100.0 else metric)
    axes.set_title(str(job.get("name", "")), loc="left", color=INK, fontsize=11)
    if cost != "latency":
        axes.xaxis.set_major_formatter(_engineering)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dfe4ea", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower right" if metric in FRACTIONS else "upper right")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _xy(points: Sequence[dict[str, Any]], cost: str, scale: float) -> list[tuple[float, float]]:
    field = COSTS[cost]
    return [
        (p["costs"][field], scale * p["value"])
        for p in points
        if p["value"] is not None and p["costs"].get(field) is not None
    ]


def _original(axes: Any, baseline: dict[str, Any], cost: str, scale: float, metric: str) -> None:
    x = baseline["costs"].get(COSTS[cost])
    if x is not None:
        axes.scatter([x], [scale * baseline["value"]], marker="*", s=150, color=INK, label="original", zorder=3)
    lost = baseline["max_drop"]
    if metric in FRACTIONS:
        kept = baseline["value"] - lost
    elif metric == "mse":  # a drop of a loss is relative
        kept = baseline["value"] * (1 + lost)
    else:
        kept = baseline["value"] + lost
    axes.axhline(scale * kept, color="#b3261e", linestyle=":", linewidth=1.3, label="budget")


def _engineering(value: float, _: object = None) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"
