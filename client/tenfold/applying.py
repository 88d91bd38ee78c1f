"""``apply``: a plan and its tensors onto a user's own network, for those who want to train on."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .layers import factorized_like

__all__ = ["apply"]


def apply(module: nn.Module, plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``module`` with the plan's layers factorized and all weights taken from ``tensors``.

    Args:
        module: the original network, as it was uploaded; it is not changed.
        plan: ``{"layer1.0.conv1": {"method": "tucker2", "ranks": [8, 8]}, …}`` (``plan.json``).
        tensors: every tensor of the compressed network by name (``model.safetensors``).

    Raises:
        KeyError: the plan names a layer that the module lacks.
        ValueError: a method does not fit its layer, or the tensors are not those of this network.

    Example::

        plan = json.loads(Path("plan.json").read_text())
        network = tenfold.apply(MyNet(), plan, safetensors.torch.load_file("model.safetensors"))
    """
    network = copy.deepcopy(module)
    for site, entry in plan.items():
        try:
            layer = network.get_submodule(site)
        except AttributeError:
            raise KeyError(f"the plan replaces {site!r}, but {type(module).__name__} has no such layer") from None
        new = factorized_like(layer, entry["method"], entry["ranks"])
        parent, _, name = site.rpartition(".")
        setattr(network.get_submodule(parent), name, new)
    missing, unexpected = network.load_state_dict(dict(tensors), strict=False)
    # Counters of batch norm are not needed to run; a file may leave them out.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(
            f"the tensors do not fit this network: missing {missing[:5]}, unexpected {list(unexpected)[:5]}; "
            "use the model.safetensors that was exported with this plan.json"
        )
    return network
