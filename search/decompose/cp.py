"""Canonical polyadic fits of convolutions, shared by ``cp3`` and ``cp4``: a kernel as a sum of R rank-one terms.

In whitened coordinates the layer's problem is to approximate ``T`` (out, in, *spatial) by ``sum_r u_r o p_r o k_r ...``
in the norm of ``C``. Whitening by K, the Kronecker product of C's means over all modes but one, brings C near the
identity, so that

* plain alternating least squares (``polyadic``) do most;
* sweeps in the norm of C itself do the rest: the outputs' factor is a regression, the others' normal equations are
  solved by conjugate gradients from the plain ones. Where those would take too long (``WORK``: kernels of more than
  about 128 x 128 x 3 x 3) only the regression is left of them, so the stated errors are true at any size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import Fit, Problem, bias_parameters, fill, floor_of, geometry, problems, relative, thin
from search.decompose.polyadic import (
    PENALTY,
    RIDGE,
    Terms,
    contracted,
    features,
    gram,
    grow,
    inflated,
    normalized,
    refit,
    root,
    solved,
    spectral,
    sweeps,
)
from search.decompose.projection import conjugate_gradients
from search.decompose.tightening import tightened
from search.decompose.variational import by_inputs, by_outputs, variational_rank
from search.matrices import weight_of
from search.spec import CurvePoint
from tenfold.layers import factorized_like

__all__ = ["CP"]

RANKS, LARGE_RANKS = 24, 10
"""Ranks on the lattice, for kernels up to ``LARGE`` weights and above."""
LARGE = 1 << 20
REFITTED, CURVE_SWEEPS = 5, 2
"""Points of a curve that are fitted further, and for how many sweeps; the others follow them (``tightening``)."""
PLAIN_SWEEPS, EXACT_SWEEPS, WARM_SWEEPS = 60, 8, 2
"""Sweeps at the rank that is wanted; exact ones from a fitted start."""
WORK = 3e9
"""Multiply-adds that sweeps in the norm of C may take: about 0.2 s on one core."""
ITERATIONS = 4
"""Conjugate-gradient steps for one factor."""


class CP:
    """What both methods share; they say which modes there are, which link holds each, and what it costs."""

    name: ClassVar[str]
    links: ClassVar[tuple[str, ...]]
    """The links of the modes in their order; the output's is ``last``."""

    def modes(self, layer: nn.Module) -> tuple[int, ...]:
        """Sizes of (in, *spatial), channels per group."""
        raise NotImplementedError

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        raise NotImplementedError

    def ranks(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        _, weight = geometry(layer)
        _, out, n = weight.shape
        sizes = self.modes(layer)
        # R (out + in + ...) < out n, strictly.
        most = (out * n - 1) // (out + sum(sizes))
        count = RANKS if out * n <= LARGE else LARGE_RANKS
        return tuple((r,) for r in sorted({round(most ** (i / (count - 1))) for i in range(count)}) if r <= most)

    def full_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        return (_exact_rank(geometry(layer)[1].shape[1], *self.modes(layer)),)

    def variational_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        """No sum of fewer terms has these ranks in both unfoldings."""
        return (max(variational_rank(layer, by_inputs), variational_rank(layer, by_outputs)),)

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
        path = [r for (r,) in self.ranks(layer) if r < ranks[0]] + [ranks[0]]
        links, errors = [], []
        for g, part in enumerate(parts):
            whitened = _whiten(part, self.modes(layer))
            if start is None:
                terms, error = _fit(whitened, path)
            else:
                terms, error = _resume(whitened, part, [f.chunk(len(parts), 0)[g] for f in self._factors(start)])
            links.append(_balanced(whitened, part, terms))
            errors.append(part.floor + error)
        last, *modes = (torch.cat(link) for link in zip(*links, strict=True))
        new = factorized_like(layer, self.name, ranks)
        fill(layer, new, last=last, **dict(zip(self.links, modes, strict=True)))
        return Fit(new, relative(parts, errors))

    def curve(
        self,
        layer: nn.Module,
        statistics: Statistics | None,
        output_positions: int,
        *,
        metric: Tensor | None = None,
    ) -> tuple[CurvePoint, ...]:
        parts = problems(layer, statistics, metric)
        lattice = self.ranks(layer)
        path = [r for (r,) in lattice]
        whites = [_whiten(part, self.modes(layer)) for part in parts]
        grown = [dict(zip(path, grow(white.target, path), strict=True)) for white in whites]
        sizes = None if statistics is None else statistics.input_sizes
        points = []
        for ranks in lattice:
            lost = [_refit(w, terms[ranks[0]], RIDGE)[1] for w, terms in zip(whites, grown, strict=True)]
            errors = [part.floor + error for part, error in zip(parts, lost, strict=True)]
            parameters, macs = self.cost(layer, ranks, output_positions, input_sizes=sizes)
            points.append(CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=relative(parts, errors)))
        weight = geometry(layer)[1]
        dense = (weight.numel() + bias_parameters(layer), weight.numel() * output_positions)

        def fitted(ranks: tuple[int, ...]) -> float:
            ends = [_sweeps(w, terms[ranks[0]], CURVE_SWEEPS)[1] for w, terms in zip(whites, grown, strict=True)]
            return relative(parts, [part.floor + error for part, error in zip(parts, ends, strict=True)])

        return thin(tightened(thin(points, dense), floor_of(parts), fitted, REFITTED), dense)

    def _factors(self, start: nn.Module) -> list[Tensor]:
        """A fitted layer's links as (out, R) and (groups * R, size), float64."""
        return [
            weight_of(start.get_submodule(link)).detach().to("cpu", torch.float64).flatten(1)
            for link in ("last", *self.links)
        ]


@dataclass(frozen=True)
class _Whitened:
    """One group's problem in coordinates in which its input is nearly white."""

    target: Tensor
    """T = M B K^1/2: (out, in, *spatial)."""
    cross: Tensor
    """T C, unfolded: (out, n)."""
    moments: Tensor | None
    """C = K^-1/2 C K^-1/2: (n, n); None for the identity."""
    unroots: tuple[Tensor, ...]
    """K^-1/2, mode by mode."""
    base: float
    """||T C^1/2||^2."""


def _whiten(part: Problem, sizes: Sequence[int]) -> _Whitened:
    t = part.weighed
    if part.white:
        eyes = tuple(torch.eye(size, dtype=t.dtype) for size in sizes)
        return _Whitened(t.reshape(-1, *sizes), t, None, eyes, part.base)
    roots, unroots = [], []
    scale = 1.0
    for m, size in enumerate(sizes):
        before, after = math.prod(sizes[:m]), math.prod(sizes[m + 1 :])
        blocks = part.full.reshape(before, size, after, before, size, after)
        mean = torch.einsum("asbatb->st", blocks) / (before * after * scale)
        # The scale of C belongs to the first mode alone.
        scale = scale if m else float(mean.diagonal().mean())
        values, vectors = torch.linalg.eigh(mean)
        values = values.clamp_min(float(values.max()) * 1e-12 + 1e-300)
        roots.append((vectors * values.sqrt()) @ vectors.T)
        unroots.append((vectors / values.sqrt()) @ vectors.T)
    t = _along_modes(roots, t.T).T
    c = _along_modes(unroots, _along_modes(unroots, part.full).T)
    return _Whitened(t.reshape(-1, *sizes), t @ c, c, tuple(unroots), part.base)


def _along_modes(matrices: Sequence[Tensor], x: Tensor) -> Tensor:
    """The Kronecker product of ``matrices`` times ``x`` (n, columns)."""
    shape, done = x.shape, 1
    for matrix in matrices:
        x = torch.matmul(matrix, x.reshape(done, len(matrix), -1))
        done *= len(matrix)
    return x.reshape(shape)


def _fit(w: _Whitened, path: Sequence[int]) -> tuple[Terms, float]:
    """The best terms that we know how to find at the last rank of ``path``, and their error."""
    *_, grown = grow(w.target, path)
    tried = [grown, sweeps(w.target, grown, PLAIN_SWEEPS)[0]]
    if path[-1] >= _exact_rank(*w.target.shape):
        # There the spectral terms are exact, which alternating steps reach only in the limit.
        tried.append(spectral(w.target, path[-1]))
    terms, error = min((_refit(w, terms, RIDGE) for terms in tried), key=lambda found: found[1])
    return (terms, error) if w.moments is None else _sweeps(w, terms, EXACT_SWEEPS)


def _resume(w: _Whitened, part: Problem, links: Sequence[Tensor]) -> tuple[Terms, float]:
    """A few sweeps from the links of a fitted layer."""
    last, *modes = links
    white = [torch.linalg.solve(unroot, mode.T) for unroot, mode in zip(w.unroots, modes, strict=True)]
    return _sweeps(w, (part.rows[:, None] * last, *white), WARM_SWEEPS)


def _exact_rank(out: int, c_in: int, *spatial: int) -> int:
    """Terms of which every kernel is a sum: those of the singular values of one matrix for each tap."""
    return min(out, c_in) * math.prod(spatial)


def _sweeps(w: _Whitened, terms: Terms, most: int) -> tuple[Terms, float]:
    """At most ``most`` affordable sweeps in the norm of C, as long as they gain; the result with its error."""
    if w.moments is None:
        return sweeps(w.target, terms, most)
    n = len(w.moments)
    terms, error = _refit(w, terms)
    for _ in range(min(most, int(WORK / (2 * ITERATIONS * terms[0].shape[1] * n * n)))):
        found, new = _sweep(w, terms, w.moments)
        gained = error - new
        if gained <= 0:
            break
        terms, error = found, new
        if gained < 1e-5 * error:
            break
    return min(_refit(w, terms, RIDGE), _sweep(w, terms, w.moments, RIDGE), key=lambda found: found[1])


def _sweep(w: _Whitened, terms: Terms, moments: Tensor, penalty: float = PENALTY) -> tuple[Terms, float]:
    """Each factor once, from the present one: those of the modes, then the outputs'. Also the error."""
    out, *modes = terms
    seen, outputs = w.cross.T @ out, inflated(out.T @ out, penalty)
    for m in range(len(modes)):
        plain = root(outputs * gram([*modes[:m], *modes[m + 1 :]]))

        def apply(x: Tensor, m: int = m) -> Tensor:
            f = features([*modes[:m], x, *modes[m + 1 :]])
            return contracted((moments @ f) @ outputs, modes, m)

        def precondition(r: Tensor, plain: Tensor = plain) -> Tensor:
            return torch.cholesky_solve(r.T, plain).T

        modes[m] = conjugate_gradients(apply, precondition, modes[m], contracted(seen, modes, m), ITERATIONS)
    return _refit(w, (out, *normalized(modes)), penalty)


def _refit(w: _Whitened, terms: Terms, penalty: float = PENALTY) -> tuple[Terms, float]:
    """The outputs' factor by regression, and the error."""
    if w.moments is None:
        return refit(w.target, terms, penalty)
    f = features(terms[1:])
    normal, cross = f.T @ (w.moments @ f), w.cross @ f
    out = solved(cross, inflated(normal, penalty))
    return (out, *terms[1:]), max(w.base + float((out * (out @ normal - 2 * cross)).sum()), 0.0)


def _balanced(w: _Whitened, part: Problem, terms: Terms) -> list[Tensor]:
    """The links' weights, out first and then (R, size) by mode; a term's norm is spread evenly over its links."""
    out = terms[0] / part.rows[:, None]
    modes = [unroot @ mode for unroot, mode in zip(w.unroots, terms[1:], strict=True)]
    norms = [mode.norm(dim=0).clamp_min(1e-150) for mode in modes]
    out = out * torch.stack(norms).prod(0)
    size = out.norm(dim=0)
    # A term that is zero keeps modes of some size, so that training can use it.
    share = size.clamp_min(1e-6 * float(size.max()) + 1e-30) ** (1 / len(terms))
    return [out / share ** len(modes), *((mode * (share / norm)).T for mode, norm in zip(modes, norms, strict=True))]
