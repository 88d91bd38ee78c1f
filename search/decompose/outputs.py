"""Fits in which errors of one output count together with those of others.

``E||Q (y - V x)||^2`` is the plain problem of ``Q y``, for a form whose last link may be any map to the outputs:
factors of ``Q V`` whose last link is then turned back by ``Q^-1``.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import CONVS, Fit, Method, problems
from search.matrices import matrices, weight_from, weight_of

__all__ = ["fit_weighed"]

FREE = ("svd", "svd_input", "spatial_svd", "tucker2", "cp3", "cp4", "tt")
"""Methods whose last link is dense in the outputs; in others outputs are weighed one by one."""
Layer = TypeVar("Layer", bound=nn.Module)


@torch.no_grad()
def fit_weighed(
    method: Method,
    layer: nn.Module,
    ranks: Sequence[int],
    statistics: Statistics,
    metric: Tensor | None,
    start: nn.Module | None,
) -> Fit:
    """``method.factorize`` with ``metric`` (out, out), symmetric and positive, or its diagonal (out,), or None.

    The error of a fit by a whole matrix is relative to what the input explains: of the rest, moments tell too little.
    """
    if metric is None or metric.dim() == 1:
        return method.factorize(layer, ranks, statistics, metric=metric, start=start)
    free = method.name in FREE and isinstance(layer, (nn.Linear, *CONVS)) and len(statistics.second) == 1
    if not free:
        return method.factorize(layer, ranks, statistics, metric=metric.diagonal(), start=start)
    turn = torch.linalg.cholesky(metric.double()).T
    turned = copy.deepcopy(layer)
    weight = weight_of(turned)
    weight.copy_(weight_from(layer, turn @ matrices(layer)[0].double()))
    (part,), cross = problems(layer, statistics), turn @ statistics.cross[0]
    explained = (turn @ part.target * cross).sum(1)
    known = replace(statistics, cross=cross[None], energy=explained[None])
    fit = method.factorize(turned, ranks, known, start=None if start is None else _with_last(start, turn))
    return replace(fit, module=_with_last(fit.module, torch.linalg.inv(turn)))


def _with_last(module: Layer, matrix: Tensor) -> Layer:
    """A copy whose outputs are ``matrix`` (out, out) times its own, the bias apart."""
    module = copy.deepcopy(module)
    weight = weight_of(module.get_submodule("last"))
    weight.copy_((matrix @ weight.double().flatten(1)).reshape(weight.shape))
    return module
