"""LSTM and GRU: both kinds of factors, both ways through the recurrent product, every arrangement of torch's layers."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from search import cost
from search.calibrate import collect
from search.decompose import METHODS
from search.export import write_onnx
from search.intake.modules import FlatGRU, FlatLSTM
from search.recurrent import named_matrices, operands
from tenfold.exporting import export
from tenfold.layers import FactorizedLayer, factorized_like, recurrent

SVD = METHODS["svd"]
LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(12, 16, batch_first=True),
    "gru": lambda: nn.GRU(12, 16, batch_first=True),
    "steps first": lambda: nn.LSTM(12, 16, bias=False),
    "two layers": lambda: nn.GRU(12, 16, num_layers=2, batch_first=True),
    "two directions": lambda: nn.LSTM(12, 16, bidirectional=True, num_layers=2, batch_first=True),
    "gru of two directions": lambda: nn.GRU(20, 12, bidirectional=True, bias=False, batch_first=True),
}
STEPS = 7


class StepsFirst(nn.Module):
    """Takes (1, features, steps): a count is divided by the first axis, which must be the samples."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(2, 0, 1))[0]


def sequences(layer: nn.RNNBase, samples: int = 48, seed: int = 0) -> Tensor:
    """Features that are correlated and have a mean, each step like the one before."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(layer.input_size, layer.input_size, generator=g)
    mixing = mixing * torch.linspace(1, 0.05, layer.input_size)
    x = torch.randn(samples, STEPS, layer.input_size, generator=g)
    x = (x + x.roll(1, 1)) @ mixing.T / 3 + 0.5
    return x if layer.batch_first else x.transpose(0, 1)


def statistics_of(layer: nn.RNNBase, x: Tensor):
    return collect(nn.Sequential(layer), ["0"], [(x,)], samples=1)["0"]


@pytest.fixture(params=list(LAYERS))
def layer(request: pytest.FixtureRequest) -> nn.RNNBase:
    torch.manual_seed(0)
    return LAYERS[request.param]().eval()


@pytest.fixture(params=["fused", "steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(recurrent, "WORTH", 1 if request.param == "steps" else 1 << 40)
    return str(request.param)


def full(layer: nn.RNNBase) -> tuple[int, ...]:
    return tuple(max(ranks) for ranks in zip(*SVD.ranks(layer), strict=True))


def test_ranks_that_save_nothing_leave_the_layer_as_it_is(layer: nn.RNNBase) -> None:
    assert SVD.full_ranks(layer) == full(layer)
    x = sequences(layer)
    fit = SVD.factorize(layer, full(layer), statistics_of(layer, x))
    assert fit.error < 1e-9
    torch.testing.assert_close(fit.module(x), layer(x), rtol=1e-5, atol=1e-5)


def test_both_ways_compute_what_the_dense_layer_computes(layer: nn.RNNBase, way: str) -> None:
    x = sequences(layer, 3)
    for ranks in SVD.ranks(layer)[::11]:
        module = factorized_like(layer, "svd", ranks)
        dense = module.dense()
        assert type(dense) is type(layer)
        torch.testing.assert_close(module(x), dense(x), rtol=1e-4, atol=1e-5)
    states = [torch.randn_like(s) for s in (dense(x)[1] if isinstance(layer, nn.LSTM) else [dense(x)[1]])]
    hx = tuple(states) if isinstance(layer, nn.LSTM) else states[0]
    torch.testing.assert_close(module(x, hx), dense(x, hx), rtol=1e-4, atol=1e-5)
    if isinstance(layer, nn.LSTM):  # as a lifted graph calls it
        torch.testing.assert_close(module(x, *states), (dense(x, hx)[0], *dense(x, hx)[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [FlatLSTM, FlatGRU])
def test_a_lifted_layer_made_dense_again_is_called_as_before(kind: type[nn.RNNBase]) -> None:
    layer = kind(6, 8, batch_first=True)
    module = SVD.factorize(layer, (3, 3)).module
    dense = module.dense()
    assert type(dense) is kind
    x, states = torch.randn(2, STEPS, 6), [torch.randn(1, 2, 8) for _ in range(2 if kind is FlatLSTM else 1)]
    torch.testing.assert_close(dense(x, *states), module(x, *states), rtol=1e-4, atol=1e-5)


def test_costs_are_those_counted(layer: nn.RNNBase, way: str) -> None:
    x = sequences(layer, 1)
    for ranks in SVD.ranks(layer)[::7]:
        module = factorized_like(layer, "svd", ranks)
        network, example = (module, x) if layer.batch_first else (StepsFirst(module), x.permute(1, 2, 0))
        counted = cost.macs(network, (example,))
        assert SVD.cost(layer, ranks, STEPS, input_sizes=(STEPS,)) == (cost.parameters(module), counted)


def test_every_point_has_fewer_parameters_and_errors_fall(layer: nn.RNNBase) -> None:
    statistics = statistics_of(layer, sequences(layer))
    curve = SVD.curve(layer, statistics, STEPS)
    assert 5 < len(curve) <= 60
    assert all(p.parameters < cost.parameters(layer) for p in curve)
    for a in curve:
        assert all(b.error <= a.error + 1e-9 for b in curve if all(x >= y for x, y in zip(b.ranks, a.ranks)))  # noqa: B905
    for point in curve[::9]:
        assert SVD.factorize(layer, point.ranks, statistics).error == pytest.approx(point.error, abs=1e-9)


def test_operands_times_matrices_are_what_the_gates_read() -> None:
    """Against a GRU cell written out in numpy, second layer, both directions."""
    torch.manual_seed(0)
    gru = nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(2, 5, 3)
    found = {k: v.detach().double().numpy() for k, v in operands(gru, x, []).items()}
    w = {k: v.detach().double().numpy() for k, v in gru.named_parameters()}
    below = found["ih_l1"].reshape(5, 2, 8)
    for d, order in (("", range(5)), ("_reverse", range(4, -1, -1))):
        h = np.zeros((2, 4))
        states = found[f"hh_l1{d}"].reshape(5, 2, 4)
        for t in order:
            np.testing.assert_allclose(states[t], h, atol=1e-6)
            a = below[t] @ w[f"weight_ih_l1{d}"].T + w[f"bias_ih_l1{d}"]
            b = h @ w[f"weight_hh_l1{d}"].T + w[f"bias_hh_l1{d}"]
            r, z = (1 / (1 + np.exp(-(a[:, i : i + 4] + b[:, i : i + 4]))) for i in (0, 4))
            h = (1 - z) * np.tanh(a[:, 8:] + r * b[:, 8:]) + z * h
    torch.testing.assert_close(gru(x)[0][:, 0, 4:].double().detach(), torch.from_numpy(h), rtol=1e-4, atol=1e-5)
    assert list(found) == list(named_matrices(gru))


def test_data_aware_factors_beat_plain_ones_on_the_data(layer: nn.RNNBase) -> None:
    x = sequences(layer)
    lattice = SVD.ranks(layer)
    ranks = lattice[len(lattice) // 2]
    y = layer(x)[0]

    def gap(module: nn.Module) -> float:
        return float((module(x)[0] - y).detach().square().mean())

    assert gap(SVD.factorize(layer, ranks, statistics_of(layer, x)).module) < gap(SVD.factorize(layer, ranks).module)


def test_the_stated_error_is_that_of_what_the_gates_read() -> None:
    torch.manual_seed(0)
    lstm = LAYERS["lstm"]()
    x = sequences(lstm)
    fit = SVD.factorize(lstm, (3, 4), statistics_of(lstm, x))
    lost = energy = 0.0
    dense = named_matrices(fit.module.dense())
    for name, rows in operands(lstm, x, []).items():
        rows, weight = (rows - rows.mean(0)).detach(), named_matrices(lstm)[name].detach()
        lost += float((rows @ (weight - dense[name].detach()).T).square().sum())
        energy += float((rows @ weight.T).square().sum())
    assert fit.error == pytest.approx(lost / energy, rel=1e-3)


def test_it_trains_and_reloads(layer: nn.RNNBase, way: str) -> None:
    module = SVD.factorize(layer, SVD.ranks(layer)[20], None).module
    x = sequences(layer, 2)
    module(x)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    again: FactorizedLayer = factorized_like(layer, *module.plan())
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x)[0], module(x)[0])


class Outputs(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def test_it_exports_without_our_classes(way: str, tmp_path: Path) -> None:
    gru = LAYERS["gru"]().eval()
    network = Outputs(SVD.factorize(gru, (3, 4), None).module).eval()
    x = sequences(gru, 3).detach()
    graph = export(network, x, tmp_path / "gru.pt2")
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(graph).module()(x), network(x), rtol=1e-4, atol=1e-5)
        session = onnxruntime.InferenceSession(write_onnx(graph, ["x"], tmp_path / "gru.onnx"))
        found = session.run(None, {"x": x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), network(x), rtol=1e-4, atol=1e-5)


def test_it_follows_the_layers_precision(layer: nn.RNNBase) -> None:
    module = SVD.factorize(copy.deepcopy(layer).double(), (3, 3)).module
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert module(sequences(layer, 2).double())[0].dtype is torch.float64


def test_analytic_ranks_are_one_for_each_kind_of_matrix(layer: nn.RNNBase) -> None:
    found = METHODS["svd"].variational_ranks(layer)
    assert len(found) == 2
    assert min(found) >= 1


def test_a_large_recurrent_product_goes_step_by_step_and_a_long_or_small_one_does_not() -> None:
    assert recurrent.steps_pay(64, 4, 512, 32)
    assert not recurrent.steps_pay(64, 4, 512, 10_000)
    assert not recurrent.steps_pay(16, 4, 64, 32)


@pytest.mark.parametrize(
    ("layer", "word"), [(nn.LSTM(8, 16, proj_size=4), "proj_size"), (nn.RNN(8, 16), "RNN"), (nn.LSTM(1, 1), "no rank")]
)
def test_what_it_cannot_take_it_refuses_with_the_reason(layer: nn.Module, word: str) -> None:
    assert word in str(SVD.applies_to(layer))


def test_wrong_calls_say_what_is_wanted() -> None:
    with pytest.raises(ValueError, match=r"takes 2 ranks .* got \(3,\)"):
        factorized_like(nn.LSTM(8, 16), "svd", (3,))
    with pytest.raises(ValueError, match="proj_size=4"):
        factorized_like(nn.LSTM(8, 16, proj_size=4), "svd", (3, 3))
    with pytest.raises(ValueError, match=r"got shape \(5, 8\)"):
        factorized_like(nn.GRU(8, 16), "svd", (3, 3))(torch.randn(5, 8))
