"""Layers that share factors: kernels of equal shape stacked along the modes of the architecture and decomposed as one
tensor (Kossaifi et al. 2019, "T-Net: parametrizing fully convolutional nets with a single high-order tensor").

Every member runs as ``first`` 1 x 1 (in -> low), ``core`` k x k (low -> high), ``last`` 1 x 1 (high -> out, own bias);
which of them are the same for all members is the method's. With ``i = (i_1, ..)`` a member's place in the grid::

    joint_tucker   core_i = sum_g  U_1[i_1, g_1] U_2[i_2, g_2] ..  core[g]           first and last are shared
    joint_mps      first_i = A_1[i_1] A_2[i_2] ..  first                             core and last are shared

Ranks: one for each grid mode (of U_k; the bond behind A_k), then low, then high. A grid mode left whole needs no
factor: its index picks. A Linear is the case without kernel axes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import CONVS, FactorizedLayer, fill_dense

__all__ = ["JOINT", "JointLayer", "JointMPS", "JointTucker", "MPSFactors", "SharedFactors", "TuckerFactors", "in_grid"]
__all__ += ["joint_like"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def in_grid(members: Mapping[str, Sequence[int]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The members' names in the order of their places, the last mode fastest, and the grid's sizes.

    Raises:
        ValueError: the places do not fill a grid.
    """
    names = sorted(members, key=lambda name: tuple(members[name]))
    places = [tuple(members[name]) for name in names]
    widths = {len(p) for p in places}
    sizes = tuple(max(p[k] for p in places) + 1 for k in range(min(widths, default=0)))
    filled = len(widths) == 1 and len(sizes) > 0 and len({*places}) == len(places) == math.prod(sizes)
    if len(names) < 2 or not filled or min(min(p) for p in places) < 0:
        raise ValueError(
            f"members need places that fill a grid of two or more, counted from 0, each once; got {dict(members)}"
        )
    return tuple(names), sizes


class SharedFactors(nn.Module):
    """What the members of one group have in common.

    ``grid``: sizes of the leading modes; ``kernel``: of the kernel, () for Linear; ``ranks``: as the module says.
    Tensors have at most three axes, so that a change of memory format leaves them alone.
    """

    first: nn.Parameter
    """(h, low, in)."""
    core: nn.Parameter
    """(g, high, low * taps)."""
    last: nn.Parameter
    """(out, high)."""
    modes: nn.ParameterList
    """Of the grid modes that are not whole."""

    def __init__(
        self,
        grid: Sequence[int],
        in_: int,
        out: int,
        kernel: Sequence[int],
        ranks: Sequence[int],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(ranks) != len(grid) + 2 or min(ranks) < 1:
            raise ValueError(
                f"{type(self).__name__} takes a rank for each of the {len(grid)} grid modes, then low and high, all at "
                f"least 1; got {tuple(ranks)}"
            )
        self.grid, self.kernel, self.ranks = tuple(grid), tuple(kernel), tuple(int(r) for r in ranks)
        *_, low, high = self.ranks
        picks, mixes = self._counts()
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        taps = math.prod(self.kernel)
        self.first = _new((picks, low, in_), in_, make)
        self.core = _new((mixes, high, low * taps), low * taps, make)
        self.last = _new((out, high), high, make)
        self.modes = nn.ParameterList(_new(shape, 1, make) for shape in self._mode_shapes())

    def _counts(self) -> tuple[int, int]:
        """``(h, g)``: how many first links and cores are mixed."""
        raise NotImplementedError

    def _mode_shapes(self) -> Iterable[tuple[int, ...]]:
        raise NotImplementedError

    def links(self, at: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The member's ``first`` (low, in), ``core`` (high, low, *kernel) and ``last`` (out, high)."""
        raise NotImplementedError

    def place(self, at: Sequence[int]) -> int:
        """``at``, the first coordinates of a member, as one index: the last of them runs fastest."""
        index = 0
        for i, size in zip(at, self.grid, strict=False):
            index = index * size + i
        return index

    @property
    def is_whole(self) -> bool:
        """Whether no grid mode is cut, so that each member has a link of its own."""
        return len(self.modes) == 0

    def _shaped(self, core: Tensor) -> Tensor:
        return core.reshape(self.ranks[-1], self.ranks[-2], *self.kernel)


class TuckerFactors(SharedFactors):
    """``modes``: (I_k, r_k) of each grid mode with r_k < I_k."""

    def _counts(self) -> tuple[int, int]:
        if any(r > size for r, size in zip(self.ranks, self.grid, strict=False)):
            raise ValueError(
                f"ranks {self.ranks[: len(self.grid)]} of the grid modes are above their sizes {self.grid}"
            )
        return 1, math.prod(self.ranks[: len(self.grid)])

    def _mode_shapes(self) -> Iterable[tuple[int, ...]]:
        return [(size, r) for size, r in zip(self.grid, self.ranks, strict=False) if r < size]

    def links(self, at: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        modes = iter(self.modes)
        core: Tensor = self.core
        for i, size, r in zip(at, self.grid, self.ranks, strict=False):
            rest = core.reshape(r, -1)
            core = rest[i] if r == size else torch.matmul(next(modes)[i : i + 1], rest)
        return self.first[0], self._shaped(core), self.last


class MPSFactors(SharedFactors):
    """``modes``: (r_{k-1}, I_k, r_k) of each bond from the first that is cut on."""

    def _counts(self) -> tuple[int, int]:
        most = 1
        for size, r in zip(self.grid, self.ranks, strict=False):
            if r > most * size:
                raise ValueError(f"bonds {self.ranks[: len(self.grid)]} are above what the grid {self.grid} can fill")
            most = r
        return self.ranks[len(self.grid) - 1], 1

    @property
    def _whole(self) -> int:
        """How many of the leading modes are left whole."""
        count = 0
        while count < len(self.grid) and self.ranks[count] == math.prod(self.grid[: count + 1]):
            count += 1
        return count

    def _mode_shapes(self) -> Iterable[tuple[int, ...]]:
        bonds = (1, *self.ranks)
        return [(bonds[k], self.grid[k], bonds[k + 1]) for k in range(self._whole, len(self.grid))]

    def links(self, at: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        index = self.place(at[: self._whole])
        if self.is_whole:
            return self.first[index], self._shaped(self.core), self.last
        (i, *others), (mode, *modes) = at[self._whole :], self.modes
        row = mode[index : index + 1, i]
        for i, mode in zip(others, modes, strict=True):
            row = torch.matmul(row, mode[:, i])
        first = torch.matmul(row, self.first.flatten(1)).reshape(self.first.shape[1:])
        return first, self._shaped(self.core), self.last


class JointLayer(FactorizedLayer):
    """One member: its place ``at`` in the grid, its geometry and bias, and the factors that it shares."""

    replaces = (nn.Linear, *CONVS)
    factors: ClassVar[type[SharedFactors]]

    def __init__(self, layer: nn.Module, shared: SharedFactors, at: Sequence[int]) -> None:
        """``layer``: the dense layer whose geometry, dtype and device it takes.

        Raises:
            ValueError: the layer is no Linear or convolution that can be a member.
        """
        super().__init__(shared.ranks)
        if reason := member_reason(layer):
            raise ValueError(f"{self.method}: {reason}")
        self.at, self.shared = tuple(at), shared
        weight, bias = layer.get_parameter("weight"), layer.bias
        self.out_channels, self.in_channels = weight.shape[:2]
        self.kernel_size = tuple(weight.shape[2:])
        if isinstance(layer, CONVS):
            self.stride, self.dilation = tuple(layer.stride), tuple(layer.dilation)
            self.padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
        self.bias = nn.Parameter(bias.detach().clone()) if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        first, core, last = self.shared.links(self.at)
        d = len(self.kernel_size)
        if d == 0:
            return F.linear(F.linear(F.linear(x, first), core), last, self.bias)
        conv: Any = _CONV[d]
        ones = (1,) * d
        y = conv(x, first.reshape(*first.shape, *ones))
        y = conv(y, core, None, self.stride, self.padding, self.dilation)
        return conv(y, last.reshape(*last.shape, *ones), self.bias)  # type: ignore[no-any-return]

    def dense_weight(self) -> Tensor:
        first, core, last = self.shared.links(self.at)
        return torch.einsum("ob,ba...,ai->oi...", last, core, first)

    def dense(self) -> nn.Module:
        w = self.dense_weight()
        make: dict[str, Any] = {"bias": self.bias is not None, "device": w.device, "dtype": w.dtype}
        layer: nn.Module
        if not self.kernel_size:
            layer = nn.Linear(self.in_channels, self.out_channels, **make)
        else:
            make |= {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
            kind: Any = CONVS[len(self.kernel_size) - 1]
            layer = kind(self.in_channels, self.out_channels, self.kernel_size, **make)
        fill_dense(layer, w, self.bias)
        return layer

    @property
    def output_bias(self) -> Tensor | None:
        return self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, at={self.at}"


class JointTucker(JointLayer):
    method = "joint_tucker"
    factors = TuckerFactors


class JointMPS(JointLayer):
    method = "joint_mps"
    factors = MPSFactors


JOINT: dict[str, type[JointLayer]] = {kind.method: kind for kind in (JointTucker, JointMPS)}
"""The methods of several layers."""


def member_reason(layer: nn.Module) -> str | None:
    """Why a layer cannot be a member of a group, or None."""
    if not isinstance(layer, (nn.Linear, *CONVS)):
        return f"{type(layer).__name__} is neither a Linear nor a convolution"
    if isinstance(layer, CONVS) and layer.groups > 1:
        return f"a convolution of {layer.groups} groups has no input factor to share"
    if isinstance(layer, CONVS) and layer.padding_mode != "zeros":
        return f"padding mode {layer.padding_mode!r} is not zeros"
    return None


def joint_like(
    layers: Mapping[str, nn.Module], method: str, ranks: Sequence[int], members: Mapping[str, Sequence[int]]
) -> dict[str, JointLayer]:
    """Untrained members for dense ``layers``, all around the same factors.

    ``members``: each layer's place in the grid. Each keeps its dense layer's bias.

    Raises:
        ValueError: the method is unknown, the layers' weights differ in shape or dtype, or the places fill no grid.
    """
    if method not in JOINT:
        raise ValueError(f"unknown method {method!r} for several layers: this version knows {sorted(JOINT)}")
    names, grid = in_grid(members)
    weights = [layers[name].get_parameter("weight") for name in names]
    w = weights[0]
    if any((v.shape, v.dtype) != (w.shape, w.dtype) for v in weights):
        shapes = {name: tuple(v.shape) for name, v in zip(names, weights, strict=True)}
        raise ValueError(f"{method} joins layers whose weights have one shape and dtype, got {shapes}")
    kind = JOINT[method]
    shared = kind.factors(grid, w.shape[1], w.shape[0], w.shape[2:], ranks, w.device, w.dtype)
    return {name: kind(layers[name], shared, members[name]) for name in names}


def _new(shape: tuple[int, ...], fan_in: int, make: dict[str, Any]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, **make).normal_(0, fan_in**-0.5))
