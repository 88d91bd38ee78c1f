"""Layers that hold one weight: decomposed once, to all their uses."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from search import cost
from search.calibrate import Statistics, collect
from search.decompose import METHODS, Group, joint_method_of, same_weight
from tenfold.layers import LowRankEmbedding, LowRankHead, LowRankLinear, LowRankTurned, TurnedLinear, members_like

from .conftest import smooth_input

StatisticsOf = Callable[[nn.Module, Tensor], Statistics]


def group(*layers: nn.Module) -> Group:
    """Layers that are made to hold the weight of the first."""
    for layer in layers[1:]:
        layer.weight = layers[0].weight
    return Group(tuple(f"layer{i}" for i in range(len(layers))), layers, (len(layers),))


def linears() -> Group:
    return group(nn.Linear(14, 10), nn.Linear(14, 10), nn.Linear(14, 10, bias=False))


def convolutions() -> Group:
    """Of one kernel at two dilations."""
    return group(nn.Conv2d(8, 10, 3, padding=1), nn.Conv2d(8, 10, 3, padding=2, dilation=2, bias=False))


def language_model() -> Group:
    """Two Embeddings and the Linear that maps back to the tokens."""
    torch.manual_seed(0)
    return group(nn.Embedding(40, 12, padding_idx=0), nn.Linear(12, 40), nn.Embedding(40, 12))


def autoencoder() -> Group:
    """Two decoders that multiply with the encoder's weight turned round, one of them without bias."""
    torch.manual_seed(0)
    return group(nn.Linear(14, 10), TurnedLinear(10, 14), TurnedLinear(10, 14, bias=False))


def inputs(of: Group) -> list[Tensor]:
    return [smooth_input(layer, samples=16, seed=i) for i, layer in enumerate(of.layers)]


def known(of: Group) -> list[Statistics]:
    found = []
    for layer, x in zip(of.layers, inputs(of), strict=True):
        found.append(collect(nn.Sequential(layer), ["0"], [(x,)], samples=1)["0"])
    return found


def positions(of: Group) -> list[int]:
    """How often a sample's weight is applied: the convolutions here keep the size of their inputs."""
    return [x[0, 0].numel() if x.dim() == 4 else 1 for x in inputs(of)]


CASES = [
    *(("svd", linears), ("tt_matrix", linears), ("shuffled_tt", linears), ("r_cp", linears)),
    *(("svd", convolutions), ("tucker2", convolutions), ("cp3", convolutions), ("spatial_svd", convolutions)),
    ("svd", language_model),
    ("svd", autoencoder),
]
EACH = pytest.mark.parametrize(("method", "make"), CASES, ids=lambda v: v if isinstance(v, str) else v.__name__)


@EACH
def test_factors_are_the_same_tensors_and_counted_once(method: str, make: Callable[[], Group]) -> None:
    of, tied = make(), joint_method_of(method, {})
    assert tied.applies_to(of) is None
    ranks = tied.ranks(of)[-1]
    fit = tied.factorize(of, ranks, known(of))
    whole = nn.ModuleList(fit.modules)
    samples = [x[:1].reshape(1, -1) if x.dim() == 1 else x[:1] for x in inputs(of)]
    macs = sum(cost.macs(module, (x,)) for module, x in zip(fit.modules, samples, strict=True))
    sizes = [tuple(x.shape[2:]) for x in samples]
    parameters, predicted = tied.cost(of, ranks, positions(of), input_sizes=sizes)
    assert parameters == sum(p.numel() for p in whole.parameters()) == cost.parameters(whole)
    assert parameters < of.dense(positions(of))[0]
    assert predicted == macs
    first = {id(p) for p in fit.modules[0].parameters()}
    own = [module.output_bias for module in fit.modules if module.output_bias is not None]
    assert {id(p) for p in whole.parameters()} == first | {id(b) for b in own}


def test_a_bias_that_is_one_stays_one() -> None:
    of = group(nn.Conv2d(8, 10, 3, padding=1), nn.Conv2d(8, 10, 3, padding=2, dilation=2))
    of.layers[1].bias = of.layers[0].bias
    fit = joint_method_of("svd", {}).factorize(of, (3,), known(of))
    assert fit.modules[0].output_bias is fit.modules[1].output_bias
    whole = nn.ModuleList(fit.modules)
    assert joint_method_of("svd", {}).cost(of, (3,), positions(of))[0] == sum(p.numel() for p in whole.parameters())


def test_given_modes_are_those_of_every_member() -> None:
    of, options = linears(), {"in_modes": "7x2", "out_modes": "2x5"}
    fit = joint_method_of("tt_matrix", options).factorize(of, (3,), known(of))
    assert {str(module.plan()) for module in fit.modules} == {str(("tt_matrix", (3,), options))}
    members = {name: (i,) for i, name in enumerate(of.names)}
    again = members_like(dict(zip(of.names, of.layers, strict=True)), "tt_matrix", (3,), members, options)
    for module, name in zip(fit.modules, of.names, strict=True):
        again[name].load_state_dict(module.state_dict())


@EACH
def test_gradients_reach_the_factors_from_every_use(method: str, make: Callable[[], Group]) -> None:
    of = make()
    fit = joint_method_of(method, {}).factorize(of, joint_method_of(method, {}).ranks(of)[-1], None)
    factors = [p for p in fit.modules[0].parameters() if p is not fit.modules[0].output_bias]
    for module, x in zip(fit.modules, inputs(of), strict=True):
        nn.Module.zero_grad(module)
        module(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in factors)


@EACH
def test_stated_errors_are_those_of_the_outputs(method: str, make: Callable[[], Group]) -> None:
    of = make()
    lattice = joint_method_of(method, {}).ranks(of)
    fit = joint_method_of(method, {}).factorize(of, lattice[len(lattice) // 2], known(of))
    for layer, module, x, error in zip(of.layers, fit.modules, inputs(of), fit.errors, strict=True):
        with torch.no_grad():
            y, z = (m(x).double() for m in (layer, module))
        y, z = (v.movedim(1, -1).flatten(0, -2) if v.dim() == 4 else v for v in (y, z))
        gap, whole = y - z, y - y.mean(0)
        if not isinstance(layer, nn.Embedding):  # whose error has its mean in it
            gap = gap - gap.mean(0)
        # Embeddings count each token half a time more than it came.
        tolerance = 0.1 if isinstance(layer, nn.Embedding) else 5e-3
        assert error == pytest.approx(float(gap.square().sum() / whole.square().sum()), rel=tolerance, abs=1e-5)


@pytest.mark.parametrize("make", [linears, convolutions, language_model, autoencoder])
def test_it_is_exact_at_full_rank(make: Callable[[], Group]) -> None:
    of = make()
    full = min(of.shape[0], of.shape[1] * of.shape[2])
    for statistics in (None, known(of)):
        fit = joint_method_of("svd", {}).factorize(of, (full,), statistics)
        assert max(fit.errors) < 1e-5
        for layer, module, x in zip(of.layers, fit.modules, inputs(of), strict=True):
            torch.testing.assert_close(module(x), layer(x), rtol=1e-2, atol=1e-2)


def test_the_fit_is_to_all_uses_not_to_the_first() -> None:
    """Two Linears that read different directions: what helps one alone is wrong for the other."""
    torch.manual_seed(0)
    of = group(nn.Linear(12, 12), nn.Linear(12, 12))
    low, high = torch.randn(400, 12), torch.randn(400, 12)
    low[:, 6:] *= 0.01
    high[:, :6] *= 0.01
    seen = [
        collect(nn.Sequential(layer), ["0"], [(x,)], samples=1)["0"]
        for layer, x in zip(of.layers, (low, high), strict=True)
    ]
    both = joint_method_of("svd", {}).factorize(of, (5,), seen)
    first = METHODS["svd"].factorize(of.layers[0], (5,), seen[0]).module
    with torch.no_grad():
        gap = [(layer(x) - m(x)) for layer, m, x in ((of.layers[0], first, low), (of.layers[1], first, high))]
        gap[1] = gap[1] - (of.layers[1].bias - of.layers[0].bias)
        parts = zip(gap, of.layers, (low, high), strict=True)
        alone = [float(g.var(0).sum() / layer(x).var(0).sum()) for g, layer, x in parts]
    assert sum(both.errors) < sum(alone)
    assert max(both.errors) < max(alone)


def test_a_language_models_factors_are_the_weighted_low_rank_approximation() -> None:
    """Against numpy: alternating weighted least squares, entry by entry, from several starts."""
    of = language_model()
    seen = known(of)
    fit = joint_method_of("svd", {}).factorize(of, (4,), seen)
    w = of.layers[0].weight.detach().double().numpy()
    parts = []
    for layer, s in zip(of.layers, seen, strict=True):
        if isinstance(layer, nn.Embedding):
            half = 0.5 / s.count
            p = s.second[0].numpy() + half
            mean = (w * p[:, None]).sum(0)
            parts.append((p / ((w**2 * p[:, None]).sum() - (mean**2).sum() / p.sum()), None))
        else:
            parts.append((None, s.second[0].numpy() / float(s.energy.sum())))
    p = sum(p for p, _ in parts if p is not None)
    values, basis = np.linalg.eigh(sum(c for _, c in parts if c is not None))
    turned, weights = w @ basis, p[:, None] + values.clip(0)
    best = min(_alternated(turned, weights, 4, seed) for seed in range(4))
    assert sum(fit.errors) == pytest.approx(best, rel=2e-2)


def test_an_autoencoders_factors_are_the_best_for_both_sides() -> None:
    """Against numpy: alternating normal equations, solved whole as Kronecker products, from several starts."""
    of = autoencoder()
    seen = known(of)
    fit = joint_method_of("svd", {}).factorize(of, (4,), seen)
    w = of.layers[0].weight.detach().double().numpy()
    left, right = np.zeros((10, 10)), np.zeros((14, 14))
    for layer, s in zip(of.layers, seen, strict=True):
        side = left if isinstance(layer, TurnedLinear) else right
        side += s.second[0].numpy() / float(s.energy.sum())
    best = min(_both_sides(w, left, right, 4, seed) for seed in range(4))
    assert sum(fit.errors) == pytest.approx(best, rel=2e-2)
    alone = METHODS["svd"].factorize(of.layers[0], (4,), seen[0]).module.dense_weight().detach().double().numpy()
    assert sum(fit.errors) < 0.9 * _error_of_both(w - alone, left, right)


def _both_sides(w: np.ndarray, left: np.ndarray, right: np.ndarray, rank: int, seed: int) -> float:
    b = np.random.default_rng(seed).standard_normal((w.shape[1], rank))
    for _ in range(80):
        a = _one_side(w, left, right, b)
        b = _one_side(w.T, right, left, a)
    return _error_of_both(w - a @ b.T, left, right)


def _one_side(w: np.ndarray, left: np.ndarray, right: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A of ``left A B'B + A B' right B = left W B + W right B``."""
    system = np.kron(left, b.T @ b) + np.kron(np.eye(len(w)), b.T @ right @ b)
    wanted = left @ w @ b + w @ right @ b
    return np.linalg.lstsq(system, wanted.reshape(-1), rcond=None)[0].reshape(wanted.shape)


def _error_of_both(gap: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
    return float(np.trace(gap.T @ left @ gap) + np.trace(gap @ right @ gap.T))


def _alternated(wanted: np.ndarray, weights: np.ndarray, rank: int, seed: int) -> float:
    right = np.random.default_rng(seed).standard_normal((wanted.shape[1], rank))
    for _ in range(80):
        left = _solved(wanted, weights, right)
        right = _solved(wanted.T, weights.T, left)
    return float((weights * (wanted - left @ right.T) ** 2).sum())


def _solved(wanted: np.ndarray, weights: np.ndarray, factor: np.ndarray) -> np.ndarray:
    rows = zip(wanted, np.sqrt(weights), strict=True)
    return np.stack([np.linalg.lstsq(factor * s[:, None], x * s, rcond=None)[0] for x, s in rows])


@EACH
def test_a_curve_falls_and_a_fit_is_no_worse_than_its_point(method: str, make: Callable[[], Group]) -> None:
    of, tied = make(), joint_method_of(method, {})
    seen, dense = known(of), of.dense(positions(of))
    curve = tied.curve(of, seen, positions(of))
    assert 0 < len(curve) <= 60
    for point in curve:
        assert point.parameters < dense[0]
        assert len(point.errors) == len(of.layers)
    point = curve[len(curve) // 2]
    assert tied.factorize(of, point.ranks, seen).error <= 1.1 * point.error + 1e-6
    by_cost = [p.error for p in sorted(curve, key=lambda p: p.parameters)]
    assert by_cost[-1] <= by_cost[0]


def test_the_head_is_the_embedding_turned_round() -> None:
    of = language_model()
    made = members_like(dict(zip(of.names, of.layers, strict=True)), "svd", (3,), of.members)
    embedding, head = made["layer0"], made["layer1"]
    assert isinstance(embedding, LowRankEmbedding)
    assert isinstance(head, LowRankHead)
    torch.testing.assert_close(head.dense_weight(), embedding.dense_weight())
    x = torch.randn(5, 12)
    torch.testing.assert_close(head(x), head.dense()(x))
    torch.testing.assert_close(embedding(torch.arange(40)), embedding.dense_weight())


def test_the_decoder_is_the_encoder_turned_round() -> None:
    of = autoencoder()
    made = members_like(dict(zip(of.names, of.layers, strict=True)), "svd", (3,), of.members)
    encoder, decoder = made["layer0"], made["layer1"]
    assert isinstance(encoder, LowRankLinear)
    assert isinstance(decoder, LowRankTurned)
    torch.testing.assert_close(decoder.dense_weight(), encoder.dense_weight())
    h = torch.randn(5, 10)
    torch.testing.assert_close(decoder(h), h @ encoder.dense_weight() + decoder.last.bias)
    torch.testing.assert_close(decoder(h), decoder.dense()(h))


def test_layers_of_one_weight_are_found() -> None:
    network = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 6), "c": nn.Linear(4, 6), "d": nn.ReLU()})
    network["c"].weight = network["a"].weight
    assert same_weight(network, list(network)) == (("a", "c"),)
    assert same_weight(copy.deepcopy(network), ["a", "b"]) == ()


def test_what_cannot_be_tied_says_why() -> None:
    apart = Group(("a", "b"), (nn.Linear(8, 8), nn.Linear(8, 8)), (2,))
    assert "their own" in str(joint_method_of("svd", {}).applies_to(apart))
    for make in (language_model, autoencoder):
        assert "turned round" in str(joint_method_of("tt_matrix", {}).applies_to(make()))
    soft = group(nn.Embedding(40, 12), TurnedLinear(40, 12))
    assert "hold one weight are" in str(joint_method_of("svd", {}).applies_to(soft))
    assert "hold one weight" in str(joint_method_of("joint_tucker", {}).applies_to(linears()))
    with pytest.raises(ValueError, match="hold one weight"):
        members_like({"a": nn.Linear(8, 8), "b": nn.Linear(8, 6)}, "svd", (2,), {"a": (0,), "b": (1,)})
    with pytest.raises(ValueError, match="svd replaces"):
        members_like({"a": nn.Linear(8, 8), "b": nn.LayerNorm(8)}, "svd", (2,), {"a": (0,), "b": (1,)})
