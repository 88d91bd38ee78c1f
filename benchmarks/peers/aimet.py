"""AIMET 2.42: greedy spatial SVD, which evaluates the network with each layer at each of several ratios alone.

For each ratio it may look at as many images as all of Tenfold's candidates together; they are shared equally among its
evaluations.
"""

import copy
from decimal import Decimal
from typing import Any

import torch
from aimet_torch.common.defs import CompressionScheme, CostMetric, GreedySelectionParameters
from aimet_torch.compress import ModelCompressor
from aimet_torch.defs import SpatialSvdParameters
from torch import nn

from benchmarks.peers.common import Request, answer, layers

RATIOS = 10
"""Candidate ratios of each layer, AIMET's default: nine of them are evaluated, the tenth is the layer itself."""


class _Scores:
    """The evaluation that AIMET calls; counts what it looks at."""

    def __init__(self, request: Request, decomposed: int) -> None:
        x, y = request.choosing()
        each = min(len(x), max(100, request.images // (decomposed * (RATIOS - 1))))
        self.x, self.y = x[:each], y[:each]
        self.evaluations = 0

    @torch.no_grad()
    def __call__(self, network: nn.Module, _iterations: int | None = None, use_cuda: bool = False) -> float:
        self.evaluations += 1
        network.eval()
        hits = sum(
            int((network(x).argmax(-1) == y).sum()) for x, y in zip(self.x.split(128), self.y.split(128), strict=True)
        )
        return hits / len(self.y)


def compress(request: Request, rate: float) -> tuple[nn.Module, dict[str, Any]]:
    network = copy.deepcopy(request.network)
    wanted = list(layers(network, nn.Conv2d).values())
    ignored = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m not in wanted]
    scores = _Scores(request, len(wanted))
    greedy = GreedySelectionParameters(
        target_comp_ratio=Decimal(str(round(rate, 4))),
        num_comp_ratio_candidates=RATIOS,
    )
    auto = SpatialSvdParameters.AutoModeParams(greedy, modules_to_ignore=ignored)
    compressed, _ = ModelCompressor.compress_model(
        network,
        eval_callback=scores,
        eval_iterations=1,
        input_shape=tuple(request.choosing()[0][:1].shape),
        compress_scheme=CompressionScheme.spatial_svd,
        cost_metric=CostMetric.memory,
        parameters=SpatialSvdParameters(SpatialSvdParameters.Mode.auto, auto),
    )
    return compressed, {"evaluations": scores.evaluations, "images": scores.evaluations * len(scores.y)}


if __name__ == "__main__":
    answer(compress)
