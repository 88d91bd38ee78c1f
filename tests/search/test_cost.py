"""Costs counted on the real module, against formulas written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search import cost


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bij,jk->bik", x, self.weight)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Conv2d(8, 16, 3, padding=1, groups=4), (8, 10, 10), 10 * 10 * 16 * 2 * 9),
        (nn.Conv2d(8, 16, 3, stride=2, dilation=2), (8, 11, 11), 4 * 4 * 16 * 8 * 9),
        (nn.Conv1d(8, 16, 3, dilation=2), (8, 10), 6 * 16 * 8 * 3),
        (nn.Conv3d(2, 4, 3), (2, 5, 5, 5), 27 * 4 * 2 * 27),
        (nn.ConvTranspose2d(8, 16, 3, stride=2, groups=4), (8, 10, 10), 100 * 8 * 4 * 9),
        (nn.Linear(8, 16), (5, 8), 5 * 8 * 16),
        (Attention(), (2, 5, 8), 2 * (2 * 5 * 5 * 8)),
        (Product(), (5, 8), 5 * 8 * 3),
        (Recurrent(), (5, 8), 5 * 4 * 16 * (8 + 16)),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), (3, 4, 4), 0),
    ],
    ids=[
        "groups",
        "stride_dilation",
        "conv1d",
        "conv3d",
        "transposed",
        "linear",
        "attention",
        "einsum",
        "lstm",
        "none",
    ],
)
def test_macs_equal_the_formula(module: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert cost.macs(module, (torch.randn(1, *shape),)) == expected


def test_macs_are_of_one_sample_whatever_the_batch() -> None:
    module = nn.Conv2d(3, 4, 3)
    assert cost.macs(module, (torch.randn(6, 3, 8, 8),)) == cost.macs(module, (torch.randn(1, 3, 8, 8),))


def test_bilinear_macs_are_the_product_of_its_sizes() -> None:
    assert cost.macs(nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(2, 4))) == 3 * 4 * 5


def test_a_tied_weight_counts_once() -> None:
    tied = nn.ModuleDict({"a": nn.Linear(6, 6, bias=False), "b": nn.Linear(6, 6, bias=False)})
    tied["b"].weight = tied["a"].weight
    assert cost.parameters(tied) == 36
    assert cost.stored_bytes(tied) == 36 * 4


def test_parameters_that_only_share_memory_count_once() -> None:
    shared = nn.ModuleList([nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)])
    shared[1].weight = nn.Parameter(shared[0].weight.data)
    assert cost.parameters(shared) == 36


def test_bytes_include_buffers_and_follow_the_type() -> None:
    norm = nn.BatchNorm1d(10)
    assert cost.stored_bytes(norm) == 4 * 10 * 4 + 8
    assert cost.stored_bytes(nn.Linear(4, 4, bias=False).half()) == 32


def test_counting_leaves_mode_and_statistics_as_they_were() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = network[1].running_mean.clone()
    cost.count(network, (torch.randn(2, 3, 8, 8),))
    assert network.training
    assert torch.equal(network[1].running_mean, before)
