"""``tt``: the kernel as a tensor train over in, rows, columns, out: 1 x 1 to r1, k x 1 to r2, 1 x k to r3, 1 x 1 back.

In the norm of C this is ``projection`` twice. The first link projects the input of each tap to r1 channels, from the
leading subspace in whitened coordinates. What follows is the same kind of problem with r1 inputs: its k x 1 link
projects (inputs, rows) to r2 with one tap for each column, and its rest is a reduced-rank regression. So r1 and r2 are
nested in their subspaces, and all r3 come from one eigendecomposition. With C = I this is TT-SVD (Oseledets 2011,
algorithm 1). ``factorize`` then alternates: k x 1 link and rest for a given first link, the first link for those.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import (
    Fit,
    Problem,
    bias_parameters,
    conv2d_of,
    conv2d_sizes,
    fill,
    floor_of,
    geometry,
    input_positions,
    middle_positions,
    problems,
    ranks_between,
    relative,
    separable_reason,
    thin,
)
from search.decompose.projection import (
    WARM_SWEEPS,
    Nested,
    alternate,
    errors_of_ranks,
    project,
    refine,
    refitted,
    restrict,
    restrictions,
    solve,
)
from search.decompose.tightening import tightened
from search.decompose.variational import by_inputs, by_outputs, by_rows, variational_rank
from search.matrices import weight_of
from search.spec import CurvePoint
from tenfold.layers import factorized_like

__all__ = ["TT"]

STEPS = 8
"""How many values of each rank are tried."""
LARGE = 1 << 18
LARGE_STEPS = 5
"""The same for kernels of more than ``LARGE`` weights, where each regression takes seconds."""
ROUNDS = 4
"""Of alternation between the first link and what follows it."""


class TT:
    name = "tt"

    def applies_to(self, layer: nn.Module) -> str | None:
        return separable_reason(self.name, layer) or (None if self.ranks(layer) else "no rank makes it smaller")

    def ranks(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        rows, columns, c_in, c_out = conv2d_sizes(layer)
        dense = rows * columns * c_in * c_out
        steps = STEPS if dense <= LARGE else LARGE_STEPS
        lattice = []
        for low in ranks_between(1, c_in, steps):
            for middle in ranks_between(1, min(low * rows, columns * c_out), steps):
                # low in + low rows middle + middle columns high + high out < dense, strictly.
                most = (dense - 1 - low * (c_in + rows * middle)) // (middle * columns + c_out)
                highs = ranks_between(1, min(most, c_out, middle * columns), steps)
                lattice += [(low, middle, high) for high in highs]
        return tuple(lattice)

    def full_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        rows, columns, c_in, c_out = conv2d_sizes(layer)
        return c_in, min(c_in * rows, columns * c_out), c_out

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        return _prices(layer, output_positions, input_sizes)(ranks)

    def variational_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        return tuple(variational_rank(layer, unfold) for unfold in (by_inputs, by_rows, by_outputs))

    def factorize(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        statistics: Statistics | None = None,
        *,
        metric: Tensor | None = None,
        start: nn.Module | None = None,
    ) -> Fit:
        sizes, high = conv2d_sizes(layer), ranks[2]
        parts = problems(layer, statistics, metric)
        if start is None:
            begun = [_train(p, project(p, sizes[0] * sizes[1])[: ranks[0]], None, ranks, sizes) for p in parts]
        else:
            fitted = zip(parts, _fitted(start, len(parts)), strict=True)
            begun = [_train(part, first, tall, ranks, sizes) for part, (first, tall) in fitted]
        rounds = ROUNDS if start is None else WARM_SWEEPS
        trains = [_alternate(part, train, ranks, sizes, rounds) for part, train in zip(parts, begun, strict=True)]
        links = [_balanced(train, ranks, sizes) for train in trains]
        first, tall, wide, last = (torch.cat(link) for link in zip(*links, strict=True))
        new = fill(layer, factorized_like(layer, self.name, ranks), first=first, rows=tall, columns=wide, last=last)
        return Fit(new, relative(parts, [train.error(high) for train in trains]))

    def curve(
        self,
        layer: nn.Module,
        statistics: Statistics | None,
        output_positions: int,
        *,
        metric: Tensor | None = None,
    ) -> tuple[CurvePoint, ...]:
        kernel = conv2d_sizes(layer)
        rows, columns = kernel[:2]
        parts = problems(layer, statistics, metric)
        bases = [project(part, rows * columns) for part in parts]
        sizes = None if statistics is None else statistics.input_sizes
        points: list[CurvePoint] = []
        cost = _prices(layer, output_positions, sizes)
        lattice = dict(_by_low(self.ranks(layer)))
        most = max(lattice)
        rests = [restrictions(p, b[:most], rows * columns, list(lattice)) for p, b in zip(parts, bases, strict=True)]
        inner = [{low: project(rest, columns) for low, rest in by_low.items()} for by_low in rests]
        for low, middles in lattice.items():
            lost = [
                errors_of_ranks(rest[low], tall[low][: max(middles)], columns, list(middles))
                for rest, tall in zip(rests, inner, strict=True)
            ]
            for middle, highs in middles.items():
                for ranks in ((low, middle, high) for high in highs):
                    error = relative(parts, [float(e[middle][min(ranks[2], len(e[middle]) - 1)]) for e in lost])
                    parameters, macs = cost(ranks)
                    points.append(CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=error))
        weight = geometry(layer)[1]
        dense = (weight.numel() + bias_parameters(layer), weight.numel() * output_positions)

        def fitted(ranks: tuple[int, ...]) -> float:
            low, middle, _ = ranks
            known = zip(bases, rests, inner, strict=True)
            begun = [_behind(basis[:low], tall[low][:middle], rest[low], columns) for basis, rest, tall in known]
            ends = [_alternate(p, train, ranks, kernel, 1) for p, train in zip(parts, begun, strict=True)]
            return relative(parts, [train.error(ranks[2]) for train in ends])

        # Without statistics the curve is that of TT-SVD, within a few per cent of what fits reach.
        count = 0 if statistics is None else refitted(parts, rows * columns, weight.shape[2] // (2 * rows * columns))
        return thin(tightened(thin(points, dense), floor_of(parts), fitted, count), dense)


def _prices(
    layer: nn.Module, output_positions: int, input_sizes: Sequence[int] | None
) -> Callable[[Sequence[int]], tuple[int, int]]:
    """Parameters and MACs by ranks: a curve asks for hundreds, and the layer is the same for all of them."""
    rows, columns, c_in, c_out = conv2d_sizes(layer)
    groups, bias = conv2d_of(layer).groups, bias_parameters(layer)
    before = input_positions(layer, output_positions, input_sizes)
    between = middle_positions(layer, output_positions, input_sizes)

    def of(ranks: Sequence[int]) -> tuple[int, int]:
        low, middle, high = ranks
        first, tall, rest = (
            groups * size for size in (c_in * low, low * rows * middle, high * (middle * columns + c_out))
        )
        return first + tall + rest + bias, first * before + tall * between + rest * output_positions

    return of


def _by_low(lattice: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, dict[int, list[int]]]]:
    """Each r1 with its rising r2, and the r3 of each."""
    for low, group in groupby(lattice, key=lambda ranks: ranks[0]):
        yield low, {middle: [r[2] for r in same] for middle, same in groupby(group, key=lambda ranks: ranks[1])}


@dataclass(frozen=True)
class _Train:
    """One group's links. The last two are nested in r3."""

    first: Tensor
    """(r1, in)."""
    tall: Tensor
    """(r2, r1 * rows)."""
    nested: Nested
    rest: Problem
    """What follows the first link."""

    def error(self, high: int) -> float:
        return self.rest.floor + self.nested.error(high)


def _train(part: Problem, first: Tensor, tall: Tensor | None, ranks: Sequence[int], sizes: Sequence[int]) -> _Train:
    """The best rest for given first links; without the second, the leading subspace's."""
    rows, columns = sizes[:2]
    rest = restrict(part, first, rows * columns)
    if tall is None:
        tall = project(rest, columns)[: ranks[1]]
    return _behind(first, tall, rest, columns)


def _behind(first: Tensor, tall: Tensor, rest: Problem, columns: int) -> _Train:
    """The best last links for two given ones."""
    return _Train(first, tall, solve(rest, tall, columns), rest)


def _fitted(start: nn.Module, groups: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first two links of a fitted layer, group by group."""
    links = (weight_of(start.get_submodule(name)).detach().to("cpu", torch.float64) for name in ("first", "rows"))
    first, tall = (link.flatten(1).chunk(groups) for link in links)
    return zip(first, tall, strict=True)


def _alternate(part: Problem, train: _Train, ranks: Sequence[int], sizes: Sequence[int], rounds: int) -> _Train:
    """At most ``rounds`` of (second link, rest) for the first, first for those; never worse than the start."""
    (rows, columns), high = sizes[:2], ranks[2]
    for _ in range(rounds):
        tall, nested = alternate(train.rest, train.tall, columns, high, WARM_SWEEPS, train.nested)
        inner = _Train(train.first, tall, nested, train.rest)
        cube = tall.reshape(len(tall), -1, rows)
        q = torch.einsum("obw,bah->oahw", nested.weight(high).reshape(-1, len(tall), columns), cube)
        better = refine(part, inner.first, q.flatten(1), rows * columns)
        # An orthonormal basis of the same row space, and the second link in its coordinates.
        basis, mix = torch.linalg.qr(better.T)
        outer = _train(part, basis.T, torch.einsum("bah,ca->bch", cube, mix).flatten(1), ranks, sizes)
        before = train.error(high)
        train = min(inner, outer, key=lambda t: t.error(high))
        if before - train.error(high) < 1e-4 * (before + 1e-300):
            break
    return train


def _balanced(train: _Train, ranks: Sequence[int], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """The four links with equal norms on both sides of each channel; channels beyond the exact rank are zero."""
    (rows, columns), (_, middle, high) = sizes[:2], ranks
    short = middle - len(train.tall)
    tall = F.pad(train.tall.reshape(len(train.tall), -1, rows), (0, 0, 0, 0, 0, short))
    core, last = train.nested.core[:high], train.nested.last[:, :high]
    missing = high - len(core)
    core = F.pad(core.reshape(len(core), -1, columns), (0, 0, 0, short, 0, missing))
    last = F.pad(last, (0, missing))
    low_scale = _scale(train.first.norm(dim=1), tall.norm(dim=(0, 2)))
    first, tall = train.first * low_scale[:, None], tall / low_scale[:, None]
    middle_scale = _scale(tall.norm(dim=(1, 2)), core.norm(dim=(0, 2)))
    tall, core = tall * middle_scale[:, None, None], core / middle_scale[:, None]
    high_scale = _scale(core.norm(dim=(1, 2)), last.norm(dim=0))
    return first, tall, core * high_scale[:, None, None], last / high_scale


def _scale(before: Tensor, after: Tensor) -> Tensor:
    return (after / before.clamp_min(1e-30)).clamp_min(1e-30).sqrt()
