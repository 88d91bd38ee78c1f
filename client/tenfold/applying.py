"""``apply``: a plan and its tensors onto a user's own network, for those who want to train on."""

import copy
import warnings
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from .layers import FactorizedLayer, factorized_like, members_like
from .layers.attention import open_attention
from .layers.tied import readable

__all__ = ["apply", "untrained"]


def apply(module: nn.Module, plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``module`` with the plan's layers factorized and all weights taken from ``tensors``.

    Args:
        module: the original network, as it was uploaded; it is not changed.
        plan: ``{"layer1.0.conv1": {"method": "tucker2", "ranks": [8, 8]}, …}`` (``plan.json``). An entry may have
            ``options`` of its method. One with ``members`` (layer name to place) replaces those layers by ones that
            share factors. A member such as ``embed.weight`` is no layer: the network's own code multiplies with the
            weight of ``embed``.
        tensors: every tensor of the compressed network by name (``model.safetensors``); shared ones under one name.

    An ``nn.MultiheadAttention`` whose projections are among them becomes an ``Attention``, which calls them. What
    the forward never uses (an auxiliary head, say) is in no compressed file: it stays as it was, with a warning.

    Raises:
        KeyError: the plan names a layer that the module lacks.
        ValueError: a method does not fit its layer, or the tensors are not those of this network.

    Example::

        plan = json.loads(Path("plan.json").read_text())
        network = tenfold.apply(MyNet(), plan, safetensors.torch.load_file("model.safetensors"))
    """
    network = copy.deepcopy(module)
    replaced = {name for site, entry in plan.items() for name in entry.get("members") or (site,)}
    tensors = _joined(tensors)
    network = open_attention(network, replaced | tensors.keys())
    _factorize(network, plan)
    missing, unexpected = network.load_state_dict(dict(tensors), strict=False)
    # Counters of batch norm are not needed to run; a file may leave them out. What layers share lies in it once.
    parameters = dict(network.named_parameters(remove_duplicate=False))
    given = {id(p) for name, p in parameters.items() if name in tensors}
    missing = [n for n in missing if not n.endswith("num_batches_tracked") and id(parameters.get(n)) not in given]
    # Another plan's tensors fail in a replaced layer. Where all have found their place, the rest was never exported.
    if unexpected or any(n.startswith(tuple(f"{r}." for r in replaced)) for n in missing):
        raise ValueError(
            f"the tensors do not fit this network: missing {missing[:5]}, unexpected {list(unexpected)[:5]}; "
            "use the model.safetensors that was exported with this plan.json"
        )
    if missing:
        warnings.warn(
            f"{len(missing)} tensors are in no file, for the exported network does not use them, and stay as they are: "
            f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}",
            stacklevel=2,
        )
    return network


def untrained(module: nn.Module, plan: Mapping[str, Any]) -> nn.Module:
    """A copy of ``module`` with the plan's layers factorized, whose factors start as torch initialises them."""
    network = copy.deepcopy(module)
    _factorize(network, plan)
    return network


def _factorize(network: nn.Module, plan: Mapping[str, Any]) -> None:
    planned = {name for site, entry in plan.items() for name in entry.get("members") or (site,)}
    for site, entry in plan.items():
        for name, layer in _made(network, site, entry).items():
            for same in (name, *(_same_as(network, name) - planned)):
                parent, _, leaf = same.rpartition(".")
                setattr(network.get_submodule(parent), leaf, layer)


def _same_as(network: nn.Module, name: str) -> set[str]:
    """Every name of a layer: of the module, and of others of its kind with all its parameters, which compute the same.

    An exported file knows them as one layer that is called several times.
    """
    layer = network.get_submodule(name)
    own = [id(p) for p in layer.parameters()]
    return {
        other
        for other, module in network.named_modules(remove_duplicate=False)
        if [id(p) for p in module.parameters()] == own and repr(module) == repr(layer)
    }


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With each tensor of which the file has the parts alone: all rows, as in ``w[0:8]`` and ``w[8:24]``."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        whole, _, rows = name.partition("[")
        parts.setdefault(whole, []).append((int(rows.partition(":")[0] or 0), tensor))
    return {
        name: torch.cat([t for _, t in sorted(found, key=itemgetter(0))]) if len(found) > 1 else found[0][1]
        for name, found in parts.items()
    }


def _made(network: nn.Module, site: str, entry: Mapping[str, Any]) -> dict[str, FactorizedLayer]:
    members = entry.get("members") or {site: ()}
    # Beside a layer, its weight is a member where the network's own code multiplies with it.
    read = {f"{name}.weight" for name in members} & members.keys()
    layers = {name: _layer(network, name) for name in members if name not in read}
    method, ranks, options = entry["method"], entry["ranks"], entry.get("options", {})
    if len(layers) > 1:
        places = {name: members[name] for name in layers}
        new = members_like(layers, method, ranks, places, options)
    else:
        new = {name: factorized_like(layer, method, ranks, options) for name, layer in layers.items()}
    return {name: readable(layer) if f"{name}.weight" in read else layer for name, layer in new.items()}


def _layer(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise KeyError(
            f"the plan replaces {name!r}, but {type(module).__name__} has no such layer; where its own code multiplies "
            "with a weight, make that an nn.Linear before you export it, or use model.pt2"
        ) from None
