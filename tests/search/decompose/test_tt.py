import numpy as np
import pytest
import torch
from tensorly.decomposition import tensor_train
from torch import nn

from search.decompose import METHODS

from .conftest import smooth_input
from .contract import Contract, StatisticsOf, conv_layers


class TestTT(Contract):
    method = "tt"
    layers = conv_layers() | {"tall": lambda: nn.Conv2d(8, 8, (5, 3), padding=(2, 1), stride=2)}

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        c_in, c_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        rows, columns = layer.kernel_size
        return c_in, min(c_in * rows, c_out * columns), c_out


@pytest.mark.parametrize("ranks", [(4, 6, 5), (2, 2, 2), (10, 9, 3)])
def test_without_statistics_it_is_as_exact_as_tensorlys_tensor_train(ranks: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(10, 12, 3)
    fit = METHODS["tt"].factorize(layer, ranks)
    w = layer.weight.detach().double().numpy()
    theirs = tensor_train(w.transpose(1, 2, 3, 0), rank=[1, *ranks, 1]).to_tensor().transpose(3, 0, 1, 2)
    ours = fit.module.dense_weight().detach().double().numpy()
    assert np.linalg.norm(ours - w) <= (1 + 1e-6) * np.linalg.norm(theirs - w)
    assert fit.error == pytest.approx((np.linalg.norm(ours - w) / np.linalg.norm(w)) ** 2, rel=1e-4)


def test_the_curve_without_statistics_lies_between_the_fit_and_tt_svd_written_out_in_numpy() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3)
    w = layer.weight.detach().double().numpy().transpose(1, 2, 3, 0)
    for point in METHODS["tt"].curve(layer, None, 16)[::5]:
        low, middle, high = point.ranks
        a = np.linalg.svd(w.reshape(6, -1), full_matrices=False)[0][:, :low]
        rest = (a.T @ w.reshape(6, -1)).reshape(low * 3, -1)
        b = np.linalg.svd(rest, full_matrices=False)[0][:, :middle]
        s = np.linalg.svd((b.T @ rest).reshape(-1, 8), compute_uv=False)[:high]
        plain = 1 - (s**2).sum() / (w**2).sum()
        assert 0.9 * METHODS["tt"].factorize(layer, point.ranks).error <= point.error <= plain + 1e-7


def test_parameters_are_those_of_the_plain_tensor_train_with_equal_ranks() -> None:
    # Su et al. 2018, plain TT: R (S + T) + 2 k R^2.
    assert METHODS["tt"].cost(nn.Conv2d(64, 128, 3, bias=False), (20, 20, 20), 1)[0] == 20 * (64 + 128) + 2 * 3 * 20**2


def test_a_fitted_start_is_taken_up(statistics_of: StatisticsOf) -> None:
    layer = nn.Conv2d(16, 24, 3, padding=1, groups=2)
    statistics = statistics_of(layer, smooth_input(layer))
    ranks = METHODS["tt"].ranks(layer)[40]
    fit = METHODS["tt"].factorize(layer, ranks, statistics)
    again = METHODS["tt"].factorize(layer, ranks, statistics, start=fit.module)
    assert again.error <= fit.error + 1e-6


def test_layers_that_are_no_images_are_refused() -> None:
    assert "Conv2d" in str(METHODS["tt"].applies_to(nn.Conv1d(8, 8, 3)))
    assert "nothing to separate" in str(METHODS["tt"].applies_to(nn.Conv2d(8, 8, (3, 1))))
