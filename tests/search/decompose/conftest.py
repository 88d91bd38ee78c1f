"""Layers of every geometry and statistics of correlated data for them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from search.calibrate import Statistics, collect


def smooth_input(layer: nn.Module, samples: int = 48, seed: int = 0) -> Tensor:
    """Inputs whose channels and neighbours are correlated, with a mean that is not zero; tokens, few of them often."""
    g = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Embedding):
        shares = 1 / torch.arange(1.0, layer.num_embeddings + 1)
        return torch.multinomial(shares, samples * 1024, replacement=True, generator=g)
    if isinstance(layer, nn.Linear):
        mixing = torch.randn(layer.in_features, layer.in_features, generator=g)
        mixing = mixing * torch.linspace(1, 0.05, layer.in_features)
        return torch.randn(samples * 8, layer.in_features, generator=g) @ mixing.T + 0.5
    d = len(layer.kernel_size)
    sizes = (16, 9, 8)[:d] if d < 3 else (5, 6, 5)
    mixing = torch.randn(layer.in_channels, layer.in_channels, generator=g)
    mixing = mixing * torch.linspace(1, 0.05, layer.in_channels)
    x = torch.randn(samples, layer.in_channels, *sizes, generator=g)
    x = x + 0.7 * x.roll(1, dims=-1)
    return torch.einsum("ij,bj...->bi...", mixing, x) + 0.5


@pytest.fixture(scope="session")
def statistics_of() -> Callable[[nn.Module, Tensor], Statistics]:
    def build(layer: nn.Module, x: Tensor) -> Statistics:
        holder = nn.Sequential(layer)
        return collect(holder, ["0"], [(part,) for part in x.split(16)], samples=1)["0"]

    return build
