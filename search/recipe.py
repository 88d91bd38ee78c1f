"""The parts of the training recipe that follow from the network and the length of the training."""

from typing import Literal

from torch import nn

from search.spec import FineTune

__all__ = ["optimizer_of", "peak_rate"]

_SGD, _ADAMW = 0.02, 1e-3
"""Peak rates of a training of ten epochs."""
_GROWTH = 0.4
"""Exponent: a longer training bears a higher peak, for its low rates last long enough to bring back what that cost."""
_RANGE = (1.0, 2.0)
_ADAPTIVE = (nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)
"""Layers of networks whose gradients differ in scale from layer to layer."""


def optimizer_of(recipe: FineTune, network: nn.Module) -> Literal["sgd", "adamw"]:
    """As asked, or by the layers of the original ``network``."""
    if recipe.optimizer != "auto":
        return recipe.optimizer
    return "adamw" if any(isinstance(m, _ADAPTIVE) for m in network.modules()) else "sgd"


def peak_rate(recipe: FineTune, network: nn.Module, epochs: float) -> float:
    """The schedule's highest rate: as asked, or for ``epochs`` of training."""
    if recipe.learning_rate != "auto":
        return recipe.learning_rate
    base = {"sgd": _SGD, "adamw": _ADAMW}[optimizer_of(recipe, network)]
    growth: float = (epochs / 10) ** _GROWTH
    return base * min(max(growth, _RANGE[0]), _RANGE[1])
