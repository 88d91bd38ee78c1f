"""Layers whose channels are reshaped to two modes each, S = S1 S2 inputs and T = T1 T2 outputs (Su et al. 2018)::

    r_cp      V[(t1, t2), (s1, s2), k] = sum_r factor1_r[t1, s1] factor2_r[t2, s2] spatial_r[k]
    r_tucker  V[(t1, t2), (s1, s2), k] = sum_ab out1[t1, b1] out2[t2, b2] core[b1 b2, a1 a2, k] in1[a1, s1] in2[a2, s2]

A Linear has no k. With groups, all of it is per group. ``balanced`` splits a number of channels; the order of the
contractions is decided from shapes when the layer is made, so that an exported graph has no branches.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import ConvChain, FactorizedLayer, fill_dense

__all__ = [
    "ReshapedCPConv2d",
    "ReshapedCPLinear",
    "ReshapedTuckerConv2d",
    "ReshapedTuckerLinear",
    "balanced",
    "cp_order",
    "second_first",
]


def balanced(channels: int) -> tuple[int, int]:
    """The two factors of ``channels`` nearest to its square root, the smaller first: 24 -> (4, 6), 7 -> (1, 7)."""
    small = next(f for f in range(math.isqrt(channels), 0, -1) if channels % f == 0)
    return small, channels // small


def second_first(s: tuple[int, int], t: tuple[int, int]) -> bool:
    """Whether mapping s2 -> t2 before s1 -> t1 takes fewer MACs: t2 s1 (s2 + t1) against t1 s2 (s1 + t2)."""
    return t[1] * s[0] * (s[1] + t[0]) < t[0] * s[1] * (s[0] + t[1])


def cp_order(s: tuple[int, int], t: tuple[int, int], rank: int, taps: int, stride: int) -> str:
    """How an ``r_cp`` convolution is computed with the fewest MACs an output position.

    ``spatial_first`` / ``spatial_last``: the spatial convolution before or after the channels' contractions, which
    then run at output or input positions (``stride``: input positions an output position). ``dense``: build the
    kernel; that is paid once a call, whatever the batch and the positions, and is left out of the comparison.
    """
    chain = min(t[0] * s[1] * (s[0] + t[1]), t[1] * s[0] * (s[1] + t[0]))
    costs = {
        "spatial_first": rank * (chain + math.prod(s) * taps),
        "spatial_last": rank * (chain * stride + math.prod(t) * taps),
        "dense": math.prod(s) * math.prod(t) * taps,
    }
    return min(costs, key=lambda name: costs[name])


class _Factors(nn.Module):
    """What the Linear and the Conv2d of one method share: factors as parameters, and the dense layer's bias."""

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
        self.swap = second_first(self.s, self.t)
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

    def _of_rows(self, x: Tensor) -> Tensor:
        """(rows, S) to (rows, T) of one group without a spatial factor: two large products, whatever the rank."""
        rows, a, b = x.shape[0], self.factor1[0], self.factor2[0]
        x = x.reshape(rows, *self.s)
        x = x.permute(2, 1, 0) if self.swap else x.permute(1, 2, 0)
        if self.swap:
            a, b = b, a
        (rank, mid, source), (_, target, rest) = a.shape, b.shape
        y = a.flatten(0, 1) @ x.reshape(source, rest * rows)
        y = y.reshape(rank, mid, rest, rows).transpose(1, 2).reshape(rank * rest, mid * rows)
        y = (b.transpose(0, 1).flatten(1) @ y).reshape(target, mid, rows)
        return (y.permute(2, 0, 1) if self.swap else y.permute(2, 1, 0)).reshape(rows, target * mid)

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
        a, b = tuple(ranks[:2]), tuple(ranks[2:])
        self.swap_in = second_first(self.s, (a[0], a[1]))
        self.swap_out = second_first((b[0], b[1]), self.t)
        for i in (0, 1):
            self._add(f"in{i + 1}", groups, a[i], self.s[i], **make)
            self._add(f"out{i + 1}", groups, self.t[i], b[i], **make)
        self._add_bias(targets if bias else None, **make)

    in1: nn.Parameter
    in2: nn.Parameter
    out1: nn.Parameter
    out2: nn.Parameter

    @staticmethod
    def _modes(x: Tensor, one: Tensor, two: Tensor, swap: bool) -> Tensor:
        """Both mode products: (batch, groups, P1 P2, positions) to (batch, groups, Q1 Q2, positions)."""
        batch, groups, _, positions = x.shape
        x = x.reshape(batch, groups, one.shape[2], two.shape[2], positions)
        if swap:
            x = two[:, None] @ x
            x = (one @ x.flatten(3)).reshape(batch, groups, one.shape[1], two.shape[1], positions)
        else:
            x = (one @ x.flatten(3)).reshape(batch, groups, one.shape[1], two.shape[2], positions)
            x = two[:, None] @ x
        return x.flatten(2, 3)

    def _project(self, x: Tensor) -> Tensor:
        return self._modes(x, self.in1, self.in2, self.swap_in)

    def _expand(self, x: Tensor) -> Tensor:
        return self._modes(x, self.out1, self.out2, self.swap_out)

    def _matrix(self, core: Tensor) -> Tensor:
        """(groups, T, S * taps) from ``core``: (groups, R1' R2', R1 R2, taps)."""
        p = torch.einsum("gas,gbt->gabst", self.in1, self.in2).flatten(3).flatten(1, 2)
        w = torch.einsum("gsa,gtb->gstab", self.out1, self.out2).flatten(3).flatten(1, 2)
        return torch.einsum("gtb,gbak,gas->gtsk", w, core, p).flatten(2)


def _linear_like(cls: type[FactorizedLayer], layer: nn.Module, ranks: Sequence[int], count: int) -> nn.Linear:
    if not isinstance(layer, nn.Linear) or len(ranks) != count:
        given = f"{type(layer).__name__} and ranks {tuple(ranks)}"
        raise ValueError(f"{cls.method} of a Linear takes {count} ranks, got {given}")
    return layer


def _dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
    fill_dense(layer, weight, bias)
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
        y = self._of_rows(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], math.prod(self.t))
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        return self._matrix(None)[0]

    def dense(self) -> nn.Linear:
        return _dense_linear(self.dense_weight(), self.bias)


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
        y = self._project(x.reshape(-1, 1, x.shape[-1], 1)).flatten(1)
        y = self._expand(self.core(y)[:, None, :, None]).reshape(*x.shape[:-1], math.prod(self.t))
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        return self._matrix(self.core.weight[None, :, :, None])[0]

    def dense(self) -> nn.Linear:
        return _dense_linear(self.dense_weight(), self.bias)


class _Conv2d(ConvChain):
    replaces = (nn.Conv2d,)

    def _kernel(self, c_in: int, c_out: int) -> nn.Conv2d:
        """The link with the whole kernel."""
        link = self._link(c_in, c_out, range(len(self.kernel_size)))
        if not isinstance(link, nn.Conv2d):
            raise ValueError(f"{self.method} replaces a Conv2d, got a kernel of {self.kernel_size}")
        return link


class ReshapedCPConv2d(_CP, _Conv2d):
    """A Conv2d as ``rank`` Kronecker products, each with a spatial filter of its own."""

    method = "r_cp"

    def _build(self, bias: bool) -> None:
        rank, g = self.ranks[0], self.groups
        self._make_factors(self.in_channels, self.out_channels, g, rank, bias, **self._make)
        self.order = cp_order(self.s, self.t, rank, math.prod(self.kernel_size), math.prod(self.stride))
        # The filters act on every channel alike, so channels go to the batch; the last order sums the ranks too.
        ends = (g * rank, g) if self.order == "spatial_last" else (g, g * rank)
        self.spatial = self._kernel(*ends)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        g, rank = self.groups, self.ranks[0]
        y: Tensor
        if self.order == "dense":
            # The link's own convolution, with the whole kernel: its padding mode, stride and dilation are the layer's.
            y = self.spatial._conv_forward(x, self.dense_weight(), self.bias)
            return y
        if self.order == "spatial_first":
            x = x.reshape(batch, g, -1, height, width).transpose(1, 2)
            y = self.spatial(x.reshape(-1, g, height, width))
            height, width = y.shape[2:]
            y = y.reshape(batch, -1, g, rank, height * width).permute(0, 2, 3, 1, 4)
            y = self._summed(y.reshape(batch, g, rank, *self.s, height * width))
        else:
            y = self._apart(x.reshape(batch, g, *self.s, height * width))
            y = y.permute(0, 3, 1, 2, 4).reshape(-1, g * rank, height, width)
            y = self.spatial(y)
            height, width = y.shape[2:]
            y = y.reshape(batch, -1, g, height, width).transpose(1, 2)
        y = y.reshape(batch, self.out_channels, height, width)
        return y if self.bias is None else y + self.bias[:, None, None]

    def dense_weight(self) -> Tensor:
        filters = self.spatial.weight.reshape(self.groups, self.ranks[0], -1)
        return self._matrix(filters).reshape(self.out_channels, -1, *self.kernel_size)


class ReshapedTuckerConv2d(_Tucker, _Conv2d):
    """A Conv2d as mode products, a k x k ``core`` convolution (R1 R2 -> R1' R2') and mode products back."""

    method = "r_tucker"
    count = 4

    def _build(self, bias: bool) -> None:
        g = self.groups
        self._make_factors(self.in_channels, self.out_channels, g, self.ranks, bias, **self._make)
        self.core = self._kernel(g * math.prod(self.ranks[:2]), g * math.prod(self.ranks[2:]))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        y: Tensor = self._project(x.reshape(batch, self.groups, -1, height * width))
        y = self.core(y.reshape(batch, -1, height, width))
        height, width = y.shape[2:]
        y = self._expand(y.reshape(batch, self.groups, -1, height * width))
        y = y.reshape(batch, self.out_channels, height, width)
        return y if self.bias is None else y + self.bias[:, None, None]

    def dense_weight(self) -> Tensor:
        core = self._per_group(self.core.weight).flatten(3)
        return self._matrix(core).reshape(self.out_channels, -1, *self.kernel_size)
