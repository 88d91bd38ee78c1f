"""``nn.MultiheadAttention`` with its projections as layers, so that these can be replaced.

Torch's own reads the projections' weights itself: the packed one is no layer at all, and what is put in ``out_proj`` is
never called.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "open_attention"]

PACKED = {
    "in_proj": "qkv",
    "in_proj_qk": "qk",
    "in_proj_q": "q",
    "in_proj_kv": "kv",
    "in_proj_k": "k",
    "in_proj_v": "v",
}
"""Layers that hold rows of ``in_proj_weight``, to what they project: queries, keys, values."""
SEPARATE = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
"""Those that hold ``q_proj_weight`` and so on."""


class Attention(nn.Module):
    """Called like the ``nn.MultiheadAttention`` that it is made from, and computes the same.

    ``out_proj`` and ``projections`` are Linears until they are replaced. The latter are named by what they project:
    ``in_proj`` (E -> 3 E) queries, keys and values, ``in_proj_q`` and ``in_proj_kv`` the queries, and keys and values
    that come from elsewhere; ``q_proj``, ``k_proj`` and ``v_proj`` if those have sizes of their own (``kdim``,
    ``vdim``). Without any, the weights stay parameters as in torch.
    """

    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(self, attention: nn.MultiheadAttention, projections: Collection[str]) -> None:
        """Takes the weights of ``attention`` over.

        Raises:
            ValueError: ``projections`` are not all that it has.
        """
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout = attention.embed_dim, attention.num_heads, attention.dropout
        self.batch_first, self.add_zero_attn = attention.batch_first, attention.add_zero_attn
        self._qkv_same_embed_dim = False  # says to torch's encoder that its fused kernel may not read the weights
        self.out_proj: nn.Module = attention.out_proj
        self.bias_k, self.bias_v = attention.bias_k, attention.bias_v
        own = SEPARATE if attention.in_proj_weight is None else PACKED
        self.projections = {name: part for name, part in own.items() if name in projections}
        """Names to which of q, k and v each gives."""
        if "".join(self.projections.values()) not in ("", "qkv") or len(self.projections) != len(projections):
            raise ValueError(
                f"the projections {sorted(projections)} do not make up the queries, keys and values of an attention "
                f"that has {' or '.join(own)}: use the plan.json and model.safetensors of this network"
            )
        for name in ("in_proj_weight", "in_proj_bias", *(f"{name}_weight" for name in SEPARATE)):
            self.register_parameter(name, None if self.projections else getattr(attention, name))
        for name, part in self.projections.items():
            self.add_module(name, _projection(attention, part))
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
        projected = self._projected(query, key, value)
        if not batched:
            projected = [x.unsqueeze(0) for x in projected]
        elif not self.batch_first:
            projected = [x.transpose(0, 1) for x in projected]
        q, k, v = (self._heads(x) for x in self._extended(*projected))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        # Torch trusts the hint here, and lets no query see the keys of its own, which come last.
        hinted = is_causal and key_padding_mask is None and not need_weights
        padding = key_padding_mask if batched else _unsqueezed(key_padding_mask)
        shut = self._shut(scores, padding, attn_mask, float("-inf") if hinted else 0.0)
        weights = (scores if shut is None else scores + shut).softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        y = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        told: Tensor | None = None
        if need_weights:
            told = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return y.squeeze(0), None if told is None else told.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), told

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        if not self.projections:
            weights, biases = _thirds(self)
            return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
        given, found = dict(zip("qkv", inputs, strict=True)), []
        for name, part in self.projections.items():
            layer, xs = self.get_submodule(name), [given[p] for p in part]
            if all(x is xs[0] for x in xs):
                found += layer(xs[0]).chunk(len(part), -1)
            else:
                found += [layer(x).chunk(len(part), -1)[i] for i, x in enumerate(xs)]
        return found

    def _extended(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values with those that the attention has itself, (batch, length + up to 2, E)."""
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, length, E) as (batch, heads, length, E / heads)."""
        return x.reshape(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)

    def _shut(self, scores: Tensor, padding: Tensor | None, mask: Tensor | None, last: float) -> Tensor | None:
        """Both masks as one to add to the scores, (batch, heads, length, length) or what spreads to that.

        ``last``: what ``mask`` is for the attention's own keys.
        """
        own = (self.bias_k is not None) + self.add_zero_attn
        total: Tensor | None = None
        if mask is not None:
            total = F.pad(_added(mask, scores), (0, own), value=last)
            total = total.reshape(-1, self.num_heads, *total.shape[1:]) if total.dim() == 3 else total
        if padding is not None:
            shut = F.pad(_added(padding, scores), (0, own))[:, None, None]
            total = shut if total is None else total + shut
        return total


def _unsqueezed(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.unsqueeze(0)


def _added(mask: Tensor, scores: Tensor) -> Tensor:
    """True of a boolean mask shuts out."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(mask, float("-inf"))


def _thirds(attention: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """Weights and biases for queries, keys and values."""
    packed, bias = attention.in_proj_weight, attention.in_proj_bias
    weights = [getattr(attention, f"{name}_weight") for name in SEPARATE] if packed is None else packed.chunk(3)
    return weights, [None] * 3 if bias is None else bias.chunk(3)


def _projection(attention: nn.MultiheadAttention, part: str) -> nn.Linear:
    """The layer that gives ``part`` of q, k and v."""
    weights, biases = (thirds["qkv".index(part[0]) :][: len(part)] for thirds in _thirds(attention))
    joined = torch.cat([w.detach() for w in weights])
    linear = nn.Linear(joined.shape[1], joined.shape[0], biases[0] is not None, "meta")
    # The whole weight stays the same tensor, which another attention may hold too.
    linear.weight = attention.in_proj_weight if part == "qkv" else nn.Parameter(joined, weights[0].requires_grad)
    if biases[0] is not None:
        linear.bias = nn.Parameter(torch.cat([b.detach() for b in biases]), biases[0].requires_grad)
    return linear


def open_attention(network: nn.Module, names: Collection[str]) -> nn.Module:
    """``network`` with an ``Attention`` for every ``nn.MultiheadAttention`` of whose projections one is in ``names``.

    ``names``: of the layers that are replaced and of the tensors that are loaded. In place, but for a network that is
    itself one.

    Raises:
        ValueError: the names are those of another network.
    """
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which are for the fused kernel
        if not isinstance(module, nn.MultiheadAttention):
            continue
        prefix = f"{name}." if name else ""
        inside = {n.removeprefix(prefix).partition(".")[0] for n in names if n.startswith(prefix)}
        projections = inside & (PACKED.keys() | SEPARATE.keys())
        if not projections and f"{prefix}out_proj" not in names:
            continue
        opened = Attention(module, projections)
        if not name:
            return opened
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, opened)
    return network
