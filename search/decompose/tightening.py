"""A whole curve's errors from few fits.

A cheap error (a whitened start, a closed form) overstates what fitting reaches, by a share that changes slowly along a
curve. So a few points are fitted; each other point takes the share of the fitted one on either side that gained less.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

from search.spec import CurvePoint

__all__ = ["tightened"]


def tightened(
    points: Sequence[CurvePoint], floor: float, fitted: Callable[[tuple[int, ...]], float], count: int
) -> tuple[CurvePoint, ...]:
    """The points with the share of their error that fitting leaves.

    Args:
        points: a curve with cheap errors, in order of parameters, as ``thin`` gives it.
        floor: the part of every point's error that no fit can take away.
        fitted: the error at some ranks after fitting; a larger one than the cheap one counts as equal to it.
        count: how many points are fitted: the first, the last and evenly between them.
    """
    if not points or count < 1:
        return tuple(points)
    chosen = [points[i] for i in sorted({round(k * (len(points) - 1) / max(count - 1, 1)) for k in range(count)})]
    places = [p.parameters for p in chosen]
    shares = []
    for p in chosen:
        rough = p.error - floor
        shares.append(min(max(fitted(p.ranks) - floor, 0.0) / rough, 1.0) if rough > 0 else 1.0)

    def better(p: CurvePoint) -> CurvePoint:
        share = _larger_neighbour(places, shares, p.parameters)
        return p.model_copy(update={"error": floor + share * max(p.error - floor, 0.0)})

    return tuple(better(p) for p in points)


def _larger_neighbour(places: Sequence[float], values: Sequence[float], x: float) -> float:
    """The larger of the values at the two rising ``places`` around ``x``, or that of the nearest one outside."""
    left, right = bisect_right(places, x) - 1, bisect_left(places, x)
    return max(values[max(left, 0)], values[min(right, len(places) - 1)])
