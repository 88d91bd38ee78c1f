"""Chains of two or three of torch's own layers, nothing between the links::

    LowRankLinear        first (in -> r)            last (r -> out, bias)
    LowRankConv          first k x k (in -> r)      last 1 x 1 (r -> out, bias)
    InputLowRankConv     first 1 x 1 (in -> r)      last k x k (r -> out, bias)
    SpatialSVDConv       first k x 1 (in -> r)      last 1 x k (r -> out, bias)
    Tucker2Conv          first 1 x 1 (in -> r1)     core k x k (r1 -> r2)     last 1 x 1 (r2 -> out, bias)
    LowRankEmbedding     first look-up (n -> r)     last (r -> d)

A transposed convolution has the same chains as a convolution, its links with a part of the kernel transposed: zeros go
between its inputs along one axis after the other, so that k x 1 then 1 x k is exact there too.

Only the k x k link (or the two one-dimensional links, each along its own axis) carries stride, padding and dilation.
With groups, every link has the same number of groups and ranks count *per group*.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import ConvChain, FactorizedLayer, TransposedChain, dense_linear, fill_dense

__all__ = [
    "InputLowRankConv",
    "InputLowRankConvTranspose",
    "LowRankConv",
    "LowRankConvTranspose",
    "LowRankEmbedding",
    "LowRankLinear",
    "SpatialSVDConv",
    "SpatialSVDConvTranspose",
    "Tucker2Conv",
    "Tucker2ConvTranspose",
]


class LowRankLinear(FactorizedLayer):
    """``Linear(in, out)`` as ``in -> rank -> out``."""

    method = "svd"
    replaces = (nn.Linear,)
    link: type[nn.Linear] = nn.Linear
    """The kind of layer that both links are."""

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
        self.first = self.link(in_features, rank, bias=False, device=device, dtype=dtype)
        self.last = self.link(rank, out_features, bias=bias, device=device, dtype=dtype)

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
        return dense_linear(self.dense_weight(), self.last.bias)


class LowRankEmbedding(FactorizedLayer):
    """``Embedding(n, d)`` as a look-up of ``rank`` numbers and a matrix to ``d``, for every token."""

    method = "svd"
    replaces = (nn.Embedding,)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((rank,))
        self.first = nn.Embedding(
            num_embeddings, rank, padding_idx, scale_grad_by_freq=scale_grad_by_freq, device=device, dtype=dtype
        )
        self.last = nn.Linear(rank, embedding_dim, bias=False, device=device, dtype=dtype)

    @classmethod
    def like(cls, layer: nn.Module, ranks: Sequence[int]) -> "LowRankEmbedding":
        if not isinstance(layer, nn.Embedding) or len(ranks) != 1:
            raise ValueError(f"svd of an Embedding takes one rank, got {type(layer).__name__} and ranks {tuple(ranks)}")
        if layer.max_norm is not None:
            raise ValueError(
                f"svd cannot keep an Embedding's max_norm, got max_norm={layer.max_norm}: train without it"
            )
        w = layer.weight
        return cls(
            layer.num_embeddings,
            layer.embedding_dim,
            ranks[0],
            layer.padding_idx,
            layer.scale_grad_by_freq,
            w.device,
            w.dtype,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(tokens))
        return y

    def dense_weight(self) -> Tensor:
        return self.first.weight @ self.last.weight.T

    def dense(self) -> nn.Embedding:
        w = self.dense_weight()
        layer = nn.Embedding(
            w.shape[0],
            w.shape[1],
            self.first.padding_idx,
            scale_grad_by_freq=self.first.scale_grad_by_freq,
            device=w.device,
            dtype=w.dtype,
        )
        fill_dense(layer, w, None)
        return layer


class LowRankConv(ConvChain):
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
        u = self._of_link(self.last).flatten(2)
        v = self._of_link(self.first)
        return self._whole(torch.einsum("gor,gr...->go...", u, v))


class InputLowRankConv(ConvChain):
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
        q = self._of_link(self.last)
        p = self._of_link(self.first).flatten(2)
        return self._whole(torch.einsum("gor...,gri->goi...", q, p))


class SpatialSVDConv(ConvChain):
    """Jaderberg et al. 2014: a k x 1 convolution to ``rank`` channels (per group), then a 1 x k.

    With three axes k x 1 x 1, then 1 x k x k (Tran et al. 2018).
    """

    method = "spatial_svd"

    def _build(self, bias: bool) -> None:
        if len(self.kernel_size) < 2:
            raise ValueError(f"{self.method} replaces a Conv2d or Conv3d, got a kernel of {self.kernel_size}")
        middle = self.groups * self.ranks[0]
        self.first = self._link(self.in_channels, middle, (0,))
        self.last = self._link(middle, self.out_channels, range(1, len(self.kernel_size)), bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x))
        return y

    def dense_weight(self) -> Tensor:
        q = self._of_link(self.last).squeeze(3)
        p = self._of_link(self.first).flatten(3)
        return self._whole(torch.einsum("gor...,grih->goih...", q, p))


class Tucker2Conv(ConvChain):
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
        p = self._of_link(self.first).flatten(2)
        g = self._of_link(self.core)
        u = self._of_link(self.last).flatten(2)
        return self._whole(torch.einsum("gob,gba...,gai->goi...", u, g, p))


class LowRankConvTranspose(TransposedChain, LowRankConv):
    """A transposed k x k convolution to ``rank`` channels (per group), then a 1 x 1 back."""


class InputLowRankConvTranspose(TransposedChain, InputLowRankConv):
    """A 1 x 1 to ``rank`` channels (per group), then the transposed k x k."""


class SpatialSVDConvTranspose(TransposedChain, SpatialSVDConv):
    """A transposed k x 1 to ``rank`` channels (per group), then a transposed 1 x k."""


class Tucker2ConvTranspose(TransposedChain, Tucker2Conv):
    """1 x 1 to ``ranks[0]`` channels, a transposed k x k to ``ranks[1]``, 1 x 1 back (all per group)."""
