"""Which layers may be decomposed together, and where each stands in the architecture's grid. Imports no torch.

T-Net stacks kernels of equal shape along the design parameters of its architecture (stack, depth, pathway, block). A
trained network tells them by its names: those of one weight shape are cut into words and numbers, and each position at
which they differ is a mode, ``layer1.{0..2}.conv{1,2}`` a grid of 3 x 2. Where that leaves holes (a first block without
its twin), the layers stand in one row, in the network's order.
"""

import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from search.errors import BadRequest
from search.spec import LayerInfo, Layers

__all__ = ["find_groups"]

Places = dict[str, tuple[int, ...]]

_TOKEN = re.compile(r"\d+|\.|[^\d.]+")
_KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d")


def find_groups(layers: Sequence[LayerInfo], asked: Layers) -> dict[str, Places]:
    """Name of each group to its layers' places, no layer in two.

    ``layers``: those that may change, in the network's order.

    Raises:
        BadRequest: a group asked for has fewer than two of these layers, or layers of different kinds or shapes, or
            one that another group has too.
    """
    able = [layer for layer in layers if layer.kind in _KINDS and layer.options.get("groups", 1) == 1]
    if asked.groups == "auto":
        alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for layer in able:
            alike.setdefault((layer.kind, layer.weight), []).append(layer.name)
        return {_name(names, shape): _grid(names) for (_, shape), names in alike.items() if len(names) > 1}
    found: dict[str, Places] = {}
    owner: dict[str, str] = {}
    for group, patterns in asked.groups.items():
        chosen = [layer for layer in able if any(fnmatchcase(layer.name, p) for p in patterns)]
        names = [layer.name for layer in chosen]
        shapes = {layer.name: [layer.kind, *layer.weight] for layer in chosen}
        what = f"layers.groups: {group}: {list(patterns)} matches {shapes or 'no layer that may change'}"
        if len(chosen) < 2 or len({(layer.kind, layer.weight) for layer in chosen}) > 1:
            raise BadRequest("bad_group", f"{what}; a group needs two or more layers of one kind and weight shape")
        if twice := [name for name in names if name in owner]:
            raise BadRequest("bad_group", f"{what}; {twice[0]} is in {owner[twice[0]]} already: name each layer once")
        if any(layer.name == group for layer in layers):
            raise BadRequest("bad_group", f"{what}; call the group by another name than that of a layer")
        owner |= dict.fromkeys(names, group)
        found[group] = _grid(names)
    return found


def _name(names: Sequence[str], shape: Sequence[int]) -> str:
    """What the names have in common, and the shape, which no other group of this kind has."""
    words = [_TOKEN.findall(name) for name in names]
    if len({len(w) for w in words}) == 1:
        common = "".join(along[0] if len({*along}) == 1 else "*" for along in zip(*words, strict=True))
    else:
        common = "".join(along[0] for along in _leading(words)) + "*"
    return f"{common}[{'x'.join(map(str, shape))}]"


def _leading(words: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The positions before the first at which the names differ."""
    common: list[tuple[str, ...]] = []
    for along in zip(*words, strict=False):
        if len({*along}) > 1:
            break
        common.append(along)
    return common


def _grid(names: Sequence[str]) -> Places:
    words = [_TOKEN.findall(name) for name in names]
    if len({len(w) for w in words}) == 1:
        modes = []
        for along in zip(*words, strict=True):
            values = list(dict.fromkeys(along))
            if len(values) > 1:
                values.sort(key=lambda v: int(v) if v.isdigit() else -1)  # stable: words stay in the network's order
                modes.append((along, values))
        if math.prod(len(values) for _, values in modes) == len(names):
            return {
                name: tuple(values.index(along[position]) for along, values in modes)
                for position, name in enumerate(names)
            }
    return {name: (position,) for position, name in enumerate(names)}
