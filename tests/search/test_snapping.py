"""Ranks at multiples: raised, priced anew, never dearer than the layer."""

import pytest
import torch
from torch import nn

from search.decompose import METHODS
from search.snapping import snapped
from search.spec import CurvePoint


@pytest.mark.parametrize("method", ["svd", "tucker2", "cp3", "tt", "r_tucker"])
def test_every_rank_is_a_multiple_with_its_own_cost_and_an_error_that_the_fit_keeps(method: str) -> None:
    torch.manual_seed(0)
    layer, m = nn.Conv2d(24, 32, 3, padding=1), METHODS[method]
    dense = (sum(p.numel() for p in layer.parameters()), layer.weight.numel() * 64)
    curve = snapped(m.curve(layer, None, 64), 4, lambda ranks: m.cost(layer, ranks, 64), dense)
    assert curve
    for point in curve:
        assert all(rank % 4 == 0 for rank in point.ranks)
        assert (point.parameters, point.macs) == m.cost(layer, point.ranks, 64)
        assert point.parameters < dense[0]
        assert point.macs <= dense[1]
    point = curve[len(curve) // 2]
    assert m.factorize(layer, point.ranks).error <= point.error * 1.001


def test_a_layer_without_such_ranks_has_no_points() -> None:
    points = [CurvePoint(ranks=(r,), parameters=10 * r, macs=10 * r, error=1 / r) for r in range(1, 6)]
    assert snapped(points, 8, lambda ranks: (10 * ranks[0], 10 * ranks[0]), (60, 60)) == ()
    assert [p.ranks for p in snapped(points, 4, lambda ranks: (10 * ranks[0], 10 * ranks[0]), (60, 60))] == [(4,)]
    (kept,) = snapped(points, 4, lambda ranks: (10 * ranks[0], 10 * ranks[0]), (60, 60))
    assert kept.error == 1 / 4  # of the best point that was raised to it
