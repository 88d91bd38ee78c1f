"""Graph rewriting that frees a lifted module from where and how it was exported: device, dtype, in-place writes."""

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["make_portable", "out_of_place"]

aten = torch.ops.aten
_ACTIVATIONS = "relu relu6 leaky_relu elu selu celu silu mish hardtanh hardswish hardsigmoid sigmoid tanh gelu"
_IN_PLACE = {getattr(aten, f"{name}_").default: getattr(aten, name).default for name in _ACTIVATIONS.split()} | {
    getattr(aten, f"{name}_").Tensor: getattr(aten, name).Tensor for name in ("add", "sub", "mul", "div")
}


def out_of_place(node: fx.Node, fresh: set[fx.Node]) -> Any:
    """The operator to call: an in-place activation or residual addition becomes its plain form when nobody else sees
    the tensor it writes to.

    Hooks that keep a layer's output would otherwise find it overwritten. A tensor that something else reads (or a view
    of one) keeps the in-place form, because what is read then depends on the write. ``fresh`` grows: nodes whose value
    shares memory with no other.
    """
    if node.target in _IN_PLACE:
        first: Any = node.args[0]
        if first in fresh and set(first.users) == {node} and _same_types(node.args[:2]):
            fresh.add(node)
            return _IN_PLACE[node.target]
    elif isinstance(node.target, torch._ops.OpOverload) and not any(r.alias_info for r in node.target._schema.returns):
        fresh.add(node)
    return node.target


def _same_types(args: tuple[Any, ...]) -> bool:
    """Otherwise the plain form would promote, where the in-place form keeps the type of what it writes to."""
    values = [a.meta.get("val") for a in args if isinstance(a, fx.Node)]
    return len({v.dtype for v in values if isinstance(v, Tensor)}) == 1


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
