"""Small charts as inline SVG text: no script, readable on light and dark, each drawn beside its table."""

from collections.abc import Sequence
from html import escape

__all__ = ["Point", "bar", "line", "scatter"]

Point = tuple[float, float, str]
"""x, y, and what hovering says."""

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 44


def scatter(
    points: Sequence[Point],
    *,
    x_title: str,
    y_title: str,
    chosen: Point | None = None,
) -> str:
    """Points in a plane; ``chosen`` is marked."""
    everything = [*points, *([chosen] if chosen else [])]
    scale = _Scale([p[0] for p in everything], [p[1] for p in everything])
    drawn = [f'<circle class="dot" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="4">{_title(t)}</circle>'
             for x, y, t in points]  # fmt: skip
    if chosen:
        x, y, text = chosen
        drawn.append(
            f'<circle class="chosen" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="6">{_title(text)}</circle>'
        )
    return _frame(scale, drawn, x_title, y_title)


def line(points: Sequence[Point], *, x_title: str, y_title: str) -> str:
    """Points joined in order."""
    scale = _Scale([p[0] for p in points], [p[1] for p in points])
    path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y, _ in points)
    drawn = [f'<polyline class="path" points="{path}"/>']
    drawn += [
        f'<circle class="dot" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3">{_title(t)}</circle>'
        for x, y, t in points
    ]
    return _frame(scale, drawn, x_title, y_title)


def bar(share: float) -> str:
    """A bar for a table's cell: ``share`` of the full width, 0 to 1."""
    width = 100 * min(max(share, 0.0), 1.0)
    return (
        f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{width:.0f} %">'
        f'<rect class="rail" width="100" height="10"/><rect class="fill" width="{width:.1f}" height="10"/></svg>'
    )


class _Scale:
    """Data to picture, with a margin, and round numbers to write at the axes."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.x_low, self.x_high = _around(xs)
        self.y_low, self.y_high = _around(ys)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def _around(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or max(abs(high) * 0.05, 1e-6)
    return low - margin, high + margin


def _frame(scale: _Scale, drawn: list[str], x_title: str, y_title: str) -> str:
    axes = []
    for i in range(5):
        x = scale.x_low + (scale.x_high - scale.x_low) * i / 4
        y = scale.y_low + (scale.y_high - scale.y_low) * i / 4
        axes.append(f'<text x="{scale.x(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_short(x)}</text>')
        axes.append(f'<text x="{LEFT - 6}" y="{scale.y(y) + 4:.1f}" text-anchor="end">{_short(y)}</text>')
        axes.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{scale.y(y):.1f}" y2="{scale.y(y):.1f}"/>'
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    axes.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>'
    )
    axes.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>')
    label = escape(f"{y_title} against {x_title}", quote=True)
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return head + "".join(axes + drawn) + "</svg>"


def _short(value: float) -> str:
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"
