import pytest
import torch
from torch import fx, nn

from search.allocate import allocate, expected_rise
from search.calibrate import collect
from search.decompose import METHODS
from search.sensitivity import measure_rises
from search.spec import CurvePoint, SiteChoice


def choice(rises: tuple[tuple[float, float], ...], sensitivity: float = 2.0) -> SiteChoice:
    return SiteChoice(site="a", dense_parameters=10, dense_macs=10, curves={}, sensitivity=sensitivity, rises=rises)


def test_without_measured_points_the_loss_is_proportional() -> None:
    assert expected_rise(choice(()), 0.3) == pytest.approx(0.6)


def test_a_square_law_is_followed_between_and_beyond_its_points() -> None:
    site = choice(((0.1, 0.02), (0.4, 0.32)))
    for error in (0.1, 0.2, 0.3, 0.4, 0.8):
        assert expected_rise(site, error) == pytest.approx(2 * error**2)
    assert expected_rise(site, 0.05) == pytest.approx(0.01)  # in proportion below the first


def test_the_expected_loss_never_falls_with_the_error() -> None:
    site = choice(((0.1, 0.05), (0.3, 0.05), (0.6, 0.2)))
    rises = [expected_rise(site, e / 50) for e in range(1, 50)]
    assert rises == sorted(rises)


def test_an_exact_point_costs_nothing() -> None:
    assert expected_rise(choice(((0.1, 0.02),)), 0.0) == 0


def test_a_layer_whose_loss_rises_late_gives_up_its_ranks_first() -> None:
    points = tuple(
        CurvePoint(ranks=(r,), parameters=10 * r, macs=10 * r, error=(1 - r / 10) ** 2) for r in range(1, 10)
    )
    early, late = (
        SiteChoice(site=name, dense_parameters=100, dense_macs=100, curves={"svd": points}, rises=rises)
        for name, rises in (("early", ((0.1, 0.3), (0.6, 1.0))), ("late", ((0.1, 0.001), (0.6, 0.5))))
    )
    plan = allocate([early, late], 0.5)
    assert "early" not in plan or plan["late"].ranks < plan["early"].ranks


def test_measured_points_rise_and_leave_the_network_alone() -> None:
    torch.manual_seed(0)
    net = fx.symbolic_trace(
        nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    )
    x = torch.randn(64, 6, 8, 8) + 1.0
    y = net(x).detach()
    statistics = collect(net, ["0"], [(x,)], samples=1)["0"]
    layer = net.get_submodule("0")
    curves = {"svd": METHODS["svd"].curve(layer, statistics, 36)}
    site = SiteChoice(site="0", dense_parameters=432, dense_macs=432 * 36, curves=curves)
    rises = measure_rises(net, site, statistics, lambda n: float((n(x) - y).square().mean()), 0.0)
    assert len(rises) >= 2
    assert [e for e, _ in rises] == sorted(e for e, _ in rises)
    assert [r for _, r in rises] == sorted(r for _, r in rises)
    assert torch.equal(net(x), y)
