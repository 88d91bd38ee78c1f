import numpy as np
import torch
from torch import nn

from search.decompose import METHODS

from .contract import Contract, conv_layers


class TestSpatialSVD(Contract):
    method = "spatial_svd"
    layers = conv_layers() | {"tall": lambda: nn.Conv2d(8, 8, (5, 3), padding=(2, 1), stride=2)}

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        rows, columns = layer.kernel_size
        return (min(layer.in_channels * rows, layer.out_channels * columns) // layer.groups,)


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
