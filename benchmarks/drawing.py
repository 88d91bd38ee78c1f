"""Fronts as a picture: accuracy on the test images against parameters and against MACs, one colour a tool."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

__all__ = ["draw"]

COLORS = {"tenfold": "#1a7f4b", "musco": "#c2700a", "aimet": "#5b8def", "tltorch": "#8d5bd1"}
INK = "#1c2430"


def draw(result: dict[str, Any], path: Path) -> None:
    """``result``: what ``benchmarks.front`` writes."""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    dense, epochs = result["dense"], result["epochs"]
    trained = f"{epochs:g} epochs each" if epochs else "no gradient step"
    for place, cost in enumerate(("parameters", "macs")):
        axes = figure.add_subplot(1, 2, place + 1)
        for name, entry in result["fronts"].items():
            points = sorted((p[cost], 100 * p["test"]) for p in entry["points"] if p["test"] is not None)
            if not points:
                continue
            xs, ys = zip(*points, strict=True)
            color = COLORS.get(name, INK)
            axes.scatter(xs, ys, s=30, color=color, label=name, zorder=2)
            best = [p for i, p in enumerate(points) if all(p[1] > q[1] for q in points[:i])]
            axes.plot(*zip(*best, strict=True), color=color, linewidth=1.2, drawstyle="steps-post", zorder=1)
        axes.scatter([dense[cost]], [100 * dense["test"]], marker="*", s=150, color=INK, label="original", zorder=3)
        if "trained_on" in dense:
            axes.axhline(
                100 * dense["trained_on"]["test"], color=INK, linestyle=":", linewidth=1, label="original, trained on"
            )
        axes.set_xlim(left=0)
        axes.set_xlabel("parameters" if cost == "parameters" else "multiply-accumulates")
        axes.set_ylabel("accuracy on the test images, %")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dfe4ea", linewidth=0.7)
        axes.set_axisbelow(True)
        if place == 1:
            axes.legend(frameon=False, loc="lower right")
    figure.suptitle(f"{result.get('title', 'Fronts')}, {trained}", color=INK, fontsize=11)
    figure.savefig(path, dpi=130)
