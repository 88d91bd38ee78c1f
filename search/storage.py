"""Weights of a finished network in fewer bits: an optional last step, reported apart from the search's own result.

The files hold float16, or int8 with a scale for each slice along the first axis (an output, a row), and widen them to
float32 whenever they run: smaller to send and to keep, not faster. Rounding is to nearest, with no data and no
training; Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018), section 3.1.2.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from search.spec import Storage

__all__ = ["narrowed"]

LEVELS = 127
"""int8 from -127 to 127, so that zero is exact."""


def narrowed(program: ExportedProgram, storage: Storage) -> nn.Module:
    """``program`` as a module whose weights of two axes and more are stored in ``storage``.

    Biases, norms and statistics, and integer tensors, stay as they are; a weight that layers share is stored once.
    """
    module = program.module(check_guards=False)
    if not isinstance(module, GraphModule):
        raise TypeError(f"an exported program unlifts to a graph, got {type(module).__name__}")
    module.graph.eliminate_dead_code()  # of the second name of a tied weight, which would be stored too
    stored: dict[int, tuple[Tensor, ...]] = {}
    for node in list(_weights(module)):
        weight = _tensor(module, str(node.target))
        parts = stored.setdefault(weight.data_ptr(), ()) or _NARROW[storage](weight.detach())
        stored[weight.data_ptr()] = parts
        _replace(module, node, parts)
    # A module of its own: the unlifted one refuses eval().
    return GraphModule(module, module.graph)


def _weights(module: GraphModule) -> Iterator[Node]:
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = _tensor(module, str(node.target))
            if isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim > 1:
                yield node


def _replace(module: GraphModule, node: Node, parts: tuple[Tensor, ...]) -> None:
    """``parts``: what is stored, and for int8 what its slices are multiplied with."""
    owner, _, leaf = str(node.target).rpartition(".")
    place = module.get_submodule(owner)
    delattr(place, leaf)
    place.register_buffer(leaf, parts[0])
    graph: Graph = module.graph
    users = list(node.users)
    with graph.inserting_after(node):
        wide = graph.call_function(torch.ops.aten.to.dtype, (node, torch.float32))
    if len(parts) > 1:
        name = f"{leaf}_scale"
        place.register_buffer(name, parts[1])
        with graph.inserting_after(wide):
            scale = graph.get_attr(f"{owner}.{name}" if owner else name)
        with graph.inserting_after(scale):
            wide = graph.call_function(torch.ops.aten.mul.Tensor, (wide, scale))
    for user in users:
        user.replace_input_with(node, wide)


def _float16(weight: Tensor) -> tuple[Tensor]:
    limit = torch.finfo(torch.float16).max
    return (weight.clamp(-limit, limit).to(torch.float16),)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
    scale = torch.where(largest > 0, largest / LEVELS, 1.0)
    return (weight / scale).round().to(torch.int8), scale


_NARROW: dict[Storage, Callable[[Tensor], tuple[Tensor, ...]]] = {Storage.FLOAT16: _float16, Storage.INT8: _int8}


def _tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), leaf)
    return value
