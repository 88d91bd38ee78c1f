"""What has been reached: the best measurement of a trial, never-grow, Pareto fronts and hypervolume. Plain Python."""

import math
from collections.abc import Iterable, Sequence

from search.spec import BEYOND_CHANCE, Cost, Costs, Outcome, Rung, TrialRecord, TrialResult

__all__ = ["dominates", "front", "hypervolume", "improvement", "is_cheaper", "kept", "measured", "ratios", "size"]

_HIGHEST_FIRST = (Rung.FULL, Rung.SHORT, Rung.CHEAP)
_USABLE = (Outcome.OK, Outcome.DIVERGED)
"""A diverged fine-tuning kept its best weights before it, and was measured with them."""

Point = tuple[float, ...]


def measured(record: TrialRecord, *, upto: Rung = Rung.FULL) -> TrialResult | None:
    """The usable result of the highest rung reached, none above ``upto``; None when there is none yet."""
    for rung in _HIGHEST_FIRST[_HIGHEST_FIRST.index(upto) :]:
        result = record.results.get(rung)
        if result is not None and result.outcome in _USABLE and result.drop is not None:
            return result
    return None


def kept(costs: Costs, dense: Costs, cost: Cost) -> float:
    """Share of the dense network's cost that is left.

    Latency compares with the dense run that was interleaved with it; where it was not measured (early rungs), the
    multiply-accumulates stand in for it, so that objectives stay finite.
    """
    if cost is Cost.LATENCY:
        reference = costs.dense_latency_ms or dense.latency_ms
        if costs.latency_ms is not None and reference:
            return costs.latency_ms / reference
        cost = Cost.MACS
    return costs.of(cost) / max(dense.of(cost), 1.0)


def ratios(costs: Costs, dense: Costs, minimize: Sequence[Cost]) -> Point:
    return tuple(kept(costs, dense, cost) for cost in minimize)


def size(costs: Costs, dense: Costs, minimize: Sequence[Cost]) -> float:
    """One figure for several costs: the geometric mean of the shares kept (1 = the dense network)."""
    shares = ratios(costs, dense, minimize)
    return math.exp(sum(math.log(max(share, 1e-12)) for share in shares) / len(shares))


def is_cheaper(costs: Costs, dense: Costs, minimize: Sequence[Cost]) -> bool:
    """Never grow: strictly below the original in every cost that is minimized, latency by more than chance explains."""
    chance = {Cost.LATENCY: BEYOND_CHANCE * costs.latency_noise}
    return all(kept(costs, dense, cost) < 1.0 - chance.get(cost, 0.0) for cost in minimize)


def dominates(a: Point, b: Point) -> bool:
    """``a`` is nowhere worse and somewhere better; smaller is better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def front(
    history: Iterable[TrialRecord], costs: Sequence[Cost] = (Cost.PARAMETERS,), *, dense: Costs | None = None
) -> list[TrialRecord]:
    """The trials that no other beats in (drop on the select split, each cost), cheapest first.

    A trial counts with the highest rung it reached: each is a network that exists. ``dense``: the original's costs;
    when given, trials that are not cheaper in every cost are left out. Of equal points the first stays.
    """
    points: dict[Point, TrialRecord] = {}
    for record in history:
        result = measured(record)
        if result is None or result.drop is None or (dense is not None and not is_cheaper(result.costs, dense, costs)):
            continue
        figures = tuple(result.costs.of(cost) for cost in costs)
        if not any(math.isnan(figure) for figure in figures):
            points.setdefault((*figures, result.drop), record)
    best: list[Point] = []
    for point in sorted(points):  # a point can only be dominated by one that sorts before it
        if not any(dominates(other, point) for other in best):
            best.append(point)
    return [points[point] for point in best]


def hypervolume(points: Iterable[Point], reference: Point) -> float:
    """Volume dominated by ``points`` below ``reference`` (all minimized), by slicing the last coordinate.

    O(n² log n) in three dimensions: meant for fronts of tens of points.
    """
    inside = [p for p in set(points) if all(x < r for x, r in zip(p, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(p[0] for p in inside)
    inside.sort(key=lambda p: p[-1])
    volume = 0.0
    for i, point in enumerate(inside):
        upper = inside[i + 1][-1] if i + 1 < len(inside) else reference[-1]
        if upper > point[-1]:
            volume += (upper - point[-1]) * hypervolume([p[:-1] for p in inside[: i + 1]], reference[:-1])
    return volume


def improvement(point: Point, points: Sequence[Point], reference: Point) -> float:
    """What ``point`` would add to the hypervolume of ``points``."""
    if any(p == point or dominates(p, point) for p in points):
        return 0.0
    return hypervolume([*points, point], reference) - hypervolume(points, reference)
