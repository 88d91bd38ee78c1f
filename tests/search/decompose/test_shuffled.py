"""``shuffled_tt``, ``shuffled_tucker`` and ``shuffled_cp``: low-rank tensors whose entries are shuffled."""

import math
from collections.abc import Callable

import torch
from torch import nn

from tenfold.layers import factorized_like
from tenfold.layers.shuffled import tensor_modes

from .conftest import smooth_input
from .contract import Contract, StatisticsOf


def shuffled_layers() -> dict[str, Callable[[], nn.Module]]:
    """Every kind and geometry of layer, small: the error is checked in the norm of C at many ranks."""
    return {
        "plain": lambda: nn.Conv2d(12, 16, 3, padding=1),
        "strided": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
        "dilated": lambda: nn.Conv2d(6, 10, 3, padding=2, dilation=2),
        "unpadded": lambda: nn.Conv2d(5, 6, (3, 2), stride=(1, 2)),
        "grouped": lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2),
        "same": lambda: nn.Conv2d(5, 6, (2, 3), padding="same", dilation=(2, 1)),
        "circular": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
        "conv1d": lambda: nn.Conv1d(8, 10, 5, padding=2, stride=2),
        "conv3d": lambda: nn.Conv3d(4, 6, 3, padding=1),
        "linear": lambda: nn.Linear(20, 14),
        "prime": lambda: nn.Linear(13, 11, bias=False),
    }


class TestShuffledTT(Contract):
    method = "shuffled_tt"
    layers = shuffled_layers()

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        modes = tensor_modes(layer.weight.numel())
        return tuple(min(math.prod(modes[:k]), math.prod(modes[k:])) for k in range(1, len(modes)))


class TestShuffledTucker(Contract):
    method = "shuffled_tucker"
    layers = shuffled_layers()

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        return tensor_modes(layer.weight.numel())


class TestShuffledCP(Contract):
    method = "shuffled_cp"
    layers = shuffled_layers()

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        return (2,)

    def test_it_is_exact_at_full_rank(self, name: str, statistics_of: StatisticsOf) -> None:
        """CP has no full rank that is cheap to know: a planted one is recovered."""
        layer = self.layers[name]()
        with torch.no_grad():
            planted = factorized_like(layer, self.method, self.full(layer)).dense_weight()
            layer.weight.copy_(planted / planted.std() * layer.weight.std())
        x = smooth_input(layer)
        for statistics in (None, statistics_of(layer, x)):
            fit = self.m.factorize(layer, self.full(layer), statistics)
            assert fit.error < 1e-4
            torch.testing.assert_close(fit.module(x), layer(x), rtol=2e-2, atol=2e-2)
