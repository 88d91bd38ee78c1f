"""``r_cp`` (Su et al. 2018): channels reshaped to two modes each, then a sum of ``rank`` Kronecker products.

Grouping (s1, t1), (s2, t2) and k makes the kernel a tensor of order three whose CP this is; a Linear has no k, and its
CP is the SVD of the rearranged matrix (Van Loan and Pitsianis 1993), all ranks at once.

In coordinates in which the nearest separable norm is plain (``reshaping``) alternating least squares (``polyadic``) do
most. Sweeps in the norm itself do the rest, each factor's normal equations solved by conjugate gradients from the plain
ones; where those would take too long (``WORK``) they are left out, so the stated errors are true at any size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
    input_positions,
    problems,
    ranks_between,
    relative,
    thin,
)
from search.decompose.polyadic import (
    PENALTY,
    RIDGE,
    Terms,
    gram,
    grow,
    inflated,
    normalized,
    pulled,
    root,
    spectral,
    summed,
    sweeps,
)
from search.decompose.projection import conjugate_gradients
from search.decompose.reshaping import Modes, Separable, modes_of, reshaped_reason, separable
from search.decompose.tightening import tightened
from search.decompose.variational import variational_rank
from search.spec import CurvePoint
from tenfold.layers import factorized_like
from tenfold.layers.contracting import linear_way
from tenfold.layers.reshaped import cp_shape, cp_way

__all__ = ["RCP", "rank_for"]

RANKS, LARGE_RANKS, MORE = 24, 10, 4
"""Ranks on the lattice up to where a layer takes as many MACs as the dense one, for those of up to ``LARGE`` weights
and above, and beyond that."""
LARGE = 1 << 18
REFITTED, CURVE_SWEEPS = 8, 6
"""Points of a curve that are fitted further, and for how many sweeps; the others follow them (``tightening``)."""
PLAIN_SWEEPS, EXACT_SWEEPS, WARM_SWEEPS = 60, 12, 2
"""Sweeps at the rank that is wanted; exact ones from a fitted start."""
WORK, CURVE_WORK = 3e10, 6e9
"""Multiply-adds that the sweeps in the norm itself may take, of a fit and of one point of a curve."""
ITERATIONS = 4
"""Conjugate-gradient steps for one factor."""


class RCP:
    name = "r_cp"

    def applies_to(self, layer: nn.Module) -> str | None:
        return reshaped_reason(layer, self.name) or (None if self.ranks(layer) else "no rank makes it smaller")

    def ranks(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        modes = modes_of(layer)
        most = rank_for(layer, modes.dense - 1 + bias_parameters(layer))
        chain = min(most, _chain_most(layer, modes))
        # As many steps as there may be up to where a layer takes as many MACs as the dense one; few above that.
        fine = ranks_between(1, chain, RANKS if modes.dense <= LARGE else LARGE_RANKS)
        return tuple((r,) for r in (*fine, *ranks_between(chain + 1, most, MORE)))

    def full_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        modes = modes_of(layer)
        sizes = [*(s * t for s, t in zip(modes.s, modes.t, strict=True)), modes.taps]
        return (math.prod(sizes) // max(sizes),)

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        modes, r = modes_of(layer), ranks[0]
        parameters = modes.groups * r * _term(layer, modes) + bias_parameters(layer)
        if isinstance(layer, nn.Linear):
            return parameters, linear_way(cp_shape(modes.s, modes.t, r), output_positions)[1].macs
        positions = input_positions(layer, output_positions, input_sizes), output_positions
        return parameters, cp_way(modes.s, modes.t, r, modes.kernel, modes.groups, 1, positions)[1].macs

    def variational_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        """Its rank is that of no unfolding; (s1, t1) against the rest bounds it from below."""
        modes = modes_of(layer)

        def pair(weight: Tensor) -> Tensor:
            return weight.reshape(*modes.t, *modes.s, -1).permute(0, 2, 1, 3, 4).flatten(2).flatten(0, 1)

        return (variational_rank(layer, pair),)

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
        path = [r for (r,) in self.ranks(layer) if r < ranks[0]] + [ranks[0]]
        found, errors = [], []
        for g, part in enumerate(parts):
            white = _whiten(part, modes)
            terms, error = _fit(white, path) if start is None else _resume(white, _read(start, g))
            found.append(_balanced(white, terms))
            errors.append(part.floor + error)
        links = dict(zip(("factor1", "factor2", "spatial"), map(torch.stack, zip(*found, strict=True)), strict=False))
        if not isinstance(layer, nn.Linear):  # a kernel of one tap has links for it all the same
            links.setdefault("spatial", torch.ones(modes.groups * ranks[0]))
        return Fit(fill(layer, factorized_like(layer, self.name, ranks), **links), relative(parts, errors))

    def curve(
        self,
        layer: nn.Module,
        statistics: Statistics | None,
        output_positions: int,
        *,
        metric: Tensor | None = None,
    ) -> tuple[CurvePoint, ...]:
        weight = geometry(layer)[1]
        dense = (weight.numel() + bias_parameters(layer), weight.numel() * output_positions)
        sizes = None if statistics is None else statistics.input_sizes
        costs = {r: self.cost(layer, r, output_positions, input_sizes=sizes) for r in self.ranks(layer)}
        wanted = [r for r, (_, macs) in costs.items() if macs <= dense[1]]
        if not wanted:
            return ()
        parts = problems(layer, statistics, metric)
        whites = [_whiten(part, modes_of(layer)) for part in parts]
        path = [r for (r,) in wanted]
        grown = [dict(zip(path, _growing(white, path), strict=True)) for white in whites]
        points = []
        for ranks in wanted:
            lost = [white.error(terms[ranks[0]]) for white, terms in zip(whites, grown, strict=True)]
            errors = [part.floor + error for part, error in zip(parts, lost, strict=True)]
            parameters, macs = costs[ranks]
            points.append(CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=relative(parts, errors)))

        def fitted(ranks: tuple[int, ...]) -> float:
            ends = [
                _sweeps(white, terms[ranks[0]], CURVE_SWEEPS, CURVE_WORK)[1]
                for white, terms in zip(whites, grown, strict=True)
            ]
            return relative(parts, [part.floor + error for part, error in zip(parts, ends, strict=True)])

        return thin(tightened(thin(points, dense), floor_of(parts), fitted, REFITTED), dense)


def rank_for(layer: nn.Module, parameters: int) -> int:
    """The largest rank that costs at most ``parameters``, the bias counted; 0 where none does."""
    modes = modes_of(layer)
    return max(0, (parameters - bias_parameters(layer)) // (modes.groups * _term(layer, modes)))


def _term(layer: nn.Module, modes: Modes) -> int:
    """Weights of one term of one group: sum S_l T_l + k^2, without k^2 for a Linear."""
    taps = 0 if isinstance(layer, nn.Linear) else modes.taps
    return sum(s * t for s, t in zip(modes.s, modes.t, strict=True)) + taps


def _chain_most(layer: nn.Module, modes: Modes) -> int:
    """The largest rank that takes fewer MACs than the dense layer at the same positions; at least 1."""
    (s1, s2), (t1, t2) = modes.s, modes.t
    one = min(t1 * s2 * (s1 + t2), t2 * s1 * (s2 + t1))
    if not isinstance(layer, nn.Linear):
        one = min(one + s1 * s2 * modes.taps, one * modes.stride + t1 * t2 * modes.taps)
    return max(1, (modes.dense // modes.groups - 1) // one)


@dataclass(frozen=True)
class _Whitened:
    """One group's problem in coordinates in which its norm is nearly plain."""

    modes: Modes
    norm: Separable
    target: Tensor
    """M B K^1/2: (T1 S1, T2 S2, taps), or (T1 S1, T2 S2) for a Linear."""
    moments: Tensor | None
    """What is left of C: (S taps, S taps); None where the norm is plain."""
    rows: Tensor
    """What is left of M^2: (T,)."""

    def spread(self, x: Tensor) -> Tensor:
        """``x``, shaped like ``target``, times the norm's matrix."""
        if self.moments is None:
            return x
        (t1, t2), (s1, s2) = self.modes.t, self.modes.s
        matrix = x.reshape(t1, s1, t2, s2, -1).transpose(1, 2).reshape(t1 * t2, -1)
        spread = (matrix * self.rows[:, None]) @ self.moments
        return spread.reshape(t1, t2, s1, s2, -1).transpose(1, 2).reshape(x.shape)

    def error(self, terms: Terms) -> float:
        gap = self.target - summed(terms)
        return float((self.spread(gap) * gap).sum())


def _whiten(part: Problem, modes: Modes) -> _Whitened:
    norm = separable(part, modes)
    (t1, t2), (s1, s2) = modes.t, modes.s
    target = norm.whitened.transpose(1, 2).reshape(t1 * s1, t2 * s2, -1)
    target = target if modes.taps > 1 else target.squeeze(2)
    rows = (part.rows / (norm.rows[0][:, None] * norm.rows[1]).flatten()).square()
    if part.white:
        moments = None if bool(((rows - 1).abs() < 1e-9).all()) else torch.eye(s1 * s2 * modes.taps, dtype=rows.dtype)
        return _Whitened(modes, norm, target, moments, rows)
    one, two, k = norm.unroots
    kept = part.full
    for _ in range(2):  # from the left and, as C is symmetric, from the right
        kept = torch.einsum("abcx,ad,be,cf->xdef", kept.reshape(s1, s2, modes.taps, -1), one, two, k).flatten(1)
    return _Whitened(modes, norm, target, kept, rows)


def _growing(w: _Whitened, path: Sequence[int]) -> Iterator[Terms]:
    """Terms at each of the rising ranks of ``path``, as if the norm were plain."""
    if w.target.dim() == 3:
        yield from grow(w.target, path)
        return
    best = spectral(w.target, path[-1])
    for rank in path:
        yield _padded(tuple(factor[:, :rank] for factor in best), rank)


def _fit(w: _Whitened, path: Sequence[int]) -> tuple[Terms, float]:
    """The best terms that we know how to find at the last rank of ``path``, and their error."""
    *_, grown = _growing(w, path)
    if w.target.dim() == 2:
        return _sweeps(w, grown, EXACT_SWEEPS, WORK)
    # Where there are as many as are mutually orthogonal, these are exact: alternating steps are so only in the limit.
    tried = [grown, sweeps(w.target, grown, PLAIN_SWEEPS)[0], spectral(w.target, path[-1])]
    return _sweeps(w, _padded(min(tried, key=w.error), path[-1]), EXACT_SWEEPS, WORK)


def _resume(w: _Whitened, factors: Sequence[Tensor]) -> tuple[Terms, float]:
    """A few sweeps from the factors of a fitted layer, as ``_balanced`` returns them."""
    pairs = zip(factors, (*w.norm.rows, None), w.norm.unroots, strict=False)
    terms = []
    for factor, rows, unroot in pairs:
        weighed = factor if rows is None else factor * rows[:, None]
        terms.append(torch.linalg.solve(unroot.T, weighed, left=False).flatten(1).T)
    return _sweeps(w, tuple(terms), WARM_SWEEPS, WORK)


def _sweeps(w: _Whitened, terms: Terms, most: int, work: float) -> tuple[Terms, float]:
    """At most ``most`` affordable sweeps, as long as they gain; the result with its error."""
    error = w.error(terms)
    if w.moments is None:
        further = [sweeps(w.target, terms, most)] if len(terms) == 3 else []  # two factors are an SVD already
        return min([(terms, error), *further], key=lambda found: found[1])
    each = len(terms) * (ITERATIONS + 1) * len(w.rows) * len(w.moments) ** 2
    # Steps in single precision, the target brought to norm one; what they reach is measured in double.
    size = w.target.norm().clamp_min(1e-150)
    single = replace(w, target=(w.target / size).float(), moments=w.moments.float(), rows=w.rows.float())
    begun = (terms[0] / size, *terms[1:])
    for _ in range(min(most, int(work / each))):
        begun = _sweep(single, begun, PENALTY)
        first, *rest = (factor.double() for factor in _sweep(single, begun, RIDGE))
        found = first * size, *rest
        gained = error - w.error(found)
        if gained <= 0:
            break
        terms, error = found, error - gained
        if gained < 1e-3 * error:
            break
    return terms, error


def _sweep(w: _Whitened, terms: Terms, penalty: float) -> Terms:
    """Each factor in the norm itself, from the present one, in the precision of ``w``; the first one last."""
    factors, wanted = [factor.to(w.target.dtype) for factor in terms], w.spread(w.target)
    for m in reversed(range(len(factors))):
        normal = gram([*factors[:m], *factors[m + 1 :]])
        ridge, plain = penalty * normal.diagonal(), root(inflated(normal, penalty))

        def apply(x: Tensor, m: int = m, ridge: Tensor = ridge) -> Tensor:
            tensor = summed((*factors[:m], x, *factors[m + 1 :]))
            return pulled(w.spread(tensor), tuple(factors), m) + x * ridge

        def precondition(r: Tensor, plain: Tensor = plain) -> Tensor:
            return torch.cholesky_solve(r.T, plain).T

        right = pulled(wanted, tuple(factors), m)
        factors[m] = conjugate_gradients(apply, precondition, factors[m], right, ITERATIONS)
        if m > 0:
            factors[m] = normalized([factors[m]])[0]
    return tuple(factors)


def _padded(terms: Terms, rank: int) -> Terms:
    """More terms than there are: copies of the last ones, of which each has a share."""
    missing = rank - terms[0].shape[1]
    if missing <= 0:
        return terms
    chosen = torch.arange(rank) % terms[0].shape[1]
    shares = 1 / chosen.bincount()[chosen].to(terms[0])
    first, *rest = (factor[:, chosen] for factor in terms)
    return first * shares, *rest


def _balanced(w: _Whitened, terms: Terms) -> tuple[Tensor, ...]:
    """(rank, T1, S1), (rank, T2, S2) and, where there are taps, (rank, taps), with equal norms in each term: what
    gradient descent and low precision like."""
    (t1, t2), (s1, s2), (m1, m2) = w.modes.t, w.modes.s, w.norm.rows
    shapes: tuple[tuple[int, ...], ...] = ((-1, t1, s1), (-1, t2, s2), (-1, w.modes.taps))
    factors = [f.T.reshape(shape) @ u for f, shape, u in zip(terms, shapes, w.norm.unroots, strict=False)]
    factors[0], factors[1] = factors[0] / m1[:, None], factors[1] / m2[:, None]
    norms = torch.stack([f.flatten(1).norm(dim=1).clamp_min(1e-30) for f in factors])
    mean = norms.log().mean(0).exp()
    return tuple(f * (mean / n).reshape(-1, *[1] * (f.dim() - 1)) for f, n in zip(factors, norms, strict=True))


def _read(layer: nn.Module, group: int) -> list[Tensor]:
    """A fitted layer's factors, as ``_balanced`` returns them."""
    first, second = (layer.get_parameter(n)[group].detach().to("cpu", torch.float64) for n in ("factor1", "factor2"))
    if "spatial.weight" not in layer.state_dict():
        return [first, second]
    filters = layer.get_parameter("spatial.weight").detach().to("cpu", torch.float64)
    taps = filters.reshape(-1, len(first), math.prod(filters.shape[2:]))[group]
    return [first * taps[:, :, None], second] if taps.shape[1] == 1 else [first, second, taps]
