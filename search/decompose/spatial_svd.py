"""``spatial_svd`` (Jaderberg et al. 2014): k x 1 then 1 x k; the matrix ``(in * rows) x (out * columns)``.

The plain one is a singular value decomposition. In the norm of C the two factors are found by alternating least
squares from a whitened start: see ``projection`` with one tap for each column.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import (
    Fit,
    bias_parameters,
    conv2d_of,
    conv2d_sizes,
    fill,
    floor_of,
    geometry,
    middle_positions,
    problems,
    ranks_between,
    relative,
    separable_reason,
    thin,
)
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

__all__ = ["SpatialSVD"]


class SpatialSVD:
    name = "spatial_svd"

    def applies_to(self, layer: nn.Module) -> str | None:
        return separable_reason(self.name, layer) or (None if self.ranks(layer) else "no rank makes it smaller")

    def ranks(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        rows, columns, c_in, c_out = conv2d_sizes(layer)
        dense, step = c_in * c_out * rows * columns, c_in * rows + c_out * columns
        return tuple((r,) for r in ranks_between(1, min((dense - 1) // step, c_in * rows, c_out * columns), 40))

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        rows, columns, c_in, c_out = conv2d_sizes(layer)
        groups = conv2d_of(layer).groups
        first, last = (groups * ranks[0] * size for size in (c_in * rows, c_out * columns))
        middle = middle_positions(layer, output_positions, input_sizes)
        return first + last + bias_parameters(layer), first * middle + last * output_positions

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
        rows, columns, c_in, c_out = conv2d_sizes(layer)
        r = ranks[0]
        parts = problems(layer, statistics, metric)
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
        columns = conv2d_sizes(layer)[1]
        parts = problems(layer, statistics, metric)
        bases = [project(p, columns) for p in parts]
        sizes = None if statistics is None else statistics.input_sizes
        lattice = self.ranks(layer)
        most = lattice[-1][0]
        lost = [errors_of_inputs(part, basis[:most], columns) for part, basis in zip(parts, bases, strict=True)]
        points = []
        for ranks in lattice:
            errors = [float(e[ranks[0]]) for e in lost]
            parameters, macs = self.cost(layer, ranks, output_positions, input_sizes=sizes)
            points.append(CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=relative(parts, errors)))
        weight = geometry(layer)[1]
        dense = (weight.numel() + bias_parameters(layer), weight.numel() * output_positions)

        def fitted(ranks: tuple[int, ...]) -> float:
            ends = [
                alternate(p, b[: ranks[0]], columns, None, CURVE_SWEEPS)[1] for p, b in zip(parts, bases, strict=True)
            ]
            return relative(parts, [p.floor + n.error(len(n.gains)) for p, n in zip(parts, ends, strict=True)])

        # The plain start cannot be improved.
        count = 0 if statistics is None else refitted(parts, columns, most // 2)
        return thin(tightened(thin(points, dense), floor_of(parts), fitted, count), dense)
