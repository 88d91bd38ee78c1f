"""The factorized layers: plain modules made of torch's own convolutions and linears, so that they train, export and
load like any other.

Every class is a chain without anything between its links, so it stands for one dense layer exactly::

    LowRankLinear        first (in -> r)            last (r -> out, bias)
    LowRankConv          first k x k (in -> r)      last 1 x 1 (r -> out, bias)
    InputLowRankConv     first 1 x 1 (in -> r)      last k x k (r -> out, bias)
    SpatialSVDConv2d     first k x 1 (in -> r)      last 1 x k (r -> out, bias)
    Tucker2Conv          first 1 x 1 (in -> r1)     core k x k (r1 -> r2)     last 1 x 1 (r2 -> out, bias)

Only the k x k link (or the two one-dimensional links, each along its own axis) carries stride, padding and dilation.
With groups, every link has the same number of groups and ranks count *per group*.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "LAYERS",
    "FactorizedLayer",
    "InputLowRankConv",
    "LowRankConv",
    "LowRankLinear",
    "SpatialSVDConv2d",
    "Tucker2Conv",
    "factorized_like",
]

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS: tuple[type[Conv], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class FactorizedLayer(nn.Module):
    """One dense layer as a chain of smaller ones.

    ``ranks`` are the sizes between the links (per group). Factors start as torch initialises the links; a
    decomposition or a checkpoint fills them.
    """

    method: ClassVar[str]

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__()
        if any(r < 1 for r in ranks):
            raise ValueError(f"{type(self).__name__} needs ranks of at least 1, got {tuple(ranks)}")
        self.ranks = tuple(int(r) for r in ranks)

    @classmethod
    def like(cls, layer: nn.Module, ranks: Sequence[int]) -> "FactorizedLayer":
        """An untrained factorized layer with the geometry, dtype and device of a dense ``layer``."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """The dense layer's weight that the chain stands for, in the dense layer's own shape."""
        raise NotImplementedError

    def dense(self) -> nn.Module:
        """A new dense layer that computes the same function."""
        raise NotImplementedError

    def plan(self) -> tuple[str, tuple[int, ...]]:
        """``(method, ranks)``, as a plan's JSON names them."""
        return self.method, self.ranks

    def extra_repr(self) -> str:
        return f"method={self.method}, ranks={self.ranks}"


class LowRankLinear(FactorizedLayer):
    """``Linear(in, out)`` as ``in -> rank -> out``."""

    method = "svd"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((rank,))
        self.first = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.last = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def like(cls, layer: nn.Module, ranks: Sequence[int]) -> "LowRankLinear":
        if not isinstance(layer, nn.Linear) or len(ranks) != 1:
            raise ValueError(f"svd of a Linear takes one rank, got {type(layer).__name__} and ranks {tuple(ranks)}")
        w = layer.weight
        return cls(layer.in_features, layer.out_features, ranks[0], layer.bias is not None, w.device, w.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x))
        return y

    def dense_weight(self) -> Tensor:
        return self.last.weight @ self.first.weight

    def dense(self) -> nn.Linear:
        w = self.dense_weight()
        layer = nn.Linear(w.shape[1], w.shape[0], self.last.bias is not None, w.device, w.dtype)
        _fill(layer, w, self.last.bias)
        return layer


class _ConvChain(FactorizedLayer):
    """What the convolutional chains share: the dense layer's geometry, kept as plain Python values."""

    count: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        ranks: Sequence[int],
        *,
        stride: Sequence[int] | int = 1,
        padding: Sequence[int] | int | str = 0,
        dilation: Sequence[int] | int = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ranks)
        if len(self.ranks) != self.count:
            raise ValueError(f"{type(self).__name__} takes {self.count} ranks, got {self.ranks}")
        self.kernel_size = tuple(kernel_size)
        d = len(self.kernel_size)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.stride, self.dilation = _spread(stride, d), _spread(dilation, d)
        self.padding = padding if isinstance(padding, str) else _spread(padding, d)
        self.padding_mode = padding_mode
        self._make = {"device": device, "dtype": dtype}
        self._build(bias)
        del self._make

    def _build(self, bias: bool) -> None:
        raise NotImplementedError

    @classmethod
    def like(cls, layer: nn.Module, ranks: Sequence[int]) -> "_ConvChain":
        if not isinstance(layer, CONVS):
            raise ValueError(f"{cls.method} replaces a convolution, got {type(layer).__name__}")
        return cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            ranks,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )

    def _link(self, c_in: int, c_out: int, axes: Sequence[int] | None, bias: bool = False) -> Conv:
        """A convolution that acts along ``axes`` (None: pointwise) and carries the geometry of those axes only."""
        d = len(self.kernel_size)
        on = range(0) if axes is None else axes

        def pick(values: Sequence[int], off: int) -> tuple[int, ...]:
            return tuple(values[a] if a in on else off for a in range(d))

        padding: Any = pick(self.padding, 0) if not isinstance(self.padding, str) else self.padding
        return CONVS[d - 1](
            c_in,
            c_out,
            pick(self.kernel_size, 1),  # type: ignore[arg-type]
            stride=pick(self.stride, 1),  # type: ignore[arg-type]
            padding=padding,
            dilation=pick(self.dilation, 1),  # type: ignore[arg-type]
            groups=self.groups,
            bias=bias,
            # A pointwise link pads nothing; zeros keeps it on the fast path.
            padding_mode=self.padding_mode if len(on) else "zeros",
            **self._make,
        )

    def dense(self) -> Conv:
        w = self.dense_weight()
        bias = self.last.bias
        layer = CONVS[len(self.kernel_size) - 1](
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            stride=self.stride,  # type: ignore[arg-type]
            padding=self.padding,  # type: ignore[arg-type]
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
            bias=bias is not None,
            padding_mode=self.padding_mode,
            device=w.device,
            dtype=w.dtype,
        )
        _fill(layer, w, bias)
        return layer

    def _per_group(self, weight: Tensor) -> Tensor:
        """``(groups, out / groups, in / groups, *kernel)``."""
        return weight.reshape(self.groups, -1, *weight.shape[1:])

    first: Conv
    last: Conv


class LowRankConv(_ConvChain):
    """A k x k convolution to ``rank`` channels (per group), then a 1 x 1 back: the matrix ``out x (in k k)``."""

    method = "svd"

    def _build(self, bias: bool) -> None:
        middle = self.groups * self.ranks[0]
        self.first = self._link(self.in_channels, middle, range(len(self.kernel_size)))
        self.last = self._link(middle, self.out_channels, None, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x))
        return y

    def dense_weight(self) -> Tensor:
        u = self._per_group(self.last.weight).flatten(2)
        v = self._per_group(self.first.weight)
        return torch.einsum("gor,gr...->go...", u, v).flatten(0, 1)


class InputLowRankConv(_ConvChain):
    """A 1 x 1 to ``rank`` channels (per group), then the k x k: the matrix ``in x (out k k)``."""

    method = "svd_input"

    def _build(self, bias: bool) -> None:
        middle = self.groups * self.ranks[0]
        self.first = self._link(self.in_channels, middle, None)
        self.last = self._link(middle, self.out_channels, range(len(self.kernel_size)), bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x))
        return y

    def dense_weight(self) -> Tensor:
        q = self._per_group(self.last.weight)
        p = self._per_group(self.first.weight).flatten(2)
        return torch.einsum("gor...,gri->goi...", q, p).flatten(0, 1)


class SpatialSVDConv2d(_ConvChain):
    """Jaderberg et al. 2014: a k x 1 convolution to ``rank`` channels (per group), then a 1 x k."""

    method = "spatial_svd"

    def _build(self, bias: bool) -> None:
        if len(self.kernel_size) != 2:
            raise ValueError(f"spatial_svd replaces a Conv2d, got a kernel of {self.kernel_size}")
        middle = self.groups * self.ranks[0]
        self.first = self._link(self.in_channels, middle, (0,))
        self.last = self._link(middle, self.out_channels, (1,), bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x))
        return y

    def dense_weight(self) -> Tensor:
        q = self._per_group(self.last.weight).squeeze(3)
        p = self._per_group(self.first.weight).squeeze(4)
        return torch.einsum("gorw,grih->goihw", q, p).flatten(0, 1)


class Tucker2Conv(_ConvChain):
    """Kim et al. 2016: 1 x 1 to ``ranks[0]`` channels, k x k to ``ranks[1]``, 1 x 1 back (all per group)."""

    method = "tucker2"
    count = 2

    def _build(self, bias: bool) -> None:
        low, high = (self.groups * r for r in self.ranks)
        self.first = self._link(self.in_channels, low, None)
        self.core = self._link(low, high, range(len(self.kernel_size)))
        self.last = self._link(high, self.out_channels, None, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.core(self.first(x)))
        return y

    def dense_weight(self) -> Tensor:
        p = self._per_group(self.first.weight).flatten(2)
        g = self._per_group(self.core.weight)
        u = self._per_group(self.last.weight).flatten(2)
        return torch.einsum("gob,gba...,gai->goi...", u, g, p).flatten(0, 1)


LAYERS: dict[str, type[FactorizedLayer]] = {
    c.method: c for c in (LowRankConv, InputLowRankConv, SpatialSVDConv2d, Tucker2Conv)
}
"""Method to the class that replaces a convolution; ``svd`` of a Linear is ``LowRankLinear``."""


def factorized_like(layer: nn.Module, method: str, ranks: Sequence[int]) -> FactorizedLayer:
    """An untrained factorized layer for a dense ``layer``.

    Raises:
        ValueError: the method is unknown, or does not replace this kind of layer with these ranks.
    """
    if isinstance(layer, nn.Linear):
        if method != "svd":
            raise ValueError(f"a Linear is replaced by method 'svd', got {method!r}")
        return LowRankLinear.like(layer, ranks)
    if method not in LAYERS:
        raise ValueError(f"unknown method {method!r}: this version of tenfold knows {sorted(LAYERS)}")
    return LAYERS[method].like(layer, ranks)


def _spread(value: Sequence[int] | int, dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


def _fill(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight)  # type: ignore[operator,union-attr]
        if bias is not None:
            layer.bias.copy_(bias)  # type: ignore[operator,union-attr]
