"""What every factorized layer is, and what the convolutional ones share."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "CONVS",
    "TRANSPOSED",
    "Conv",
    "ConvChain",
    "ConvTranspose",
    "FactorizedLayer",
    "PaddingMode",
    "TransposedChain",
    "dense_linear",
    "fill_dense",
]

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS: tuple[type[Conv], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class FactorizedLayer(nn.Module):
    """One dense layer as a chain of smaller ones.

    ``ranks`` are the sizes between the links (per group). Factors start as torch initialises the links; a
    decomposition or a checkpoint fills them.
    """

    method: ClassVar[str]
    replaces: ClassVar[tuple[type[nn.Module], ...]]
    """The dense layers that it can stand for."""
    options: ClassVar[tuple[str, ...]] = ()
    """What a plan may say besides the ranks: keyword arguments of ``like``."""

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

    @property
    def output_bias(self) -> Tensor | None:
        """The bias, (out,), which is the dense layer's own; None where that has none."""
        bias = self.get_submodule("last").bias
        return bias if isinstance(bias, Tensor) else None

    def plan(self) -> tuple[str, tuple[int, ...], dict[str, str]]:
        """``(method, ranks, options)``, as a plan's JSON names them."""
        return self.method, self.ranks, {}

    def extra_repr(self) -> str:
        return f"method={self.method}, ranks={self.ranks}"


class ConvChain(FactorizedLayer):
    """What the convolutional chains share: the dense layer's geometry, kept as plain Python values."""

    replaces: ClassVar[tuple[type[nn.Module], ...]] = CONVS
    count: ClassVar[int | None] = 1
    """How many ranks there are; None where the channels decide, and the class checks."""

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
        if self.count is not None and len(self.ranks) != self.count:
            raise ValueError(f"{type(self).__name__} takes {self.count} ranks, got {self.ranks}")
        self.kernel_size = tuple(kernel_size)
        d = len(self.kernel_size)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.stride, self.dilation = _spread(stride, d), _spread(dilation, d)
        self.padding = padding if isinstance(padding, str) else _spread(padding, d)
        self.padding_mode = padding_mode
        self._make: dict[str, Any] = {"device": device, "dtype": dtype}
        self._build(bias)
        del self._make

    def _build(self, bias: bool) -> None:
        raise NotImplementedError

    def _need_images(self) -> None:
        if len(self.kernel_size) != 2:
            raise ValueError(f"{self.method} replaces a Conv2d, got a kernel of {self.kernel_size}")

    @classmethod
    def like(cls, layer: nn.Module, ranks: Sequence[int]) -> "ConvChain":
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

    def _link(
        self, c_in: int, c_out: int, axes: Sequence[int] | None, bias: bool = False, groups: int | None = None
    ) -> Any:
        """A convolution that acts along ``axes`` (None: pointwise) and carries the geometry of those axes only.

        ``groups``: the dense layer's, unless the link has its own.
        """
        on = range(0) if axes is None else axes
        padding: Any = self._along(on, self.padding, 0) if not isinstance(self.padding, str) else self.padding
        return CONVS[len(self.kernel_size) - 1](
            c_in,
            c_out,
            self._along(on, self.kernel_size, 1),  # type: ignore[arg-type]
            stride=self._along(on, self.stride, 1),  # type: ignore[arg-type]
            padding=padding,
            dilation=self._along(on, self.dilation, 1),  # type: ignore[arg-type]
            groups=self.groups if groups is None else groups,
            bias=bias,
            # A pointwise link pads nothing; zeros keeps it on the fast path.
            padding_mode=self.padding_mode if len(on) else "zeros",
            **self._make,
        )

    def _along(self, axes: Sequence[int], values: Sequence[int], off: int) -> tuple[int, ...]:
        """``values`` along these axes, ``off`` along the others."""
        return tuple(values[a] if a in axes else off for a in range(len(self.kernel_size)))

    def output_sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Spatial sizes of the output for those of an input."""
        geometry = zip(self.kernel_size, self.stride, self.dilation, strict=True)
        extents = [(d * (k - 1), s) for k, s, d in geometry]
        if self.padding == "same":
            return tuple(sizes)
        padding = (0,) * len(extents) if isinstance(self.padding, str) else self.padding
        return tuple((n + 2 * p - e - 1) // s + 1 for n, p, (e, s) in zip(sizes, padding, extents, strict=True))

    def dense(self) -> nn.Module:
        w = self.dense_weight()
        bias = self.output_bias
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
        fill_dense(layer, w, bias)
        return layer

    def _per_group(self, weight: Tensor) -> Tensor:
        """``(groups, out / groups, in / groups, *kernel)``."""
        return weight.reshape(self.groups, -1, *weight.shape[1:])

    def _of_link(self, link: nn.Module) -> Tensor:
        """A link's weight as ``(groups, out / groups, in / groups, *kernel)``."""
        weight: Any = link.weight
        return self._per_group(weight)

    def _whole(self, weight: Tensor) -> Tensor:
        """From ``(groups, out / groups, in / groups, *kernel)`` to the dense layer's own shape."""
        return weight.flatten(0, 1)

    first: Any
    last: Any


class TransposedChain(ConvChain):
    """The chains of transposed convolutions: links with a part of the kernel are transposed, the others pointwise."""

    replaces = TRANSPOSED

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        ranks: Sequence[int],
        *,
        output_padding: Sequence[int] | int = 0,
        **geometry: Any,
    ) -> None:
        self.output_padding = _spread(output_padding, len(kernel_size))  # the links ask for it as they are made
        super().__init__(in_channels, out_channels, kernel_size, ranks, **geometry)

    @classmethod
    def like(cls, layer: nn.Module, ranks: Sequence[int]) -> "TransposedChain":
        if not isinstance(layer, TRANSPOSED):
            raise ValueError(f"{cls.__name__} replaces a transposed convolution, got {type(layer).__name__}")
        return cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            ranks,
            output_padding=layer.output_padding,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=layer.bias is not None,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )

    def _link(
        self, c_in: int, c_out: int, axes: Sequence[int] | None, bias: bool = False, groups: int | None = None
    ) -> Any:
        if axes is None:
            return super()._link(c_in, c_out, None, bias, groups)
        return self._transposed(c_in, c_out, axes, bias, **self._make)

    def _transposed(self, c_in: int, c_out: int, axes: Sequence[int], bias: bool, **make: Any) -> ConvTranspose:
        kind: Any = TRANSPOSED[len(self.kernel_size) - 1]
        layer: ConvTranspose = kind(
            c_in,
            c_out,
            self._along(axes, self.kernel_size, 1),
            stride=self._along(axes, self.stride, 1),
            padding=self._along(axes, self.padding, 0),  # type: ignore[arg-type]
            output_padding=self._along(axes, self.output_padding, 0),
            dilation=self._along(axes, self.dilation, 1),
            groups=self.groups,
            bias=bias,
            **make,
        )
        return layer

    def dense(self) -> nn.Module:
        w, bias = self.dense_weight(), self.output_bias
        axes, make = range(len(self.kernel_size)), {"device": w.device, "dtype": w.dtype}
        layer = self._transposed(self.in_channels, self.out_channels, axes, bias is not None, **make)
        fill_dense(layer, w, bias)
        return layer

    def _of_link(self, link: nn.Module) -> Tensor:
        if isinstance(link, TRANSPOSED):  # whose weight is (in, out / groups, *kernel)
            return self._per_group(link.weight).transpose(1, 2)
        return super()._of_link(link)

    def _whole(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2).flatten(0, 1)


def _spread(value: Sequence[int] | int, dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """The layer of ``weight`` (out, in) and ``bias``."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
    fill_dense(layer, weight, bias)
    return layer


def fill_dense(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Copy a dense layer's weight and bias into it."""
    with torch.no_grad():
        layer.weight.copy_(weight)  # type: ignore[operator,union-attr]
        if bias is not None:
            layer.bias.copy_(bias)  # type: ignore[operator,union-attr]
