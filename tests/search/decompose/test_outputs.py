"""Fits that weigh outputs together, against the closed form and against outputs weighed one by one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose import METHODS
from search.decompose.outputs import FREE, fit_weighed
from search.matrices import matrices
from tests.search.decompose.conftest import smooth_input


def metric_of(out: int) -> Tensor:
    """Of a few directions that count much more than the others."""
    a = torch.randn(out, out, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (a * torch.logspace(0, -3, out, dtype=torch.float64)) @ a.T + 1e-4 * torch.eye(out, dtype=torch.float64)


def cost(layer: nn.Module, fitted: nn.Module, statistics: Statistics, metric: Tensor) -> float:
    """E||Q (B - V) x||^2 with Q^T Q = metric."""
    weight = matrices(layer, fitted.dense_weight().detach())[0].double()  # type: ignore[operator]
    target = torch.linalg.solve(statistics.second[0], statistics.cross[0].T).T
    gap = target - weight
    return float(torch.einsum("oi,ij,pj,op->", gap, statistics.second[0], gap, metric))


@pytest.mark.parametrize("name", FREE)
def test_a_fit_by_a_whole_matrix_costs_less_than_one_by_its_diagonal(
    name: str, statistics_of: Callable[[nn.Module, Tensor], Statistics]
) -> None:
    torch.manual_seed(1)
    layer = nn.Conv2d(8, 12, 3, padding=1)
    known, metric, method = statistics_of(layer, smooth_input(layer)), metric_of(12), METHODS[name]
    lattice = method.ranks(layer)
    ranks = lattice[len(lattice) // 2]
    whole = fit_weighed(method, layer, ranks, known, metric, None).module
    each = fit_weighed(method, layer, ranks, known, metric.diagonal(), None).module
    again = fit_weighed(method, layer, ranks, known, metric, whole).module
    costs = [cost(layer, fitted, known, metric) for fitted in (whole, each, again)]
    assert costs[0] < 0.9 * costs[1]
    assert costs[2] < 1.01 * costs[0]


def test_of_a_matrix_it_is_the_best_there_is(statistics_of: Callable[[nn.Module, Tensor], Statistics]) -> None:
    torch.manual_seed(2)
    layer = nn.Linear(9, 11)
    known, metric = statistics_of(layer, torch.randn(400, 9) @ torch.randn(9, 9)), metric_of(11)
    fitted = fit_weighed(METHODS["svd"], layer, (3,), known, metric, None).module
    target = torch.linalg.solve(known.second[0], known.cross[0].T).T
    seen = torch.linalg.cholesky(metric).T @ target @ torch.linalg.cholesky(known.second[0])
    least = float(torch.linalg.svdvals(seen)[3:].square().sum())
    assert cost(layer, fitted, known, metric) == pytest.approx(least, rel=1e-3)


def test_where_the_last_link_is_not_free_outputs_are_weighed_one_by_one(
    statistics_of: Callable[[nn.Module, Tensor], Statistics],
) -> None:
    layer = nn.Conv2d(8, 12, 3, padding=1, groups=2)
    known, metric, method = statistics_of(layer, smooth_input(layer)), metric_of(12), METHODS["svd"]
    ranks = method.ranks(layer)[1]
    fits = [fit_weighed(method, layer, ranks, known, m, None) for m in (metric, metric.diagonal())]
    assert fits[0].error == fits[1].error
