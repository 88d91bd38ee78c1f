import numpy as np
import pytest
import torch
from torch import nn

from search.decompose import METHODS

from .conftest import smooth_input
from .contract import Contract, StatisticsOf, conv_layers, output_positions, transposed_layers


class TestSpatialSVD(Contract):
    method = "spatial_svd"
    layers = conv_layers() | {
        "tall": lambda: nn.Conv2d(8, 8, (5, 3), padding=(2, 1), stride=2),
        "depthwise": lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6),
        "depthwise, several outputs each": lambda: nn.Conv2d(4, 12, (5, 7), padding=(2, 3), groups=4, bias=False),
        "depthwise, dilated": lambda: nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6),
        "one input channel": lambda: nn.Conv2d(1, 8, 5, padding=2, stride=2),
        "one output channel": lambda: nn.Conv2d(8, 1, 5, padding=2),
        "three axes": lambda: nn.Conv3d(6, 8, 3, padding=1, stride=(2, 1, 1)),
        "depthwise of three axes": lambda: nn.Conv3d(4, 8, (3, 3, 3), padding=1, groups=4),
    }

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        rows, *others = layer.kernel_size
        return (min(layer.in_channels * rows, layer.out_channels * int(np.prod(others))) // layer.groups,)


class TestSpatialSVDOfTransposed(TestSpatialSVD):
    layers = {name: make for name, make in transposed_layers().items() if name != "one axis"} | {
        "up": lambda: nn.ConvTranspose2d(12, 10, 3, stride=2),
        "depthwise": lambda: nn.ConvTranspose2d(6, 6, 4, stride=2, padding=1, groups=6),
        "depthwise, several outputs each": lambda: nn.ConvTranspose2d(4, 12, (5, 4), padding=1, groups=4, bias=False),
    }


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv1d(8, 8, 3), nn.ConvTranspose1d(8, 8, 3)])
def test_layers_without_two_axes_are_refused(layer: nn.Module) -> None:
    assert type(layer).__name__ in str(METHODS["spatial_svd"].applies_to(layer))


def test_without_statistics_it_is_the_truncated_svd_of_the_spatial_unfolding() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 7, 3, padding=1)
    fit = METHODS["spatial_svd"].factorize(layer, (4,))
    w = layer.weight.detach().double().numpy().transpose(1, 2, 0, 3).reshape(5 * 3, 7 * 3)
    u, s, v = np.linalg.svd(w, full_matrices=False)
    best = ((u[:, :4] * s[:4]) @ v[:4]).reshape(5, 3, 7, 3).transpose(2, 0, 1, 3)
    np.testing.assert_allclose(fit.module.dense_weight().detach().numpy(), best, atol=1e-4)


def test_a_pointwise_kernel_is_refused() -> None:
    assert "nothing to separate" in str(METHODS["spatial_svd"].applies_to(nn.Conv2d(8, 8, 1)))


@pytest.mark.parametrize(("size", "ranks"), [(3, [1]), (5, [1, 2]), (7, [1, 2, 3])])
def test_a_depthwise_kernel_has_the_ranks_that_make_it_smaller(size: int, ranks: list[int]) -> None:
    layer = nn.Conv2d(8, 8, size, padding=size // 2, groups=8, bias=False)
    method = METHODS["spatial_svd"]
    assert method.applies_to(layer) is None
    assert [r for (r,) in method.ranks(layer)] == ranks
    assert [method.cost(layer, (r,), 1)[0] for r in ranks] == [8 * 2 * size * r for r in ranks]


def test_a_point_that_costs_more_multiplications_is_not_offered() -> None:
    """k x 1 runs on all columns: at stride 3 that is three times what it saves."""
    layer = nn.Conv2d(8, 8, 3, stride=3, groups=8)
    x = torch.randn(4, 8, 12, 12)
    assert METHODS["spatial_svd"].cost(layer, (1,), output_positions(layer, x))[1] > 8 * 9 * 16
    assert METHODS["spatial_svd"].curve(layer, None, output_positions(layer, x)) == ()


def test_a_depthwise_kernel_without_statistics_is_each_channels_truncated_svd() -> None:
    layer = nn.Conv2d(5, 5, 7, padding=3, groups=5)
    fit = METHODS["spatial_svd"].factorize(layer, (2,))
    u, s, v = np.linalg.svd(layer.weight.detach().double().numpy()[:, 0])
    best = np.einsum("gir,gr,grj->gij", u[:, :, :2], s[:, :2], v[:, :2])
    np.testing.assert_allclose(fit.module.dense_weight().detach().numpy()[:, 0], best, atol=1e-5)
    assert fit.error == pytest.approx(float((s[:, 2:] ** 2).sum() / (s**2).sum()), rel=1e-5)


def test_a_depthwise_kernels_factors_are_the_least_squares_of_the_outputs(statistics_of: StatisticsOf) -> None:
    """Against numpy's own least squares on the windows, alternating from several random starts for each channel."""
    layer = nn.Conv2d(3, 3, 3, groups=3)
    x = smooth_input(layer)
    fit = METHODS["spatial_svd"].factorize(layer, (1,), statistics_of(layer, x))
    left = total = 0.0
    for channel, kernel in enumerate(layer.weight.detach().double().numpy()[:, 0]):
        windows = np.lib.stride_tricks.sliding_window_view(x[:, channel].double().numpy(), (3, 3), axis=(1, 2))
        rows = windows.reshape(-1, 3, 3)
        rows = rows - rows.mean(0)
        wanted = np.einsum("nij,ij->n", rows, kernel)
        left += min(_alternated(rows, wanted, seed) for seed in range(4))
        total += float((wanted**2).sum())
    assert fit.error == pytest.approx(left / total, rel=1e-3)


def _alternated(rows: np.ndarray, wanted: np.ndarray, seed: int) -> float:
    column = np.random.default_rng(seed).standard_normal(rows.shape[1])
    for _ in range(60):
        row = np.linalg.lstsq(np.einsum("nij,i->nj", rows, column), wanted, rcond=None)[0]
        column = np.linalg.lstsq(np.einsum("nij,j->ni", rows, row), wanted, rcond=None)[0]
    return float(np.square(wanted - np.einsum("nij,i,j->n", rows, column, row)).sum())
