"""``r_cp`` and ``r_tucker``: channels as two modes each."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tensorly
import torch
from tensorly.decomposition import parafac, tucker
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from search.decompose import METHODS, r_cp, r_tucker
from search.decompose.polyadic import PENALTY
from tenfold.layers import factorized_like
from tenfold.layers.base import CONVS, Conv
from tenfold.layers.contracting import TTShape
from tenfold.layers.reshaped import balanced, cp_shape, cp_way, tucker_way

from .conftest import smooth_input
from .contract import Contract, StatisticsOf


def reshaped_layers() -> dict[str, Callable[[], nn.Module]]:
    """Every geometry that they take; channels that are no powers of two, and unequal factors."""
    return {
        "plain": lambda: nn.Conv2d(12, 16, 3, padding=1),
        "strided": lambda: nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False),
        "widening": lambda: nn.Conv2d(6, 24, 3, stride=2, padding=1),
        "dilated": lambda: nn.Conv2d(12, 10, 3, padding=2, dilation=2),
        "unpadded": lambda: nn.Conv2d(10, 12, (3, 2), stride=(1, 2)),
        "grouped": lambda: nn.Conv2d(16, 24, 3, padding=1, groups=2),
        "grouped, narrowing": lambda: nn.Conv2d(24, 12, 3, padding=1, stride=(2, 1), groups=2),
        "same": lambda: nn.Conv2d(10, 12, (2, 3), padding="same", dilation=(2, 1)),
        "circular": lambda: nn.Conv2d(10, 12, 3, padding=1, padding_mode="circular"),
        "pointwise": lambda: nn.Conv2d(18, 16, 1),
        "conv1d": lambda: nn.Conv1d(12, 10, 5, padding=2, stride=2),
        "conv1d, grouped": lambda: nn.Conv1d(16, 12, 3, padding="same", dilation=2, groups=2, bias=False),
        "conv3d": lambda: nn.Conv3d(6, 8, (2, 3, 3), padding=1),
        "conv3d, grouped": lambda: nn.Conv3d(8, 12, (1, 3, 2), padding=(0, 1, 0), stride=(1, 2, 1), groups=2),
        "linear": lambda: nn.Linear(24, 18),
        "wide linear": lambda: nn.Linear(20, 48, bias=False),
    }


def plant(layer: nn.Module, method: str, ranks: tuple[int, ...]) -> None:
    """Give ``layer`` a weight that the method stands for exactly at these ranks."""
    with torch.no_grad():
        planted = factorized_like(layer, method, ranks).dense_weight()
        layer.weight.copy_(planted / planted.std() * layer.weight.std())


class TestRCP(Contract):
    method = "r_cp"
    layers = reshaped_layers()

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        return (2,)

    def test_it_is_exact_at_full_rank(self, name: str, statistics_of: StatisticsOf) -> None:
        """CP has no full rank that is cheap to know: a planted one is recovered."""
        layer = self.layers[name]()
        plant(layer, "r_cp", self.full(layer))
        x = smooth_input(layer)
        for statistics in (None, statistics_of(layer, x)):
            fit = self.m.factorize(layer, self.full(layer), statistics)
            assert fit.error < PENALTY**2
            torch.testing.assert_close(fit.module(x), layer(x), rtol=5e-2, atol=5e-2)


class TestRTucker(Contract):
    method = "r_tucker"
    layers = reshaped_layers()

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        groups = getattr(layer, "groups", 1)
        return *balanced(layer.weight.shape[1]), *balanced(layer.weight.shape[0] // groups)


@pytest.mark.parametrize(("channels", "pair"), [(64, (8, 8)), (512, (16, 32)), (24, (4, 6)), (10, (2, 5)), (7, (1, 7))])
def test_channels_are_split_near_their_square_root(channels: int, pair: tuple[int, int]) -> None:
    assert balanced(channels) == pair


@pytest.mark.parametrize("name", ["r_cp", "r_tucker"])
def test_a_prime_number_of_channels_is_refused_with_the_reason(name: str) -> None:
    convolutions = nn.Conv2d(3, 16, 3), nn.Conv1d(16, 13, 3), nn.Conv3d(14, 16, 3, groups=2)
    for layer in (*convolutions, nn.Linear(16, 17)):
        assert "prime" in str(METHODS[name].applies_to(layer))


@pytest.mark.parametrize("name", ["r_cp", "r_tucker"])
@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(16, 16, 3), nn.Embedding(16, 16)], ids=str)
def test_other_layers_are_refused_by_their_kind(name: str, layer: nn.Module) -> None:
    reason = METHODS[name].applies_to(layer)
    assert reason == f"{name} replaces Linear and convolutions, not {type(layer).__name__}"
    with pytest.raises(ValueError, match=f"got {type(layer).__name__}"):
        factorized_like(layer, name, (1,))


def parameters(layer: nn.Module, method: str, ranks: tuple[int, ...]) -> int:
    return sum(p.numel() for p in factorized_like(layer, method, ranks).parameters())


def test_parameters_are_those_of_the_papers_formulas() -> None:
    conv, linear = nn.Conv2d(64, 128, 3, bias=False), nn.Linear(256, 100, bias=False)
    volume = nn.Conv3d(64, 128, 3, bias=False)
    assert parameters(conv, "r_cp", (10,)) == 10 * (8 * 8 + 8 * 16 + 9)
    assert parameters(volume, "r_cp", (10,)) == 10 * (8 * 8 + 8 * 16 + 27)
    assert parameters(linear, "r_cp", (10,)) == 10 * (16 * 10 + 16 * 10)
    assert parameters(conv, "r_tucker", (4, 5, 6, 7)) == 8 * 4 + 8 * 5 + 8 * 6 + 16 * 7 + 9 * 4 * 5 * 6 * 7
    assert parameters(volume, "r_tucker", (4, 5, 6, 7)) == 8 * 4 + 8 * 5 + 8 * 6 + 16 * 7 + 27 * 4 * 5 * 6 * 7
    assert parameters(linear, "r_tucker", (4, 5, 6, 7)) == 16 * 4 + 16 * 5 + 10 * 6 + 10 * 7 + 4 * 5 * 6 * 7


LAYERS_WITH_RATES = [nn.Conv2d(16, 24, 3), nn.Conv3d(16, 24, 3, groups=2), nn.Linear(36, 20)]


@pytest.mark.parametrize("layer", LAYERS_WITH_RATES, ids=str)
@pytest.mark.parametrize("rate", [0.001, 0.05, 0.1, 0.4])
def test_the_rank_for_a_rate_is_the_largest_that_real_modules_allow(layer: nn.Module, rate: float) -> None:
    budget = int(rate * sum(p.numel() for p in layer.parameters()))
    fits = [r for r in range(1, 200) if parameters(layer, "r_cp", (r,)) <= budget]
    assert r_cp.rank_for(layer, budget) == max(fits, default=0)


@pytest.mark.parametrize("layer", LAYERS_WITH_RATES, ids=str)
@pytest.mark.parametrize("rate", [0.001, 0.1, 0.4])
def test_the_tucker_ranks_for_a_rate_leave_no_room_to_raise_all_of_them(layer: nn.Module, rate: float) -> None:
    budget = int(rate * sum(p.numel() for p in layer.parameters()))
    found = r_tucker.rank_for(layer, budget)
    smallest = parameters(layer, "r_tucker", (1, 1, 1, 1))
    assert (found is None) == (smallest > budget)
    if found is not None:
        assert parameters(layer, "r_tucker", found) <= budget
        more = tuple(r + 1 for r in found)
        assert parameters(layer, "r_tucker", more) > budget


def test_r_cp_of_a_linear_is_the_svd_of_the_rearranged_matrix() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 18)
    w = layer.weight.detach().double().numpy().reshape(3, 6, 4, 6).transpose(0, 2, 1, 3).reshape(12, 36)
    u, s, v = np.linalg.svd(w, full_matrices=False)
    for rank in (1, 4, 9):
        fit = METHODS["r_cp"].factorize(layer, (rank,))
        best = ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(3, 4, 6, 6).transpose(0, 2, 1, 3).reshape(18, 24)
        np.testing.assert_allclose(fit.module.dense_weight().detach().numpy(), best, atol=1e-5)
        assert fit.error == pytest.approx((s[rank:] ** 2).sum() / (s**2).sum(), rel=1e-5)


def reshaped(layer: nn.Conv2d) -> np.ndarray:
    """(S1, S2, T1, T2, k, k) in float64."""
    (s1, s2), (t1, t2) = balanced(layer.in_channels), balanced(layer.out_channels)
    w = layer.weight.detach().double().numpy()
    return w.reshape(t1, t2, s1, s2, *layer.kernel_size).transpose(2, 3, 0, 1, 4, 5)


@pytest.mark.filterwarnings("ignore")  # tensorly's own, about its settings
@pytest.mark.parametrize("rank", [3, 8, 20])
def test_r_cp_without_statistics_is_as_good_as_tensorlys_parafac(rank: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 16, 3)
    fit = METHODS["r_cp"].factorize(layer, (rank,))
    w = reshaped(layer).transpose(0, 2, 1, 3, 4, 5).reshape(3 * 4, 4 * 4, 9)
    theirs = tensorly.cp_to_tensor(parafac(w, rank, n_iter_max=200, init="svd", tol=1e-9))
    assert fit.error <= 1.02 * np.square(theirs - w).sum() / np.square(w).sum()


def test_r_cp_with_statistics_is_the_least_squares_of_the_outputs(statistics_of: StatisticsOf) -> None:
    """Against numpy's own least squares in the norm of the windows' moments, from several random starts."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3)
    x = smooth_input(layer)
    fit = METHODS["r_cp"].factorize(layer, (3,), statistics_of(layer, x))
    windows = np.lib.stride_tricks.sliding_window_view(x.double().numpy(), (3, 3), axis=(2, 3))
    rows = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 36)
    rows = rows - rows.mean(0)
    norm = np.linalg.cholesky(rows.T @ rows)
    w = layer.weight.detach().double().numpy().reshape(4, 36)
    best = min(_alternated(w, norm, 3, seed) for seed in range(4))
    assert fit.error <= 1.02 * best / np.square(w @ norm).sum()


def _alternated(w: np.ndarray, norm: np.ndarray, rank: int, seed: int) -> float:
    """``|| (W - V) norm ||^2`` of V[(t1, t2), (s1, s2, k)] = sum_r a[r, t1, s1] b[r, t2, s2] c[r, k], two of each."""
    rng = np.random.default_rng(seed)
    factors = [rng.standard_normal((rank, 2, 2)), rng.standard_normal((rank, 2, 2)), rng.standard_normal((rank, 9))]

    def summed(factors: list[np.ndarray]) -> np.ndarray:
        return np.einsum("rta,rub,rk->tuabk", *factors).reshape(4, 36)

    for _ in range(200):
        for m in range(3):
            units = np.eye(factors[m].size).reshape(-1, *factors[m].shape)
            columns = [(summed([*factors[:m], unit, *factors[m + 1 :]]) @ norm).ravel() for unit in units]
            found = np.linalg.lstsq(np.stack(columns, 1), (w @ norm).ravel(), rcond=None)[0]
            factors[m] = found.reshape(factors[m].shape)
    return float(np.square((w - summed(factors)) @ norm).sum())


@pytest.mark.filterwarnings("ignore")  # tensorly's own, about its settings
def test_r_tucker_without_statistics_is_as_good_as_tensorlys_tucker() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 16, 3)
    fit = METHODS["r_tucker"].factorize(layer, (2, 3, 3, 2))
    w = reshaped(layer)
    core, factors = tucker(w, rank=[2, 3, 3, 2, 3, 3], n_iter_max=200, tol=1e-9)
    theirs = tensorly.tucker_to_tensor((core, factors))
    assert fit.error <= 1.01 * np.square(theirs - w).sum() / np.square(w).sum()


@pytest.mark.parametrize("name", ["r_cp", "r_tucker"])
def test_a_start_is_never_made_worse(name: str, statistics_of: StatisticsOf) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 16, 3, padding=1, groups=1)
    statistics = statistics_of(layer, smooth_input(layer))
    ranks = METHODS[name].ranks(layer)[9]
    fit = METHODS[name].factorize(layer, ranks, statistics)
    again = METHODS[name].factorize(layer, ranks, statistics, start=fit.module)
    assert again.error <= fit.error * (1 + 1e-5)


@pytest.mark.parametrize("name", ["r_cp", "r_tucker"])
def test_a_metric_moves_the_error_away_from_the_outputs_that_count(name: str, statistics_of: StatisticsOf) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 18)
    x = smooth_input(layer)
    statistics = statistics_of(layer, x)
    weights = torch.tensor([100.0] * 3 + [1.0] * 15)
    ranks = (3,) if name == "r_cp" else (2, 4, 2, 4)
    plain, aimed = (METHODS[name].factorize(layer, ranks, statistics, metric=m).module for m in (None, weights))
    gap = lambda m: (m(x) - layer(x)).detach()[:, :3].std(0).sum()  # noqa: E731
    assert gap(aimed) < gap(plain)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("name", ["r_cp", "r_tucker"])
def test_exported_files_take_any_batch(name: str, kind: type[Conv], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = kind(12, 16, 3, padding=1, stride=2, groups=2)
    module = METHODS[name].factorize(layer, METHODS[name].ranks(layer)[5]).module.eval()
    x = torch.randn(7, 12, *(9, 8, 5)[: len(layer.kernel_size)])
    dynamic = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(module, (x[:4],), dynamic_shapes=dynamic)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for batch in (x[:1], x[:3], x):
        torch.testing.assert_close(program.module()(batch), module(batch), rtol=1e-4, atol=1e-4)
        (there,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(there), module(batch).detach(), rtol=1e-4, atol=1e-4)


def test_variational_ranks_have_the_length_of_the_methods_ranks() -> None:
    torch.manual_seed(0)
    for layer in (nn.Conv2d(16, 24, 3, groups=2), nn.Linear(36, 20)):
        (rank,) = METHODS["r_cp"].variational_ranks(layer)
        assert rank >= 1
        ranks = METHODS["r_tucker"].variational_ranks(layer)
        assert len(ranks) == 4
        full = (*balanced(layer.weight.shape[1]), *balanced(layer.weight.shape[0] // getattr(layer, "groups", 1)))
        assert all(1 <= r <= n for r, n in zip(ranks, full, strict=True))


# ---------------------------------------------------------------------------------------------------------------- ways


def multiplied(call: Callable[[], Tensor]) -> int:
    """Multiplications of a call for which all that a layer keeps has been made."""
    with torch.no_grad():
        call()
        with FlopCounterMode(display=False) as counter:
            call()
    return counter.get_total_flops() // 2


def sides(s: tuple[int, int], t: tuple[int, int]) -> tuple[TTShape, TTShape]:
    return TTShape((2, 3), s, (1, 1)), TTShape(t, (4, 2), (1, 1))


def test_every_way_of_a_linear_computes_the_same() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    cp = factorized_like(nn.Linear(24, 36), "r_cp", (5,)).double().eval()
    for way in cp_shape(cp.s, cp.t, 5).ways():
        torch.testing.assert_close(cp.along(way, x), cp.dense()(x))
        assert multiplied(lambda way=way: cp.along(way, x)) == cp_shape(cp.s, cp.t, 5).contraction(way, 6, 1).macs
    tucker = factorized_like(nn.Linear(24, 36), "r_tucker", (2, 3, 4, 2)).double().eval()
    into, out_of = sides(tucker.s, tucker.t)
    for way in (None, *product(into.ways(), out_of.ways())):
        torch.testing.assert_close(tucker.along(way, x), tucker.dense()(x))


@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": 1},
        {"stride": 2, "padding": 1, "groups": 2},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
        {"padding": 1, "padding_mode": "circular", "stride": (2, 1, 2), "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", CONVS)
def test_every_way_of_a_convolution_computes_the_same(kind: type[Conv], geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    axes = CONVS.index(kind) + 1
    here = {name: value[:axes] if isinstance(value, tuple) else value for name, value in geometry.items()}
    layer, sizes = kind(24, 36, (3, 2, 1)[:axes], **here), (9, 8, 5)[:axes]
    x = torch.randn(2, 24, *sizes, dtype=torch.float64)
    cp = factorized_like(layer, "r_cp", (3,)).double().eval()
    assert cp.output_sizes(sizes) == tuple(cp(x).shape[2:])
    for order in ("spatial_first", "spatial_last", "dense"):
        torch.testing.assert_close(cp.along(order, x), cp.dense()(x))
    tucker = factorized_like(layer, "r_tucker", (2, 3, 4, 2)).double().eval()
    into, out_of = sides(tucker.s, tucker.t)
    for way in (None, *product(into.ways(), out_of.ways())):
        torch.testing.assert_close(tucker.along(way, x), tucker.dense()(x))


@pytest.mark.parametrize(("channels", "rank"), [(64, 8), (512, 2), (512, 40)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_batch_multiplies_as_often_as_planned(channels: int, rank: int, stride: int) -> None:
    layer = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
    x = torch.randn(3, channels, 6, 6)
    positions = 36, 36 // stride**2
    cp = factorized_like(layer, "r_cp", (rank,)).eval()
    assert multiplied(lambda: cp(x)) == cp_way(cp.s, cp.t, rank, (3, 3), 1, 3, positions)[1].macs
    tucker = factorized_like(layer, "r_tucker", (4, 5, 3, 4)).eval()
    way = tucker_way(tucker.s, tucker.t, (4, 5, 3, 4), (3, 3), 1, 3, positions)
    assert multiplied(lambda: tucker(x)) == way[1].macs


def test_few_large_terms_are_contracted_and_many_are_multiplied_out() -> None:
    few, many = (cp_way((16, 32), (16, 32), rank, (3, 3), 1, 1, (49, 49))[0] for rank in (2, 200))
    assert few != "dense"
    assert many == "dense"


class Operators(TorchDispatchMode):
    """The names of those that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("exported", [False, True])
def test_states_between_factors_keep_their_places(exported: bool) -> None:
    torch.manual_seed(0)
    layer = factorized_like(nn.Conv2d(64, 64, 3, padding=1), "r_tucker", (4, 4, 6, 5)).eval()
    x = torch.randn(4, 64, 9, 9)
    run: nn.Module = layer
    if exported:
        dynamic = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
        run = torch.export.export(layer, (x,), dynamic_shapes=dynamic).module()
    with torch.no_grad(), Operators() as seen:
        run(x)
    assert seen.names.count("bmm") == 4
    assert not {"clone", "copy_"} & set(seen.names)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sizes", [(9, 9, 9), (4, 7, 7)], ids=str)
def test_few_terms_of_one_volume_are_contracted(sizes: tuple[int, ...], stride: int) -> None:
    layer = nn.Conv3d(64, 64, 3, padding=1, stride=stride)
    cp = factorized_like(layer, "r_cp", (2,))
    positions = math.prod(sizes), math.prod(cp.output_sizes(sizes))
    assert cp_way(cp.s, cp.t, 2, cp.kernel_size, 1, 1, positions)[0] != "dense"
