"""``joint_tucker`` (Kossaifi et al. 2019): one Tucker over layers of equal shape; all share the 1 x 1 input and output
factors, each has a core of its own, or a mixture of fewer cores where a grid mode is cut.

The input factor comes from the members' whitened unfoldings side by side, the output factor from their regressions in
one eigendecomposition (nested in its rank), the cores from least squares, the grid's factors from the HOSVD of the
cores in the norm of the pooled statistics; ``Pool.improve`` goes on from there.
"""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import product

import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import problems, ranks_between
from search.decompose.joint import (
    Family,
    Group,
    JointFit,
    Pool,
    Projected,
    built,
    factor,
    joint_cost,
    member_of,
    own_core,
    points,
    stacked_rank,
    truncated,
)
from search.decompose.projection import restrict
from search.spec import CurvePoint
from tenfold.layers import FactorizedLayer

__all__ = ["JointTucker"]

LOWS, HIGHS = 12, 10
"""Ranks of the channels that a curve tries."""


class JointTucker:
    name = "joint_tucker"

    def applies_to(self, group: Group) -> str | None:
        return group.reason()

    def ranks(self, group: Group) -> tuple[tuple[int, ...], ...]:
        out, in_, taps = group.shape
        dense = group.dense([0] * len(group.layers))[0]
        lattice = []
        for modes in product(*(sorted({size, -(-size // 2)}, reverse=True) for size in group.grid)):
            for low in ranks_between(1, in_, LOWS):
                for high in ranks_between(1, min(out, low * taps), HIGHS):
                    ranks = (*modes, low, high)
                    if self.cost(group, ranks, [0] * len(group.layers))[0] < dense:
                        lattice.append(ranks)
        return tuple(lattice)

    def full_ranks(self, group: Group) -> tuple[int, ...]:
        out, in_, _ = group.shape
        return *group.grid, in_, out

    def cost(
        self,
        group: Group,
        ranks: Sequence[int],
        output_positions: Sequence[int],
        *,
        input_sizes: Sequence[Sequence[int]] | None = None,
    ) -> tuple[int, int]:
        out, in_, taps = group.shape
        *modes, low, high = ranks
        left = math.prod(modes) * high * low * taps
        parameters, mixing = left + low * in_ + out * high, 0
        for size, r in zip(group.grid, modes, strict=True):
            if r < size:
                parameters, mixing = parameters + size * r, mixing + left
            left //= r
        return joint_cost(group, (parameters, mixing), ranks, output_positions, input_sizes)

    def factorize(
        self,
        group: Group,
        ranks: Sequence[int],
        statistics: Sequence[Statistics] | None = None,
        *,
        metrics: Sequence[Tensor | None] | None = None,
    ) -> JointFit:
        pool = Pool(group, statistics, metrics)
        *modes, low, high = ranks
        first = _inputs(pool)[:low]
        projected = pool.project([first] * len(pool.parts))
        last = _outputs(pool, projected, high)
        cores = _cores(pool, projected, last)
        factors, core = _cut(pool, projected, last, cores, group.grid, modes)
        mix = reduce(_kron, factors)
        ones = torch.ones(len(pool.parts), 1, dtype=torch.float64)
        family = pool.improve(Family(last, core, mix, first[None], ones))
        cut = [u for u, size in zip(factors, group.grid, strict=True) if u.shape[1] < size]
        modules = built(group, self.name, ranks, cut, family, pool.unroot)
        return JointFit(modules, tuple(pool.errors(pool.project(family.firsts()), family.outers())))

    def refit(
        self, module: FactorizedLayer, layer: nn.Module, statistics: Statistics, *, metric: Tensor | None = None
    ) -> float:
        problem = problems(layer, statistics, metric)[0]
        module = member_of(module)
        shared = module.shared
        if shared.is_whole:
            first, _, last = (v.detach().to("cpu", torch.float64) for v in shared.links(module.at))
            taps = problem.moments.shape[0] // first.shape[1]
            rest = restrict(problem, first, taps)
            weights = problem.rows.square()
            gram = last.T @ (weights[:, None] * last)
            cross = last.T @ (weights[:, None] * rest.spread(rest.target))
            index = shared.place(module.at)
            with torch.no_grad():
                shared.core[index] = own_core(gram, rest.full, cross).reshape(shared.core[index].shape)
        return problem.error(module.dense_weight().detach().double().cpu().flatten(1)) / problem.energy

    def curve(
        self,
        group: Group,
        statistics: Sequence[Statistics] | None,
        output_positions: Sequence[int],
        *,
        metrics: Sequence[Tensor | None] | None = None,
    ) -> tuple[CurvePoint, ...]:
        pool = Pool(group, statistics, metrics)
        inputs = _inputs(pool)
        errors: dict[tuple[int, ...], Sequence[float]] = {}
        for low, highs in _by_channels(self.ranks(group)).items():
            projected = pool.project([inputs[:low]] * len(pool.parts))
            outputs = _outputs(pool, projected, min(group.shape[0], low * pool.taps))
            for high, wanted in highs.items():
                last = outputs[:, :high]
                cores = _cores(pool, projected, last)
                for modes in wanted:
                    factors, core = _cut(pool, projected, last, cores, group.grid, modes)
                    mixed = torch.einsum("mg,gsn->msn", reduce(_kron, factors), core)
                    errors[*modes, low, high] = pool.errors(projected, last @ mixed)
        return points(self, group, statistics, output_positions, errors)

    def variational_ranks(self, group: Group) -> tuple[int, ...]:
        stacked = torch.stack([w.detach().double() for w in map(_weight, group.layers)])
        shaped = stacked.reshape(*group.grid, *group.shape)
        axes = (*range(len(group.grid)), shaped.dim() - 2, shaped.dim() - 3)
        return tuple(stacked_rank(shaped.movedim(axis, 0).flatten(1)) for axis in axes)


def _kron(a: Tensor, b: Tensor) -> Tensor:
    # torch.kron cannot view a single column that is a slice of a wider matrix.
    return torch.einsum("ig,jh->ijgh", a, b).reshape(len(a) * len(b), -1)


def _weight(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight").cpu()


def _by_channels(lattice: Sequence[tuple[int, ...]]) -> dict[int, dict[int, list[tuple[int, ...]]]]:
    """``low`` to ``high`` to the grid ranks that are wanted with them."""
    found: dict[int, dict[int, list[tuple[int, ...]]]] = {}
    for *modes, low, high in lattice:
        found.setdefault(low, {}).setdefault(high, []).append(tuple(modes))
    return found


def _inputs(pool: Pool) -> Tensor:
    """(in, in): directions of the whitened inputs by falling importance to all members; the first rows are F."""
    unfolded = torch.cat(
        [p.weighed.reshape(-1, pool.in_, pool.taps).transpose(0, 1).flatten(1) for p in pool.parts], dim=1
    )
    return truncated(unfolded @ unfolded.T, pool.in_).T


def _outputs(pool: Pool, projected: Sequence[Projected], rank: int) -> Tensor:
    """(out, rank): directions of the members' best outputs, by falling importance; the first columns are L."""
    gram = torch.zeros(pool.out, pool.out, dtype=torch.float64)
    for part, p in zip(pool.parts, projected, strict=True):
        weighed = part.rows[:, None] * (p.cross @ p.target.T) * part.rows
        gram += (weighed + weighed.T) / 2
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(1)[:, :rank] / pool.rows[:, None]


def _cores(pool: Pool, projected: Sequence[Projected], last: Tensor) -> Tensor:
    """(members, high, low * taps): each member's least squares for given first and last links."""
    found = []
    for p, w in zip(projected, pool.weights, strict=True):
        half = torch.cholesky_solve(last.T @ (w[:, None] * p.target), factor(last.T @ (w[:, None] * last)))
        found.append(half)
    return torch.stack(found)


def _cut(
    pool: Pool,
    projected: Sequence[Projected],
    last: Tensor,
    cores: Tensor,
    grid: Sequence[int],
    modes: Sequence[int],
) -> tuple[list[Tensor], Tensor]:
    """The grid's factors (I_k, r_k), the identity where a mode is whole, and the cores that they mix."""
    factors = [torch.eye(size, dtype=torch.float64) for size in grid]
    if tuple(modes) == tuple(grid):
        return factors, cores
    right = factor(torch.stack([p.second for p in projected]).mean(0))
    left = factor(last.T @ (pool.rows.square()[:, None] * last))
    whitened = (left.T @ cores @ right).reshape(*grid, -1)
    for k, rank in enumerate(modes):
        if rank < grid[k]:
            factors[k] = truncated(whitened.movedim(k, 0).flatten(1), rank)
    for k, u in enumerate(factors):
        whitened = torch.tensordot(u.T, whitened.movedim(k, 0), dims=1).movedim(0, k)
    flat = whitened.reshape(-1, *cores.shape[1:])
    core = torch.linalg.solve_triangular(left.T, flat, upper=True)
    return factors, torch.linalg.solve_triangular(right, core, upper=False, left=False)
