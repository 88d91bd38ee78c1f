"""What every decomposition must do, whatever it is. A test class inherits ``Contract`` and names its layers.

Most tests see every layer. Those ``of_each_kind`` look at weights and statistics alone, or at code that is the same for
all numbers: they leave out the layers that differ from another only by strides, dilations and paddings.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from search.calibrate import Statistics
from search.decompose import Method, method_of
from search.spec import CurvePoint
from tenfold.layers import FactorizedLayer, factorized_like
from tenfold.layers.base import TRANSPOSED

from .conftest import smooth_input

StatisticsOf = Callable[[nn.Module, Tensor], Statistics]

ALIKE = {"strided", "dilated", "unpadded", "overlapping", "padded outputs"}
"""Layers that are of another's kind: their weights have its axes, and their geometry is of other numbers."""


@dataclass(frozen=True)
class Known:
    """A layer, its data, and what the method offers for both: found once for all tests that ask."""

    method: Method
    layer: nn.Module
    x: Tensor
    statistics: Statistics

    @cached_property
    def curve(self) -> tuple[CurvePoint, ...]:
        return self.method.curve(self.layer, self.statistics, 4)


def of_each_kind(test: Callable[..., None]) -> Callable[..., None]:
    """Leave the layers of ``ALIKE`` out."""
    test.of_each_kind = True  # type: ignore[attr-defined]
    return test


def true_error(layer: nn.Module, module: nn.Module, x: Tensor) -> float:
    """E||y - y^||^2 / E||y - Ey||^2 of the centred outputs, from the outputs themselves."""
    wide = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        y, z = layer.double()(wide), module.double()(wide)
    axis = 1 if y.dim() > 2 else -1
    y, z = y.movedim(axis, -1).flatten(0, -2), z.movedim(axis, -1).flatten(0, -2)
    y, z = y - y.mean(0), z - z.mean(0)
    return float((y - z).square().sum() / y.square().sum())


def output_positions(layer: nn.Module, x: Tensor) -> int:
    """How often the weight is applied to one sample."""
    if isinstance(layer, TRANSPOSED):
        return x[0, 0].numel()
    with torch.no_grad():
        y = layer(x[:1])
    return y[0, 0].numel() if y.dim() > 2 else 1


class Contract:
    method: ClassVar[str]
    options: ClassVar[dict[str, str]] = {}
    layers: ClassVar[dict[str, Callable[[], nn.Module]]]
    full: ClassVar[Callable[[nn.Module], tuple[int, ...]]]
    """Ranks at which the method is exact."""

    @classmethod
    def named(cls) -> Method:
        return method_of(cls.method, cls.options)

    @property
    def m(self) -> Method:
        return self.named()

    @pytest.fixture(autouse=True)
    def _one_seed(self) -> None:
        torch.manual_seed(3)

    @pytest.fixture(scope="class")
    @classmethod
    def known(cls, name: str, statistics_of: StatisticsOf) -> Known:
        layer = cls.made(name)
        x = smooth_input(layer)
        return Known(cls.named(), layer, x, statistics_of(layer, x))

    @pytest.fixture(scope="class")
    @classmethod
    def _plain(cls, name: str) -> FactorizedLayer:
        layer = cls.made(name)
        return cls.named().factorize(layer, cls.middle(layer), None).module

    @pytest.fixture
    def plain(self, _plain: FactorizedLayer) -> FactorizedLayer:
        """Factors of middle ranks that no data were known for, to do with as one likes."""
        return copy.deepcopy(_plain)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "name" in metafunc.fixturenames:
            left_out = ALIKE if hasattr(metafunc.function, "of_each_kind") else set()
            metafunc.parametrize("name", [name for name in self.layers if name not in left_out], scope="class")

    @classmethod
    def made(cls, name: str) -> nn.Module:
        torch.manual_seed(3)
        return cls.layers[name]()

    @classmethod
    def middle(cls, layer: nn.Module) -> tuple[int, ...]:
        lattice = cls.named().ranks(layer)
        return lattice[len(lattice) // 2]

    def test_it_is_exact_at_full_rank(self, name: str, statistics_of: StatisticsOf) -> None:
        layer = self.layers[name]()
        x = smooth_input(layer)
        full = self.m.full_ranks(layer)
        assert full == type(self).full(layer)
        for statistics in (None, statistics_of(layer, x)):
            fit = self.m.factorize(layer, full, statistics)
            assert fit.error < 1e-4
            torch.testing.assert_close(fit.module(x), layer(x), rtol=2e-2, atol=2e-2)

    @of_each_kind
    def test_the_error_never_rises_with_rank(self, known: Known) -> None:
        for curve in (self.m.curve(known.layer, None, 4), known.curve):
            by_cost = sorted(curve, key=lambda p: p.parameters)
            errors = {p.ranks: p.error for p in by_cost}
            for low, error in errors.items():
                for high, other in errors.items():
                    if all(a <= b for a, b in zip(low, high, strict=True)):
                        assert other <= error + 1e-9

    def test_its_stated_error_is_the_error_of_its_outputs(self, known: Known) -> None:
        fit = self.m.factorize(known.layer, self.middle(known.layer), known.statistics)
        actual = true_error(copy.deepcopy(known.layer), fit.module, known.x)
        assert fit.error == pytest.approx(actual, rel=2e-3, abs=1e-5)

    @of_each_kind
    def test_a_fit_is_no_worse_than_its_point_on_the_curve(self, known: Known) -> None:
        """To 2 %: most points of a tightened curve follow a few that were fitted."""
        for point in known.curve[::9]:
            fit = self.m.factorize(known.layer, point.ranks, known.statistics)
            assert fit.error <= 1.02 * point.error + 1e-6

    @of_each_kind
    def test_data_aware_factors_beat_plain_ones_on_the_data(self, known: Known, plain: FactorizedLayer) -> None:
        aware = self.m.factorize(known.layer, self.middle(known.layer), known.statistics).module
        error, other = (true_error(copy.deepcopy(known.layer), module, known.x) for module in (aware, plain))
        assert error <= other

    def test_predicted_parameters_and_macs_are_the_modules(self, name: str) -> None:
        layer = self.layers[name]()
        x = smooth_input(layer, samples=1)[:1]
        sizes = tuple(x.shape[2:])
        for ranks in self.m.ranks(layer)[::7]:
            module = factorized_like(layer, self.method, ranks, self.options).eval()  # as the search counts
            with torch.no_grad():
                module(x)  # a layer may keep what it makes of its factors
                with FlopCounterMode(display=False) as counter:
                    module(x)
            parameters, macs = self.m.cost(layer, ranks, output_positions(layer, x), input_sizes=sizes)
            assert parameters == sum(p.numel() for p in module.parameters())
            assert macs == counter.get_total_flops() // 2

    @of_each_kind
    def test_every_point_has_fewer_parameters_and_no_more_macs_than_the_dense_layer(self, known: Known) -> None:
        curve = self.m.curve(known.layer, known.statistics, output_positions(known.layer, known.x))
        assert 0 < len(curve) <= 60
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            known.layer(known.x[:1])
        for point in curve:
            assert point.parameters < sum(p.numel() for p in known.layer.parameters())
            # A look-up multiplies nothing: there any factors cost MACs, and parameters are what they save.
            assert point.macs <= counter.get_total_flops() // 2 or isinstance(known.layer, nn.Embedding)

    def test_it_computes_what_its_dense_layer_computes(self, name: str, plain: FactorizedLayer) -> None:
        layer = self.layers[name]()
        x = smooth_input(layer, samples=2)
        dense = plain.dense()
        assert type(dense) is type(layer)
        assert dense.weight.shape == layer.weight.shape
        torch.testing.assert_close(dense(x), plain(x), rtol=1e-4, atol=1e-4)

    def test_analytic_ranks_are_as_many_as_the_methods(self, name: str) -> None:
        layer = self.layers[name]()
        found = self.m.variational_ranks(layer)
        assert len(found) == len(self.m.ranks(layer)[0])
        assert min(found) >= 1

    def test_no_rank_worth_trying_is_above_what_is_exact(self, name: str) -> None:
        layer = self.layers[name]()
        full, *lattice = self.m.full_ranks(layer), *self.m.ranks(layer)
        assert all(r <= most for ranks in lattice for r, most in zip(ranks, full, strict=True))

    def test_gradients_reach_every_factor(self, name: str, plain: FactorizedLayer) -> None:
        plain(smooth_input(self.layers[name](), samples=2)).square().sum().backward()
        for parameter in plain.parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0

    def test_its_state_reloads_into_an_untrained_one(self, name: str, plain: FactorizedLayer) -> None:
        layer = self.layers[name]()
        again: FactorizedLayer = factorized_like(layer, *plain.plan())
        again.load_state_dict(plain.state_dict())
        x = smooth_input(layer, samples=2)
        assert torch.equal(again(x), plain(x))

    @of_each_kind
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_follows_the_layers_precision(self, name: str, dtype: torch.dtype) -> None:
        layer = self.layers[name]().to(dtype)
        module = self.m.factorize(layer, self.middle(layer), None).module
        x = smooth_input(layer, samples=2)
        x = x.to(dtype) if x.is_floating_point() else x
        assert {p.dtype for p in module.parameters()} == {dtype}
        torch.testing.assert_close(
            module(x), module.dense()(x), rtol=0.1, atol=0.5 if dtype == torch.bfloat16 else 1e-3
        )

    def test_channels_last_gives_the_same(self, name: str, plain: FactorizedLayer) -> None:
        layer = self.layers[name]()
        if not isinstance(layer, nn.Conv2d):
            pytest.skip("channels-last is a layout of images")
        x = smooth_input(layer, samples=2)
        expected = plain(x)
        moved = plain.to(memory_format=torch.channels_last)
        torch.testing.assert_close(moved(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)

    @of_each_kind
    def test_it_exports_without_our_classes(self, name: str, plain: FactorizedLayer) -> None:
        module, x = plain.eval(), smooth_input(self.layers[name](), samples=2)
        program = torch.export.export(module, (x,))
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-4)


def transposed_layers() -> dict[str, Callable[[], nn.Module]]:
    """Transposed convolutions of every geometry."""
    return {
        "up": lambda: nn.ConvTranspose2d(12, 10, 2, stride=2),
        "overlapping": lambda: nn.ConvTranspose2d(10, 12, 4, stride=2, padding=1, bias=False),
        "padded outputs": lambda: nn.ConvTranspose2d(10, 8, 3, stride=(2, 1), padding=1, output_padding=(1, 0)),
        "dilated": lambda: nn.ConvTranspose2d(10, 8, (2, 3), stride=2, dilation=(2, 1), padding=(3, 0)),
        "grouped": lambda: nn.ConvTranspose2d(16, 12, 3, stride=2, padding=1, output_padding=1, groups=2),
        "one axis": lambda: nn.ConvTranspose1d(12, 10, 4, stride=2, padding=1),
        "three axes": lambda: nn.ConvTranspose3d(6, 8, 2, stride=2, padding=(0, 1, 0)),
    }


def conv_layers() -> dict[str, Callable[[], nn.Module]]:
    """Convolutions of every geometry that the channel methods take."""
    return {
        "plain": lambda: nn.Conv2d(12, 16, 3, padding=1),
        "strided": lambda: nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False),
        "dilated": lambda: nn.Conv2d(12, 10, 3, padding=2, dilation=2),
        "unpadded": lambda: nn.Conv2d(10, 12, (3, 2), stride=(1, 2)),
        "grouped": lambda: nn.Conv2d(16, 24, 3, padding=1, groups=2),
        "same": lambda: nn.Conv2d(10, 12, (2, 3), padding="same", dilation=(2, 1)),
        "circular": lambda: nn.Conv2d(10, 12, 3, padding=1, padding_mode="circular"),
    }
