"""A network cut into blocks: stretches of its graph with a single tensor between one and the next.

Where one tensor alone is alive, all that a network goes on with is in it: the end of a residual block, the layers of a
plain chain. A compressed network has the same graph as its original, so both are cut at the same places and a block
of the one can be held against that of the other. Masks, sizes and whatever else no trained weight had a part in cross
a cut freely.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from search.intake import Answer, first_output
from tenfold.layers import FactorizedLayer

__all__ = ["Block", "blocks", "cuts"]


@dataclass(frozen=True)
class Block:
    """A stretch of a network's graph; its layers and weights are the network's own."""

    module: fx.GraphModule
    takes: tuple[str, ...]
    """Values it needs, by the names of the nodes they come from."""
    gives: tuple[str, ...]
    """Values that it makes for later blocks, the tensor at the cut first; none: it ends in the network's output."""
    answer: Answer = first_output
    """Picks the tensor that counts from the network's output."""

    def __call__(self, values: dict[str, Any]) -> Tensor:
        """Run on the values alive, to which its own are added; the tensor at its end."""
        made = self.module(*(values[name] for name in self.takes))
        if not self.gives:
            return self.answer(made)
        values.update(zip(self.gives, made, strict=True))
        end: Tensor = made[0]
        return end


@torch.no_grad()
def cuts(network: fx.GraphModule, inputs: Sequence[Tensor], most: int) -> tuple[str, ...]:
    """Names of the nodes behind which to cut a compressed network into at most ``most`` blocks.

    Every block holds about the same number of factorized layers, at least one, and reaches up to the next one's block,
    so that what follows a layer (norm, activation, pooling) is in the layer's own block. No weight is used on both
    sides of a cut. ``network``: in evaluation mode; ``inputs``: a batch that it runs on.
    """
    nodes = list(network.graph.nodes)
    sites = {n for n in nodes if n.op == "call_module" and isinstance(_at(network, n), FactorizedLayer)}
    each = max(1, -(-len(sites) // most))
    places = _places(network, nodes, inputs)
    found: list[str] = []
    held, latest = 0, None
    for node in nodes:
        if node in sites:
            if held >= each and latest is not None:
                found.append(latest)
                held = 0
            held, latest = held + 1, None
        if node in places and held:
            latest = node.name
    return tuple(found)


def blocks(network: fx.GraphModule, ends: Sequence[str], answer: Answer = first_output) -> tuple[Block, ...]:
    """The network, or another with the same graph, cut behind the nodes named ``ends`` (of ``cuts``)."""
    stretches: list[list[fx.Node]] = [[]]
    for node in network.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        stretches[-1].append(node)
        if node.name in ends:
            stretches.append([])
    return tuple(_block(network, stretch, stretch[-1].op == "output", answer) for stretch in stretches)


def _block(network: fx.GraphModule, stretch: Sequence[fx.Node], last: bool, answer: Answer) -> Block:
    inside = set(stretch)
    sources = dict.fromkeys(s for n in stretch for s in n.all_input_nodes if s not in inside)
    taken = [s for s in sources if s.op != "get_attr"]
    made = [n for n in reversed(stretch) if any(u not in inside for u in n.users)]
    graph = fx.Graph()
    copies = {s: graph.placeholder(s.name) for s in taken}
    copies |= {s: graph.get_attr(str(s.target)) for s in sources if s.op == "get_attr"}
    for node in stretch:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    if not last:
        graph.output(tuple(copies[n] for n in made))
    module = fx.GraphModule(network, graph, class_name="Block")
    return Block(module, tuple(s.name for s in taken), () if last else tuple(n.name for n in made), answer)


def _places(network: fx.GraphModule, nodes: Sequence[fx.Node], inputs: Sequence[Tensor]) -> set[fx.Node]:
    """The nodes behind which one learnt tensor alone is alive, and no weight is yet to be used again."""
    single = _Singles(network).seen(inputs)
    position = {node: i for i, node in enumerate(nodes)}
    last: dict[object, int] = {}
    learnt: set[fx.Node] = set()
    weights: dict[fx.Node, list[int]] = {}
    for i, node in enumerate(nodes):
        weights[node] = [id(p) for p in _trained(network, node)]
        if weights[node] or any(n in learnt for n in node.all_input_nodes):
            learnt.add(node)
        users = [position[u] for u in node.users]
        last[node] = max(users, default=i)
        for weight in weights[node]:
            last[weight] = max(last.get(weight, i), i, *(users if node.op == "get_attr" else ()))
    found: set[fx.Node] = set()
    alive: set[object] = set()
    for i, node in enumerate(nodes):
        alive.update(weights[node])
        if node in learnt and node.op != "get_attr" and single.get(node) is not None:
            alive.add(node)
        alive = {value for value in alive if last[value] > i}
        if alive == {node} and single[node]:
            found.add(node)
    return found


class _Singles(fx.Interpreter):
    """Runs a network once and notes which values carry floating-point tensors."""

    def seen(self, inputs: Sequence[Tensor]) -> dict[fx.Node, bool]:
        """Node to whether it is one tensor alone; nodes without any are left out."""
        self.singles: dict[fx.Node, bool] = {}
        self.run(*inputs)
        return self.singles

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if any(isinstance(v, Tensor) and v.is_floating_point() for v in pytree.tree_leaves(value)):
            self.singles[n] = isinstance(value, Tensor)
        return value


def _trained(network: fx.GraphModule, node: fx.Node) -> Iterable[nn.Parameter]:
    """The trainable weights that a node itself uses."""
    if node.op not in ("call_module", "get_attr"):
        return ()
    held = _at(network, node)
    parameters = held.parameters() if isinstance(held, nn.Module) else (held,)
    return [p for p in parameters if isinstance(p, nn.Parameter) and p.requires_grad]


def _at(network: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = network
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value
