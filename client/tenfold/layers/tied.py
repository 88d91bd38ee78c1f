"""Layers that hold one weight, around one set of factors.

Layers of one kind share the factors as they are; each keeps its own bias and geometry. An Embedding and the Linear that
maps back to its tokens hold the same (n, d) matrix, A B' with A (n, r) and B (d, r): the Embedding looks up rows of A
and multiplies by B', the Linear multiplies by B and then by A'. So it is with the two halves of an autoencoder that
hold one matrix: x -> A (B' x) encodes and h -> B (A' h) decodes.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import CONVS, TRANSPOSED, FactorizedLayer, dense_linear, fill_dense
from .chains import LowRankEmbedding, LowRankLinear

__all__ = ["LowRankHead", "LowRankTurned", "TurnedLinear", "factors_of", "readable", "tie", "tied_reason"]


class TurnedLinear(nn.Linear):
    """``Linear(in, out)`` by another layer's weight turned round, which both hold: ``weight`` is (in, out).

    What ``F.linear(h, encode.weight.T, bias)`` and ``h @ encode.weight`` are in a network of modules.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


class LowRankHead(FactorizedLayer):
    """``Linear(d, n)`` with the factors of an ``Embedding(n, d)`` that holds the same weight."""

    method = "svd"
    replaces = (nn.Linear,)

    def __init__(self, layer: nn.Linear, embedding: LowRankEmbedding) -> None:
        """``layer``: the dense layer whose bias it keeps."""
        super().__init__(embedding.ranks)
        self.tokens = embedding.first.get_parameter("weight")
        """A: (n, r)."""
        self.mixing = embedding.last.get_parameter("weight")
        """B: (d, r)."""
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.mixing.T), self.tokens, self.bias)

    def dense_weight(self) -> Tensor:
        return self.tokens @ self.mixing.T

    def dense(self) -> nn.Linear:
        return dense_linear(self.dense_weight(), self.bias)

    @property
    def output_bias(self) -> Tensor | None:
        return self.bias


class LowRankTurned(LowRankLinear):
    """``TurnedLinear(in, out)`` as ``in -> rank -> out``, each link turned round like the whole.

    The links' weights, A (n, r) and B' (r, d), can be the last and the first link of the Linear with the same weight.
    """

    replaces = (TurnedLinear,)
    link = TurnedLinear

    def dense_weight(self) -> Tensor:
        return self.first.weight @ self.last.weight

    def dense(self) -> TurnedLinear:
        w = self.dense_weight()
        layer = TurnedLinear(w.shape[0], w.shape[1], self.last.bias is not None, w.device, w.dtype)
        fill_dense(layer, w, self.last.bias)
        return layer


def factors_of(layer: FactorizedLayer) -> dict[str, nn.Parameter]:
    """The parameters by name, without the bias."""
    return {name: p for name, p in layer.named_parameters() if p is not layer.output_bias}


def tie(layers: Mapping[str, nn.Module], made: Mapping[str, FactorizedLayer]) -> dict[str, FactorizedLayer]:
    """Let the factorized layers ``made`` for dense ``layers`` of one weight have one set of factors.

    Raises:
        ValueError: the layers cannot hold one weight, or their factors do not serve it both as it is and turned round.
    """
    if reason := tied_reason(layers):
        raise ValueError(reason)
    kinds = {_kind(layer) for layer in layers.values()}
    whose = next(kind for kind in (nn.Embedding, nn.Linear, *kinds) if kind in kinds)
    first = next(name for name, layer in layers.items() if _kind(layer) is whose)
    source = made[first]
    if len(kinds) > 1 and not isinstance(source, LowRankEmbedding | LowRankLinear):
        raise ValueError(f"{source.method} has no factors that serve a weight as it is and turned round: use svd")
    tied = dict(made)
    for name, layer in layers.items():
        other = tied[name]
        if isinstance(layer, nn.Linear) and isinstance(source, LowRankEmbedding):
            tied[name] = LowRankHead(layer, source)
        elif isinstance(other, LowRankTurned) and isinstance(source, LowRankLinear) and whose is nn.Linear:
            other.first.weight, other.last.weight = source.last.weight, source.first.weight
        elif name != first:
            whole = getattr(layer, "bias", None) is getattr(layers[first], "bias", None)  # the bias is one too
            for factor, parameter in dict(source.named_parameters()).items() if whole else factors_of(source).items():
                owner, _, leaf = factor.rpartition(".")
                setattr(tied[name].get_submodule(owner), leaf, parameter)
    return tied


def readable(layer: FactorizedLayer) -> FactorizedLayer:
    """``layer`` with a ``weight``, its factors' product, for code that multiplies with that itself.

    In place. The product is made at each look. As with torch's parametrizations, such a layer is stored by its state
    dict, not pickled whole.
    """
    kind = type(layer)
    layer.__class__ = type(kind.__name__, (kind,), {"weight": property(kind.dense_weight)})
    return layer


def tied_reason(layers: Mapping[str, nn.Module]) -> str | None:
    """Why these layers cannot hold one weight and be replaced together, or None."""
    kinds = {_kind(layer) for layer in layers.values()}
    shapes = {(tuple(w.shape), getattr(m, "groups", 1)) for m in layers.values() if (w := _weight(m)) is not None}
    alike = len(kinds) == 1 or kinds in ({nn.Embedding, nn.Linear}, {nn.Linear, TurnedLinear})
    if len(layers) > 1 and None not in kinds and alike and len(shapes) == 1:
        return None
    what = {name: (type(m).__name__, *(() if (w := _weight(m)) is None else w.shape)) for name, m in layers.items()}
    return (
        "layers that hold one weight are two or more Linears, Embeddings or convolutions of one kind and shape, "
        f"Embeddings and Linears, or Linears of which some multiply with it turned round, got {what}"
    )


def _kind(layer: nn.Module) -> type[nn.Module] | None:
    kinds = (nn.Embedding, TurnedLinear, nn.Linear, *CONVS, *TRANSPOSED)
    return next((kind for kind in kinds if isinstance(layer, kind)), None)


def _weight(layer: nn.Module) -> Tensor | None:
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) else None
