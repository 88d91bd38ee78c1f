"""Several layers as one tensor: the contract of the methods of one layer, said of a group; and independent oracles."""

import copy
import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch
from tensorly.decomposition import tensor_train, tucker
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from search import cost
from search.calibrate import Statistics
from search.decompose import JOINT_METHODS, JointMethod
from search.decompose.joint import Group
from tenfold.layers import JointLayer, joint_like

from .conftest import smooth_input
from .contract import StatisticsOf, output_positions, true_error

Layers = Callable[[], tuple[nn.Module, ...]]


def convs(count: int, **options: object) -> tuple[nn.Module, ...]:
    return tuple(nn.Conv2d(8, 10, 3, padding=1, **options) for _ in range(count))  # type: ignore[arg-type]


GROUPS: dict[str, tuple[tuple[int, ...], Layers]] = {
    "grid": ((3, 2), lambda: convs(6)),
    "row": ((3,), lambda: (*convs(2, bias=False), nn.Conv2d(8, 10, 3, stride=2, padding=1))),
    "odd kernels": (
        (2,),
        lambda: (nn.Conv2d(8, 9, (3, 2)), nn.Conv2d(8, 9, (3, 2), padding="same", dilation=(1, 2))),
    ),
    "pointwise": ((3,), lambda: tuple(nn.Conv2d(10, 12, 1) for _ in range(3))),
    "one axis": ((2,), lambda: tuple(nn.Conv1d(8, 9, 5, padding=2) for _ in range(2))),
    "three axes": ((2,), lambda: tuple(nn.Conv3d(6, 7, 3, padding=1) for _ in range(2))),
    "linear": ((2, 2), lambda: tuple(nn.Linear(12, 10) for _ in range(4))),
}


def make(name: str) -> Group:
    torch.manual_seed(3)
    grid, layers = GROUPS[name]
    members = layers()
    return Group(tuple(f"layer{i}" for i in range(len(members))), members, grid)


def known(group: Group, statistics_of: StatisticsOf) -> list[Statistics]:
    return [statistics_of(layer, smooth_input(layer, seed=i)) for i, layer in enumerate(group.layers)]


def untrained(group: Group, method: str, ranks: tuple[int, ...]) -> list[JointLayer]:
    modules = joint_like(dict(zip(group.names, group.layers, strict=True)), method, ranks, group.members)
    return [modules[name] for name in group.names]


@pytest.mark.parametrize("name", GROUPS)
class JointContract:
    method: ClassVar[str]
    full: ClassVar[Callable[[Group], tuple[int, ...]]]

    @property
    def m(self) -> JointMethod:
        return JOINT_METHODS[self.method]

    def middle(self, group: Group) -> tuple[int, ...]:
        """Of the lattice's middle; every other group's leading mode is cut there."""
        lattice = [r for r in self.m.ranks(group) if (r[0] < group.grid[0]) == (len(group.layers) % 2 == 1)]
        return lattice[len(lattice) // 2]

    def test_it_is_exact_at_full_rank(self, name: str, statistics_of: StatisticsOf) -> None:
        group = make(name)
        full = self.m.full_ranks(group)
        assert full == type(self).full(group)
        for statistics in (None, known(group, statistics_of)):
            fit = self.m.factorize(group, full, statistics)
            assert max(fit.errors) < 1e-4
            for i, (layer, module) in enumerate(zip(group.layers, fit.modules, strict=True)):
                x = smooth_input(layer, seed=i)
                torch.testing.assert_close(module(x), layer(x), rtol=2e-2, atol=2e-2)

    def test_curves_are_cheaper_than_dense_and_never_rise_and_fits_are_as_good(
        self, name: str, statistics_of: StatisticsOf
    ) -> None:
        group = make(name)
        statistics = known(group, statistics_of)
        positions = [output_positions(x, smooth_input(x)) for x in group.layers]
        curve = self.m.curve(group, statistics, positions)
        assert 0 < len(curve) <= 60
        dense = group.dense(positions)
        for low in curve:
            assert low.parameters < dense[0]
            assert low.macs <= dense[1]
            assert low.error == pytest.approx(sum(low.errors) / len(low.errors))
            for high in curve:
                if all(a <= b for a, b in zip(low.ranks, high.ranks, strict=True)):
                    assert high.error <= low.error + 1e-9
        for point in curve[::13]:
            fit = self.m.factorize(group, point.ranks, statistics)
            assert fit.error <= point.error + 1e-6

    def test_its_stated_errors_are_those_of_its_outputs(self, name: str, statistics_of: StatisticsOf) -> None:
        group = make(name)
        fit = self.m.factorize(group, self.middle(group), known(group, statistics_of))
        for i, (layer, module, error) in enumerate(zip(group.layers, fit.modules, fit.errors, strict=True)):
            x = smooth_input(layer, seed=i)
            assert error == pytest.approx(true_error(copy.deepcopy(layer), copy.deepcopy(module), x), rel=5e-3)

    def test_data_aware_factors_beat_plain_ones_on_the_data(self, name: str, statistics_of: StatisticsOf) -> None:
        group = make(name)
        ranks = self.middle(group)

        def total(statistics: list[Statistics] | None) -> float:
            fit = self.m.factorize(group, ranks, statistics)
            return sum(
                true_error(copy.deepcopy(layer), copy.deepcopy(module), smooth_input(layer, seed=i))
                for i, (layer, module) in enumerate(zip(group.layers, fit.modules, strict=True))
            )

        assert total(known(group, statistics_of)) < total(None)

    def test_refitting_a_member_to_its_own_data_helps_it_and_leaves_the_others(
        self, name: str, statistics_of: StatisticsOf
    ) -> None:
        group = make(name)
        whole = [r for r in self.m.ranks(group) if untrained(group, self.method, r)[0].shared.is_whole]
        fit = self.m.factorize(group, whole[len(whole) // 2], known(group, statistics_of))
        before = [m.dense_weight().detach().clone() for m in fit.modules]
        layer = group.layers[1]
        new = statistics_of(layer, smooth_input(layer, seed=9))
        start = true_error(copy.deepcopy(layer), copy.deepcopy(fit.modules[1]), smooth_input(layer, seed=9))
        error = self.m.refit(fit.modules[1], layer, new)
        assert error < start
        after = true_error(copy.deepcopy(layer), copy.deepcopy(fit.modules[1]), smooth_input(layer, seed=9))
        assert error == pytest.approx(after, rel=5e-3)
        assert [torch.equal(m.dense_weight(), w) for m, w in zip(fit.modules, before, strict=True)].count(False) == 1

    def test_predicted_costs_are_the_modules_with_shared_factors_once(self, name: str) -> None:
        group = make(name)
        xs = [smooth_input(layer, samples=1)[:1] for layer in group.layers]
        positions = [output_positions(layer, x) for layer, x in zip(group.layers, xs, strict=True)]
        sizes = [tuple(x.shape[2:]) for x in xs]
        for ranks in self.m.ranks(group)[::37]:
            modules = nn.ModuleList(untrained(group, self.method, ranks))
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                for module, x in zip(modules, xs, strict=True):
                    module(x)
            parameters, macs = self.m.cost(group, ranks, positions, input_sizes=sizes)
            assert parameters == cost.parameters(modules)
            assert macs == counter.get_total_flops() // 2

    def test_members_compute_what_their_dense_layers_compute(self, name: str) -> None:
        group = make(name)
        for layer, module in zip(group.layers, self.m.factorize(group, self.middle(group)).modules, strict=True):
            x = smooth_input(layer, samples=2)
            dense = module.dense()
            assert type(dense) is type(layer)
            assert dense.weight.shape == layer.weight.shape
            torch.testing.assert_close(dense(x), module(x), rtol=1e-4, atol=1e-4)

    def test_gradients_of_all_members_add_up_in_the_same_factors(self, name: str) -> None:
        group = make(name)
        modules = nn.ModuleList(self.m.factorize(group, self.middle(group)).modules)
        shared = modules[0].shared
        assert all(module.shared is shared for module in modules)
        xs = [smooth_input(layer, samples=2) for layer in group.layers]
        alone = []
        for module, x in zip(modules, xs, strict=True):
            modules.zero_grad()
            module(x).square().sum().backward()
            alone.append(shared.last.grad.clone())
        modules.zero_grad()
        sum(module(x).square().sum() for module, x in zip(modules, xs, strict=True)).backward()
        torch.testing.assert_close(shared.last.grad, sum(alone), rtol=1e-3, atol=1e-3)
        for parameter in modules.parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_follows_the_layers_precision_and_layout(self, name: str, dtype: torch.dtype) -> None:
        group = make(name)
        group = Group(group.names, tuple(layer.to(dtype) for layer in group.layers), group.grid)
        modules = self.m.factorize(group, self.middle(group)).modules
        for layer, module in zip(group.layers, modules, strict=True):
            x = smooth_input(layer, samples=2).to(dtype)
            assert {p.dtype for p in module.parameters()} == {dtype}
            expected = module.dense()(x)
            if isinstance(layer, nn.Conv2d):
                module, x = module.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
            torch.testing.assert_close(module(x), expected, rtol=0.1, atol=0.5 if dtype == torch.bfloat16 else 1e-3)

    def test_analytic_ranks_are_as_many_as_the_methods(self, name: str) -> None:
        group = make(name)
        found = self.m.variational_ranks(group)
        assert len(found) == len(self.m.ranks(group)[0])
        assert min(found) >= 1


class TestJointTucker(JointContract):
    method = "joint_tucker"

    @staticmethod
    def full(group: Group) -> tuple[int, ...]:
        out, in_, _ = group.shape
        return (*group.grid, in_, out)


class TestJointMPS(JointContract):
    method = "joint_mps"

    @staticmethod
    def full(group: Group) -> tuple[int, ...]:
        out, in_, taps = group.shape
        bonds = [math.prod(group.grid[: k + 1]) for k in range(len(group.grid))]
        return (*bonds, min(len(group.layers) * in_, taps * out), out)


# ------------------------------------------------------------------------------------------------------------ oracles


def related(grid: tuple[int, ...]) -> Group:
    """Layers whose kernels are alike, so that cutting a grid mode keeps most; energies equal, as the oracles weigh."""
    torch.manual_seed(1)
    common, layers = torch.randn(3, 9, 8, 3, 3), []
    for _ in range(math.prod(grid)):
        layer = nn.Conv2d(8, 9, 3, bias=False)
        weight = torch.einsum("k,k...->...", torch.randn(3), common) + 0.3 * torch.randn(9, 8, 3, 3)
        layer.weight.data = weight / weight.norm()
        layers.append(layer)
    return Group(tuple(f"layer{i}" for i in range(len(layers))), tuple(layers), grid)


def stacked(group: Group) -> np.ndarray:
    weights = np.stack([layer.weight.detach().double().numpy() for layer in group.layers])
    return weights.reshape(*group.grid, *weights.shape[1:])


@pytest.mark.filterwarnings("ignore")  # tensorly's own, about its settings
@pytest.mark.parametrize(("grid", "modes"), [((3, 2), (3, 2)), ((3, 2), (2, 1)), ((5,), (3,))])
def test_without_statistics_joint_tucker_is_as_exact_as_tensorlys_tucker(
    grid: tuple[int, ...], modes: tuple[int, ...]
) -> None:
    group = related(grid)
    w = stacked(group)
    fit = JOINT_METHODS["joint_tucker"].factorize(group, (*modes, 4, 5))
    core, factors = tucker(w, rank=[*modes, 5, 4, 3, 3], n_iter_max=200, tol=1e-10)
    theirs = core
    for axis, factor in enumerate(factors):
        theirs = np.moveaxis(np.tensordot(factor, theirs, axes=(1, axis)), 0, axis)
    ours = np.stack([m.dense_weight().detach().double().numpy() for m in fit.modules]).reshape(w.shape)
    assert np.linalg.norm(ours - w) <= 1.02 * np.linalg.norm(theirs - w)
    assert fit.error == pytest.approx(np.linalg.norm(ours - w) ** 2 / np.linalg.norm(w) ** 2, rel=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("grid", "bonds"), [((3, 2), (3, 6)), ((3, 2), (3, 3)), ((5,), (3,))])
def test_without_statistics_joint_mps_is_no_worse_than_tensorlys_tensor_train(
    grid: tuple[int, ...], bonds: tuple[int, ...]
) -> None:
    group = related(grid)
    w = stacked(group)
    chain = w.reshape(*grid, 9, 8, 9).transpose(*range(len(grid)), -2, -1, -3)  # grid.., in, taps, out
    fit = JOINT_METHODS["joint_mps"].factorize(group, (*bonds, 5, 6))
    theirs = tensor_train(chain, rank=[1, *bonds, 5, 6, 1]).to_tensor()
    ours = np.stack([m.dense_weight().detach().double().numpy() for m in fit.modules]).reshape(*grid, 9, 8, 9)
    ours = ours.transpose(*range(len(grid)), -2, -1, -3)
    assert np.linalg.norm(ours - chain) <= np.linalg.norm(theirs - chain)


def test_a_members_kernel_is_its_rows_of_the_grid_factors_times_the_core() -> None:
    group = make("grid")
    tucker_member = untrained(group, "joint_tucker", (2, 1, 3, 4))[3]  # the fourth of 3 x 2: row (1, 1)
    s = tucker_member.shared
    u, v = (m.detach().numpy() for m in s.modes)
    core = np.einsum("g,h,ghon->on", u[1], v[1], s.core.detach().numpy().reshape(2, 1, 4, -1))
    kernel = np.einsum(
        "os,srhw,ri->oihw", s.last.detach().numpy(), core.reshape(4, 3, 3, 3), s.first[0].detach().numpy()
    )
    np.testing.assert_allclose(tucker_member.dense_weight().detach().numpy(), kernel, rtol=1e-4, atol=1e-5)
    chain_member = untrained(group, "joint_mps", (2, 3, 4, 5))[5]  # the last: row (2, 1)
    s = chain_member.shared
    a, b = (m.detach().numpy() for m in s.modes)
    first = np.einsum("b,bc,cri->ri", a[0, 2], b[:, 1], s.first.detach().numpy())
    core = s.core.detach().numpy().reshape(5, 4, 3, 3)
    kernel = np.einsum("os,srhw,ri->oihw", s.last.detach().numpy(), core, first)
    np.testing.assert_allclose(chain_member.dense_weight().detach().numpy(), kernel, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)), "not of one shape"),
        ((nn.Conv2d(4, 4, 3), nn.Conv2d(8, 4, 3, groups=2)), "2 groups"),
        ((nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), "circular"),
        ((nn.Embedding(4, 4), nn.Embedding(4, 4)), "Embedding is neither"),
        ((nn.Linear(4, 1), nn.Linear(4, 1)), "a single channel"),
    ],
)
def test_layers_that_cannot_be_joined_say_why(layers: tuple[nn.Module, ...], reason: str) -> None:
    assert reason in str(Group(("a", "b"), layers, (2,)).reason())


@pytest.mark.parametrize(
    ("method", "ranks", "members", "message"),
    [
        ("joint_tucker", (2, 3, 3), {"a": (0,), "b": (2,)}, "fill a grid"),
        ("joint_tucker", (2, 3, 3), {"a": (0,), "b": (0,)}, "fill a grid"),
        ("joint_tucker", (2, 3, 3), {"a": (0,)}, "fill a grid"),
        ("joint_tucker", (2, 3), {"a": (0,), "b": (1,)}, "then low and high"),
        ("joint_tucker", (3, 3, 3), {"a": (0,), "b": (1,)}, "above their sizes"),
        ("joint_mps", (3, 3, 3), {"a": (0,), "b": (1,)}, "above what the grid"),
        ("svd", (3,), {"a": (0,), "b": (1,)}, "unknown method 'svd' for several layers"),
        ("joint_mps", (2, 3, 3), {"a": (0,), "c": (1,)}, "one shape and dtype"),
    ],
)
def test_members_that_cannot_be_made_say_why(
    method: str, ranks: tuple[int, ...], members: dict[str, tuple[int, ...]], message: str
) -> None:
    layers = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 5)}
    with pytest.raises(ValueError, match=message):
        joint_like(layers, method, ranks, members)
