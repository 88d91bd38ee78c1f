"""Tensor trains over reshaped channels (Novikov et al. 2015, Garipov et al. 2016, Su et al. 2018).

The out and in channels are written with d digits, o = (o_1 .. o_d) and i = (i_1 .. i_d), and the matrix as a product of
one small matrix for each pair of digits::

    W[o, i] = G_1[o_1, i_1] G_2[o_2, i_2] ... G_d[o_d, i_d]          G_k[o_k, i_k]: (r_{k-1}, r_k), r_0 = 1

A Linear ends with r_d = 1. A convolution ends with one core more, S: (r_d, *kernel), shared by all channels.

The cores can be contracted with the input from the first to the last (a convolution then convolves at the end), from
the last to the first (it convolves at the beginning, so that a stride makes all the rest cheaper), or with one another.
Which is cheapest follows from the shapes alone, so a layer has one straight path for life.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Conv, ConvChain, FactorizedLayer, fill_dense

__all__ = ["RTTConv", "TTLinear", "TTShape", "balanced", "conv_modes", "linear_modes"]

Order = Literal["first", "last", "dense"]
"""Which core meets the input first; "dense" builds the whole weight."""

MODE_PRODUCT = 64
"""What o_k i_k should be about: 8 x 8 for a square matrix, the range that both papers use."""
CONV_MODES = 3
"""Su et al. write channels with three digits."""


@lru_cache(maxsize=1024)
def balanced(size: int, count: int) -> tuple[int, ...]:
    """The ``count`` factors of ``size``, ascending, with the least sum: 4096 -> (8, 8, 8, 8), 96 -> (4, 4, 6).

    A factor of 1 appears only where ``size`` has fewer than ``count`` prime factors.
    """
    if count == 1:
        return (size,)
    found = [
        tuple(sorted((f, *balanced(size // f, count - 1))))
        for f in range(1, math.isqrt(size) + 1)
        if size % f == 0 and f**count <= size
    ]
    return min(found, key=lambda modes: (sum(modes), modes))


def linear_modes(in_features: int, out_features: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``(out_modes, in_modes)`` of a Linear: about log(in out) / log 64 pairs, at least two.

    The pairs are as few as the number with fewer prime factors allows: a mode of size 1 (next to a prime) appears in
    the minimum of two pairs only. Growing in modes meet falling out modes, so that the pairs have similar products.
    """
    wanted = round(math.log(max(2, in_features * out_features)) / math.log(MODE_PRODUCT))
    return _paired(in_features, out_features, wanted)


def conv_modes(in_channels: int, out_channels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``(out_modes, in_modes)`` of a convolution's channels (of one group): three pairs, or two."""
    return _paired(in_channels, out_channels, CONV_MODES)


def _paired(size_in: int, size_out: int, wanted: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    count = max(2, min(wanted, _prime_factors(size_in), _prime_factors(size_out)))
    return balanced(size_out, count)[::-1], balanced(size_in, count)


def _prime_factors(size: int) -> int:
    """How many, counted with multiplicity."""
    count, factor = 0, 2
    while size > 1:
        if factor * factor > size:
            return count + 1
        if size % factor:
            factor += 1
        else:
            size //= factor
            count += 1
    return count


@dataclass(frozen=True)
class TTShape:
    """The shapes of a train's cores and what they cost; ``ranks``: r_1 .. r_d."""

    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.out_modes) == len(self.in_modes) == len(self.ranks) >= 1:
            raise ValueError(
                f"a tensor train needs an out mode, an in mode and a rank for each core, got out modes "
                f"{self.out_modes}, in modes {self.in_modes} and ranks {self.ranks}"
            )

    @property
    def out(self) -> int:
        return math.prod(self.out_modes)

    @property
    def in_(self) -> int:
        return math.prod(self.in_modes)

    @property
    def cores(self) -> tuple[tuple[int, int, int, int], ...]:
        """(r_{k-1}, o_k, i_k, r_k) of each core."""
        return tuple(zip((1, *self.ranks[:-1]), self.out_modes, self.in_modes, self.ranks, strict=True))

    @property
    def parameters(self) -> int:
        return sum(math.prod(core) for core in self.cores)

    @property
    def first(self) -> int:
        """Multiplications for one input, (in,) to (out, r_d), beginning with the first core."""
        return sum(
            math.prod(core) * math.prod(self.out_modes[:k]) * math.prod(self.in_modes[k + 1 :])
            for k, core in enumerate(self.cores)
        )

    @property
    def last(self) -> int:
        """Multiplications for one input, (in, r_d) to (out,), beginning with the last core."""
        return sum(
            math.prod(core) * math.prod(self.in_modes[:k]) * math.prod(self.out_modes[k + 1 :])
            for k, core in enumerate(self.cores)
        )

    @property
    def build(self) -> int:
        """Multiplications that build (out, in, r_d)."""
        return sum(
            math.prod(core) * math.prod(self.out_modes[:k]) * math.prod(self.in_modes[:k])
            for k, core in enumerate(self.cores)
            if k
        )


class TTLinear(FactorizedLayer):
    """``Linear(in, out)`` as a train of cores (r_{k-1}, o_k, i_k, r_k) and a dense bias (Novikov et al. 2015).

    ``ranks``: r_1 .. r_{d-1}. The dense matrix is built only in the order "dense", where that is cheapest for one row.
    """

    method = "tt_matrix"
    replaces = (nn.Linear,)

    def __init__(
        self,
        in_modes: Sequence[int],
        out_modes: Sequence[int],
        ranks: Sequence[int],
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ranks)
        shape = self.shape = TTShape(tuple(out_modes), tuple(in_modes), (*self.ranks, 1))
        self.order = linear_order(shape)
        self.cores = _new_cores(shape, 1, 1 / (3 * shape.in_), device, dtype)
        self.bias = _new_bias(shape.out, device, dtype) if bias else None

    @classmethod
    def like(cls, layer: nn.Module, ranks: Sequence[int]) -> "TTLinear":
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"tt_matrix replaces Linear, got {type(layer).__name__}")
        out_modes, in_modes = linear_modes(layer.in_features, layer.out_features)
        w = layer.weight
        return cls(in_modes, out_modes, ranks, layer.bias is not None, w.device, w.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "dense":
            return F.linear(x, self.dense_weight(), self.bias)
        cores = list(self.cores)
        flat = x.reshape(math.prod(x.shape[:-1]), 1, self.shape.in_, 1)
        y = from_first(flat, cores) if self.order == "first" else from_last(flat.unsqueeze(3), cores)
        y = y.reshape(*x.shape[:-1], self.shape.out)
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        return build(list(self.cores)).reshape(self.shape.out, self.shape.in_)

    def dense(self) -> nn.Linear:
        w = self.dense_weight()
        layer = nn.Linear(w.shape[1], w.shape[0], self.bias is not None, w.device, w.dtype)
        fill_dense(layer, w, self.bias)
        return layer

    @property
    def output_bias(self) -> Tensor | None:
        return self.bias


def linear_order(shape: TTShape) -> Order:
    """The cheapest order for one row."""
    return _cheapest(first=shape.first, last=shape.last, dense=shape.build + shape.out * shape.in_)


class RTTConv(ConvChain):
    """A convolution as a train over its channels and one spatial core (Garipov et al. 2016; Su et al. 2018, r-TT).

    ``ranks``: r_1 .. r_d, the last one towards the spatial core; each group has a train of its own, of these ranks.
    The order is the cheapest where the kernel is applied often, so that building a dense kernel costs next to nothing.
    """

    method = "r_tt"
    count = None

    def _build(self, bias: bool) -> None:
        out_modes, in_modes = conv_modes(self.in_channels // self.groups, self.out_channels // self.groups)
        shape = self.shape = TTShape(out_modes, in_modes, self.ranks)
        self.order = conv_order(shape, math.prod(self.kernel_size), math.prod(self.stride))
        self.cores = _new_cores(shape, self.groups, 1 / shape.in_, **self._make)
        axes, r = range(len(self.kernel_size)), shape.ranks[-1]
        wide, narrow = self.groups * r, self.groups
        self.spatial = self._link(*((narrow, wide) if self.order == "last" else (wide, narrow)), axes)
        self.bias = _new_bias(self.out_channels, **self._make) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "dense":
            # The spatial link has the dense layer's own geometry, its handling of padding modes included.
            return self.spatial._conv_forward(x, self.dense_weight(), self.bias)  # type: ignore[no-any-return]
        g, out, in_, r = self.groups, self.shape.out, self.shape.in_, self.shape.ranks[-1]
        b, sizes = x.shape[0], x.shape[2:]
        y = x.reshape(b, g, in_, math.prod(sizes))
        # The spatial core is the same for all channels of a group: they go along the batch.
        if self.order == "first":
            y = from_first(y, list(self.cores))
            y = self.spatial(y.transpose(1, 2).reshape(b * out, g * r, *sizes))
            sizes = y.shape[2:]
            y = y.reshape(b, out, g, math.prod(sizes)).transpose(1, 2)
        else:
            y = self.spatial(y.transpose(1, 2).reshape(b * in_, g, *sizes))
            sizes = y.shape[2:]
            y = from_last(y.reshape(b, in_, g, r, math.prod(sizes)).transpose(1, 2), list(self.cores))
        y = y.reshape(b, self.out_channels, *sizes)
        return y if self.bias is None else y + self.bias.reshape(-1, *(1,) * len(sizes))

    def dense_weight(self) -> Tensor:
        channels = build(list(self.cores), self.groups)
        spatial = self.spatial.weight.reshape(self.groups, self.shape.ranks[-1], -1)
        weight = torch.bmm(channels.flatten(1, 2), spatial)
        return weight.reshape(self.out_channels, self.shape.in_, *self.kernel_size)

    @property
    def output_bias(self) -> Tensor | None:
        return self.bias

    spatial: Conv


def conv_order(shape: TTShape, taps: int, stride: int) -> Order:
    """The cheapest order for a kernel of ``taps`` whose input has ``stride`` positions for each of its output."""
    r = shape.ranks[-1]
    return _cheapest(
        first=stride * shape.first + shape.out * r * taps,
        last=shape.in_ * r * taps + shape.last,
        dense=shape.out * shape.in_ * taps,
    )


def _cheapest(*, first: int, last: int, dense: int) -> Order:
    costs: dict[Order, int] = {"first": first, "last": last, "dense": dense}
    return min(costs, key=lambda order: costs[order])


def from_first(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """(batch, groups, in, positions) to (batch, groups, out, r_d, positions), beginning with the first core."""
    batch, groups, channels, positions = x.shape
    rows, rank = positions * batch, 1
    # State: (groups, r, the in modes to come, the out modes done, rows). Each core is one product with the matrix
    # (o s, r i). Sizes with the batch in them stay at one end: an export with a dynamic batch cannot split others.
    y = x.permute(1, 2, 3, 0)
    for core in cores:
        r, o, i, s = core.shape[0] // groups, *core.shape[1:]
        matrix = core.reshape(groups, r, o, i, s).permute(0, 2, 4, 1, 3).reshape(groups, o * s, r * i)
        y = torch.bmm(matrix, y.reshape(groups, r * i, channels // i * rows))
        y = y.reshape(groups, o, s, channels // i, rows).permute(0, 2, 3, 1, 4)
        channels, rank = channels // i * o, s
    return y.reshape(groups, rank, channels, positions, batch).permute(4, 0, 2, 1, 3)


def from_last(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """(batch, groups, in, r_d, positions) to (batch, groups, out, positions), beginning with the last core."""
    batch, groups, channels, _, positions = x.shape
    rows = batch * positions
    # State: (groups, the out modes done, rows, the in modes to come, r); each core is the matrix (i s, o r).
    y = x.permute(1, 0, 4, 2, 3)
    for core in reversed(cores):
        r, o, i, s = core.shape[0] // groups, *core.shape[1:]
        matrix = core.reshape(groups, r, o, i, s).permute(0, 3, 4, 2, 1).reshape(groups, i * s, o * r)
        y = torch.bmm(y.reshape(groups, rows * (channels // i), i * s), matrix)
        y = y.reshape(groups, rows * (channels // i), o, r).permute(0, 2, 1, 3)
        channels = channels // i * o
    return y.reshape(groups, channels, batch, positions).permute(2, 0, 1, 3)


def build(cores: Sequence[Tensor], groups: int = 1) -> Tensor:
    """The product of the cores: (groups, out, in, r_d)."""
    y = cores[0].reshape(groups, *cores[0].shape[1:])
    for core in cores[1:]:
        (_, out, in_, r), (_, o, i, s) = y.shape, core.shape
        y = torch.bmm(y.reshape(groups, out * in_, r), core.reshape(groups, r, o * i * s))
        y = y.reshape(groups, out, in_, o, i, s).permute(0, 1, 3, 2, 4, 5).reshape(groups, out * o, in_ * i, s)
    return y


def _new_cores(
    shape: TTShape, groups: int, variance: float, device: torch.device | None, dtype: torch.dtype | None
) -> nn.ParameterList:
    """Normal cores whose product has entries of this variance; groups lie along the first axis.

    Four axes, not five with one for the groups: torch takes five for a volume and refuses channels-last for it.
    """
    deviation = (variance / math.prod(shape.ranks[:-1])) ** (0.5 / len(shape.ranks))
    return nn.ParameterList(
        nn.Parameter(torch.empty(groups * r, *rest, device=device, dtype=dtype).normal_(0, deviation))
        for r, *rest in shape.cores
    )


def _new_bias(size: int, device: torch.device | None, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
