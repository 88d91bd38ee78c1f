"""``tucker2`` (Kim et al. 2016): 1 x 1 to r1 channels, k x k to r2, 1 x 1 back; and ``svd_input``, which keeps all
outputs.

A transposed convolution has the same links, its k x k transposed; the first runs over the input, the last over the
(often more) outputs.

The input factor P comes from the whitened input channels (HOSVD in the norm of C); for each r1 one regression gives the
core with *all* output ranks nested; alternating least squares then refines P for the ranks that are really used.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import (
    Fit,
    bias_parameters,
    conv_reason,
    dense_cost,
    fill,
    floor_of,
    geometry,
    input_positions,
    output_positions_of,
    problems,
    ranks_between,
    relative,
    thin,
)
from search.decompose.projection import (
    CURVE_SWEEPS,
    SWEEPS,
    WARM_SWEEPS,
    alternate,
    errors_of_inputs,
    errors_of_ranks,
    project,
    refitted,
    starts,
)
from search.decompose.tightening import tightened
from search.decompose.variational import by_inputs, by_outputs, variational_rank
from search.matrices import taps_of
from search.spec import CurvePoint
from tenfold.layers import factorized_like

__all__ = ["SVDInput", "Tucker2"]

IN_RANKS = 24
"""How many input ranks a curve solves for; output ranks come free with each."""


class Tucker2:
    name = "tucker2"

    def applies_to(self, layer: nn.Module) -> str | None:
        reason = conv_reason(layer, transposed=True)
        if reason is None and _sizes(layer)[2] == 1:
            reason = "a 1 x 1 kernel is a matrix already: svd does it with one link less"
        return reason or (None if self.ranks(layer) else "no rank makes it smaller")

    def ranks(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        c_out, c_in, taps = _sizes(layer)
        dense = c_out * c_in * taps
        lattice = []
        for low in ranks_between(1, c_in, IN_RANKS):
            # low c_in + low taps high + high c_out < dense, strictly.
            most = (dense - 1 - low * c_in) // (low * taps + c_out)
            lattice += [(low, high) for high in ranks_between(1, min(most, c_out, low * taps), 2 * IN_RANKS)]
        return tuple(lattice)

    def full_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        c_out, c_in, _ = _sizes(layer)
        return c_in, c_out

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        c_out, c_in, taps = _sizes(layer)
        groups = geometry(layer)[0]
        low, high = ranks
        first, core, last = groups * low * c_in, groups * low * taps * high, groups * high * c_out
        macs = (
            first * input_positions(layer, output_positions, input_sizes)
            + core * output_positions
            + last * output_positions_of(layer, output_positions, input_sizes)
        )
        return first + core + last + bias_parameters(layer), macs

    def variational_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        return variational_rank(layer, by_inputs), variational_rank(layer, by_outputs)

    def factorize(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        statistics: Statistics | None = None,
        *,
        metric: Tensor | None = None,
        start: nn.Module | None = None,
    ) -> Fit:
        c_out, _, taps = _sizes(layer)
        low, high = ranks
        parts = problems(layer, statistics, metric)
        firsts, cores, lasts, errors = [], [], [], []
        for part, begin in zip(parts, starts(parts, taps, low, start), strict=True):
            p, nested = alternate(part, begin, taps, high, SWEEPS if start is None else WARM_SWEEPS)
            high_found = min(high, len(nested.gains))
            core = torch.zeros(high, low * taps, dtype=p.dtype)
            last = torch.zeros(c_out, high, dtype=p.dtype)
            core[:high_found], last[:, :high_found] = nested.core[:high_found], nested.last[:, :high_found]
            scale = (last.norm(dim=0) / core.norm(dim=1).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
            firsts.append(p)
            cores.append((core * scale[:, None]).reshape(high, low, taps))
            lasts.append(last / scale)
            errors.append(part.floor + nested.error(high_found))
        new = factorized_like(layer, self.name, ranks)
        fill(layer, new, first=torch.cat(firsts), core=torch.cat(cores), last=torch.cat(lasts))
        return Fit(new, relative(parts, errors))

    def curve(
        self,
        layer: nn.Module,
        statistics: Statistics | None,
        output_positions: int,
        *,
        metric: Tensor | None = None,
    ) -> tuple[CurvePoint, ...]:
        taps = _sizes(layer)[2]
        parts = problems(layer, statistics, metric)
        bases = [project(p, taps) for p in parts]
        sizes = None if statistics is None else statistics.input_sizes
        lattice = self.ranks(layer)
        lows = sorted({low for low, _ in lattice})
        lost = [errors_of_ranks(p, basis[: lows[-1]], taps, lows) for p, basis in zip(parts, bases, strict=True)]
        points = []
        for ranks in lattice:
            low, high = ranks
            error = relative(parts, [float(e[low][min(high, len(e[low]) - 1)]) for e in lost])
            parameters, macs = self.cost(layer, ranks, output_positions, input_sizes=sizes)
            points.append(CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=error))
        dense = dense_cost(layer, output_positions)

        def fitted(ranks: tuple[int, ...]) -> float:
            low, high = ranks
            ends = [alternate(p, b[:low], taps, high, CURVE_SWEEPS)[1] for p, b in zip(parts, bases, strict=True)]
            return relative(parts, [p.floor + n.error(high) for p, n in zip(parts, ends, strict=True)])

        count = refitted(parts, taps, lows[len(lows) // 2])
        return thin(tightened(thin(points, dense), floor_of(parts), fitted, count), dense)


class SVDInput:
    """1 x 1 to r channels, then the k x k: Tucker-2 whose output rank is left full, one link less."""

    name = "svd_input"

    def applies_to(self, layer: nn.Module) -> str | None:
        return Tucker2().applies_to(layer) or (None if self.ranks(layer) else "no rank makes it smaller")

    def ranks(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        c_out, c_in, taps = _sizes(layer)
        dense = c_out * c_in * taps
        return tuple((r,) for r in ranks_between(1, (dense - 1) // (c_in + taps * c_out), 40))

    def full_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        return (_sizes(layer)[1],)

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        c_out, c_in, taps = _sizes(layer)
        first, last = (geometry(layer)[0] * ranks[0] * size for size in (c_in, taps * c_out))
        macs = first * input_positions(layer, output_positions, input_sizes) + last * output_positions
        return first + last + bias_parameters(layer), macs

    def variational_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        return (variational_rank(layer, by_inputs),)

    def factorize(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        statistics: Statistics | None = None,
        *,
        metric: Tensor | None = None,
        start: nn.Module | None = None,
    ) -> Fit:
        c_out, _, taps = _sizes(layer)
        parts = problems(layer, statistics, metric)
        firsts, lasts, errors = [], [], []
        for part, begin in zip(parts, starts(parts, taps, ranks[0], start), strict=True):
            p, nested = alternate(part, begin, taps, None, SWEEPS if start is None else WARM_SWEEPS)
            full = len(nested.gains)
            firsts.append(p)
            lasts.append(nested.weight(full).reshape(c_out, ranks[0], taps))
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
        taps = _sizes(layer)[2]
        parts = problems(layer, statistics, metric)
        bases = [project(p, taps) for p in parts]
        sizes = None if statistics is None else statistics.input_sizes
        lattice = self.ranks(layer)
        most = lattice[-1][0]
        lost = [errors_of_inputs(part, basis[:most], taps) for part, basis in zip(parts, bases, strict=True)]
        points = []
        for ranks in lattice:
            errors = [float(e[ranks[0]]) for e in lost]
            parameters, macs = self.cost(layer, ranks, output_positions, input_sizes=sizes)
            points.append(CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=relative(parts, errors)))
        dense = dense_cost(layer, output_positions)

        def fitted(ranks: tuple[int, ...]) -> float:
            ends = [alternate(p, b[: ranks[0]], taps, None, CURVE_SWEEPS)[1] for p, b in zip(parts, bases, strict=True)]
            return relative(parts, [p.floor + n.error(len(n.gains)) for p, n in zip(parts, ends, strict=True)])

        # The plain start cannot be improved.
        count = 0 if statistics is None else refitted(parts, taps, most // 2)
        return thin(tightened(thin(points, dense), floor_of(parts), fitted, count), dense)


def _sizes(layer: nn.Module) -> tuple[int, int, int]:
    """``(out, in, taps)``, channels per group."""
    _, out, n = geometry(layer)[1].shape
    taps = taps_of(layer)
    return out, n // taps, taps
