"""MUSCO 1.0.6: Tucker-2 of convolutions and SVD of the rest, one parameter reduction rate for all layers."""

import copy
from typing import Any

from flopco import FlopCo
from musco.pytorch import CompressorPR
from torch import nn

from benchmarks.peers.common import Request, answer, layers


def compress(request: Request, rate: float) -> tuple[nn.Module, dict[str, Any]]:
    network = copy.deepcopy(request.network)
    example = request.choosing()[0][:1]
    wanted = layers(network, nn.Conv2d, nn.Linear)
    stats = FlopCo(network, img_size=tuple(example.shape), device="cpu")
    compressor = CompressorPR(
        network,
        stats,
        conv2d_nn_decomposition="tucker2",
        ranks={name: None for name in stats.ltypes if name not in wanted},
        param_reduction_rates=dict.fromkeys(wanted, 1 / rate),
        nglobal_compress_iters=1,
    )
    while not compressor.done:
        compressor.compression_step()
    return compressor.compressed_model, {"evaluations": 0, "images": 0}


if __name__ == "__main__":
    answer(compress)
