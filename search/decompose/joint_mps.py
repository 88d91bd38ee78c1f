"""``joint_mps`` (Kossaifi et al. 2019, their matrix-product state): one chain over the grid, the inputs, the kernel and
the outputs. Members share the k x k core and the 1 x 1 output factor; each has a 1 x 1 input factor of its own, or a
mixture of fewer where a bond is cut.

In their chain the outputs follow the inputs and the kernel comes last. Here the kernel stands between them, so that a
member runs in three small links instead of a wide k x k one.

The start is TT-SVD in whitened inputs; since no member's link can be told before the shared one is, a few rounds of
least squares follow for each ``low`` before the outputs are cut, which gives all ``high`` at once.

More than ``high`` * taps inputs are of no use to a core. Without a kernel that leaves ``low`` = ``high``, where the cut
of the outputs of whole kernels is the only one: the first links take the core up.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

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
    points,
    stacked_rank,
    truncated,
)
from search.decompose.projection import refine
from search.spec import CurvePoint
from tenfold.layers import FactorizedLayer

__all__ = ["JointMPS"]

LOWS, HIGHS = 12, 10
SQUARES = 36
"""Ranks ``low`` = ``high``, where the core has no kernel."""
FIRST_SWEEPS = 2
"""Rounds for the wide core, before the outputs are cut."""


class JointMPS:
    name = "joint_mps"

    def applies_to(self, group: Group) -> str | None:
        return group.reason()

    def ranks(self, group: Group) -> tuple[tuple[int, ...], ...]:
        out, in_, taps = group.shape
        none = [0] * len(group.layers)
        dense = group.dense(none)[0]
        lattice = []
        for bonds in _bonds(group.grid):
            for low in ranks_between(1, in_, LOWS if taps > 1 else SQUARES):
                for high in ranks_between(-(-low // taps), min(out, low * taps), HIGHS):
                    if self.cost(group, (*bonds, low, high), none)[0] < dense:
                        lattice.append((*bonds, low, high))
        return tuple(lattice)

    def full_ranks(self, group: Group) -> tuple[int, ...]:
        out, in_, taps = group.shape
        bonds = (math.prod(group.grid[: k + 1]) for k in range(len(group.grid)))
        return *bonds, min(len(group.layers) * in_, taps * out), out

    def cost(
        self,
        group: Group,
        ranks: Sequence[int],
        output_positions: Sequence[int],
        *,
        input_sizes: Sequence[Sequence[int]] | None = None,
    ) -> tuple[int, int]:
        out, in_, taps = group.shape
        *bonds, low, high = ranks
        parameters, mixing = bonds[-1] * low * in_ + high * low * taps + out * high, 0
        whole, before = True, 1
        for size, bond in zip(group.grid, bonds, strict=True):
            if not whole:
                mixing += before * bond
            whole = whole and bond == before * size
            parameters += 0 if whole else before * size * bond
            before = bond
        mixing += 0 if whole else bonds[-1] * low * in_
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
        *bonds, low, high = ranks
        modes, wide, projected = _wide(pool, _rows(pool), group.grid, bonds, _width(pool, low, high))
        family = _narrow(pool, projected, wide, high)
        if wide.first.shape[1] > low:
            first = torch.einsum("sr,hra->hsa", family.core[0], family.first)
            family = replace(family, first=first, core=torch.eye(high, dtype=first.dtype)[None])
        family = pool.improve(family)
        modules = built(group, self.name, ranks, modes, family, pool.unroot)
        return JointFit(modules, tuple(pool.errors(pool.project(family.firsts()), family.outers())))

    def refit(
        self, module: FactorizedLayer, layer: nn.Module, statistics: Statistics, *, metric: Tensor | None = None
    ) -> float:
        problem = problems(layer, statistics, metric)[0]
        module = member_of(module)
        shared = module.shared
        if shared.is_whole:
            first, core, last = (v.detach().to("cpu", torch.float64) for v in shared.links(module.at))
            outer = last @ core.flatten(1)
            index = shared.place(module.at)
            with torch.no_grad():
                shared.first[index] = refine(problem, first, outer, outer.shape[1] // len(first)).to(shared.first.dtype)
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
        rows = _rows(pool)
        errors: dict[tuple[int, ...], Sequence[float]] = {}
        starts = groupby(self.ranks(group), key=lambda ranks: (*ranks[:-2], _width(pool, *ranks[-2:])))
        for (*bonds, width), wanted in starts:
            _, wide, projected = _wide(pool, rows, group.grid, bonds, width)
            for ranks in wanted:
                errors[ranks] = pool.errors(projected, _narrow(pool, projected, wide, ranks[-1]).outers())
        return points(self, group, statistics, output_positions, errors)

    def variational_ranks(self, group: Group) -> tuple[int, ...]:
        stacked = torch.stack([layer.get_parameter("weight").detach().cpu().double() for layer in group.layers])
        chain = stacked.reshape(*group.grid, *group.shape).movedim(-3, -1)  # grid.., in, taps, out
        count = len(group.grid)
        unfolded = [chain.reshape(math.prod(chain.shape[:k]), -1) for k in range(1, count + 2)]
        return tuple(stacked_rank(u) for u in (*unfolded, chain.flatten(0, -2).T))


def _bonds(grid: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Whole bonds, and those of which the last is cut to half."""
    whole = tuple(math.prod(grid[: k + 1]) for k in range(len(grid)))
    half = -(-whole[-1] // 2)
    return (whole, tuple(min(bond, half) for bond in whole))


def _width(pool: Pool, low: int, high: int) -> int:
    """How many inputs the core has whose outputs are then cut: enough for whole kernels where no other cut is due."""
    return pool.out if pool.taps == 1 and low == high else low


def _rows(pool: Pool) -> Tensor:
    """(out * taps, members * in): the weighed kernels with what the members share along the rows."""
    rows = [(pool.rows[:, None] * p.target).reshape(-1, pool.in_, pool.taps) for p in pool.parts]
    return torch.cat([r.transpose(1, 2).flatten(0, 1) for r in rows], dim=1)


def _wide(
    pool: Pool, rows: Tensor, grid: Sequence[int], bonds: Sequence[int], low: int
) -> tuple[list[Tensor], Family, list[Projected]]:
    """The cut modes and the family with a core that is as wide as the outputs."""
    count = len(pool.parts)
    leading = truncated(rows, low)
    low_found = leading.shape[1]
    firsts = (leading.T @ rows).reshape(low_found, count, pool.in_).transpose(0, 1)
    shared = torch.zeros(pool.out, low, pool.taps, dtype=torch.float64)
    shared[:, :low_found] = leading.reshape(pool.out, pool.taps, low_found).transpose(1, 2)
    padded = torch.zeros(count, low, pool.in_, dtype=torch.float64)
    padded[:, :low_found] = firsts
    modes, pick = _chain(padded, grid, bonds)
    first = torch.einsum("mh,mra->hra", pick, padded)
    eye = torch.eye(pool.out, dtype=torch.float64)
    ones = torch.ones(count, 1, dtype=torch.float64)
    family = Family(eye, (shared.flatten(1) / pool.rows[:, None])[None], ones, first, pick)
    projected = pool.project(family.firsts())
    family = replace(family, core=_regressed(pool, projected)[None])
    family = pool.improve(family, FIRST_SWEEPS, cut=False)
    return modes, family, pool.project(family.firsts())


def _chain(firsts: Tensor, grid: Sequence[int], bonds: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """TT-SVD along the grid: cores (r_{k-1}, I_k, r_k) of the bonds from the first cut one on, and the rows that they
    give: (members, r_last)."""
    modes: list[Tensor] = []
    left = torch.ones(1, 1, dtype=torch.float64)
    rest = firsts.flatten()
    before = 1
    for size, bond in zip(grid, bonds, strict=True):
        unfolded = rest.reshape(before * size, -1)
        if not modes and bond == before * size:
            basis = torch.eye(bond, dtype=torch.float64)
        else:
            basis = truncated(unfolded, bond)
            modes.append(basis.reshape(before, size, bond))
        left = torch.einsum("mb,bic->mic", left, basis.reshape(before, size, bond)).flatten(0, 1)
        rest, before = basis.T @ unfolded, bond
    return modes, left


def _regressed(pool: Pool, projected: Sequence[Projected]) -> Tensor:
    """(out, low * taps): the outer map that is best for all; exact where their metrics differ by a factor only."""
    second = _pooled(pool, projected)
    cross = torch.zeros_like(projected[0].cross)
    for p, w in zip(projected, pool.weights, strict=True):
        cross += w[:, None] * p.cross
    cross /= pool.weights.sum(0)[:, None]
    return torch.cholesky_solve(cross.T, factor(second)).T


def _pooled(pool: Pool, projected: Sequence[Projected]) -> Tensor:
    """The members' second moments behind their first links, averaged by their weights."""
    weights = pool.weights.mean(1)
    weights = weights / weights.sum()
    return torch.einsum("m,mij->ij", weights, torch.stack([p.second for p in projected]))


def _narrow(pool: Pool, projected: Sequence[Projected], wide: Family, high: int) -> Family:
    """``wide`` with its outputs cut to ``high``: reduced-rank regression in the pooled norm."""
    outer = wide.last @ wide.core[0]
    weighed = pool.rows[:, None] * outer
    second = _pooled(pool, projected)
    vectors: Tensor = torch.linalg.eigh(weighed @ second @ weighed.T).eigenvectors
    leading = vectors.flip(1)[:, :high]
    return replace(wide, last=leading / pool.rows[:, None], core=(leading.T @ weighed)[None])
