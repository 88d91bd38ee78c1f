"""Ranks at multiples that a device likes."""

from collections.abc import Callable, Sequence

from search.decompose.base import thin
from search.spec import CurvePoint

__all__ = ["snapped"]


def snapped(
    curve: Sequence[CurvePoint],
    multiple: int,
    cost: Callable[[tuple[int, ...]], tuple[int, int]],
    dense: tuple[int, float],
    *,
    grid: int = 0,
) -> tuple[CurvePoint, ...]:
    """The curve with every rank raised to the next multiple, and what that costs.

    The first ``grid`` ranks are of a grid of layers, which no layer has as channels, and stay. A point keeps its error,
    which higher ranks can only make smaller. Ranks beyond the curve's highest ones, which may not exist, and points
    that are no longer cheaper than the ``dense`` layer (parameters, MACs) are left out.
    """
    highest = [max(ranks) for ranks in zip(*(p.ranks for p in curve), strict=True)]
    raised: dict[tuple[int, ...], CurvePoint] = {}
    for point in curve:
        ranks = point.ranks[:grid] + tuple(-(-rank // multiple) * multiple for rank in point.ranks[grid:])
        best = raised.get(ranks)
        if any(rank > most for rank, most in zip(ranks, highest, strict=True)) or (best and best.error <= point.error):
            continue
        parameters, macs = cost(ranks)
        raised[ranks] = point.model_copy(update={"ranks": ranks, "parameters": parameters, "macs": macs})
    return thin(list(raised.values()), dense)
