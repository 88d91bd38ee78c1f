"""The table of layers: names, shapes, costs by hand, and reasons."""

import pytest
import torch
from torch import Tensor, nn

from search.intake import LiftedModel, load_model
from search.layers import describe, layer_table
from search.spec import LayerInfo
from tenfold.exporting import export


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.embed = nn.Embedding(10, 32)
        self.mix = nn.Linear(32, 32)
        self.out = nn.Linear(32, 10, bias=False)
        self.out.weight = self.embed.weight
        self.gru = nn.GRU(32, 4, batch_first=True)
        self.plain = nn.RNN(4, 3, batch_first=True)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.up(self.depthwise(torch.relu(self.bn(self.stem(x)))))
        t = self.mix(torch.relu(self.mix(self.embed(tokens))))
        return self.out(t), x, self.plain(self.gru(t)[0])[0]


@pytest.fixture(scope="module")
def lifted(tmp_path_factory: pytest.TempPathFactory) -> LiftedModel:
    folder = tmp_path_factory.mktemp("layers")
    example = (torch.randn(2, 3, 8, 8), torch.randint(0, 10, (2, 5)))
    return load_model(export(Net(), example, folder / "net.pt2"), scratch=folder)


@pytest.fixture(scope="module")
def rows(lifted: LiftedModel) -> dict[str, LayerInfo]:
    return {r.name: r for r in layer_table(lifted)}


def test_every_layer_is_listed_as_the_user_named_it(rows: dict[str, LayerInfo]) -> None:
    assert set(rows) == {"stem", "bn", "depthwise", "up", "embed", "mix", "out", "gru", "plain"}
    assert rows["stem"].kind == "Conv2d"
    assert rows["gru"].kind == "GRU"
    assert rows["stem"].weight == (16, 3, 3, 3)
    assert rows["stem"].output == (16, 4, 4)
    assert rows["mix"].output == (5, 32)
    assert rows["depthwise"].options == {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 16}


def test_macs_and_parameters_are_those_of_the_formulas(rows: dict[str, LayerInfo]) -> None:
    assert rows["stem"].macs == 16 * 4 * 4 * 3 * 9
    assert rows["stem"].parameters == 16 * 3 * 9 + 16
    assert rows["depthwise"].macs == 16 * 4 * 4 * 9
    assert rows["up"].macs == 16 * 4 * 4 * 8 * 4
    assert rows["mix"].macs == 2 * 5 * 32 * 32  # called twice
    assert rows["out"].macs == 5 * 32 * 10
    assert rows["gru"].macs == 5 * 3 * (32 * 4 + 4 * 4)
    assert rows["embed"].macs == 0
    assert rows["embed"].options == {"look_ups": 5}
    assert rows["embed"].parameters == 10 * 32
    assert rows["out"].parameters == 0  # its weight is counted there


def test_what_cannot_be_replaced_says_why(rows: dict[str, LayerInfo]) -> None:
    assert rows["stem"].compressible
    assert rows["mix"].compressible
    assert rows["up"].compressible
    assert rows["gru"].compressible
    assert "normalisation" in rows["bn"].reason
    assert rows["embed"].compressible
    assert rows["out"].compressible  # with the embedding, whose weight it holds
    assert "RNN" in rows["plain"].reason
    assert not any(r.compressible for r in rows.values() if r.reason)
    assert all(r.reason for r in rows.values() if not r.compressible)


def test_the_whole_is_the_sum_of_its_layers(lifted: LiftedModel, rows: dict[str, LayerInfo]) -> None:
    info = describe(lifted)
    assert info.macs == sum(r.macs for r in rows.values())
    assert info.parameters == sum(p.numel() for p in Net().parameters()) == sum(r.parameters for r in rows.values())
    assert info.batch == "any"
    assert [i.shape for i in info.inputs] == [(None, 3, 8, 8), (None, 5)]


def test_looking_leaves_nothing_behind(lifted: LiftedModel) -> None:
    layer_table(lifted)
    assert not any(m._forward_hooks for m in lifted.module.modules())
    assert not lifted.module.training
