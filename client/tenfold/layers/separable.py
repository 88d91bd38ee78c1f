"""Chains in which the channels and the kernel's axes are separated, nothing between the links::

    CP3Conv      first 1 x 1 (in -> r), depthwise k x k (r), last 1 x 1 (r -> out)
    CP4Conv2d    first 1 x 1 (in -> r), rows k x 1 and columns 1 x k, both depthwise (r), last 1 x 1 (r -> out)
    TTConv2d     first 1 x 1 (in -> r1), rows k x 1 (r1 -> r2), columns 1 x k (r2 -> r3), last 1 x 1 (r3 -> out)

The last link has the bias. Each spatial link carries stride, padding and dilation of its own axes only. With groups,
ranks count *per group*: the depthwise links have groups * r channels, the others the dense layer's groups.
"""

import math

import torch
from torch import Tensor

from .base import Conv, ConvChain
from .planning import in_pieces

__all__ = ["CP3Conv", "CP4Conv2d", "TTConv2d"]


class _Terms(ConvChain):
    """Between its links are more channels than before and behind: one for each term."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == len(self.kernel_size) + 1:  # one image by itself
            return self._chain(x)
        return in_pieces(self._chain, x, self.groups * self.ranks[0] * math.prod(x.shape[2:]))

    def _chain(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class CP3Conv(_Terms):
    """Lebedev et al. 2015, the kernel's axes together: a sum of ``ranks[0]`` terms in x (k k) x out (per group)."""

    method = "cp3"

    def _build(self, bias: bool) -> None:
        middle = self.groups * self.ranks[0]
        self.first = self._link(self.in_channels, middle, None)
        self.depthwise = self._link(middle, middle, range(len(self.kernel_size)), groups=middle)
        self.last = self._link(middle, self.out_channels, None, bias)

    def _chain(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.depthwise(self.first(x)))
        return y

    def dense_weight(self) -> Tensor:
        p = self._per_group(self.first.weight).flatten(2)
        k = self._per_group(self.depthwise.weight).squeeze(2)
        u = self._per_group(self.last.weight).flatten(2)
        # One matrix product: the terms' own outer products are small beside it.
        f = p[..., None] * k.flatten(2)[:, :, None]
        return (u @ f.flatten(2)).reshape(self.out_channels, -1, *self.kernel_size)


class CP4Conv2d(_Terms):
    """Lebedev et al. 2015: a sum of ``ranks[0]`` terms in x k x k x out (per group)."""

    method = "cp4"

    def _build(self, bias: bool) -> None:
        self._need_images()
        middle = self.groups * self.ranks[0]
        self.first = self._link(self.in_channels, middle, None)
        self.rows = self._link(middle, middle, (0,), groups=middle)
        self.columns = self._link(middle, middle, (1,), groups=middle)
        self.last = self._link(middle, self.out_channels, None, bias)

    rows: Conv
    columns: Conv

    def _chain(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.columns(self.rows(self.first(x))))
        return y

    def dense_weight(self) -> Tensor:
        p = self._per_group(self.first.weight).flatten(2)
        h = self._per_group(self.rows.weight).flatten(2)
        w = self._per_group(self.columns.weight).flatten(2)
        u = self._per_group(self.last.weight).flatten(2)
        f = p[..., None] * (h[..., None] * w[:, :, None]).flatten(2)[:, :, None]
        return (u @ f.flatten(2)).reshape(self.out_channels, -1, *self.kernel_size)


class TTConv2d(ConvChain):
    """The tensor train of the kernel, modes in the order in, rows, columns, out, with three ranks (per group)."""

    method = "tt"
    count = 3

    def _build(self, bias: bool) -> None:
        self._need_images()
        low, middle, high = (self.groups * r for r in self.ranks)
        self.first = self._link(self.in_channels, low, None)
        self.rows = self._link(low, middle, (0,))
        self.columns = self._link(middle, high, (1,))
        self.last = self._link(high, self.out_channels, None, bias)

    rows: Conv
    columns: Conv

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.columns(self.rows(self.first(x))))
        return y

    def dense_weight(self) -> Tensor:
        p = self._per_group(self.first.weight).flatten(2)
        h = self._per_group(self.rows.weight).squeeze(4)
        w = self._per_group(self.columns.weight).squeeze(3)
        u = self._per_group(self.last.weight).flatten(2)
        return torch.einsum("goc,gcbw,gbah,gai->goihw", u, w, h, p).flatten(0, 1)
