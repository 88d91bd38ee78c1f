"""``spatial_svd`` (Jaderberg et al. 2014): k x 1 then 1 x k; the matrix ``(in * rows) x (out * columns)``.

"Rows" are the kernel's first axis and "columns" its others together: with three axes k x 1 x 1 then 1 x k x k (Tran et
al. 2018, "A closer look at spatiotemporal convolutions for action recognition", where the first axis is time). With
groups each has its own pair of factors, all of one rank; so a depthwise k x k becomes ``r`` depthwise k x 1 for each
channel and the sum of their 1 x k, ``2 k r`` weights for ``k k``. A transposed convolution becomes two transposed ones.

The plain one is a singular value decomposition. In the norm of C the two factors are found by alternating least
squares from a whitened start: see ``projection`` with one tap for each column, and ``depthwise`` where a group has one
input channel.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import (
    Fit,
    bias_parameters,
    conv_of,
    fill,
    floor_of,
    geometry,
    middle_positions,
    problems,
    ranks_between,
    relative,
    thin,
)
from search.decompose.depthwise import separate
from search.decompose.projection import (
    CURVE_SWEEPS,
    SWEEPS,
    WARM_SWEEPS,
    alternate,
    errors_of_inputs,
    project,
    refitted,
    starts,
)
from search.decompose.tightening import tightened
from search.decompose.variational import by_rows, variational_rank
from search.spec import CurvePoint
from tenfold.layers import factorized_like
from tenfold.layers.base import TRANSPOSED, Conv, ConvTranspose

__all__ = ["SpatialSVD"]


class SpatialSVD:
    name = "spatial_svd"

    def applies_to(self, layer: nn.Module) -> str | None:
        if not isinstance(layer, Conv | ConvTranspose) or len(layer.kernel_size) == 1:
            return f"{self.name} replaces convolutions of two or three axes, not {type(layer).__name__}"
        if min(_sizes(layer)[:2]) == 1:
            return f"a kernel of {tuple(layer.kernel_size)} has nothing to separate"
        return None if self.ranks(layer) else "no rank makes it smaller"

    def ranks(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        rows, columns, c_in, c_out = _sizes(layer)
        dense, step = c_in * c_out * rows * columns, c_in * rows + c_out * columns
        return tuple((r,) for r in ranks_between(1, (dense - 1) // step, 40))

    def full_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        rows, columns, c_in, c_out = _sizes(layer)
        return (min(c_in * rows, c_out * columns),)

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        rows, columns, c_in, c_out = _sizes(layer)
        groups = conv_of(layer).groups
        first, last = (groups * ranks[0] * size for size in (c_in * rows, c_out * columns))
        middle = middle_positions(layer, output_positions, input_sizes)
        # A link runs once for each of its outputs, a transposed one for each of its inputs.
        runs = (output_positions, middle) if isinstance(layer, TRANSPOSED) else (middle, output_positions)
        return first + last + bias_parameters(layer), first * runs[0] + last * runs[1]

    def variational_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        return (variational_rank(layer, by_rows),)

    def factorize(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        statistics: Statistics | None = None,
        *,
        metric: Tensor | None = None,
        start: nn.Module | None = None,
    ) -> Fit:
        rows, columns, c_in, c_out = _sizes(layer)
        r = ranks[0]
        parts = problems(layer, statistics, metric)
        if c_in == 1:
            p, q, errors = separate(parts, columns, r, start)
            new = fill(layer, factorized_like(layer, self.name, ranks), first=p, last=q)
            return Fit(new, relative(parts, errors))
        firsts, lasts, errors = [], [], []
        for part, begin in zip(parts, starts(parts, columns, r, start), strict=True):
            p, nested = alternate(part, begin, columns, None, SWEEPS if start is None else WARM_SWEEPS)
            full = len(nested.gains)
            firsts.append(p.reshape(r, c_in, rows))
            lasts.append(nested.weight(full).reshape(c_out, r, columns))
            errors.append(part.floor + nested.error(full))
        new = fill(layer, factorized_like(layer, self.name, ranks), first=torch.cat(firsts), last=torch.cat(lasts))
        return Fit(new, relative(parts, errors))

    def curve(
        self,
        layer: nn.Module,
        statistics: Statistics | None,
        output_positions: int,
        *,
        metric: Tensor | None = None,
    ) -> tuple[CurvePoint, ...]:
        _, columns, c_in, _ = _sizes(layer)
        parts = problems(layer, statistics, metric)
        sizes = None if statistics is None else statistics.input_sizes
        lattice = self.ranks(layer)
        weight = geometry(layer)[1]
        dense = (weight.numel() + bias_parameters(layer), weight.numel() * output_positions)

        def point(ranks: tuple[int, ...], errors: Sequence[float]) -> CurvePoint:
            parameters, macs = self.cost(layer, ranks, output_positions, input_sizes=sizes)
            return CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=relative(parts, errors))

        if c_in == 1:
            return thin([point(ranks, separate(parts, columns, ranks[0])[2]) for ranks in lattice], dense)
        bases = [project(p, columns) for p in parts]
        most = lattice[-1][0]
        lost = [errors_of_inputs(part, basis[:most], columns) for part, basis in zip(parts, bases, strict=True)]
        points = [point(ranks, [float(e[ranks[0]]) for e in lost]) for ranks in lattice]

        def fitted(ranks: tuple[int, ...]) -> float:
            ends = [
                alternate(p, b[: ranks[0]], columns, None, CURVE_SWEEPS)[1] for p, b in zip(parts, bases, strict=True)
            ]
            return relative(parts, [p.floor + n.error(len(n.gains)) for p, n in zip(parts, ends, strict=True)])

        # The plain start cannot be improved.
        count = 0 if statistics is None else refitted(parts, columns, max(most // 2, 1))
        return thin(tightened(thin(points, dense), floor_of(parts), fitted, count), dense)


def _sizes(layer: nn.Module) -> tuple[int, int, int, int]:
    """``(kernel rows, kernel columns, in channels, out channels)``, channels per group."""
    conv = conv_of(layer)
    rows, *others = conv.kernel_size
    return rows, math.prod(others), conv.in_channels // conv.groups, conv.out_channels // conv.groups
