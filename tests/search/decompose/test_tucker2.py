import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import partial_tucker
from torch import nn

from search.decompose import METHODS

from .contract import Contract, conv_layers, transposed_layers


class TestTucker2(Contract):
    method = "tucker2"
    layers = conv_layers() | {
        "conv1d": lambda: nn.Conv1d(12, 10, 5, padding=2, stride=2),
        "conv3d": lambda: nn.Conv3d(8, 10, 3, padding=1),
    }

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        return layer.in_channels // layer.groups, layer.out_channels // layer.groups


class TestTucker2OfTransposed(TestTucker2):
    layers = transposed_layers()


class TestSVDInput(Contract):
    method = "svd_input"
    layers = (
        conv_layers()
        | transposed_layers()
        | {
            "conv1d": lambda: nn.Conv1d(12, 10, 5, padding=2, stride=2),
            "conv3d": lambda: nn.Conv3d(8, 10, 3, padding=1),
        }
    )

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        return (layer.in_channels // layer.groups,)


@pytest.mark.filterwarnings("ignore")  # tensorly's own, about its settings
def test_without_statistics_it_is_as_exact_as_tensorlys_partial_tucker() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(10, 12, 3)
    fit = METHODS["tucker2"].factorize(layer, (4, 5))
    w = layer.weight.detach().double().numpy()
    (core, factors), _ = partial_tucker(w, rank=[5, 4], modes=[0, 1], n_iter_max=200, tol=1e-9)
    theirs = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    ours = fit.module.dense_weight().detach().double().numpy()
    assert np.linalg.norm(ours - w) <= 1.01 * np.linalg.norm(theirs - w)
    assert fit.error == pytest.approx((np.linalg.norm(ours - w) / np.linalg.norm(w)) ** 2, rel=1e-4)


def test_svd_input_without_statistics_is_the_truncated_svd_of_the_input_unfolding() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3)
    fit = METHODS["svd_input"].factorize(layer, (3,))
    w = layer.weight.detach().double().numpy().transpose(1, 0, 2, 3).reshape(6, -1)
    u, s, v = np.linalg.svd(w, full_matrices=False)
    best = ((u[:, :3] * s[:3]) @ v[:3]).reshape(6, 8, 3, 3).transpose(1, 0, 2, 3)
    np.testing.assert_allclose(fit.module.dense_weight().detach().numpy(), best, atol=1e-4)
