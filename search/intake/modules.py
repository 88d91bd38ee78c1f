"""The few modules that torch does not have in the form the lifted graph needs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Attention", "FeatureDropout", "FlatGRU", "FlatLSTM", "FlatRNN"]


class Attention(nn.Module):
    """Scaled dot-product attention whose dropout follows ``train()`` and ``eval()``. No weights."""

    def __init__(
        self, dropout: float, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False
    ) -> None:
        super().__init__()
        self.dropout, self.is_causal, self.scale, self.enable_gqa = dropout, is_causal, scale, enable_gqa

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, is_causal={self.is_causal}"


class FeatureDropout(nn.Module):
    """Drops whole channels for inputs of any rank, as Dropout1d, 2d and 3d do for theirs."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return torch.feature_dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _OwnWeights:
    """torch's recurrent modules keep a list of their weights beside the weights; here it is read from them each time.

    So the list cannot be out of step (a swapped, copied or re-tied weight), and exporting it again changes nothing.
    """

    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, n, None) for n in getattr(self, "_flat_weights_names", ())]

    @_flat_weights.setter
    def _flat_weights(self, weights: object) -> None:
        """torch assigns it; there is nothing to keep."""


class FlatLSTM(_OwnWeights, nn.LSTM):
    """``(x, h, c) -> (outputs, h, c)``: an exported graph has no nested tuples."""

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        y, (h, c) = super().forward(x, (h, c))
        return y, h, c


class FlatGRU(_OwnWeights, nn.GRU):
    """``(x, h) -> (outputs, h)``."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out: Any = super().forward(x, h)
        return out[0], out[1]


class FlatRNN(_OwnWeights, nn.RNN):
    """``(x, h) -> (outputs, h)``."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out: Any = super().forward(x, h)
        return out[0], out[1]
