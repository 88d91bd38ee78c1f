import itertools
import math
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from search.decompose import METHODS, method_of
from search.decompose.base import problems
from search.decompose.tensor_train import refit, whiten
from search.decompose.tt_matrix import tt_round, tt_svd
from tenfold.layers import RTTConv, TTLinear, factorized_like
from tenfold.layers.contracting import TTShape, Way, build, conv_way, linear_way
from tenfold.layers.planning import one_sample
from tenfold.layers.tensor_train import balanced, conv_modes, linear_modes

from .conftest import smooth_input
from .contract import Contract, StatisticsOf, conv_layers

FC6 = {"in_modes": (2, 7, 8, 8, 7, 4), "out_modes": (4,) * 6}
FC7 = {"in_modes": (4,) * 6, "out_modes": (4,) * 6}


def exact_ranks(out_modes: tuple[int, ...], in_modes: tuple[int, ...]) -> tuple[int, ...]:
    sizes = [o * i for o, i in zip(out_modes, in_modes, strict=True)]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


class TestTTMatrix(Contract):
    method = "tt_matrix"
    layers: ClassVar = {
        "linear": lambda: nn.Linear(20, 14),
        "wide": lambda: nn.Linear(16, 36, bias=False),
        "three pairs": lambda: nn.Linear(256, 144),
        "prime": lambda: nn.Linear(31, 24),
    }

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        return exact_ranks(*METHODS["tt_matrix"].modes(layer))


class TestGivenModes(Contract):
    method = "tt_matrix"
    options: ClassVar = {"in_modes": "2x5x3", "out_modes": "4x3x2"}
    layers: ClassVar = {"linear": lambda: nn.Linear(30, 24)}

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        return exact_ranks((4, 3, 2), (2, 5, 3))


class TestRTT(Contract):
    method = "r_tt"
    layers = conv_layers() | {
        "pointwise": lambda: nn.Conv2d(16, 12, 1, stride=2),
        "conv1d": lambda: nn.Conv1d(12, 10, 5, padding=2, stride=2),
        "conv3d": lambda: nn.Conv3d(8, 10, 3, padding=1),
        "image": lambda: nn.Conv2d(3, 16, 3, padding=1),
    }

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        return exact_ranks(*METHODS["r_tt"].modes(layer))


# ---------------------------------------------------------------------------------------------------- published counts


@pytest.mark.parametrize(("rank", "parameters", "compression"), [(4, 2016, 50972), (2, 528, 194622), (1, 144, 713614)])
def test_vgg_fc6_has_the_published_counts(rank: int, parameters: int, compression: int) -> None:
    with torch.device("meta"):
        layer = TTLinear(**FC6, ranks=(rank,) * 5, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == parameters
    assert round(25088 * 4096 / parameters) == compression
    dense = nn.Linear(25088, 4096, bias=False, device="meta")
    planned = method_of("tt_matrix", {"in_modes": "2x7x8x8x7x4", "out_modes": "4x4x4x4x4x4"})
    assert planned.applies_to(dense) is None
    assert planned.cost(dense, (rank,) * 5, 1)[0] == parameters
    assert factorized_like(dense, *layer.plan()).shape == layer.shape


def test_vgg_fc6_and_fc7_at_rank_4_have_3168_parameters() -> None:
    layers = [TTLinear(**modes, ranks=(4,) * 5, bias=False) for modes in (FC6, FC7)]
    assert sum(p.numel() for layer in layers for p in layer.parameters()) == 3168


def vgg16() -> nn.Sequential:
    """Simonyan and Zisserman's (2014) configuration D, without its pooling."""
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers.append(nn.Conv2d(channels, width, 3))
            channels = width
    return nn.Sequential(*layers, nn.Linear(25088, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 1000))


@pytest.mark.parametrize(("replaced", "published"), [((13,), 3.89), ((13, 14), 7.35)])
def test_the_whole_vgg_16_is_as_much_smaller_as_published(replaced: tuple[int, ...], published: float) -> None:
    with torch.device("meta"):
        network = vgg16()
        dense = sum(p.numel() for p in network.parameters())
        for place, modes in zip(replaced, (FC6, FC7), strict=False):
            network[place] = TTLinear(**modes, ranks=(4,) * 5)
    assert dense == 138_357_544
    assert round(dense / sum(p.numel() for p in network.parameters()), 2) == published


def test_vgg_fc6_computes_without_its_matrix() -> None:
    layer = TTLinear(**FC6, ranks=(4,) * 5)
    for rows in (1, 3, 100):
        assert len(linear_way(layer.shape, rows)[0].parts) > 1
    assert layer(torch.randn(3, 25088)).shape == (3, 4096)


def test_r_tt_has_the_published_count() -> None:
    layer = RTTConv(64, 128, (3, 3), (5, 7, 3), bias=False)
    (t1, t2, t3), (s1, s2, s3) = conv_modes(64, 128)
    published = s1 * t1 * 5 + 5 * s2 * t2 * 7 + 7 * s3 * t3 * 3 + 3 * 3 * 3
    assert sum(p.numel() for p in layer.parameters()) == published


# --------------------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("size", [2, 7, 12, 60, 97, 96, 512, 4096, 25088])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_balanced_factors_have_the_least_sum_of_all(size: int, count: int) -> None:
    factors = balanced(size, count)
    assert math.prod(factors) == size
    assert list(factors) == sorted(factors)
    divisors = [f for f in range(1, size + 1) if size % f == 0]
    every = itertools.combinations_with_replacement(divisors, count - 1)
    sums = [sum(some) + size // math.prod(some) for some in every if size % math.prod(some) == 0]
    assert sum(factors) == min(sums)


def test_modes_of_familiar_layers() -> None:
    assert linear_modes(4096, 4096) == ((8,) * 4, (8,) * 4)
    assert linear_modes(512, 512) == ((8,) * 3, (8,) * 3)
    assert conv_modes(64, 128) == ((8, 4, 4), (4, 4, 4))


@pytest.mark.parametrize(("size_in", "size_out"), [(4096, 4096), (96, 1000), (768, 3072), (30, 22), (6, 35)])
def test_no_mode_is_1_unless_a_size_is_prime(size_in: int, size_out: int) -> None:
    out_modes, in_modes = linear_modes(size_in, size_out)
    assert min(out_modes + in_modes) > 1


def test_a_prime_takes_two_pairs_and_no_more() -> None:
    assert linear_modes(4099, 4096) == ((64, 64), (1, 4099))


def test_a_plan_names_modes_only_where_they_do_not_follow_from_the_sizes() -> None:
    assert TTLinear((8, 8, 8), (8, 8, 8), (2, 2)).plan() == ("tt_matrix", (2, 2), {})
    modes = {"in_modes": "4x8x8x4", "out_modes": "5x5x5x5"}
    assert TTLinear((4, 8, 8, 4), (5, 5, 5, 5), (3, 3, 3)).plan() == ("tt_matrix", (3, 3, 3), modes)


@pytest.mark.parametrize(
    ("in_modes", "out_modes"),
    [
        ("4x8x8", "5x5x5x5"),
        ("4x8x32", "5x5x5x5"),
        ("1024", "625"),
        ("4x8x8x4", None),
        ("4x8x8x4 ", "5x5x5x5"),
        ([4, 8, 8, 4], "5x5x5x5"),
        ("-4x8x8x-4", "5x5x5x5"),
        ("x".join(["2"] * 10 + ["1"]), "5x5x5x5" + "x1" * 7),
    ],
)
def test_modes_that_are_not_the_layers_are_refused_with_its_sizes(in_modes: object, out_modes: object) -> None:
    options = {"in_modes": in_modes} | ({} if out_modes is None else {"out_modes": out_modes})
    layer = nn.Linear(1024, 625)
    message = f"1024 inputs and 625 outputs; got {re.escape(repr(in_modes))} and {re.escape(repr(out_modes))}"
    with pytest.raises(ValueError, match=message):
        factorized_like(layer, "tt_matrix", (2, 2, 2), options)
    assert re.search(message, str(method_of("tt_matrix", options).applies_to(layer)))


# ------------------------------------------------------------------------------------------------------------- oracles


def tensorised(weight: Tensor, out_modes: tuple[int, ...], in_modes: tuple[int, ...]) -> np.ndarray:
    d = len(out_modes)
    return weight.numpy().reshape(*out_modes, *in_modes).transpose([a for k in range(d) for a in (k, d + k)])


@pytest.mark.filterwarnings("ignore")  # tensorly's own, about its settings
def test_tt_svd_is_tensorlys() -> None:
    from tensorly.decomposition import tensor_train, tensor_train_matrix

    torch.manual_seed(0)
    out_modes, in_modes, ranks = (4, 3, 2), (2, 3, 5), (5, 6)
    weight = torch.randn(24, 30, dtype=torch.float64)
    ours = tt_svd(weight, out_modes, in_modes, ranks)
    gap = float((build(ours)[0, :, :, 0] - weight).norm())
    tensor = tensorised(weight, out_modes, in_modes)
    merged = tensor.reshape([o * i for o, i in zip(out_modes, in_modes, strict=True)])
    theirs = tensor_train(merged, rank=[1, *ranks, 1])
    assert [core.shape[3] for core in ours] == [f.shape[2] for f in theirs.factors]
    assert gap == pytest.approx(np.linalg.norm(theirs.to_tensor() - merged), rel=1e-6)
    as_matrix = tensor_train_matrix(weight.numpy().reshape(*out_modes, *in_modes), rank=[1, *ranks, 1])
    assert gap <= 1.01 * np.linalg.norm(as_matrix.to_tensor().reshape(24, 30) - weight.numpy())


def test_rounding_a_train_is_tt_svd_of_its_matrix() -> None:
    torch.manual_seed(0)
    modes = (3, 2, 4), (2, 5, 3)
    planted = tt_svd(torch.randn(24, 30, dtype=torch.float64), *modes, (6, 9))
    weight = build(planted)[0, :, :, 0]
    rounded, direct = tt_round(planted, (3, 4)), tt_svd(weight, *modes, (3, 4))
    torch.testing.assert_close(build(rounded), build(direct), rtol=1e-8, atol=1e-8)


def test_a_planted_train_is_found_again() -> None:
    torch.manual_seed(0)
    modes = (3, 2, 4), (2, 5, 3)
    weight = build([torch.randn(shape, dtype=torch.float64) for shape in TTShape(*modes, (3, 2, 1)).cores])[0, :, :, 0]
    found = tt_svd(weight, *modes, 30)
    torch.testing.assert_close(build(found)[0, :, :, 0], weight)
    again = tt_svd(weight, *modes, (3, 2))
    torch.testing.assert_close(build(again)[0, :, :, 0], weight)


@pytest.mark.parametrize("metric", [None, torch.linspace(0.2, 5, 16)])
def test_refitting_ends_where_least_squares_in_numpy_cannot_better_a_core(
    metric: Tensor | None, statistics_of: StatisticsOf
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 16, 3, padding=1)
    part = problems(layer, statistics_of(layer, smooth_input(layer)), metric)[0]
    white = whiten(part, *METHODS["r_tt"].modes(layer), 4)
    start = white.at((4, 4, 4))
    found, error = refit(white.problem, start, sweeps=300, macs=1e12)
    new = white.leave(found)
    assert error == pytest.approx(part.error(build(new)[0, :, :, 0]), rel=1e-9)
    assert error < part.error(build(white.leave(start))[0, :, :, 0])
    # The design matrix of the last core, column by column.
    root = np.linalg.cholesky(part.moments.numpy())
    wanted = ((part.rows[:, None] * part.target).numpy() @ root).ravel()
    last = new[-1]
    design = []
    for entry in torch.eye(last.numel(), dtype=torch.float64):
        moved = build([*new[:-1], entry.reshape(last.shape)])[0, :, :, 0]
        design.append(((part.rows[:, None] * moved).numpy() @ root).ravel())
    solution, *_ = np.linalg.lstsq(np.stack(design, 1), wanted, rcond=None)
    best = part.floor + np.square(np.stack(design, 1) @ solution - wanted).sum()
    assert error <= best * (1 + 1e-3)


def test_a_fit_goes_on_from_one_for_nearly_the_same_data(statistics_of: StatisticsOf) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 16, 3, padding=1)
    m = METHODS["r_tt"]
    ranks = m.ranks(layer)[-1]
    first = m.factorize(layer, ranks, statistics_of(layer, smooth_input(layer)))
    other = statistics_of(layer, smooth_input(layer, seed=1))
    unmoved = problems(layer, other)[0]
    before = unmoved.error(first.module.dense_weight().detach().double().flatten(1)) / unmoved.energy
    assert m.factorize(layer, ranks, other, start=first.module).error <= before + 1e-9


# ------------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("way", TTShape((4, 3, 2), (2, 5, 3), (4, 3, 1)).ways(), ids=str)
def test_every_way_of_a_linear_computes_the_same_and_multiplies_as_often_as_planned(way: Way) -> None:
    torch.manual_seed(0)
    layer = TTLinear((2, 5, 3), (4, 3, 2), (4, 3)).double().eval()
    x = torch.randn(2, 7, 30, dtype=torch.float64)
    torch.testing.assert_close(layer.along(way, x), layer.dense()(x))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer.along(way, x)  # joins cores
        first = counter.get_total_flops()
        layer.along(way, x)  # and keeps them
    shape = layer.shape
    assert counter.get_total_flops() - first == 2 * shape.contraction(way, 14, 1).macs
    assert 2 * first - counter.get_total_flops() == 2 * shape.joining(way.parts).macs


@pytest.mark.parametrize("way", [*TTShape((2, 4), (2, 3), (3, 2)).ways(), Way("first", (2,), True)], ids=str)
def test_every_way_of_a_convolution_computes_the_same(way: Way) -> None:
    torch.manual_seed(0)
    layer = RTTConv(12, 16, (3, 2), (3, 2), stride=(2, 1), padding=1, groups=2, padding_mode="reflect").double()
    assert layer.shape == TTShape((4, 2), (2, 3), (3, 2))
    x = torch.randn(2, 12, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(layer.along(way, x), layer.dense()(x))


def test_few_rows_go_along_the_cores_and_small_kernels_are_built() -> None:
    large, small = TTShape((8,) * 4, (8,) * 4, (8, 8, 8, 1)), TTShape((4,) * 3, (4,) * 3, (7,) * 3)
    assert len(linear_way(large, 1)[0].parts) > 1
    assert conv_way(small, (3, 3), 1, 32, (784, 784))[0].is_dense
    assert not conv_way(TTShape((8,) * 3, (8,) * 3, (2,) * 3), (3, 3), 1, 1, (49, 49))[0].is_dense


def test_a_kept_product_follows_its_cores() -> None:
    torch.manual_seed(0)
    layer = RTTConv(16, 16, (3, 3), (7, 7, 7), padding=1).eval()
    x = torch.randn(4, 16, 9, 9)
    assert conv_way(layer.shape, (3, 3), 1, 4, (81, 81))[0].is_dense
    with torch.no_grad():
        before = layer(x)
        layer.cores[0].mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
        layer.spatial.weight.mul_(0.5)
        torch.testing.assert_close(layer(x), before)


def test_within_one_sample_a_batch_goes_the_way_of_one() -> None:
    layer = TTLinear((8,) * 3, (8,) * 3, (4, 4)).eval()
    x = torch.randn(512, 512)

    def counted() -> int:
        layer(x)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        return counter.get_total_flops() // 2 // 512

    with torch.no_grad():
        assert counted() == linear_way(layer.shape, 512)[1].macs // 512
        with one_sample():
            assert counted() == linear_way(layer.shape, 1)[1].macs
    assert linear_way(layer.shape, 512)[0] != linear_way(layer.shape, 1)[0]


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (TTLinear((4, 4, 4), (4, 4, 4), (3, 3)), torch.randn(3, 64)),
        (RTTConv(16, 64, (3, 3), (2, 2, 2), padding=1), torch.randn(3, 16, 6, 6)),
        (RTTConv(64, 16, (3, 3), (2, 2, 2), padding=1, groups=2), torch.randn(3, 64, 6, 6)),
    ],
    ids=["linear", "last", "first"],
)
def test_it_exports_with_a_dynamic_batch(layer: nn.Module, x: Tensor, tmp_path: Path) -> None:
    layer.eval()
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(layer, (x,), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    onnx = pytest.importorskip("onnxruntime")
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnx.InferenceSession(str(tmp_path / "model.onnx"))
    for batch in (torch.cat([x, x]), x[:1]):
        torch.testing.assert_close(loaded(batch), layer(batch))
        (there,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(there), layer(batch).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "method"), [(nn.Linear(64, 64), "tt_matrix"), (nn.Conv2d(32, 32, 3, groups=2), "r_tt")]
)
def test_variational_ranks_are_one_for_each_unfolding_and_find_a_planted_train(layer: nn.Module, method: str) -> None:
    torch.manual_seed(0)
    groups = getattr(layer, "groups", 1)
    out_modes, in_modes = METHODS[method].modes(layer)
    exact = exact_ranks(out_modes, in_modes)
    planted = tuple(min(2, most) for most in exact)
    trains = [build([torch.randn(shape) for shape in TTShape(out_modes, in_modes, (*planted, 1)).cores])] * groups
    with torch.no_grad():
        layer.weight.copy_(torch.cat([train[0, :, :, 0] for train in trains]).reshape(layer.weight.shape))
        layer.weight.add_(1e-3 * torch.randn_like(layer.weight))
    assert METHODS[method].variational_ranks(layer) == planted


def test_each_names_the_other_for_the_layers_it_does_not_take() -> None:
    assert "r_tt" in str(METHODS["tt_matrix"].applies_to(nn.Conv2d(8, 8, 3)))
    assert "tt_matrix" in str(METHODS["r_tt"].applies_to(nn.Linear(8, 8)))
