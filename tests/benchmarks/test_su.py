"""The paper's experiment compares what is really of one size."""

import pytest
from torch import nn

from benchmarks.papers.su import PAIRS, RATES, plan_at, ranks_at, run
from benchmarks.papers.table import Settings
from search import cost
from search.decompose import METHODS
from search.intake.architectures import resnet_cifar
from tenfold.layers import factorized_like

METHODS_HERE = [method for pair in PAIRS for method in pair]


@pytest.mark.parametrize("method", METHODS_HERE)
def test_a_rate_is_of_the_parameters_that_the_layer_really_has(method: str) -> None:
    layer = nn.Conv2d(64, 64, 3, bias=False)
    for rate in RATES:
        built = factorized_like(layer, method, ranks_at(layer, method, rate))
        kept = cost.parameters(built) / layer.weight.numel()
        assert 0.65 * rate < kept <= rate


@pytest.mark.parametrize("method", METHODS_HERE)
def test_a_larger_rate_never_keeps_less(method: str) -> None:
    layer = nn.Conv2d(16, 32, 3, bias=False)
    kept = [METHODS[method].cost(layer, ranks_at(layer, method, rate), 1)[0] for rate in sorted(RATES)]
    assert kept == sorted(kept)


def test_a_rate_below_the_smallest_ranks_gives_those() -> None:
    assert ranks_at(nn.Conv2d(16, 16, 3), "svd", 1e-3) == (1,)
    assert ranks_at(nn.Conv2d(16, 16, 3), "tucker2", 1e-3) == (1, 1)


def test_the_stem_and_the_dense_layer_are_left_alone() -> None:
    plan = plan_at(resnet_cifar(8), "svd", 0.2)
    assert len(plan) == 6
    assert all(site.startswith("layer") for site in plan)


def test_a_trained_network_is_asked_for() -> None:
    with pytest.raises(ValueError, match="--weights"):
        run(Settings(), lambda table: None)
