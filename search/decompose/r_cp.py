"""``r_cp`` (Su et al. 2018): channels reshaped to two modes each, then a sum of ``rank`` Kronecker products.

Grouping (s1, t1), (s2, t2) and k makes the kernel a tensor of order three whose CP this is; a Linear has no k, and its
CP is the SVD of the rearranged matrix (Van Loan and Pitsianis 1993), all ranks at once. For a convolution a closed form
that is nested in the rank comes from two SVDs: of one mode against the others, then of each component's matrix. Its
terms are orthogonal, so the best ``r`` are the largest ``r``. There are three such forms; the best one is taken.

These hold in the nearest separable norm. In the norm of C itself terms are given coefficients by regression, and
alternating least squares goes on from there: a curve walks up the ranks, each time adding closed-form terms of what is
left over and sweeping once, so its errors never rise; a fit walks the same way and sweeps until it gains no more. A
proximal ridge bounds the degenerate terms that CP is known for (de Silva and Lim 2008). Layers that are too large for
the normal equations keep the closed form, whose curve is one regression: prefixes of its Cholesky factor are the
regressions of smaller ranks.
"""

import math
from collections.abc import Sequence
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
    ranks_between,
    relative,
    thin,
)
from search.decompose.reshaping import Modes, modes_of, reshaped_reason, separable
from search.decompose.variational import variational_rank
from search.spec import CurvePoint
from tenfold.layers import factorized_like
from tenfold.layers.contracting import linear_way
from tenfold.layers.reshaped import cp_shape, cp_way

__all__ = ["RCP", "rank_for"]

SWEEPS = 40
WARM_SWEEPS = 3
ENOUGH = 5e-3
"""A sweep that gains less than this part of the error is the last."""
CURVE_FLOPS = 3e9
"""About what a curve may cost, well below a second: large layers get fewer points, at least ``FEWEST``."""
FEWEST = 8
LARGEST = 1200
"""Above so many inputs (channels x taps), or unknowns of one factor, no alternating least squares."""


class RCP:
    name = "r_cp"

    def applies_to(self, layer: nn.Module) -> str | None:
        return reshaped_reason(layer, self.name) or (None if self.ranks(layer) else "no rank makes it smaller")

    def ranks(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        modes = modes_of(layer)
        most = rank_for(layer, modes.dense - 1 + bias_parameters(layer))
        chain = min(most, _chain_most(layer, modes))
        out, n = math.prod(modes.t), math.prod(modes.s) * modes.taps
        point = modes.groups * out * n * n * (2 if n > LARGEST else max(1, chain // 2))
        count = max(FEWEST, min(60, int(CURVE_FLOPS / point)))
        # As many steps as there may be up to where a layer takes as many MACs as the dense one; few above that.
        fine, coarse = ranks_between(1, chain, count), ranks_between(chain + 1, most, FEWEST // 2)
        return tuple((r,) for r in (*fine, *coarse))

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
        modes, r = modes_of(layer), ranks[0]
        parts = problems(layer, statistics, metric)
        found, errors = [], []
        for g, part in enumerate(parts):
            if start is None:
                terms = _walk(part, modes, [*(x for (x,) in self.ranks(layer) if x < r), r])[0]
            else:
                terms = _read(start, g)
            terms, error = _alternate(part, terms, modes, SWEEPS if start is None else WARM_SWEEPS)
            found.append(terms)
            errors.append(part.floor + error)
        links = {n: torch.stack([getattr(f, n) for f in found]) for n in ("factor1", "factor2", "spatial")}
        if isinstance(layer, nn.Linear):
            links["factor1"] = links["factor1"] * links.pop("spatial")[..., None]
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
        curves = [_walk(part, modes_of(layer), [r for (r,) in wanted])[1] for part in parts]
        points = []
        for i, ranks in enumerate(wanted):
            errors = [part.floor + errors[i] for part, errors in zip(parts, curves, strict=True)]
            parameters, macs = costs[ranks]
            points.append(CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=relative(parts, errors)))
        return thin(points, dense)


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
class _Terms:
    factor1: Tensor
    """(rank, T1, S1)."""
    factor2: Tensor
    """(rank, T2, S2)."""
    spatial: Tensor
    """(rank, taps)."""

    def __getitem__(self, which: slice) -> "_Terms":
        return _Terms(self.factor1[which], self.factor2[which], self.spatial[which])

    def joined(self, more: "_Terms") -> "_Terms":
        pairs = ((self.factor1, more.factor1), (self.factor2, more.factor2), (self.spatial, more.spatial))
        factor1, factor2, spatial = (torch.cat(pair) for pair in pairs)
        return _Terms(factor1, factor2, spatial)

    def scaled(self, by: Tensor) -> "_Terms":
        """Each term times ``by``: (rank,)."""
        return _Terms(self.factor1 * by[:, None, None], self.factor2, self.spatial)

    def balanced(self) -> "_Terms":
        """The same sum with equal norms in each term: what gradient descent and low precision like."""
        factors = (self.factor1, self.factor2, self.spatial)
        norms = torch.stack([f.flatten(1).norm(dim=1).clamp_min(1e-30) for f in factors])
        mean = norms.log().mean(0).exp()
        first, second, spatial = (
            f * (mean / n).reshape(-1, *[1] * (f.dim() - 1)) for f, n in zip(factors, norms, strict=True)
        )
        return _Terms(first, second, spatial)

    def weight(self) -> Tensor:
        """(T, S * taps)."""
        _, t1, s1 = self.factor1.shape
        _, t2, s2 = self.factor2.shape
        right = (self.factor2[..., None] * self.spatial[:, None, None]).flatten(1)
        v = (self.factor1.flatten(1).T @ right).reshape(t1, s1, t2, s2, -1)
        return v.transpose(1, 2).reshape(t1 * t2, -1)


def _read(layer: nn.Module, group: int) -> _Terms:
    """A fitted layer's terms."""
    first, second = (layer.get_parameter(n)[group].detach().to("cpu", torch.float64) for n in ("factor1", "factor2"))
    spatial = torch.ones(len(first), 1, dtype=torch.float64)
    if "spatial.weight" in layer.state_dict():
        filters = layer.get_parameter("spatial.weight").detach().to("cpu", torch.float64)
        spatial = filters.reshape(-1, len(first), math.prod(filters.shape[2:]))[group]
    return _Terms(first, second, spatial)


def _walk(part: Problem, modes: Modes, ranks: Sequence[int]) -> tuple[_Terms, list[float]]:
    """Terms of the last of the rising ``ranks``, and the errors ``||M (B - V) C^1/2||^2`` of each of them."""
    if _too_large(part, modes, ranks[-1]):
        return _nested(part, modes, ranks)
    terms, errors = _nested(part, modes, ranks[:1])
    terms, errors[0] = _alternate(part, terms, modes, 1)
    for rank in ranks[1:]:
        left = replace(part, target=part.target - terms.weight())
        terms = terms.joined(_nested(left, modes, [rank - len(terms.factor1)])[0])
        terms, error = _alternate(part, terms, modes, 1)
        errors.append(error)
    return terms, errors


def _too_large(part: Problem, modes: Modes, rank: int) -> bool:
    return max(len(part.moments), rank * max(*modes.s, modes.taps)) > LARGEST


def _orthogonal(part: Problem, modes: Modes, most: int) -> _Terms:
    """At most ``most`` terms, largest first, orthogonal in the nearest separable norm."""
    norm = separable(part, modes)
    # (s1 t1), (s2 t2), k: each mode in turn is cut from the other two, which are then cut from each other.
    x = norm.whitened.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    best: tuple[Tensor, list[Tensor]] | None = None
    for lead in (2, 1, 0) if modes.taps > 1 else (2,):
        others = [m for m in range(3) if m != lead]
        moved = x.permute(lead, *others)
        u, s, v = torch.linalg.svd(moved.flatten(1), full_matrices=False)
        u, s, v = u[:, :most], s[:most], v[:most]
        a, sigma, b = torch.linalg.svd(v.reshape(-1, *moved.shape[1:]), full_matrices=False)
        sizes = (s[:, None] * sigma).flatten()
        keep = sizes.argsort(descending=True)[:most]
        component = keep // sigma.shape[1]
        modewise = [torch.empty(0)] * 3
        modewise[lead] = u.T[component] * sizes[keep, None]
        modewise[others[0]] = a.transpose(1, 2).flatten(0, 1)[keep]
        modewise[others[1]] = b.flatten(0, 1)[keep]
        # The energy explained, averaged over the ranks: the forms differ most at few terms.
        score = sizes[keep].square().cumsum(0).mean()
        if best is None or len(keep) > len(best[1][0]) or (len(keep) == len(best[1][0]) and score > best[0]):
            best = score, modewise
    if best is None:
        raise AssertionError("one form at least is always tried")
    (m1, m2), (one, two, k) = norm.rows, norm.unroots
    first = best[1][0].reshape(-1, modes.t[0], modes.s[0]) @ one / m1[:, None]
    second = best[1][1].reshape(-1, modes.t[1], modes.s[1]) @ two / m2[:, None]
    return _Terms(first, second, best[1][2] @ k)


def _nested(part: Problem, modes: Modes, ranks: Sequence[int]) -> tuple[_Terms, list[float]]:
    """Terms of the last of the rising ``ranks`` and the errors ``||M (B - V) C^1/2||^2`` of each of them.

    The terms between two ranks share one coefficient; coefficients are a regression in the norm of C.
    """
    terms = _orthogonal(part, modes, ranks[-1])
    found = len(terms.factor1)
    ends = [min(r, found) for r in ranks]
    blocks = [(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True) if b > a]
    out, n = part.target.shape
    weights = torch.empty(len(blocks), out * n, dtype=part.target.dtype)
    images = torch.empty_like(weights)
    for i, (a, b) in enumerate(blocks):
        weight = part.rows[:, None] * terms[a:b].weight()
        weights[i], images[i] = weight.flatten(), part.spread(weight).flatten()
    # Unit diagonal: the last terms are small, and a ridge relative to the first would drop them.
    scale = (weights * images).sum(1).clamp_min(1e-300).rsqrt()
    gram = (weights @ images.T) * scale[:, None] * scale
    lower = torch.linalg.cholesky(gram + 1e-10 * torch.eye(len(gram), dtype=gram.dtype))
    right = scale * (images @ part.weighed.flatten())
    seen = torch.linalg.solve_triangular(lower, right[:, None], upper=False)
    coefficients = scale * torch.linalg.solve_triangular(lower.T, seen, upper=True)[:, 0]
    base = part.base
    explained = [0.0, *seen[:, 0].square().cumsum(0).tolist()]
    by_end = {b: max(base - e, 0.0) for (_, b), e in zip(blocks, explained[1:], strict=True)}
    spread = torch.cat([c.expand(b - a) for c, (a, b) in zip(coefficients, blocks, strict=True)])
    terms = terms.scaled(spread)
    if found < ranks[-1]:
        terms = _padded(terms, ranks[-1])
    return terms.balanced(), [by_end[e] for e in ends]


def _padded(terms: _Terms, rank: int) -> _Terms:
    """More terms than the closed form has: the last ones again, with half the weight each time."""
    while len(terms.factor1) < rank:
        more = min(rank - len(terms.factor1), len(terms.factor1))
        halves = torch.ones(len(terms.factor1), dtype=terms.factor1.dtype)
        halves[-more:] = 0.5
        terms = terms.scaled(halves)
        terms = terms.joined(terms[slice(len(terms.factor1) - more, None)])
    return terms


def _alternate(part: Problem, terms: _Terms, modes: Modes, sweeps: int) -> tuple[_Terms, float]:
    """Each factor in turn by least squares in the norm of C; never worse than the start."""
    error = part.error(terms.weight()) - part.floor
    if _too_large(part, modes, len(terms.factor1)):
        return terms, error
    (s1, s2), (t1, t2), k = modes.s, modes.t, modes.taps
    c = part.full.reshape(s1, s2, k, s1, s2, k)
    crossed = c.permute(1, 0, 2, 4, 3, 5)
    cross = part.spread(part.target).reshape(t1, t2, s1, s2, k)
    weight = part.rows.square().reshape(t1, t2)
    ahead = c.reshape(s1, s2 * k, s1, s2 * k)
    behind = crossed.reshape(s2, s1 * k, s2, s1 * k)
    for _ in range(sweeps):
        first = _channels(ahead, cross.flatten(3), weight, terms.factor1, terms.factor2, terms.spatial)
        found = _Terms(first, terms.factor2, terms.spatial)
        turned = cross.permute(1, 0, 3, 2, 4).flatten(3)
        second = _channels(behind, turned, weight.T, found.factor2, found.factor1, found.spatial)
        found = _Terms(found.factor1, second, found.spatial)
        if k > 1:
            found = _Terms(found.factor1, found.factor2, _filters(part, found, modes))
        found = found.balanced()
        reached = part.error(found.weight()) - part.floor
        if not reached < error:
            break
        gain, error, terms = error - reached, reached, found
        if gain < ENOUGH * error:
            break
    return terms, max(error, 0.0)


def _channels(c: Tensor, cross: Tensor, weight: Tensor, own: Tensor, other: Tensor, spatial: Tensor) -> Tensor:
    """One channel factor by its normal equations, which come apart over its own outputs.

    ``c``: (s, s' k, s, s' k) with s the factor's own mode; ``cross``: B C as (t, t', s, s' k); ``weight``: M^2 as
    (t, t'); ``own``: (r, t, s); ``other``: (r, t', s').
    """
    r, t, s = own.shape
    f = torch.einsum("rts,rk->trsk", other, spatial).flatten(2)
    half = (f @ c.permute(1, 0, 2, 3).flatten(1)).reshape(len(f), r, s, s, -1)
    normal = torch.einsum("urpqx,uzx->urpzq", half, f).flatten(1)
    normal = (weight @ normal).reshape(t, r * s, r * s)
    right = torch.einsum("tu,tupx,urx->trp", weight, cross, f).flatten(1)
    return _proximal(normal, right, own.transpose(0, 1).flatten(1)).reshape(t, r, s).transpose(0, 1)


def _filters(part: Problem, terms: _Terms, modes: Modes) -> Tensor:
    """The spatial factor by its normal equations: (rank, taps)."""
    r, k = terms.spatial.shape
    sources = math.prod(modes.s)
    a = torch.einsum("rts,ruv->rtusv", terms.factor1, terms.factor2).reshape(r, -1, sources)
    weighed = part.rows[:, None] * a
    flat = weighed.flatten(1)
    c = part.full.reshape(sources, k, sources, k)
    normal = torch.empty(r, k, r, k, dtype=flat.dtype)
    for j in range(k):
        for i in range(j + 1):
            block = (weighed @ c[:, j, :, i]).flatten(1) @ flat.T
            normal[:, j, :, i] = block
            normal[:, i, :, j] = block.T
    cross = part.spread(part.weighed).reshape(-1, sources * k)
    right = torch.einsum("rts,tsk->rk", weighed, cross.reshape(len(cross), sources, k))
    return _proximal(normal.reshape(1, r * k, r * k), right.reshape(1, -1), terms.spatial.reshape(1, -1)).reshape(r, k)


def _proximal(normal: Tensor, right: Tensor, present: Tensor) -> Tensor:
    """Normal equations with a ridge toward the present value: it bounds the step, and cannot raise the error."""
    ridge = 1e-8 * normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-300)[:, None]
    eye = torch.eye(normal.shape[1], dtype=normal.dtype)
    lower = torch.linalg.cholesky(normal + ridge[..., None] * eye)
    return torch.cholesky_solve((right + ridge * present)[..., None], lower)[..., 0]
