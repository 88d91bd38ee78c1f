"""``r_tucker`` (Su et al. 2018): channels reshaped to two modes each, then Tucker over the four of them.

With P = in1 (x) in2 shared by all taps and Q = out1 (x) out2 this is Tucker-2 with Kronecker-structured factors. Given
the factors, the best core in the norm of C is a regression, and it explains

    || Qo' M B C P' L^-T ||_F^2        L L' = (P (x) I) C (P (x) I)'        Qo an orthonormal basis of M Q

Factors come from an HOSVD in the nearest separable norm. All their rows in the order of the lattice make prefixes of L
and Qo belong to smaller ranks, so *one* Cholesky and *one* QR give the error of every rank as a cumulative sum. For the
ranks that are used, alternating least squares refines each factor in the norm of C, where the layer is small enough.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import (
    Fit,
    Problem,
    bias_parameters,
    fill,
    geometry,
    input_positions,
    problems,
    relative,
    thin,
)
from search.decompose.projection import projected
from search.decompose.reshaping import Modes, modes_of, reshaped_reason, separable
from search.decompose.variational import variational_rank
from search.spec import CurvePoint
from tenfold.layers import factorized_like
from tenfold.layers.reshaped import tucker_way

__all__ = ["RTucker", "rank_for"]

STEPS = 16
"""How many pairs of ranks each side of the lattice has at most."""
SWEEPS = 8
WARM_SWEEPS = 2
LARGEST = 1200
"""Above so many inputs (channels x taps) the factors stay those of the start, and only the core is fitted."""


class RTucker:
    name = "r_tucker"

    def applies_to(self, layer: nn.Module) -> str | None:
        return reshaped_reason(layer, self.name) or (None if self.ranks(layer) else "no rank makes it smaller")

    def ranks(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        modes = modes_of(layer)
        lattice = [(*a, *b) for a in _some(_path(modes.s)) for b in _some(_path(modes.t))]
        return tuple(r for r in lattice if _count(modes, r) < modes.dense)

    def full_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        modes = modes_of(layer)
        return *modes.s, *modes.t

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        modes = modes_of(layer)
        before = input_positions(layer, output_positions, input_sizes)
        if isinstance(layer, nn.Linear):
            _, work = tucker_way(modes.s, modes.t, tuple(ranks), (), 1, output_positions, (1, 1))
        else:
            positions = before, output_positions
            _, work = tucker_way(modes.s, modes.t, tuple(ranks), modes.kernel, modes.groups, 1, positions)
        return _count(modes, ranks) + bias_parameters(layer), work.macs

    def variational_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        modes = modes_of(layer)

        def by(axis: int) -> Callable[[Tensor], Tensor]:
            return lambda weight: weight.reshape(*modes.t, *modes.s, -1).movedim(axis, 0).flatten(1)

        in1, in2, out1, out2 = (variational_rank(layer, by(axis)) for axis in (2, 3, 0, 1))
        return in1, in2, out1, out2

    def factorize(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        statistics: Statistics | None = None,
        *,
        metric: Tensor | None = None,
        start: nn.Module | None = None,
    ) -> Fit:
        modes = modes_of(layer)
        parts = problems(layer, statistics, metric)
        found, errors = [], []
        for g, part in enumerate(parts):
            if start is None:
                factors = _cut(_hosvd(part, modes), ranks)
            else:
                kept = (start.get_parameter(n)[g].detach().to("cpu", torch.float64) for n in _NAMES)
                factors = _Factors(*kept)
            factors, core, error = _alternate(part, factors, modes, SWEEPS if start is None else WARM_SWEEPS)
            found.append((factors, core))
            errors.append(part.floor + error)
        links = {n: torch.stack([getattr(f, n) for f, _ in found]) for n in _NAMES}
        new = factorized_like(layer, self.name, ranks)
        fill(layer, new, core=torch.cat([core for _, core in found]), **links)
        return Fit(new, relative(parts, errors))

    def curve(
        self,
        layer: nn.Module,
        statistics: Statistics | None,
        output_positions: int,
        *,
        metric: Tensor | None = None,
    ) -> tuple[CurvePoint, ...]:
        modes = modes_of(layer)
        parts = problems(layer, statistics, metric)
        explained = [_explained(part, modes) for part in parts]
        low, high = _places(_path(modes.s)), _places(_path(modes.t))
        sizes = None if statistics is None else statistics.input_sizes
        points = []
        for ranks in self.ranks(layer):
            i, j = low[ranks[0], ranks[1]], high[ranks[2], ranks[3]]
            errors = [p.floor + max(base - float(e[j, i]), 0.0) for p, (base, e) in zip(parts, explained, strict=True)]
            parameters, macs = self.cost(layer, ranks, output_positions, input_sizes=sizes)
            points.append(CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=relative(parts, errors)))
        weight = geometry(layer)[1]
        return thin(points, (weight.numel() + bias_parameters(layer), weight.numel() * output_positions))


def rank_for(layer: nn.Module, parameters: int) -> tuple[int, ...] | None:
    """The largest ranks of equal share in every mode that cost at most ``parameters`` (the bias counted); None: none.

    Both sides walk from (1, 1) to full along their paths, at equal shares of them.
    """
    modes = modes_of(layer)
    budget = parameters - bias_parameters(layer)
    a, b = _path(modes.s), _path(modes.t)
    steps = max(len(a), len(b))
    best = None
    for i in range(steps):
        share = i / (steps - 1)
        ranks = (*a[round(share * (len(a) - 1))], *b[round(share * (len(b) - 1))])
        if _count(modes, ranks) <= budget:
            best = ranks
    return best


_NAMES = ("in1", "in2", "out1", "out2")


@dataclass(frozen=True)
class _Factors:
    in1: Tensor
    """(R1, S1)."""
    in2: Tensor
    """(R2, S2)."""
    out1: Tensor
    """(T1, R1')."""
    out2: Tensor
    """(T2, R2')."""


def _path(full: tuple[int, int]) -> list[tuple[int, int]]:
    """Pairs from (1, 1) to ``full``, one rank more at each step, always where the smaller share is kept."""
    pair = (1, 1)
    path = [pair]
    while pair != full:
        ahead = pair[0] * full[1] > pair[1] * full[0]
        pair = (pair[0], pair[1] + 1) if ahead or pair[0] == full[0] else (pair[0] + 1, pair[1])
        path.append(pair)
    return path


def _some(path: list[tuple[int, int]]) -> list[tuple[int, int]]:
    if len(path) <= STEPS:
        return path
    return [path[round(i * (len(path) - 1) / (STEPS - 1))] for i in range(STEPS)]


def _places(path: list[tuple[int, int]]) -> dict[tuple[int, int], int]:
    return {pair: i for i, pair in enumerate(path)}


def _count(modes: Modes, ranks: Sequence[int]) -> int:
    """Weights of all groups: sum S_l R_l + sum T_l R'_l + k^2 prod R_l prod R'_l."""
    sides = sum(n * r for n, r in zip((*modes.s, *modes.t), ranks, strict=True))
    return modes.groups * (sides + math.prod(ranks) * modes.taps)


def _hosvd(part: Problem, modes: Modes) -> _Factors:
    """Full factors in falling importance, from the Gram matrices of the whitened target's four modes."""
    norm = separable(part, modes)

    def leading(mode: int) -> Tensor:
        unfolded = norm.whitened.movedim(mode, 0).flatten(1)
        vectors: Tensor = torch.linalg.eigh(unfolded @ unfolded.T).eigenvectors.flip(1)
        return vectors

    in1, in2 = (leading(2 + i).T @ norm.unroots[i] for i in (0, 1))
    out1, out2 = (leading(i) / norm.rows[i][:, None] for i in (0, 1))
    return _Factors(in1, in2, out1, out2)


def _cut(f: _Factors, ranks: Sequence[int]) -> _Factors:
    """The leading ranks of full factors."""
    return _Factors(f.in1[: ranks[0]], f.in2[: ranks[1]], f.out1[:, : ranks[2]], f.out2[:, : ranks[3]])


def _inputs(part: Problem, p: Tensor, modes: Modes) -> tuple[Tensor, Tensor]:
    """``p``: (r, S), shared by the taps. Whitened regressors: L of its moments, (r k, r k), and M B C P' L^-T."""
    c, d = projected(part, p, modes.taps)
    if c.dim() == 1:
        return torch.diag(c), d
    lower = torch.linalg.cholesky(c)
    return lower, torch.linalg.solve_triangular(lower, d.T, upper=False).T


def _order(path: list[tuple[int, int]], full: tuple[int, int]) -> tuple[Tensor, list[int]]:
    """Entries of a full Kronecker product in the order in which the path takes them, and how many each pair has."""
    order: list[int] = []
    before = (0, 0)
    for pair in path:
        order += [i * full[1] + j for i in range(pair[0]) for j in range(pair[1]) if i >= before[0] or j >= before[1]]
        before = pair
    return torch.tensor(order), [a * b for a, b in path]


def _explained(part: Problem, modes: Modes) -> tuple[float, Tensor]:
    """``||M B C^1/2||^2`` and what of it each pair of places on the output's and the input's path explains."""
    factors = _hosvd(part, modes)
    columns, low = _order(_path(modes.s), modes.s)
    rows, high = _order(_path(modes.t), modes.t)
    _, seen = _inputs(part, _kron(factors.in1, factors.in2)[columns], modes)
    basis = torch.linalg.qr(part.rows[:, None] * _kron(factors.out1, factors.out2)[:, rows]).Q
    energy = (basis.T @ seen).square().cumsum(0).cumsum(1)
    base = part.base
    ends = torch.tensor(low) * modes.taps - 1
    return base, energy[torch.tensor(high) - 1][:, ends]


def _core(part: Problem, factors: _Factors, modes: Modes) -> tuple[Tensor, float]:
    """The best core, (R1' R2', R1 R2, taps), and its error ``||M (B - V) C^1/2||^2``."""
    lower, seen = _inputs(part, _kron(factors.in1, factors.in2), modes)
    basis, upper = torch.linalg.qr(part.rows[:, None] * _kron(factors.out1, factors.out2))
    kept = basis.T @ seen
    core = torch.linalg.solve_triangular(upper, kept, upper=True)
    core = torch.linalg.solve_triangular(lower, core, upper=False, left=False)
    base = part.base
    return core.reshape(len(core), -1, modes.taps), max(base - float(kept.square().sum()), 0.0)


def _alternate(part: Problem, factors: _Factors, modes: Modes, sweeps: int) -> tuple[_Factors, Tensor, float]:
    """Each factor in turn by least squares, the core with every one; never worse than the start."""
    core, error = _core(part, factors, modes)
    if len(part.moments) > LARGEST:
        return factors, core, error
    for _ in range(sweeps):
        before = error
        for name in _NAMES:
            update = _better_input if name.startswith("in") else _better_output
            other = replace(factors, **{name: update(part, factors, core, modes, name.endswith("1"))})
            found, reached = _core(part, other, modes)
            if reached < error:
                factors, core, error = other, found, reached
        if before - error <= 1e-4 * before:
            break
    return factors, core, error


def _better_input(part: Problem, f: _Factors, core: Tensor, modes: Modes, one: bool) -> Tensor:
    """``in1`` (or ``in2``) by its normal equations, its rows made orthonormal (the core takes up the rest)."""
    k = modes.taps
    fixed = f.in2 if one else f.in1
    r, n = (f.in1 if one else f.in2).shape
    c = part.full.reshape(*modes.s, k, *modes.s, k)
    cross = (part.rows[:, None] * part.spread(part.weighed)).reshape(-1, *modes.s, k)
    g = (_kron(f.out1, f.out2) @ core.flatten(1)).reshape(-1, len(f.in1), len(f.in2), k)
    if not one:
        c, cross, g = c.permute(1, 0, 2, 4, 3, 5), cross.transpose(1, 2), g.transpose(1, 2)
    g = g.flatten(2)
    weighed = (part.rows[:, None, None] * g).flatten(1)
    gram = (weighed.T @ weighed).reshape(r, g.shape[2], r, g.shape[2])
    c = torch.einsum("pajqbl,ca,db->pcjqdl", c, fixed, fixed).reshape(n, g.shape[2], n, g.shape[2])
    normal = torch.einsum("axby,pxqy->apbq", gram, c).reshape(r * n, r * n)
    seen = torch.einsum("opaj,ca->opcj", cross, fixed).flatten(2)
    right = torch.einsum("oax,opx->ap", g, seen).reshape(-1)
    solution = _solve(normal, right[:, None]).reshape(r, n)
    rows: Tensor = torch.linalg.qr(solution.T).Q.T
    return rows


def _better_output(part: Problem, f: _Factors, core: Tensor, modes: Modes, one: bool) -> Tensor:
    """``out1`` (or ``out2``), each of its rows by normal equations of its own, its columns made orthonormal."""
    z = torch.einsum("bak,as->bsk", core, _kron(f.in1, f.in2)).flatten(1)
    own, fixed = (f.out1, f.out2) if one else (f.out2, f.out1)
    gram = (part.spread(z) @ z.T).reshape(f.out1.shape[1], f.out2.shape[1], f.out1.shape[1], f.out2.shape[1])
    cross = (part.spread(part.target) @ z.T).reshape(*modes.t, f.out1.shape[1], f.out2.shape[1])
    weight = part.rows.square().reshape(modes.t)
    if not one:
        gram, cross, weight = gram.permute(1, 0, 3, 2), cross.permute(1, 0, 3, 2), weight.T
    seen = torch.einsum("bcde,uc,ue->ubd", gram, fixed, fixed)
    normal = torch.einsum("tu,ubd->tbd", weight, seen)
    right = torch.einsum("tu,tubc,uc->tb", weight, cross, fixed)
    solution = _solve(normal, right[..., None])[..., 0]
    return torch.linalg.qr(solution).Q if own.shape[0] >= own.shape[1] else solution


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """torch's own views its factors, and fails on some layouts."""
    return torch.einsum("ik,jl->ijkl", a, b).reshape(len(a) * len(b), -1)


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    """Normal equations with a ridge that is far below the data and keeps a dead direction finite."""
    ridge = 1e-9 * normal.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-300)
    return torch.cholesky_solve(
        right, torch.linalg.cholesky(normal + ridge * torch.eye(normal.shape[-1], dtype=normal.dtype))
    )
