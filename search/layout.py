"""How images lie in memory while a network is only run, not trained."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Quick"]


class Quick:
    """A network that is called with its images channels last, where it has convolutions and runs on a CPU.

    Convolutions are a third quicker so, and depthwise ones, of which factorized layers are full, do not fall to a slow
    path (a CP of ResNet-20: 2.4 times). A network whose code forbids it, by a ``view``, gets them as they are. Outputs
    differ in the last digits only.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._arranges = any(isinstance(m, nn.Conv2d) for m in module.modules())

    def __call__(self, *inputs: Tensor) -> Any:
        if self._arranges and inputs[0].device.type == "cpu":
            try:
                return self.module(*(_arranged(x) for x in inputs))
            except RuntimeError:
                self._arranges = False  # if it was something else, it comes again
        return self.module(*inputs)


def _arranged(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
