"""Graph rewriting that frees a lifted module from where and how it was exported: device, dtype, in-place writes."""

from typing import Any

import torch
from torch import fx

__all__ = ["make_portable", "out_of_place"]

_IN_PLACE = {
    getattr(torch.ops.aten, f"{name}_").default: getattr(torch.ops.aten, name).default
    for name in [
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "silu",
        "mish",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "tanh",
        "gelu",
    ]
}


def out_of_place(node: fx.Node, weights: dict[fx.Node, str]) -> Any:
    """The operator to call: an in-place activation becomes its plain form when nobody else sees the tensor.

    Hooks that keep a layer's output would otherwise find it overwritten. A tensor that something else reads (or a view
    of one) keeps the in-place form, because what is read then depends on the write.
    """
    first = node.args[0] if node.args else None
    if node.target in _IN_PLACE and isinstance(first, fx.Node) and first.op == "call_function" and first not in weights:
        returns_fresh = not any(a.alias_info for a in first.target._schema.returns) if _has_schema(first) else False  # type: ignore[union-attr]
        if returns_fresh and set(first.users) == {node}:
            return _IN_PLACE[node.target]
    return node.target


def _has_schema(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def make_portable(module: fx.GraphModule, stored: set[torch.dtype]) -> None:
    """Devices follow the inputs; the float types the weights were ``stored`` in become float32, in the graph too."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            _follow_device(part)
            _follow_dtype(part, stored)
            part.graph.lint()
            part.recompile()


def _follow_device(part: fx.GraphModule) -> None:
    nodes = list(part.graph.nodes)
    baked = [n for n in nodes if n.op == "call_function" and _holds(n, torch.device)]
    places = [n for n in nodes if n.op == "placeholder"]
    if not baked or not places:
        return
    with part.graph.inserting_after(places[-1]):
        device = part.graph.call_function(getattr, (places[0], "device"))
    for n in baked:
        n.args = _swap(n.args, torch.device, device)
        n.kwargs = _swap(dict(n.kwargs), torch.device, device)


def _follow_dtype(part: fx.GraphModule, stored: set[torch.dtype]) -> None:
    """Weights are float32 whatever the file held, so a constant of their old type would not meet them."""
    for n in part.graph.nodes:
        if n.op == "call_function" and _holds(n, torch.dtype):
            n.args = _swap(n.args, torch.dtype, torch.float32, only=stored)
            n.kwargs = _swap(dict(n.kwargs), torch.dtype, torch.float32, only=stored)


def _holds(node: fx.Node, kind: type) -> bool:
    return any(isinstance(a, kind) for a in (*node.args, *node.kwargs.values()))


def _swap(values: Any, kind: type, new: Any, only: set[Any] | None = None) -> Any:
    def one(v: Any) -> Any:
        return new if isinstance(v, kind) and (only is None or v in only) else v

    if isinstance(values, dict):
        return {k: one(v) for k, v in values.items()}
    return tuple(one(v) for v in values)
