"""tensorly-torch 0.5.0: Tucker of every convolution at one share of its parameters (no choice of ranks is offered)."""

import copy
from typing import Any

import tltorch
from torch import nn

from benchmarks.peers.common import Request, answer, layers


def compress(request: Request, rate: float) -> tuple[nn.Module, dict[str, Any]]:
    network = copy.deepcopy(request.network)
    for name, layer in layers(network, nn.Conv2d).items():
        made = tltorch.FactorizedConv.from_conv(
            layer, rank=rate, factorization="tucker", implementation="factorized", decompose_weights=True
        )
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, made)
    return network, {"evaluations": 0, "images": 0}


if __name__ == "__main__":
    answer(compress)
