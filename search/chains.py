"""What follows a layer in the graph, as far as it can be looked through: batch norm, an addition, a ReLU.

Matching a layer's raw output is not the goal; matching what the network goes on with is. In evaluation mode a batch
norm is a scale and shift of each channel, an addition brings a second operand that may carry errors of
its own, and a ReLU forgets how negative its input was. ``follow`` finds these; ``reconstruct`` aims at them.
"""

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = ["Chain", "follow", "schedule"]

_ADD = {operator.add, operator.iadd, torch.add, torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, "add", "add_"}
_RELU = {
    F.relu,
    F.relu_,
    torch.relu,
    torch.relu_,
    torch.ops.aten.relu.default,
    torch.ops.aten.relu_.default,
    "relu",
    "relu_",
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Chain:
    """From a site's output onwards."""

    norm: str | None = None
    """Batch norm (with running statistics) right behind the site."""
    other: fx.Node | None = None
    """The other operand of an addition behind that."""
    relu: bool = False
    """Whether a ReLU ends it."""


def follow(node: fx.Node, modules: dict[str, nn.Module]) -> Chain:
    """The chain behind ``node``; every link but the last has one user only, so nothing else sees it."""
    norm: str | None = None
    other: fx.Node | None = None
    while len(node.users) == 1:
        user = next(iter(node.users))
        target = user.target
        module = modules.get(str(target)) if user.op == "call_module" else None
        if isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d)):
            pass
        elif isinstance(module, _NORMS) and module.running_var is not None and norm is None and other is None:
            norm = str(target)
        elif _is_relu(user, module):
            return Chain(norm, other, True)
        elif user.op in ("call_function", "call_method") and target in _ADD and other is None and not user.kwargs:
            operands = [a for a in user.args if isinstance(a, fx.Node)]
            if len(operands) != 2 or len(user.args) != 2 or operands[0] is operands[1]:
                break
            other = operands[1] if operands[0] is node else operands[0]
        else:
            break
        node = user
    return Chain(norm, other, False)


def schedule(graph: fx.Graph, chains: dict[fx.Node, Chain]) -> list[fx.Node]:
    """The graph's nodes so ordered that an addition's other operand is there before the site that must match it.

    A site whose other operand hangs on the site itself, or on one that waits for it, keeps its place; its chain then
    has no usable second operand, which the caller sees by its absence.
    """
    order: list[fx.Node] = []
    state: dict[fx.Node, bool] = {}  # False: being visited, True: done

    def visit(node: fx.Node) -> None:
        if node in state:
            return
        state[node] = False
        for argument in node.all_input_nodes:
            visit(argument)
        other = chains[node].other if node in chains else None
        if other is not None and not any(state.get(n) is False for n in _ancestors(other, state)):
            visit(other)
        state[node] = True
        order.append(node)

    for node in graph.nodes:
        visit(node)
    return order


def _ancestors(node: fx.Node, state: dict[fx.Node, bool]) -> set[fx.Node]:
    """``node`` and what it needs that is not done."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n not in found and state.get(n) is not True:
            found.add(n)
            stack.extend(n.all_input_nodes)
    return found


def _is_relu(node: fx.Node, module: nn.Module | None) -> bool:
    if node.op == "call_module":
        return isinstance(module, nn.ReLU)
    return node.op in ("call_function", "call_method") and node.target in _RELU
