"""The factorized layers: plain modules that train, export and load like any other. Each stands for one dense layer
exactly. Where a method takes both Linear and convolutions, it has a class for each. ``LAYERS`` are those that stand
alone; ``joint_like`` makes several that share factors.
"""

from collections.abc import Sequence

from torch import nn

from .base import FactorizedLayer
from .chains import InputLowRankConv, LowRankConv, LowRankLinear, SpatialSVDConv2d, Tucker2Conv
from .joint import JointLayer, JointMPS, JointTucker, joint_like
from .reshaped import ReshapedCPConv2d, ReshapedCPLinear, ReshapedTuckerConv2d, ReshapedTuckerLinear
from .separable import CP3Conv, CP4Conv2d, TTConv2d
from .tensor_train import RTTConv, TTLinear

__all__ = [
    "LAYERS",
    "CP3Conv",
    "CP4Conv2d",
    "FactorizedLayer",
    "InputLowRankConv",
    "JointLayer",
    "JointMPS",
    "JointTucker",
    "LowRankConv",
    "LowRankLinear",
    "RTTConv",
    "ReshapedCPConv2d",
    "ReshapedCPLinear",
    "ReshapedTuckerConv2d",
    "ReshapedTuckerLinear",
    "SpatialSVDConv2d",
    "TTConv2d",
    "TTLinear",
    "Tucker2Conv",
    "factorized_like",
    "joint_like",
]

LAYERS: tuple[type[FactorizedLayer], ...] = (
    LowRankLinear,
    LowRankConv,
    InputLowRankConv,
    SpatialSVDConv2d,
    Tucker2Conv,
    CP3Conv,
    CP4Conv2d,
    TTConv2d,
    TTLinear,
    RTTConv,
    ReshapedCPLinear,
    ReshapedCPConv2d,
    ReshapedTuckerLinear,
    ReshapedTuckerConv2d,
)


def factorized_like(layer: nn.Module, method: str, ranks: Sequence[int]) -> FactorizedLayer:
    """An untrained factorized layer for a dense ``layer``.

    Raises:
        ValueError: the method is unknown, or does not replace this kind of layer with these ranks.
    """
    known = [c for c in LAYERS if c.method == method]
    if not known:
        methods = sorted({c.method for c in LAYERS})
        raise ValueError(f"unknown method {method!r}: this version of tenfold knows {methods}")
    for kind in known:
        if isinstance(layer, kind.replaces):
            return kind.like(layer, ranks)
    kinds = sorted(t.__name__ for c in known for t in c.replaces)
    raise ValueError(f"{method} replaces {', '.join(kinds)}, got {type(layer).__name__}")
