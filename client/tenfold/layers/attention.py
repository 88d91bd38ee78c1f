"""``nn.MultiheadAttention`` with its projections as layers, so that these can be replaced.

Torch's own reads the projections' weights itself: the packed one is no layer at all, and what is put in ``out_proj`` is
never called.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "open_attention"]


class Attention(nn.Module):
    """Called like the ``nn.MultiheadAttention`` that it is made from, and computes the same.

    ``in_proj`` (E -> 3 E) and ``out_proj`` are Linears until they are replaced. ``packed``: where queries, keys and
    values come from different inputs the packed weight is read by thirds, and stays ``in_proj_weight`` as in torch.
    """

    in_proj_bias: nn.Parameter | None
    in_proj_weight: nn.Parameter

    def __init__(self, attention: nn.MultiheadAttention, *, packed: bool) -> None:
        """Takes the weights of ``attention`` over.

        Raises:
            ValueError: it has inputs of several sizes, or keys and values of its own.
        """
        super().__init__()
        if not attention._qkv_same_embed_dim or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(
                "the projections of an nn.MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn cannot be "
                "replaced: run the exported model.pt2 instead, or write the attention with Linear layers"
            )
        self.embed_dim, self.num_heads, self.dropout = attention.embed_dim, attention.num_heads, attention.dropout
        self.batch_first = attention.batch_first
        self._qkv_same_embed_dim = False  # says to torch's encoder that its fused kernel may not read the weights
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj: nn.Module = attention.out_proj
        self.in_proj: nn.Module | None = None
        if packed:
            self.in_proj_weight, self.in_proj_bias = weight, bias
        else:
            self.in_proj_bias = None
            linear = nn.Linear(self.embed_dim, 3 * self.embed_dim, bias is not None, weight.device, weight.dtype)
            linear.weight = weight
            if bias is not None:
                linear.bias = bias
            self.in_proj = linear
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's: (output, weights or None), sequences first unless ``batch_first``, with or without a batch."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        shut = self._shut(scores, key_padding_mask if batched else _unsqueezed(key_padding_mask), attn_mask)
        weights = (scores if shut is None else scores + shut).softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        y = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        told: Tensor | None = None
        if need_weights:
            told = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return y.squeeze(0), None if told is None else told.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), told

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj is None:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            thirds = zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
            return tuple(F.linear(x, w, b) for x, w, b in thirds)
        if query is key and key is value:
            return self.in_proj(query).chunk(3, -1)  # type: ignore[no-any-return]
        return tuple(self.in_proj(x).chunk(3, -1)[i] for i, x in enumerate((query, key, value)))

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, length, E) as (batch, heads, length, E / heads)."""
        return x.reshape(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)

    def _shut(self, scores: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Both masks as one to add to the scores, (batch, heads, length, length) or what spreads to that."""
        total: Tensor | None = None
        if mask is not None:
            total = _added(mask, scores)
            total = total.reshape(-1, self.num_heads, *total.shape[1:]) if total.dim() == 3 else total
        if padding is not None:
            shut = _added(padding, scores)[:, None, None]
            total = shut if total is None else total + shut
        return total


def _unsqueezed(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.unsqueeze(0)


def _added(mask: Tensor, scores: Tensor) -> Tensor:
    """True of a boolean mask shuts out."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(mask, float("-inf"))


def open_attention(network: nn.Module, names: Collection[str]) -> None:
    """Put an ``Attention`` for every ``nn.MultiheadAttention`` of ``network`` of whose projections one is in ``names``.

    ``names``: of the layers that are replaced and of the tensors that are loaded. In place.

    Raises:
        ValueError: one of them cannot be opened.
    """
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which are for the fused kernel
        if not isinstance(module, nn.MultiheadAttention):
            continue
        prefix = f"{name}." if name else ""
        packed = not any(n.startswith(f"{prefix}in_proj.") or n == f"{prefix}in_proj" for n in names)
        if not packed or any(n == f"{prefix}out_proj" for n in names):
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, Attention(module, packed=packed))
