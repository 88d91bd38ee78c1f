"""``tt_matrix`` (Novikov et al. 2015): a Linear as a tensor train over the digits of its features.

Mode sizes are given, or follow from the layer's shape (``linear_modes``). The lattice has one knob, a rank that all
r_k share, each clipped to what is exact at its place; the algebra is in ``tensor_train``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import (
    Fit,
    Problem,
    bias_parameters,
    fill,
    floor_of,
    geometry,
    problems,
    ranks_between,
    relative,
    thin,
)
from search.decompose.tensor_train import (
    Train,
    Whitened,
    equal_norms,
    refit,
    train_matrix,
    tt_round,
    tt_svd,
    tt_unfolding,
    whiten,
)
from search.decompose.tightening import tightened
from search.decompose.variational import variational_rank
from search.spec import CurvePoint
from tenfold.layers import factorized_like
from tenfold.layers.contracting import TTShape, linear_way
from tenfold.layers.tensor_train import modes_of

__all__ = ["TTMatrix", "tt_round", "tt_svd"]

POINTS = 24
"""Of a lattice, at most; a large layer has fewer, down to ``FEW``: each point's true error is a product with C."""
FEW = 6
ERROR_MACS = 3e11
"""Multiplications that the errors of all points may take."""
SWEEPS = 6
WARM_SWEEPS = 2
REFITTED = 6
"""Points of a curve that are refitted; the others' errors follow theirs (``tightening``)."""
CURVE_MACS = 6e10
"""Multiplications that refitting may take for a whole curve: one or two seconds."""
FIT_MACS = 2e11
"""And for one fit."""


class TTMatrix:
    name = "tt_matrix"

    def __init__(self, options: Mapping[str, Any] = {}) -> None:
        """``options``: ``in_modes`` and ``out_modes``, as ``TTLinear.like`` takes them."""
        self.options = options

    def applies_to(self, layer: nn.Module) -> str | None:
        if not isinstance(layer, nn.Linear):
            hint = " (r_tt is its form for convolutions)" if hasattr(layer, "kernel_size") else ""
            return f"tt_matrix replaces Linear, not {type(layer).__name__}{hint}"
        if min(layer.weight.shape) < 2:
            return "a Linear with one input or output has no digits to part"
        try:
            self.modes(layer)
        except ValueError as error:
            return str(error)
        return None if self.ranks(layer) else "no rank makes it smaller"

    def modes(self, layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``(out_modes, in_modes)`` of the layer's matrix (of one group), taps included."""
        out, in_ = geometry(layer)[1].shape[1:]
        return modes_of(in_, out, self.options)

    def ranks(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        out_modes, in_modes = self.modes(layer)
        exact = self.full_ranks(layer)
        groups, weight = geometry(layer)
        dense = weight.numel()
        points = max(FEW, min(POINTS, int(ERROR_MACS / (dense * weight.shape[2]))))

        def at(rank: int) -> tuple[int, ...]:
            return tuple(min(rank, most) for most in exact)

        def cheaper(rank: int) -> bool:
            train = TTShape(out_modes, in_modes, (*at(rank), 1))
            chains = (train.contraction(way, 1, 1).macs for way in train.ways() if len(way.parts) > 1)
            return groups * train.parameters < dense and any(groups * macs < dense for macs in chains)

        most = next((rank - 1 for rank in range(1, max(exact) + 1) if not cheaper(rank)), max(exact))
        return tuple(at(rank) for rank in ranks_between(1, most, points))

    def full_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        sizes = [o * i for o, i in zip(*self.modes(layer), strict=True)]
        return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        out_modes, in_modes = self.modes(layer)
        shape = TTShape(out_modes, in_modes, (*ranks, 1))
        _, work = linear_way(shape, output_positions)
        return shape.parameters + bias_parameters(layer), work.macs

    def variational_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        out_modes, in_modes = self.modes(layer)

        def up_to(k: int) -> Callable[[Tensor], Tensor]:
            return lambda weight: tt_unfolding(weight.flatten(1), out_modes, in_modes, k)

        return tuple(variational_rank(layer, up_to(k)) for k in range(1, len(out_modes)))

    def factorize(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        statistics: Statistics | None = None,
        *,
        metric: Tensor | None = None,
        start: nn.Module | None = None,
    ) -> Fit:
        parts = problems(layer, statistics, metric)
        trains, errors = [], []
        for g, white in enumerate(self._whitened(layer, parts, ranks)):
            if start is None:
                # As on the curve, then on from there: so that a fit is never worse than its point.
                cores, _ = refit(white.problem, white.at(ranks), sweeps=1, macs=self._point_macs(parts))
            else:
                cores = white.enter(self._train_of(start, layer, g))
            sweeps = SWEEPS if start is None else WARM_SWEEPS
            cores, error = refit(white.problem, cores, sweeps=sweeps, macs=FIT_MACS / len(parts))
            trains.append(equal_norms(_padded(white.leave(cores), ranks)))
            errors.append(error)
        links = {name: torch.cat(cores) for name, *cores in zip(self._links(layer), *trains, strict=True)}
        new = factorized_like(layer, self.name, ranks, self.options)
        return Fit(fill(layer, new, **links), relative(parts, errors))

    def curve(
        self,
        layer: nn.Module,
        statistics: Statistics | None,
        output_positions: int,
        *,
        metric: Tensor | None = None,
    ) -> tuple[CurvePoint, ...]:
        """``thin`` keeps a point only if it is better than all cheaper ones; with one knob that makes it monotone."""
        parts = problems(layer, statistics, metric)
        whites, budget = self._whitened(layer, parts), self._point_macs(parts)
        sizes = None if statistics is None else statistics.input_sizes
        points = []
        for ranks in self.ranks(layer):
            errors = [white.problem.error(train_matrix(white.at(ranks))) for white in whites]
            parameters, macs = self.cost(layer, ranks, output_positions, input_sizes=sizes)
            points.append(CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=relative(parts, errors)))
        weight = geometry(layer)[1]
        dense = (weight.numel() + bias_parameters(layer), weight.numel() * output_positions)

        def refitted(ranks: tuple[int, ...]) -> float:
            errors = [refit(white.problem, white.at(ranks), sweeps=1, macs=budget)[1] for white in whites]
            return relative(parts, errors)

        return thin(tightened(thin(points, dense), floor_of(parts), refitted, REFITTED), dense)

    def _links(self, layer: nn.Module) -> tuple[str, ...]:
        """The names of the parameters that the cores go to."""
        return tuple(f"cores.{k}" for k in range(len(self.modes(layer)[0])))

    def _whitened(self, layer: nn.Module, parts: Sequence[Problem], ranks: Sequence[int] = ()) -> list[Whitened]:
        """Each group's start, at the lattice's highest ranks or at ``ranks`` where they are higher."""
        highest = tuple(map(max, zip(*self.ranks(layer)[-1:], *([ranks] if ranks else []), strict=True)))
        return [whiten(part, *self.modes(layer), highest) for part in parts]

    def _point_macs(self, parts: Sequence[Problem]) -> float:
        """What refitting one group of one point of a curve may take."""
        return CURVE_MACS / (REFITTED * len(parts))

    def _train_of(self, module: nn.Module, layer: nn.Module, group: int) -> Train:
        """One group's cores of a fitted ``module``."""
        groups, last = geometry(layer)[0], 1
        cores = []
        for name, o, i in zip(self._links(layer), *self.modes(layer), strict=True):
            value = module.get_parameter(name).detach().to("cpu", torch.float64)
            core = value.reshape(groups, last, o, i, -1)[group]
            cores.append(core)
            last = core.shape[3]
        return cores


def _padded(cores: Train, ranks: Sequence[int]) -> Train:
    """Zeros where a rank asked for is more than what is exact."""
    sizes = (1, *ranks, 1)
    padded = []
    for k, core in enumerate(cores):
        new = core.new_zeros(sizes[k], *core.shape[1:3], sizes[k + 1])
        new[: core.shape[0], :, :, : core.shape[3]] = core
        padded.append(new)
    return padded
