"""Swapping layers inside a network."""

import copy
from collections.abc import Iterator

from torch import nn

from tenfold.layers import FactorizedLayer, JointLayer
from tenfold.layers.tied import factors_of

__all__ = ["dense_of", "named_sites", "replace"]


def replace(module: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where the dotted ``name`` points, in place.

    Raises:
        KeyError: there is no such submodule.
    """
    parent_name, _, leaf = name.rpartition(".")
    try:
        parent = module.get_submodule(parent_name)
        parent.get_submodule(leaf)
    except AttributeError:
        raise KeyError(f"{type(module).__name__} has no layer {name!r}") from None
    # Plain setattr also serves Sequential and ModuleList, whose children are named by numbers.
    setattr(parent, leaf, new)


def named_sites(module: nn.Module) -> Iterator[tuple[str, FactorizedLayer]]:
    """The factorized layers of a network by name, in the order of registration."""
    for name, layer in module.named_modules():
        if isinstance(layer, FactorizedLayer):
            yield name, layer


def dense_of(module: nn.Module) -> nn.Module:
    """A copy in which every factorized layer is the dense layer that it stands for: where a next stage starts.

    Layers with the same factors, whose weight was one, hold one again.
    """
    network = copy.deepcopy(module)
    held: dict[frozenset[int], nn.Parameter] = {}
    for name, layer in list(named_sites(network)):
        dense = layer.dense()
        if not isinstance(layer, JointLayer):
            factors = frozenset(id(p) for p in factors_of(layer).values())
            if factors in held:
                dense.weight = held[factors]
            elif isinstance(weight := getattr(dense, "weight", None), nn.Parameter):
                held[factors] = weight
        replace(network, name, dense)
    return network
