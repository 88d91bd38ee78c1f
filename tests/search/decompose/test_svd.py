from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from search.decompose import METHODS

from .conftest import smooth_input
from .contract import Contract, StatisticsOf, conv_layers, transposed_layers


class TestSVDOfTransposed(Contract):
    method = "svd"
    layers = transposed_layers()

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        return (layer.out_channels // layer.groups,)


class TestSVDOfEmbedding(Contract):
    method = "svd"
    layers: ClassVar = {
        "tall": lambda: nn.Embedding(60, 12),
        "wide": lambda: nn.Embedding(14, 20),
        "padded": lambda: nn.Embedding(40, 12, padding_idx=0),
    }

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        return (min(layer.weight.shape),)

    def test_its_stated_error_is_the_error_of_its_outputs(self, name: str, statistics_of: StatisticsOf) -> None:
        """With no bias to take up the mean, an error of the mean is an error."""
        layer = self.layers[name]()
        x = smooth_input(layer)
        fit = self.m.factorize(layer, self.middle(layer), statistics_of(layer, x))
        y, z = layer(x).detach(), fit.module(x).detach()
        assert fit.error == pytest.approx(float((y - z).square().sum() / (y - y.mean(0)).square().sum()), rel=4e-3)


class TestSVD(Contract):
    method = "svd"
    layers = conv_layers() | {
        "linear": lambda: nn.Linear(20, 14),
        "wide linear": lambda: nn.Linear(8, 30, bias=False),
        "pointwise": lambda: nn.Conv2d(16, 12, 1),
        "conv1d": lambda: nn.Conv1d(12, 10, 5, padding=2, stride=2),
        "conv3d": lambda: nn.Conv3d(8, 10, 3, padding=1),
    }

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        groups = getattr(layer, "groups", 1)
        return (min(layer.weight.shape[0] // groups, layer.weight[0].numel()),)


def test_without_statistics_it_is_the_truncated_svd_of_numpy() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 9, 3)
    fit = METHODS["svd"].factorize(layer, (4,))
    w = layer.weight.detach().double().numpy().reshape(9, -1)
    u, s, v = np.linalg.svd(w, full_matrices=False)
    best = (u[:, :4] * s[:4]) @ v[:4]
    np.testing.assert_allclose(fit.module.dense_weight().detach().numpy().reshape(9, -1), best, atol=1e-5)
    assert fit.error == pytest.approx((s[4:] ** 2).sum() / (s**2).sum(), rel=1e-6)


def test_with_statistics_it_is_reduced_rank_regression_written_out_in_numpy(statistics_of: StatisticsOf) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 9)
    x = smooth_input(layer)
    fit = METHODS["svd"].factorize(layer, (3,), statistics_of(layer, x))
    a = x.double().numpy() - x.double().numpy().mean(0)
    y = a @ layer.weight.detach().double().numpy().T
    u = np.linalg.svd(y, full_matrices=False)[2][:3]  # principal directions of the outputs
    best = u.T @ u @ layer.weight.detach().double().numpy()
    np.testing.assert_allclose(fit.module.dense_weight().detach().numpy(), best, atol=1e-4)


def test_a_metric_moves_the_error_away_from_the_outputs_that_count(statistics_of: StatisticsOf) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 8)
    x = smooth_input(layer)
    statistics = statistics_of(layer, x)
    weights = torch.tensor([100.0] * 2 + [1.0] * 6)
    plain = METHODS["svd"].factorize(layer, (3,), statistics).module
    aimed = METHODS["svd"].factorize(layer, (3,), statistics, metric=weights).module
    gap = lambda m: (m(x) - layer(x)).detach()[:, :2].std(0).sum()  # noqa: E731
    assert gap(aimed) < gap(plain)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("tt_matrix", "spatial_svd")])
def test_depthwise_convolutions_are_refused_with_the_reason(name: str) -> None:
    reason = METHODS[name].applies_to(nn.Conv2d(16, 16, 3, groups=16))
    assert reason is not None
    assert "depthwise" in reason


def test_no_method_makes_a_depthwise_kernel_of_one_axis_smaller() -> None:
    reasons = {name: method.applies_to(nn.Conv1d(16, 16, 3, groups=16)) for name, method in METHODS.items()}
    assert all(reasons.values()), reasons


@pytest.mark.parametrize("name", list(METHODS))
def test_other_layers_are_refused_with_the_reason(name: str) -> None:
    reason = METHODS[name].applies_to(nn.LayerNorm(8))
    assert reason is not None
    assert "LayerNorm" in reason


def test_an_embeddings_factors_are_numpys_for_rows_weighed_by_their_frequency(statistics_of: StatisticsOf) -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(30, 10)
    tokens = smooth_input(layer)
    fit = METHODS["svd"].factorize(layer, (4,), statistics_of(layer, tokens))
    w = layer.weight.detach().double().numpy()
    root = np.sqrt(np.bincount(tokens.numpy(), minlength=30) + 0.5)[:, None]
    u, s, v = np.linalg.svd(root * w, full_matrices=False)
    np.testing.assert_allclose(fit.module.dense_weight().detach().numpy(), (u[:, :4] * s[:4]) @ v[:4] / root, atol=1e-5)
    spread = (root * (w - (root**2 * w).sum(0) / (root**2).sum())) ** 2
    assert fit.error == pytest.approx((s[4:] ** 2).sum() / spread.sum(), rel=1e-6)


def test_the_row_of_a_padding_token_stays_zero_and_untrained() -> None:
    layer = nn.Embedding(30, 10, padding_idx=3)
    module = METHODS["svd"].factorize(layer, (4,)).module
    assert module.first.padding_idx == 3
    assert not module(torch.tensor([3])).any()
    module(torch.tensor([3, 4])).sum().backward()
    assert not module.first.weight.grad[3].any()


def test_rows_that_are_cut_as_they_are_looked_up_cannot_be_factors() -> None:
    assert "max_norm" in METHODS["svd"].applies_to(nn.Embedding(30, 10, max_norm=1.0))
