"""What an error at one layer does to the loss: real truncations, put in one at a time and taken out again.

The loss is not proportional to a layer's output error: on ResNet-20 it rises about as its square, and the layer that
matters least at 10 % error (the last) matters a lot at 30 %. One slope misleads an allocation (÷4 without
training, one draw, first 4,000 test images: 48 % with the slope at 10 %, 80 % when all layers count alike, 83 % with
points at several errors).
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn

from search.calibrate import Statistics
from search.reconstruct import fit_alone
from search.spec import CurvePoint, SiteChoice

__all__ = ["PROBE_ERRORS", "measure_rises"]

PROBE_ERRORS = (0.1, 0.3, 0.6)
"""Relative output errors at which the loss is measured: what an allocation at ÷2 to ÷5 gives to layers."""


@torch.no_grad()
def measure_rises(
    network: nn.Module, choice: SiteChoice, statistics: Statistics, loss: Callable[[nn.Module], float], base: float
) -> tuple[tuple[float, float], ...]:
    """``(relative output error, rise of the loss)`` of one site by rising error; see ``SiteChoice.rises``.

    Args:
        network: as the site's statistics were taken on; it is not changed.
        choice: the site and its curves, from which the points to try are taken.
        loss: of a whole network, 0 or more.
        base: the loss of ``network`` itself.
    """
    points = [(method, p) for method, curve in choice.curves.items() for p in curve if p.error > 0]
    found: dict[float, float] = {}
    tried: set[tuple[str, tuple[int, ...]]] = set()
    for wanted in PROBE_ERRORS:
        nearest = min(points, key=lambda mp: _distance(mp[1], wanted), default=None)
        if nearest is None or (nearest[0], nearest[1].ranks) in tried:
            continue
        method, point = nearest
        tried.add((method, point.ranks))
        changed = copy.deepcopy(network)
        error = fit_alone(changed, choice.site, choice.entry(method, point), statistics)
        rise = loss(changed) - base
        if error > 0 and math.isfinite(rise) and rise > 0:
            found[error] = rise
    return _rising(found)


def _distance(point: CurvePoint, wanted: float) -> float:
    return abs(math.log(point.error / wanted))


def _rising(found: dict[float, float]) -> tuple[tuple[float, float], ...]:
    """By error; a rise that falls below an earlier one is lifted to it, for it did so by chance."""
    kept: list[tuple[float, float]] = []
    for error, rise in sorted(found.items()):
        kept.append((error, max(rise, kept[-1][1] if kept else 0.0)))
    return tuple(kept)
