"""The factorized layers: plain modules that train, export and load like any other. Each stands for one dense layer
exactly. Where a method takes both Linear and convolutions, it has a class for each. ``LAYERS`` are those that stand
alone; ``members_like`` makes several that share factors.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from .base import FactorizedLayer
from .chains import (
    InputLowRankConv,
    InputLowRankConvTranspose,
    LowRankConv,
    LowRankConvTranspose,
    LowRankEmbedding,
    LowRankLinear,
    SpatialSVDConv,
    SpatialSVDConvTranspose,
    Tucker2Conv,
    Tucker2ConvTranspose,
)
from .joint import JOINT, JointLayer, JointMPS, JointTucker, joint_like
from .recurrent import LowRankGRU, LowRankLSTM
from .reshaped import ReshapedCPConv, ReshapedCPLinear, ReshapedTuckerConv, ReshapedTuckerLinear
from .separable import CP3Conv, CP4Conv2d, TTConv2d
from .shuffled import (
    ShuffledCPConv,
    ShuffledCPLinear,
    ShuffledTTConv,
    ShuffledTTLinear,
    ShuffledTuckerConv,
    ShuffledTuckerLinear,
)
from .tensor_train import RTTConv, TTLinear
from .tied import LowRankHead, LowRankTurned, TurnedLinear, tie

__all__ = [
    "LAYERS",
    "CP3Conv",
    "CP4Conv2d",
    "FactorizedLayer",
    "InputLowRankConv",
    "InputLowRankConvTranspose",
    "JointLayer",
    "JointMPS",
    "JointTucker",
    "LowRankConv",
    "LowRankConvTranspose",
    "LowRankEmbedding",
    "LowRankGRU",
    "LowRankHead",
    "LowRankLSTM",
    "LowRankLinear",
    "LowRankTurned",
    "RTTConv",
    "ReshapedCPConv",
    "ReshapedCPLinear",
    "ReshapedTuckerConv",
    "ReshapedTuckerLinear",
    "ShuffledCPConv",
    "ShuffledCPLinear",
    "ShuffledTTConv",
    "ShuffledTTLinear",
    "ShuffledTuckerConv",
    "ShuffledTuckerLinear",
    "SpatialSVDConv",
    "SpatialSVDConvTranspose",
    "TTConv2d",
    "TTLinear",
    "Tucker2Conv",
    "Tucker2ConvTranspose",
    "TurnedLinear",
    "factorized_like",
    "joint_like",
    "members_like",
    "options_reason",
]

LAYERS: tuple[type[FactorizedLayer], ...] = (
    *(LowRankTurned, LowRankLinear),  # in this order: a TurnedLinear is a Linear too
    LowRankEmbedding,
    LowRankLSTM,
    LowRankGRU,
    LowRankConv,
    LowRankConvTranspose,
    InputLowRankConv,
    InputLowRankConvTranspose,
    SpatialSVDConv,
    SpatialSVDConvTranspose,
    Tucker2Conv,
    Tucker2ConvTranspose,
    CP3Conv,
    CP4Conv2d,
    TTConv2d,
    TTLinear,
    RTTConv,
    ReshapedCPLinear,
    ReshapedCPConv,
    ReshapedTuckerLinear,
    ReshapedTuckerConv,
    *(ShuffledTTLinear, ShuffledTTConv),
    *(ShuffledTuckerLinear, ShuffledTuckerConv),
    *(ShuffledCPLinear, ShuffledCPConv),
)


def factorized_like(
    layer: nn.Module, method: str, ranks: Sequence[int], options: Mapping[str, Any] = {}
) -> FactorizedLayer:
    """An untrained factorized layer for a dense ``layer``.

    ``options``: of ``tt_matrix``, ``{"in_modes": "4x8x8x4", "out_modes": "5x5x5x5"}``; other methods have none.

    Raises:
        ValueError: the method is unknown, or does not replace this kind of layer with these ranks and options.
    """
    known = [c for c in LAYERS if c.method == method]
    if not known:
        methods = sorted({c.method for c in LAYERS})
        raise ValueError(f"unknown method {method!r}: this version of tenfold knows {methods}")
    for kind in known:
        if isinstance(layer, kind.replaces):
            if reason := options_reason(method, options):
                raise ValueError(reason)
            like: Callable[..., FactorizedLayer] = kind.like
            return like(layer, ranks, **options)
    kinds = sorted(t.__name__ for c in known for t in c.replaces)
    raise ValueError(f"{method} replaces {', '.join(kinds)}, got {type(layer).__name__}")


def members_like(
    layers: Mapping[str, nn.Module],
    method: str,
    ranks: Sequence[int],
    members: Mapping[str, Sequence[int]],
    options: Mapping[str, Any] = {},
) -> dict[str, FactorizedLayer]:
    """Untrained factorized layers for several dense ``layers``, all around the same factors.

    ``members``: each layer's place. A method of several layers puts them into a grid; any other method is of one
    weight, which all of them hold. ``options``: as in ``factorized_like``.

    Raises:
        ValueError: the method is unknown, or does not replace these layers with these ranks and options.
    """
    if method in JOINT:
        if reason := options_reason(method, options):
            raise ValueError(reason)
        return dict(joint_like(layers, method, ranks, members))
    ordered = {name: layers[name] for name in sorted(members, key=lambda name: tuple(members[name]))}
    return tie(ordered, {name: factorized_like(layer, method, ranks, options) for name, layer in ordered.items()})


def options_reason(method: str, options: Mapping[str, Any]) -> str | None:
    """Why a method cannot take options of these names, or None."""
    known = {name for kind in LAYERS if kind.method == method for name in kind.options}
    if unknown := sorted(options.keys() - known):
        takes = f"the options {' and '.join(sorted(known))}" if known else "no options"
        return f"{method} takes {takes}, got {', '.join(unknown)}"
    return None
