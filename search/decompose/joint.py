"""What the joint decompositions share: members' least-squares problems in common coordinates, and their solver.

Kernels of equal shape from several layers become one structured family. Member ``m`` is

    V_m = L (sum_g c_mg G_g) (sum_h v_mh F_h)        L: (out, high), G_g: (high, low * taps), F_h: (low, in)

with its row ``c_m`` of a Tucker's grid factors (then ``v`` = 1) or its row ``v_m`` of a chain's leading cores (then
``c`` = 1). We minimise the sum of the members' *relative* output errors; each is quadratic in any one of L, G and F, so
these are solved in turn: L row by row, G and F by preconditioned conjugate gradients, every step from where it is, so
that the error cannot rise.

Inputs are first whitened by the members' pooled second moments (per channel, averaged over taps): one change of
coordinates for all, undone in F at the end. Without it the shared input factor would follow whichever weights are
large, not what the outputs feel.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import Problem, bias_parameters, input_positions, problems, thin
from search.decompose.projection import conjugate_gradients
from search.matrices import weight_of
from search.spec import CurvePoint
from search.vbmf import evbmf_rank
from tenfold.layers import FactorizedLayer, JointLayer, joint_like
from tenfold.layers.joint import in_grid, member_reason

__all__ = [
    "Family",
    "Group",
    "JointFit",
    "JointMethod",
    "Pool",
    "Projected",
    "built",
    "factor",
    "group_of",
    "joint_cost",
    "member_of",
    "own_core",
    "points",
    "stacked_rank",
    "truncated",
]

ITERATIONS = 12
SWEEPS = 8
SMALL = 1e-10
ROW_BYTES = 64 << 20
"""Of the small systems that are solved together for rows of L."""


@dataclass(frozen=True)
class Group:
    """Dense layers of one site in the order of their places, the last grid mode fastest."""

    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    grid: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(out, in, taps)`` of every member."""
        weight = weight_of(self.layers[0])
        return weight.shape[0], weight.shape[1], math.prod(weight.shape[2:])

    @property
    def members(self) -> dict[str, tuple[int, ...]]:
        places = torch.cartesian_prod(*(torch.arange(size) for size in self.grid)).reshape(len(self.names), -1)
        return {name: tuple(place) for name, place in zip(self.names, places.tolist(), strict=True)}

    def dense(self, output_positions: Sequence[int]) -> tuple[int, float]:
        """Parameters, those that layers share once, and MACs of the dense layers together.

        Infinite where there are only look-ups, as for one of them (``base.dense_cost``).
        """
        parameters = {id(p): p.numel() for layer in self.layers for p in layer.parameters()}
        multiplied = [
            weight_of(layer).numel() * positions
            for layer, positions in zip(self.layers, output_positions, strict=True)
            if not isinstance(layer, nn.Embedding)
        ]
        return sum(parameters.values()), sum(multiplied) if multiplied else math.inf

    def reason(self) -> str | None:
        """Why these layers cannot be decomposed together, or None."""
        weights = [weight_of(layer) for layer in self.layers]
        reasons = [f"{n}: {r}" for n, layer in zip(self.names, self.layers, strict=True) if (r := member_reason(layer))]
        if reasons:
            return reasons[0]
        if len({id(w) for w in weights}) < len(weights):
            return f"{', '.join(self.names)}: some of these hold one weight, which a method of one layer takes"
        if len({(w.shape, w.dtype, type(layer)) for w, layer in zip(weights, self.layers, strict=True)}) > 1:
            shapes = {name: tuple(w.shape) for name, w in zip(self.names, weights, strict=True)}
            return f"the members' weights are not of one shape and kind: {shapes}"
        return None if min(self.shape[:2]) > 1 else "a single channel leaves nothing to share"


def group_of(network: nn.Module, members: Mapping[str, Sequence[int]]) -> Group:
    """The layers of ``network`` at ``members`` (layer name to its place).

    Raises:
        ValueError: the places fill no grid.
        AttributeError: there is no such layer.
    """
    names, grid = in_grid(members)
    return Group(names, tuple(network.get_submodule(name) for name in names), grid)


@dataclass(frozen=True)
class JointFit:
    """The members, around the same factors, and their relative output errors, in the group's order."""

    modules: tuple[FactorizedLayer, ...]
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        return sum(self.errors) / len(self.errors)


class JointMethod(Protocol):
    """A decomposition of several layers. Sequences have an entry for each member, in the group's order."""

    @property
    def name(self) -> str: ...

    def applies_to(self, group: Group) -> str | None:
        """None when the group can be decomposed, else the reason why not."""

    def ranks(self, group: Group) -> tuple[tuple[int, ...], ...]:
        """Ranks worth trying (each grid mode, low, high), all cheaper in parameters than the dense layers together."""

    def full_ranks(self, group: Group) -> tuple[int, ...]:
        """Each rank's largest value, as ``Method.full_ranks``."""

    def cost(
        self,
        group: Group,
        ranks: Sequence[int],
        output_positions: Sequence[int],
        *,
        input_sizes: Sequence[Sequence[int]] | None = None,
    ) -> tuple[int, int]:
        """``(parameters, macs of one sample)`` of all members, what they share counted once."""

    def factorize(
        self,
        group: Group,
        ranks: Sequence[int],
        statistics: Sequence[Statistics] | None = None,
        *,
        metrics: Sequence[Tensor | None] | None = None,
    ) -> JointFit:
        """The members of these ranks with the least sum of relative errors that is found."""

    def refit(
        self, module: FactorizedLayer, layer: nn.Module, statistics: Statistics, *, metric: Tensor | None = None
    ) -> float:
        """Fit what is the member's own (nothing, once a grid mode is cut) to new statistics, in place; its error."""

    def curve(
        self,
        group: Group,
        statistics: Sequence[Statistics] | None,
        output_positions: Sequence[int],
        *,
        metrics: Sequence[Tensor | None] | None = None,
    ) -> tuple[CurvePoint, ...]:
        """Error (mean of the members', which are in ``errors``) against cost, as ``Method.curve``."""

    def variational_ranks(self, group: Group) -> tuple[int, ...]:
        """Analytic variational Bayes ranks of the stacked weights' unfoldings."""


@dataclass
class Family:
    """The factors of all members, float64, in the whitened coordinates of a ``Pool``."""

    last: Tensor
    """L: (out, high)."""
    core: Tensor
    """G: (g, high, low * taps)."""
    mix: Tensor
    """c: (members, g); orthonormal columns."""
    first: Tensor
    """F: (h, low, in)."""
    pick: Tensor
    """v: (members, h); orthonormal columns, except where h = 1 and every entry is 1."""

    def firsts(self) -> Tensor:
        """(members, low, in)."""
        return torch.einsum("mh,hra->mra", self.pick, self.first)

    def cores(self) -> Tensor:
        """(members, high, low * taps)."""
        return torch.einsum("mg,gsn->msn", self.mix, self.core)

    def outers(self) -> Tensor:
        """(members, out, low * taps)."""
        return self.last @ self.cores()


@dataclass(frozen=True)
class Projected:
    """One member's problem behind its first link."""

    second: Tensor
    """(low * taps, low * taps)."""
    cross: Tensor
    """(out, low * taps), B C P'."""

    @cached_property
    def target(self) -> Tensor:
        """The best outer map (out, low * taps)."""
        return torch.cholesky_solve(self.cross.T, factor(self.second)).T


class Pool:
    """The members' problems with errors relative to their energies, inputs whitened by their pooled moments."""

    def __init__(
        self,
        group: Group,
        statistics: Sequence[Statistics] | None,
        metrics: Sequence[Tensor | None] | None,
    ) -> None:
        self.out, self.in_, self.taps = group.shape
        count = len(group.layers)
        known: Sequence[Statistics | None] = statistics or [None] * count
        parts = [
            problems(layer, s, m)[0] for layer, s, m in zip(group.layers, known, metrics or [None] * count, strict=True)
        ]
        parts = [replace(p, rows=p.rows / math.sqrt(p.energy), floor=p.floor / p.energy, energy=1.0) for p in parts]
        a, t = self.in_, self.taps
        pooled = torch.zeros(a, a, dtype=torch.float64)
        for p in parts:
            blocks = p.full.reshape(a, t, a, t).diagonal(dim1=1, dim2=3)
            pooled += p.rows.square().mean() * blocks.mean(-1)
        values, vectors = torch.linalg.eigh(pooled)
        values = values.clamp_min(float(values.max()) * 1e-12 + 1e-300)
        values = values / values.mean()  # whitens, keeps the scale
        self.unroot = (vectors / values.sqrt()) @ vectors.T
        root = (vectors * values.sqrt()) @ vectors.T
        self.parts = [self._whitened(p, root) for p in parts]
        self.crosses = [p.spread(p.target) for p in self.parts]
        self.weights = torch.stack([p.rows.square() for p in self.parts])
        """M^2: (members, out)."""
        self.rows = self.weights.mean(0).sqrt()
        """The metric of all members together: (out,)."""

    def _whitened(self, problem: Problem, root: Tensor) -> Problem:
        a, t = self.in_, self.taps
        moments = problem.full.reshape(a, t * a * t)
        moments = (self.unroot @ moments).reshape(a * t, a, t).transpose(1, 2) @ self.unroot
        target = problem.target.reshape(-1, a, t).transpose(1, 2) @ root
        return replace(
            problem,
            target=target.transpose(1, 2).reshape(-1, a * t),
            moments=moments.transpose(1, 2).reshape(a * t, a * t),
        )

    def project(self, firsts: Sequence[Tensor] | Tensor) -> list[Projected]:
        """Each member behind its ``firsts[m]``: (low, in)."""
        a, t = self.in_, self.taps
        found = []
        for part, cross, p in zip(self.parts, self.crosses, firsts, strict=True):
            low = len(p)
            half = (p @ part.full.reshape(a, t * a * t)).reshape(low * t, a, t)
            second = (half.transpose(1, 2) @ p.T).transpose(1, 2).reshape(low * t, low * t)
            d = (cross.reshape(-1, a, t).transpose(1, 2) @ p.T).transpose(1, 2).reshape(-1, low * t)
            found.append(Projected((second + second.T) / 2, d))
        return found

    def errors(self, projected: Sequence[Projected], outers: Sequence[Tensor] | Tensor) -> list[float]:
        """The members' relative errors of V_m = outers[m] behind the projection."""
        found = []
        for part, p, q, w in zip(self.parts, projected, outers, self.weights, strict=True):
            change = float((w[:, None] * q * (q @ p.second - 2 * p.cross)).sum())
            found.append(max(part.floor + part.base + change, 0.0))
        return found

    # ------------------------------------------------------------------------------------------------ better factors

    def improve(self, family: Family, sweeps: int = SWEEPS, *, cut: bool = True) -> Family:
        """L, G and F in turn until nothing moves; never worse than ``family``.

        ``cut=False``: the outer map has full output rank, so L stays.
        """
        projected = self.project(family.firsts())
        before = sum(self.errors(projected, family.outers()))
        for _ in range(sweeps):
            new = self._inner(family)
            projected = self.project(new.firsts())
            new = self.outer(projected, new, cut=cut)
            after = sum(self.errors(projected, new.outers()))
            if after >= before:
                break
            family, gain, before = new, before - after, after
            if gain < 1e-4 * (after + 1e-300):
                break
        return family

    def outer(self, projected: Sequence[Projected], family: Family, *, cut: bool = True) -> Family:
        """L, then G, for the present first links."""
        if cut:
            family = replace(family, last=self._last(projected, family.cores()))
        return replace(family, core=self._core(projected, family))

    def _last(self, projected: Sequence[Projected], cores: Tensor) -> Tensor:
        """Row by row: sum_m M^2[o] K_m C_m K_m' L[o] = sum_m M^2[o] K_m D_m[o]."""
        halves = [core @ p.second for core, p in zip(cores, projected, strict=True)]
        grams = torch.stack([h @ core.T for h, core in zip(halves, cores, strict=True)])
        right = torch.stack([p.cross @ core.T for core, p in zip(cores, projected, strict=True)])
        right = torch.einsum("mo,mos->os", self.weights, right)
        size = grams.shape[1]
        step = max(1, ROW_BYTES // (8 * size * size))
        solved = []
        for begin in range(0, self.out, step):
            rows, weights = right[begin : begin + step], self.weights[:, begin : begin + step]
            left = torch.einsum("mo,mst->ost", weights, grams)
            left += SMALL * left.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(size, dtype=left.dtype)
            solved.append(torch.linalg.solve(left, rows[:, :, None])[:, :, 0])
        return torch.cat(solved)

    def _core(self, projected: Sequence[Projected], family: Family) -> Tensor:
        """G for given L; member by member where each has its own, else by conjugate gradients."""
        last, mix = family.last, family.mix
        grams = torch.einsum("os,mo,ot->mst", last, self.weights, last)
        crosses = torch.stack([last.T @ (w[:, None] * p.cross) for p, w in zip(projected, self.weights, strict=True)])
        if mix.shape[1] == len(mix):
            own = [own_core(gram, p.second, cross) for gram, p, cross in zip(grams, projected, crosses, strict=True)]
            return torch.einsum("mg,msn->gsn", mix, torch.stack(own))
        seconds = torch.stack([p.second for p in projected])

        def apply(core: Tensor) -> Tensor:
            return torch.einsum("mg,msn->gsn", mix, grams @ torch.einsum("mg,gsn->msn", mix, core) @ seconds)

        weights = grams.diagonal(dim1=1, dim2=2).mean(-1)
        left = torch.cholesky_inverse(factor(grams.mean(0)))
        pooled = torch.einsum("m,mij->ij", weights / weights.sum(), seconds)
        right = torch.cholesky_inverse(factor(pooled))
        start = torch.einsum("mg,msn->gsn", mix, crosses)
        return conjugate_gradients(apply, lambda r: left @ r @ right, family.core, start, ITERATIONS)

    def _inner(self, family: Family) -> Family:
        """F for given L and G, then an orthonormal basis of what the first links span (which changes nothing else)."""
        outers, (a, t) = family.outers(), (self.in_, self.taps)
        low = family.first.shape[1]
        applies: list[Callable[[Tensor], Tensor]] = []
        right = torch.zeros_like(family.first)
        left = torch.zeros(low, low, dtype=torch.float64)
        for q, part, cross, w, v in zip(outers, self.parts, self.crosses, self.weights, family.pick, strict=True):
            shaped = q.reshape(-1, low, t)
            weighed = w[:, None, None] * shaped
            gram = torch.einsum("ort,osu->rtsu", weighed, shaped)
            left += torch.einsum("rtst->rs", gram)
            wanted = torch.einsum("ort,oat->ra", weighed, cross.reshape(-1, a, t))
            right += v[:, None, None] * wanted
            applies.append(_inner_operator(gram, part.full, a, t))

        def apply(first: Tensor) -> Tensor:
            moved = torch.stack(
                [f(p) for f, p in zip(applies, torch.einsum("mh,hra->mra", family.pick, first), strict=True)]
            )
            return torch.einsum("mh,mra->hra", family.pick, moved)

        inverse = torch.cholesky_inverse(factor(left / len(outers)))
        first = conjugate_gradients(apply, lambda r: inverse @ r, family.first, right, ITERATIONS)
        return orthonormal(replace(family, first=first), t)


def _inner_operator(gram: Tensor, moments: Tensor, a: int, t: int) -> Callable[[Tensor], Tensor]:
    """P to sum_tu Q_t' M^2 Q_u P C_ut."""
    low = gram.shape[0]
    mixing = gram.permute(0, 1, 3, 2).reshape(low * t * t, low)
    spread = moments.reshape(a, t, a, t).permute(3, 1, 0, 2).reshape(t * t * a, a)
    return lambda p: (mixing @ p).reshape(low, t * t * a) @ spread


def orthonormal(family: Family, taps: int) -> Family:
    """The same maps with the first links' low axis in an orthonormal basis."""
    low = family.first.shape[1]
    stacked = family.first.transpose(0, 1).flatten(1)
    if low > stacked.shape[1]:
        return family
    basis, mixing = torch.linalg.qr(stacked.T)  # first = mixing' basis'
    first = basis.T.reshape(low, -1, family.first.shape[2]).transpose(0, 1)
    core = family.core.reshape(*family.core.shape[:2], low, taps)
    core = torch.einsum("gsrt,qr->gsqt", core, mixing).flatten(2)
    return replace(family, first=first, core=core)


def own_core(gram: Tensor, second: Tensor, cross: Tensor) -> Tensor:
    """The core of one member for given L: (L' M^2 L)^-1 L' M^2 D C^-1."""
    half = torch.cholesky_solve(cross, factor(gram))
    return torch.cholesky_solve(half.T, factor(second)).T


def factor(matrix: Tensor) -> Tensor:
    """Cholesky, with the jitter that a nearly singular matrix needs.

    Raises:
        torch.linalg.LinAlgError: the matrix is not finite, or not nearly positive.
    """
    scale = float(matrix.diagonal().mean().clamp_min(1e-300))
    jitter, eye = SMALL * scale, torch.eye(len(matrix), dtype=matrix.dtype)
    found: Tensor
    while True:
        found, info = torch.linalg.cholesky_ex(matrix + jitter * eye)
        if not int(info):
            return found
        if jitter > scale:  # not a matter of rounding: let it raise
            return torch.linalg.cholesky(matrix)  # type: ignore[no-any-return]
        jitter *= 100


def truncated(stacked: Tensor, count: int) -> Tensor:
    """Leading left singular vectors of a matrix, (rows, count), by its smaller side."""
    if stacked.shape[0] <= stacked.shape[1]:
        vectors: Tensor = torch.linalg.eigh(stacked @ stacked.T).eigenvectors
        return vectors.flip(1)[:, :count]
    left: Tensor = torch.linalg.svd(stacked, full_matrices=False).U
    return left[:, :count]


def stacked_rank(unfolded: Tensor) -> int:
    """Analytic variational Bayes rank of an unfolding, from the eigenvalues of its short side; at least 1."""
    short = unfolded if unfolded.shape[0] <= unfolded.shape[1] else unfolded.T
    values = torch.linalg.eigvalsh(short @ short.T).clamp_min(0).sqrt()
    return max(1, evbmf_rank(values.numpy(), (unfolded.shape[0], unfolded.shape[1])))


# ---------------------------------------------------------------------------------------------------- what methods use


def built(
    group: Group, method: str, ranks: Sequence[int], modes: Sequence[Tensor], family: Family, unroot: Tensor
) -> tuple[JointLayer, ...]:
    """The members with these factors: balanced, in the layers' own coordinates, dtype and device.

    ``modes``: the factors of the grid modes that are cut.
    """
    first, core, last = family.first @ unroot, family.core, family.last
    low, taps = first.shape[1], core.shape[2] // first.shape[1]
    by_low = core.reshape(*core.shape[:2], low, taps)
    scale = _ratio(_norms(first, 1), _norms(by_low, 2))
    first, by_low = first * scale[:, None], by_low / scale[:, None]
    scale = _ratio(_norms(by_low, 1), _norms(last, 1))
    core, last = (by_low * scale[:, None, None]).flatten(2), last / scale
    modules = joint_like(dict(zip(group.names, group.layers, strict=True)), method, ranks, group.members)
    shared = next(iter(modules.values())).shared
    with torch.no_grad():
        shared.first.copy_(first)
        shared.core.copy_(core)
        shared.last.copy_(last)
        for parameter, mode in zip(shared.modes, modes, strict=True):
            parameter.copy_(mode)
    for name, layer in zip(group.names, group.layers, strict=True):
        modules[name].train(layer.training)
    return tuple(modules[name] for name in group.names)


def member_of(module: FactorizedLayer) -> JointLayer:
    """The layer, known to be a member of a group with a grid.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(module, JointLayer):
        raise TypeError(f"expected a member of a group, got {type(module).__name__}")
    return module


def _norms(value: Tensor, axis: int) -> Tensor:
    """Of the slices along an axis."""
    return value.movedim(axis, 0).flatten(1).square().sum(1).sqrt()


def _ratio(before: Tensor, after: Tensor) -> Tensor:
    return (after / before.clamp_min(1e-30)).clamp_min(1e-30).sqrt()


def joint_cost(
    group: Group,
    shared: tuple[int, int],
    ranks: Sequence[int],
    output_positions: Sequence[int],
    input_sizes: Sequence[Sequence[int]] | None,
) -> tuple[int, int]:
    """Cost of a group. ``shared``: elements of all factors, and multiplications that mix one member's own link."""
    out, in_, taps = group.shape
    *_, low, high = ranks
    parameters = shared[0] + sum(bias_parameters(layer) for layer in group.layers)
    macs = 0
    sizes: Sequence[Sequence[int] | None] = input_sizes or [None] * len(group.layers)
    for layer, positions, size in zip(group.layers, output_positions, sizes, strict=True):
        before = input_positions(layer, positions, size or None)
        macs += low * in_ * before + (low * taps * high + high * out) * positions + shared[1]
    return parameters, macs


def points(
    method: JointMethod,
    group: Group,
    statistics: Sequence[Statistics] | None,
    output_positions: Sequence[int],
    errors: Mapping[tuple[int, ...], Sequence[float]],
) -> tuple[CurvePoint, ...]:
    """A curve from the members' errors at each rank tuple.

    A point that fewer ranks beat is left out: fits on the curve are rough, and a cut mode costs multiplications.
    """
    sizes = None if statistics is None else [s.input_sizes for s in statistics]
    found = []
    for ranks, each in errors.items():
        parameters, macs = method.cost(group, ranks, output_positions, input_sizes=sizes)
        mean = sum(each) / len(each)
        found.append(CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=mean, errors=tuple(each)))
    useful = [p for p in found if not any(_beats(q, p) for q in found)]
    return thin(useful, group.dense(output_positions))


def _beats(fewer: CurvePoint, more: CurvePoint) -> bool:
    nested = fewer.ranks != more.ranks and all(a <= b for a, b in zip(fewer.ranks, more.ranks, strict=True))
    return nested and fewer.error <= more.error
