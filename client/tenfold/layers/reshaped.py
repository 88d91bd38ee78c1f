"""Layers whose channels are reshaped to two modes each, S = S1 S2 inputs and T = T1 T2 outputs (Su et al. 2018)::

    r_cp      V[(t1, t2), (s1, s2), k] = sum_r factor1_r[t1, s1] factor2_r[t2, s2] spatial_r[k]
    r_tucker  V[(t1, t2), (s1, s2), k] = sum_ab out1[t1, b1] out2[t2, b2] core[b1 b2, a1 a2, k] in1[a1, s1] in2[a2, s2]

A Linear has no k. With groups, all of it is per group. ``balanced`` splits a number of channels. In r_cp a Linear is a
tensor train of two cores; in r_tucker the factors of either side are one of rank 1. How factors meet the input, or
whether they are multiplied out before, follows from sizes, by ``planning``.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Conv, ConvChain, FactorizedLayer, dense_linear
from .contracting import TTShape, Way, from_first, from_last, joined, linear_way, train_way
from .keeping import Keeping
from .planning import Work, batch_of, convolution, copy, in_pieces, product, quickest, rows_of

__all__ = [
    "ReshapedCPConv",
    "ReshapedCPLinear",
    "ReshapedTuckerConv",
    "ReshapedTuckerLinear",
    "balanced",
    "cp_shape",
    "cp_way",
    "tucker_way",
]

Pair = tuple[int, int]
Order = Literal["spatial_first", "spatial_last", "dense"]
TuckerWay = tuple[Way, Way] | None
"""How the input's factors meet their input, and the output's factors theirs; None: the dense weight."""


def balanced(channels: int) -> Pair:
    """The two factors of ``channels`` nearest to its square root, the smaller first: 24 -> (4, 6), 7 -> (1, 7)."""
    small = next(f for f in range(math.isqrt(channels), 0, -1) if channels % f == 0)
    return small, channels // small


def cp_shape(s: Pair, t: Pair, rank: int) -> TTShape:
    """``r_cp`` without a spatial factor is the train factor1 [rank] factor2."""
    return TTShape(t, s, (rank, 1))


@lru_cache(maxsize=4096)
def cp_way(
    s: Pair, t: Pair, rank: int, kernel: tuple[int, ...], groups: int, batch: int, positions: Pair
) -> tuple[Order, Work]:
    """The quickest way for an ``r_cp`` convolution with ``positions`` of its input and of its output, and its work.

    ``spatial_first`` and ``spatial_last``: the spatial convolution before or after the channels' contractions.
    """
    before, behind = positions
    sources, targets, taps = math.prod(s), math.prod(t), math.prod(kernel)
    (first, rest), (mid, target) = (s, t) if not _second_first(s, t) else (s[::-1], t[::-1])
    each = batch * groups

    def ends(n: int, items: int, summed: int) -> Work:
        """Both contractions at n positions; ``summed``: how many ranks the second one sums."""
        return product(mid, first, rest * n, items) + product(target, rest * summed, n, each * mid * rank // summed)

    spatial_first = (
        convolution(rank, 1, kernel, positions, batch * sources, groups)
        + copy(each * rank * sources * behind)
        + ends(behind, each * rank, rank)
        + copy(each * rank * mid * rest * behind)
    )
    spatial_last = (
        ends(before, each * rank, 1)
        + copy(each * rank * targets * before)
        + convolution(1, rank, kernel, positions, batch * targets, groups)
    )
    dense = convolution(targets, sources, kernel, positions, batch, groups)
    build = product(targets * sources // (t[1] * s[1]), rank, t[1] * s[1] * taps, groups)
    ways: dict[Order, tuple[Work, Work]] = {
        "spatial_first": (spatial_first, Work()),
        "spatial_last": (spatial_last, Work()),
        "dense": (dense, build + copy(groups * targets * sources * taps)),
    }
    order = quickest(ways, dense.macs)
    return order, ways[order][0]


@lru_cache(maxsize=4096)
def tucker_way(
    s: Pair, t: Pair, ranks: tuple[int, ...], kernel: tuple[int, ...], groups: int, batch: int, positions: Pair
) -> tuple[TuckerWay, Work]:
    """The quickest way for ``r_tucker`` with ``positions`` of its input and of its output, and its work.

    For a Linear, ``kernel`` is empty and ``batch`` its rows.
    """
    low, high = math.prod(ranks[:2]), math.prod(ranks[2:])
    sources, targets = math.prod(s), math.prod(t)
    into, into_work, into_made = train_way(_side(s, ranks[:2]), batch, positions[0], groups)
    out_of, out_work, out_made = train_way(_side(ranks[2:], t), batch, positions[1], groups)
    if kernel:
        core = convolution(high, low, kernel, positions, batch, groups)
        dense = convolution(targets, sources, kernel, positions, batch, groups)
    else:
        core, dense = product(high, low, batch), product(targets, sources, batch)
    taps = math.prod(kernel)
    each = groups * taps
    build = product(high, low, sources, each) + product(targets, high, sources * taps, groups)
    ways: dict[TuckerWay, tuple[Work, Work]] = {
        (into, out_of): (into_work + core + out_work, into_made + out_made),
        None: (dense, build + copy(each * targets * sources)),
    }
    way = quickest(ways, dense.macs)
    return way, ways[way][0]


def _side(inputs: Sequence[int], outputs: Sequence[int]) -> TTShape:
    """Both factors of one side of ``r_tucker``."""
    return TTShape(tuple(outputs), tuple(inputs), (1, 1))


def _second_first(s: Pair, t: Pair) -> bool:
    """Whether mapping s2 -> t2 before s1 -> t1 takes fewer MACs: t2 s1 (s2 + t1) against t1 s2 (s1 + t2)."""
    return t[1] * s[0] * (s[1] + t[0]) < t[0] * s[1] * (s[0] + t[1])


class _Factors(Keeping):
    """What the Linear and the convolution of one method share: factors as parameters, and the dense layer's bias."""

    bias: nn.Parameter | None

    def _add(self, name: str, *shape: int, **make: Any) -> None:
        factor = nn.Parameter(torch.empty(shape, **make))
        nn.init.normal_(factor, std=shape[-1] ** -0.5)
        self.register_parameter(name, factor)

    def _add_bias(self, size: int | None, **make: Any) -> None:
        self.bias = None if size is None else nn.Parameter(torch.zeros(size, **make))

    @property
    def output_bias(self) -> Tensor | None:
        return self.bias


class _CP(_Factors):
    """``factor1``: (groups, rank, T1, S1). ``factor2``: (groups, rank, T2, S2)."""

    def _make_factors(self, sources: int, targets: int, groups: int, rank: int, bias: bool, **make: Any) -> None:
        self.s, self.t = balanced(sources // groups), balanced(targets // groups)
        self.swap = _second_first(self.s, self.t)
        for name, i in (("factor1", 0), ("factor2", 1)):
            self._add(name, groups, rank, self.t[i], self.s[i], **make)
        self._add_bias(targets if bias else None, **make)

    factor1: nn.Parameter
    factor2: nn.Parameter

    def _in_order(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` and the factors with the mode that is contracted first in front; ``axis``: where x has S1, then S2."""
        if self.swap:
            return x.transpose(axis, axis + 1), self.factor2, self.factor1
        return x, self.factor1, self.factor2

    def _summed(self, x: Tensor) -> Tensor:
        """(batch, groups, rank or 1, S1, S2, positions) to (batch, groups, T, positions): the ranks are summed."""
        x, a, b = self._in_order(x, 3)
        y = a @ x.flatten(4)
        batch, groups, rank, mid, _ = y.shape
        y = y.reshape(batch, groups, rank, mid, x.shape[4], -1).transpose(2, 3).flatten(3, 4)
        y = b.transpose(1, 2).flatten(2)[:, None] @ y
        return (y.transpose(2, 3) if self.swap else y).flatten(2, 3)

    def _apart(self, x: Tensor) -> Tensor:
        """(batch, groups, S1, S2, positions) to (batch, groups, rank, T, positions)."""
        x, a, b = self._in_order(x, 2)
        y = a.flatten(1, 2) @ x.flatten(3)
        y = y.reshape(x.shape[0], *a.shape[:3], x.shape[3], -1)
        y = b[:, :, None] @ y
        return (y.transpose(3, 4) if self.swap else y).flatten(3, 4)

    def _matrix(self, spatial: Tensor | None) -> Tensor:
        """The dense matrix, (groups, T, S * taps), by one product; ``spatial``: (groups, rank, taps)."""
        a, b = self.factor1, self.factor2
        left = a.flatten(2).transpose(1, 2)
        right = b.flatten(2)
        if spatial is not None:
            right = (right[..., None] * spatial[:, :, None]).flatten(2)
        v = (left @ right).reshape(a.shape[0], self.t[0], self.s[0], self.t[1], self.s[1], -1)
        return v.transpose(2, 3).reshape(a.shape[0], math.prod(self.t), -1)


class _Tucker(_Factors):
    """``in1``: (groups, R1, S1), ``in2``: (groups, R2, S2), ``out1``: (groups, T1, R1'), ``out2`` likewise."""

    def _make_factors(
        self, sources: int, targets: int, groups: int, ranks: Sequence[int], bias: bool, **make: Any
    ) -> None:
        self.s, self.t = balanced(sources // groups), balanced(targets // groups)
        a, b = ranks[:2], ranks[2:]
        for i in (0, 1):
            self._add(f"in{i + 1}", groups, a[i], self.s[i], **make)
            self._add(f"out{i + 1}", groups, self.t[i], b[i], **make)
        self._add_bias(targets if bias else None, **make)

    in1: nn.Parameter
    in2: nn.Parameter
    out1: nn.Parameter
    out2: nn.Parameter

    def _sides(self, way: tuple[Way, Way], groups: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The factors of both sides as trains, multiplied out as the way says."""
        own = (self.in1, self.in2, self.out1, self.out2)
        into, out_of = way

        def make() -> tuple[Tensor, ...]:
            trains = [f.flatten(0, 1).reshape(groups, *f.shape[1:], 1) for f in own]
            return joined(trains[:2], into.parts, groups) + joined(trains[2:], out_of.parts, groups)

        made = self.made((into.parts, out_of.parts), own, make)
        return made[: len(into.parts)], made[len(into.parts) :]

    def _matrix(self, core: Tensor) -> Tensor:
        """(groups, T, S * taps) from ``core``: (groups, R1' R2', R1 R2, taps)."""
        p, q = _kron(self.in1, self.in2), _kron(self.out1, self.out2)
        groups, high, low, taps = core.shape
        seen = core.transpose(2, 3).reshape(groups, high * taps, low) @ p
        w = q @ seen.reshape(groups, high, -1)
        return w.reshape(groups, q.shape[1], taps, -1).transpose(2, 3).flatten(2)


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """(groups, m, n) and (groups, p, q): (groups, m p, n q)."""
    return (a[:, :, None, :, None] * b[:, None, :, None, :]).flatten(3).flatten(1, 2)


def _contracted(way: Way, x: Tensor, cores: tuple[Tensor, ...]) -> Tensor:
    """(batch, groups, channels, positions) to the same axes."""
    return from_first(x, cores).squeeze(3) if way.begin == "first" else from_last(x.unsqueeze(3), cores)


def _linear_like(cls: type[FactorizedLayer], layer: nn.Module, ranks: Sequence[int], count: int) -> nn.Linear:
    if not isinstance(layer, nn.Linear) or len(ranks) != count:
        given = f"{type(layer).__name__} and ranks {tuple(ranks)}"
        raise ValueError(f"{cls.method} of a Linear takes {count} ranks, got {given}")
    return layer


class ReshapedCPLinear(_CP, FactorizedLayer):
    """A Linear as a sum of ``rank`` Kronecker products."""

    method = "r_cp"
    replaces = (nn.Linear,)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Sequence[int],
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        FactorizedLayer.__init__(self, ranks)
        self._make_factors(in_features, out_features, 1, self.ranks[0], bias, device=device, dtype=dtype)

    @classmethod
    def like(cls, layer: nn.Module, ranks: Sequence[int]) -> "ReshapedCPLinear":
        layer = _linear_like(cls, layer, ranks, 1)
        w = layer.weight
        return cls(layer.in_features, layer.out_features, ranks, layer.bias is not None, w.device, w.dtype)

    def forward(self, x: Tensor) -> Tensor:
        way, _ = linear_way(cp_shape(self.s, self.t, self.ranks[0]), rows_of(x))
        return self.along(way, x)

    def along(self, way: Way, x: Tensor) -> Tensor:
        """The layer's output, computed in one way: it is the same in all of them."""
        own = (self.factor1, self.factor2)

        def make() -> tuple[Tensor, ...]:
            return joined((self.factor1.permute(0, 2, 3, 1), self.factor2[0].unsqueeze(3)), way.parts)

        rows = x.reshape(math.prod(x.shape[:-1]), 1, math.prod(self.s), 1)
        y = _contracted(way, rows, self.made(way.parts, own, make)).reshape(*x.shape[:-1], math.prod(self.t))
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        return self._matrix(None)[0]

    def dense(self) -> nn.Linear:
        return dense_linear(self.dense_weight(), self.bias)


class ReshapedTuckerLinear(_Tucker, FactorizedLayer):
    """A Linear as mode products with small factors around a ``core``: (R1' R2', R1 R2)."""

    method = "r_tucker"
    replaces = (nn.Linear,)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Sequence[int],
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        FactorizedLayer.__init__(self, ranks)
        self._make_factors(in_features, out_features, 1, self.ranks, bias, device=device, dtype=dtype)
        low, high = math.prod(self.ranks[:2]), math.prod(self.ranks[2:])
        self.core = nn.Linear(low, high, bias=False, device=device, dtype=dtype)

    @classmethod
    def like(cls, layer: nn.Module, ranks: Sequence[int]) -> "ReshapedTuckerLinear":
        layer = _linear_like(cls, layer, ranks, 4)
        w = layer.weight
        return cls(layer.in_features, layer.out_features, ranks, layer.bias is not None, w.device, w.dtype)

    def forward(self, x: Tensor) -> Tensor:
        way, _ = tucker_way(self.s, self.t, self.ranks, (), 1, rows_of(x), (1, 1))
        return self.along(way, x)

    def along(self, way: TuckerWay, x: Tensor) -> Tensor:
        """The layer's output, computed in one way: it is the same in all of them."""
        if way is None:
            own = (self.in1, self.in2, self.out1, self.out2, self.core.weight)
            (weight,) = self.made(None, own, lambda: (self.dense_weight(),))
            return F.linear(x, weight, self.bias)
        into, out_of = self._sides(way, 1)
        y = _contracted(way[0], x.reshape(math.prod(x.shape[:-1]), 1, x.shape[-1], 1), into)
        y = _contracted(way[1], self.core(y.flatten(1))[:, None, :, None], out_of)
        y = y.reshape(*x.shape[:-1], math.prod(self.t))
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        return self._matrix(self.core.weight[None, :, :, None])[0]

    def dense(self) -> nn.Linear:
        return dense_linear(self.dense_weight(), self.bias)


class ReshapedCPConv(_CP, ConvChain):
    """A convolution as ``rank`` Kronecker products, each with a spatial filter of its own."""

    method = "r_cp"

    def _build(self, bias: bool) -> None:
        rank, g = self.ranks[0], self.groups
        self._make_factors(self.in_channels, self.out_channels, g, rank, bias, **self._make)
        # As it filters every channel alike, before the contractions of channels; behind them it sums the ranks, too.
        self.spatial = self._link(g, g * rank, range(len(self.kernel_size)))

    def forward(self, x: Tensor) -> Tensor:
        sizes = tuple(x.shape[2:])
        positions = math.prod(sizes), math.prod(self.output_sizes(sizes))
        order, _ = cp_way(self.s, self.t, self.ranks[0], self.kernel_size, self.groups, batch_of(x), positions)
        return self.along(order, x)

    def along(self, order: Order, x: Tensor) -> Tensor:
        """The layer's output, computed in one order: it is the same in all of them."""
        batch, sizes = x.shape[0], x.shape[2:]
        g, rank = self.groups, self.ranks[0]
        y: Tensor
        if order == "dense":
            # The link's own convolution, with the whole kernel: its padding mode, stride and dilation are the layer's.
            own = (self.factor1, self.factor2, self.spatial.weight)
            (kernel,) = self.made(order, own, lambda: (self.dense_weight(),))
            y = self.spatial._conv_forward(x, kernel, self.bias)
            return y
        # Filters act on every channel alike: channels go to the batch.
        if order == "spatial_first":
            x = x.reshape(batch, g, -1, *sizes).transpose(1, 2)
            y = self.spatial(x.reshape(-1, g, *sizes))
            sizes = y.shape[2:]
            y = y.reshape(batch, -1, g, rank, math.prod(sizes)).permute(0, 2, 3, 1, 4)
            y = self._summed(y.reshape(batch, g, rank, *self.s, math.prod(sizes)))
        else:
            y = self._apart(x.reshape(batch, g, *self.s, math.prod(sizes)))
            y = y.permute(0, 3, 1, 2, 4).reshape(-1, g * rank, *sizes)
            y = self.spatial._conv_forward(y, self.spatial.weight.reshape(g, rank, *self.kernel_size), None)
            sizes = y.shape[2:]
            y = y.reshape(batch, -1, g, *sizes).transpose(1, 2)
        y = y.reshape(batch, self.out_channels, *sizes)
        return y if self.bias is None else y + self.bias.reshape(-1, *(1,) * len(sizes))

    def dense_weight(self) -> Tensor:
        filters = self.spatial.weight.reshape(self.groups, self.ranks[0], -1)
        return self._matrix(filters).reshape(self.out_channels, -1, *self.kernel_size)

    spatial: Conv


class ReshapedTuckerConv(_Tucker, ConvChain):
    """A convolution as mode products, a k x k ``core`` convolution (R1 R2 -> R1' R2') and mode products back."""

    method = "r_tucker"
    count = 4

    def _build(self, bias: bool) -> None:
        g = self.groups
        self._make_factors(self.in_channels, self.out_channels, g, self.ranks, bias, **self._make)
        low, high = math.prod(self.ranks[:2]), math.prod(self.ranks[2:])
        self.core = self._link(g * low, g * high, range(len(self.kernel_size)))

    def forward(self, x: Tensor) -> Tensor:
        return in_pieces(self._quickest, x, max(self.in_channels, self.out_channels) * math.prod(x.shape[2:]))

    def _quickest(self, x: Tensor) -> Tensor:
        sizes = tuple(x.shape[2:])
        positions = math.prod(sizes), math.prod(self.output_sizes(sizes))
        way, _ = tucker_way(self.s, self.t, self.ranks, self.kernel_size, self.groups, batch_of(x), positions)
        return self.along(way, x)

    def along(self, way: TuckerWay, x: Tensor) -> Tensor:
        """The layer's output, computed in one way: it is the same in all of them."""
        y: Tensor
        if way is None:
            own = (self.in1, self.in2, self.out1, self.out2, self.core.weight)
            (kernel,) = self.made(None, own, lambda: (self.dense_weight(),))
            y = self.core._conv_forward(x, kernel, self.bias)
            return y
        batch, sizes = x.shape[0], x.shape[2:]
        into, out_of = self._sides(way, self.groups)
        y = _contracted(way[0], x.reshape(batch, self.groups, math.prod(self.s), math.prod(sizes)), into)
        y = self.core(y.reshape(batch, -1, *sizes))
        sizes = y.shape[2:]
        high = math.prod(self.ranks[2:])
        y = _contracted(way[1], y.reshape(batch, self.groups, high, math.prod(sizes)), out_of)
        y = y.reshape(batch, self.out_channels, *sizes)
        return y if self.bias is None else y + self.bias.reshape(-1, *(1,) * len(sizes))

    def dense_weight(self) -> Tensor:
        core = self._per_group(self.core.weight).flatten(3)
        return self._matrix(core).reshape(self.out_channels, -1, *self.kernel_size)

    core: Conv
