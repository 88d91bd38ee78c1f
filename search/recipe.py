"""The parts of the training recipe that follow from the network, its start and the length of the training."""

import math
from typing import Literal

from torch import Tensor, nn

from search.spec import FineTune

__all__ = ["optimizer_of", "peak_rate", "temperature_of"]

_SGD, _ADAMW = 0.02, 1e-3
"""Peak rates of a training of ten epochs."""
_GROWTH = 0.4
"""Exponent: a longer training bears a higher peak, for its low rates last long enough to bring back what that cost."""
_RANGE = (1.0, 2.0)
_HOT = 0.3
"""From this share of the trivial answer's loss on, a start has so much to learn that no training is cooled."""
_COOLEST = 0.1
_SOFT = 0.2
"""Share of the largest entropy, log(classes), that softened answers have."""
_TEMPERATURES = (1.0, 4.0)
_ADAPTIVE = (nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)
"""Layers of networks whose gradients differ in scale from layer to layer."""


def optimizer_of(recipe: FineTune, network: nn.Module) -> Literal["sgd", "adamw"]:
    """As asked, or by the layers of the original ``network``."""
    if recipe.optimizer != "auto":
        return recipe.optimizer
    return "adamw" if any(isinstance(m, _ADAPTIVE) for m in network.modules()) else "sgd"


def peak_rate(recipe: FineTune, network: nn.Module, epochs: float, distance: float) -> float:
    """The schedule's highest rate: as asked, or for ``epochs`` of training from a start at that ``distance``, its loss
    over the trivial answer's.

    A high rate first costs what is known, in proportion to the rate, and a short training cannot bring that back:
    from a good start it has to be cool. From ten epochs on the start no longer matters.
    """
    if recipe.learning_rate != "auto":
        return recipe.learning_rate
    base = {"sgd": _SGD, "adamw": _ADAMW}[optimizer_of(recipe, network)]
    growth: float = (epochs / 10) ** _GROWTH
    heat = min(max(math.sqrt(distance / _HOT), _COOLEST), 1.0)
    short = min(max(1 - math.log10(epochs), 0.0), 1.0)
    return base * min(max(growth, _RANGE[0]), _RANGE[1]) * math.pow(heat, short)


def temperature_of(recipe: FineTune, logits: Tensor) -> float:
    """The temperature of distillation: as asked, or by the original's answers ``logits`` (…, classes).

    One that is sure of itself says little beside the label, and softening brings out what else it knows. One that is
    not says it as it is, and softening drowns that in classes which never come (docs/decisions/0023). So: the least
    temperature, from 1 to 4, at which the answers' mean entropy is 0.2 of the largest.
    """
    if recipe.temperature != "auto":
        return recipe.temperature
    wanted = _SOFT * math.log(max(logits.shape[-1], 2))
    low, high = _TEMPERATURES
    for _ in range(20):  # entropy grows with the temperature: halve
        middle = (low + high) / 2
        logs = (logits / middle).log_softmax(-1)
        entropy = float(-(logs.exp() * logs).sum(-1).mean())
        low, high = (low, middle) if entropy >= wanted else (middle, high)
    return high
