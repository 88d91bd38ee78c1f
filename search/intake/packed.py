"""Tensors whose rows are the weights of several layers, as ``nn.MultiheadAttention`` packs its projections."""

import operator
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Rows", "divided", "layer_of", "packed"]

aten = torch.ops.aten
Rows = tuple[int, int]
"""The first row, and the one after the last."""

_CUTS = {
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.narrow.default,
    aten.slice.Tensor,
    operator.getitem,
}


def divided(source: Mapping[fx.Node, str], tensors: Mapping[str, Tensor]) -> dict[str, dict[fx.Node, Rows]]:
    """Tensors of which every row is read in one part: their names to the nodes that are parts, and the rows of each.

    ``source``: placeholder to the name of its tensor. One that is also read whole, along other axes, in parts that
    overlap or in parts that leave rows out is not among them.
    """
    reads: dict[str, dict[fx.Node, Rows | None]] = defaultdict(dict)
    for node, name in source.items():
        if tensors[name].dim() in (1, 2) and tensors[name].numel():
            reads[name] |= _reads(node, tensors[name])
    found = {}
    for name, nodes in reads.items():
        parts = {node: rows for node, rows in nodes.items() if rows is not None}
        rows = sorted(set(parts.values()))
        edges = [0, *(stop for _, stop in rows)], [*(start for start, _ in rows), len(tensors[name])]
        if len(parts) == len(nodes) and len(rows) > 1 and edges[0] == edges[1]:
            found[name] = parts
    return found


def _reads(placeholder: fx.Node, tensor: Tensor) -> dict[fx.Node, Rows | None]:
    """The nodes by which ``tensor`` is read, and which rows they are; None: something else than rows."""
    numbers = torch.arange(len(tensor))
    # The numbers of its rows in place of the tensor tell, through the cuts, what is cut out.
    left: list[tuple[fx.Node, Any]] = [
        (placeholder, numbers if tensor.dim() == 1 else numbers[:, None].expand_as(tensor))
    ]
    found = {}
    while left:
        node, value = left.pop()
        for user in node.users:
            if user.target in _CUTS and user.all_input_nodes == [node]:
                left.append((user, user.target(value, *user.args[1:], **user.kwargs)))  # type: ignore[operator]
            else:
                found[node] = _rows(value, tensor)
    return found


def _rows(value: Any, tensor: Tensor) -> Rows | None:
    if not isinstance(value, Tensor) or value.shape[1:] != tensor.shape[1:] or not value.numel():
        return None
    numbers = value if value.dim() == 1 else value[:, 0]
    start, stop = int(numbers[0]), int(numbers[0]) + len(numbers)
    return (start, stop) if torch.equal(numbers, torch.arange(start, stop)) else None


def packed(node: object, source: Mapping[fx.Node, str]) -> str | None:
    """The tensor that ``node`` is cut out of; None when it is whole, or computed otherwise."""
    cut = node
    while isinstance(cut, fx.Node) and cut.target in _CUTS:
        cut = cut.args[0]
    return source.get(cut) if isinstance(cut, fx.Node) and cut is not node else None


def layer_of(owner: str, rows: Rows, length: int) -> str:
    """The name of a layer that has ``rows`` of ``owner``'s weight: ``in_proj_q``, ``in_proj_kv``, or by their numbers.

    The in-projections of ``nn.MultiheadAttention`` are thirds, in the order queries, keys, values.
    """
    if owner.rpartition(".")[2] == "in_proj" and all(3 * edge % length == 0 for edge in rows):
        return f"{owner}_{'qkv'[3 * rows[0] // length : 3 * rows[1] // length]}"
    return f"{owner}_{rows[0]}_{rows[1]}"
