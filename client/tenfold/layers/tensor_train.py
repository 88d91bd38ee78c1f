"""Tensor trains over reshaped channels (Novikov et al. 2015, Garipov et al. 2016, Su et al. 2018).

The out and in channels are written with d digits, o = (o_1 .. o_d) and i = (i_1 .. i_d), and the matrix as a product of
one small matrix for each pair of digits::

    W[o, i] = G_1[o_1, i_1] G_2[o_2, i_2] ... G_d[o_d, i_d]          G_k[o_k, i_k]: (r_{k-1}, r_k), r_0 = 1

A Linear ends with r_d = 1. A convolution ends with one core more, S: (r_d, *kernel), shared by all channels.

How the cores meet the input, and which of them are multiplied out before, follows from sizes (``contracting``): of a
convolution it may be the whole kernel.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .base import Conv, ConvChain, FactorizedLayer, dense_linear
from .contracting import TTShape, Way, build, conv_way, from_first, from_last, joined, linear_way
from .keeping import Keeping
from .planning import batch_of, rows_of

__all__ = ["RTTConv", "TTLinear", "balanced", "conv_modes", "linear_modes", "modes_of"]

MODE_PRODUCT = 64
"""What o_k i_k should be about: 8 x 8 for a square matrix, the range that both papers use."""
CONV_MODES = 3
"""Su et al. write channels with three digits."""
MOST_MODES = 10
"""Of those that are given: the ways to meet an input are 2^d."""


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


def modes_of(
    in_features: int, out_features: int, options: Mapping[str, Any]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``(out_modes, in_modes)`` of a Linear: as ``options`` give them (``TTLinear.like``), else ``linear_modes``.

    Raises:
        ValueError: they are not the sizes of such a layer's modes.
    """
    if not options:
        return linear_modes(in_features, out_features)
    given = options.get("in_modes"), options.get("out_modes")
    in_modes, out_modes = (_sizes(text) for text in given)
    fits = (math.prod(in_modes), math.prod(out_modes)) == (in_features, out_features)
    if not fits or len(in_modes) != len(out_modes) or not 2 <= len(in_modes) <= MOST_MODES:
        raise ValueError(
            f"tt_matrix takes in_modes and out_modes like '4x8x8x4', as many in both, 2 to {MOST_MODES}, that multiply "
            f"to the layer's {in_features} inputs and {out_features} outputs; got {given[0]!r} and {given[1]!r}"
        )
    return out_modes, in_modes


def _sizes(text: Any) -> tuple[int, ...]:
    """Of ``"4x8x8x4"``; of anything else none."""
    written = isinstance(text, str) and re.fullmatch(r"[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})*", text)
    return tuple(map(int, text.split("x"))) if written else ()


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


class TTLinear(Keeping, FactorizedLayer):
    """``Linear(in, out)`` as a train of cores (r_{k-1}, o_k, i_k, r_k) and a dense bias (Novikov et al. 2015).

    ``ranks``: r_1 .. r_{d-1}.
    """

    method = "tt_matrix"
    replaces = (nn.Linear,)
    options = ("in_modes", "out_modes")

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
        self.cores = _new_cores(shape, 1, 1 / (3 * shape.in_), device, dtype)
        self.bias = _new_bias(shape.out, device, dtype) if bias else None

    @classmethod
    def like(cls, layer: nn.Module, ranks: Sequence[int], **options: Any) -> "TTLinear":
        """``options``: ``in_modes`` and ``out_modes``, each like ``"4x8x8x4"``; without, they follow from the sizes."""
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"tt_matrix replaces Linear, got {type(layer).__name__}")
        out_modes, in_modes = modes_of(layer.in_features, layer.out_features, options)
        w = layer.weight
        return cls(in_modes, out_modes, ranks, layer.bias is not None, w.device, w.dtype)

    def forward(self, x: Tensor) -> Tensor:
        way, _ = linear_way(self.shape, rows_of(x))
        return self.along(way, x)

    def along(self, way: Way, x: Tensor) -> Tensor:
        """The layer's output, computed in one way: it is the same in all of them."""
        own = tuple(self.cores)
        cores = self.made(way.parts, own, partial(joined, own, way.parts))
        flat = x.reshape(math.prod(x.shape[:-1]), 1, self.shape.in_, 1)
        y = from_first(flat, cores) if way.begin == "first" else from_last(flat.unsqueeze(3), cores)
        y = y.reshape(*x.shape[:-1], self.shape.out)
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        return build(tuple(self.cores)).reshape(self.shape.out, self.shape.in_)

    def dense(self) -> nn.Linear:
        return dense_linear(self.dense_weight(), self.bias)

    def plan(self) -> tuple[str, tuple[int, ...], dict[str, str]]:
        shape = self.shape
        if linear_modes(shape.in_, shape.out) == (shape.out_modes, shape.in_modes):
            return super().plan()
        modes = {"in_modes": shape.in_modes, "out_modes": shape.out_modes}
        return self.method, self.ranks, {name: "x".join(map(str, sizes)) for name, sizes in modes.items()}

    @property
    def output_bias(self) -> Tensor | None:
        return self.bias


class RTTConv(Keeping, ConvChain):
    """A convolution as a train over its channels and one spatial core (Garipov et al. 2016; Su et al. 2018, r-TT).

    ``ranks``: r_1 .. r_d, the last one towards the spatial core; each group has a train of its own, of these ranks.
    """

    method = "r_tt"
    count = None

    def _build(self, bias: bool) -> None:
        out_modes, in_modes = conv_modes(self.in_channels // self.groups, self.out_channels // self.groups)
        shape = self.shape = TTShape(out_modes, in_modes, self.ranks)
        self.cores = _new_cores(shape, self.groups, 1 / shape.in_, **self._make)
        # As it convolves at the end. The dense layer's geometry, its handling of padding modes included, is its own.
        self.spatial = self._link(self.groups * shape.ranks[-1], self.groups, range(len(self.kernel_size)))
        self.bias = _new_bias(self.out_channels, **self._make) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        sizes = tuple(x.shape[2:])
        positions = math.prod(sizes), math.prod(self.output_sizes(sizes))
        way, _ = conv_way(self.shape, self.kernel_size, self.groups, batch_of(x), positions)
        return self.along(way, x)

    def along(self, way: Way, x: Tensor) -> Tensor:
        """The layer's output, computed in one way: it is the same in all of them."""
        if way.is_dense:
            (kernel,) = self.made(way, (*self.cores, self.spatial.weight), lambda: (self.dense_weight(),))
            return self.spatial._conv_forward(x, kernel, self.bias)  # type: ignore[no-any-return]
        g, out, in_, r = self.groups, self.shape.out, self.shape.in_, self.shape.ranks[-1]
        b, sizes, own = x.shape[0], x.shape[2:], tuple(self.cores)
        cores = self.made(way.parts, own, partial(joined, own, way.parts, g))
        y = x.reshape(b, g, in_, math.prod(sizes))
        # The spatial core is the same for all channels of a group: they go along the batch.
        if way.begin == "first":
            y = from_first(y, cores)
            y = self.spatial(y.transpose(1, 2).reshape(b * out, g * r, *sizes))
            sizes = y.shape[2:]
            y = y.reshape(b, out, g, math.prod(sizes)).transpose(1, 2)
        else:
            kernel = self.spatial.weight.reshape(g * r, 1, *self.kernel_size)
            y = self.spatial._conv_forward(y.transpose(1, 2).reshape(b * in_, g, *sizes), kernel, None)
            sizes = y.shape[2:]
            y = from_last(y.reshape(b, in_, g, r, math.prod(sizes)).transpose(1, 2), cores)
        y = y.reshape(b, self.out_channels, *sizes)
        return y if self.bias is None else y + self.bias.reshape(-1, *(1,) * len(sizes))

    def dense_weight(self) -> Tensor:
        channels = build(tuple(self.cores), self.groups)
        spatial = self.spatial.weight.reshape(self.groups, self.shape.ranks[-1], -1)
        weight = torch.bmm(channels.reshape(self.groups, -1, self.shape.ranks[-1]), spatial)
        return weight.reshape(self.out_channels, self.shape.in_, *self.kernel_size)

    @property
    def output_bias(self) -> Tensor | None:
        return self.bias

    spatial: Conv


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
