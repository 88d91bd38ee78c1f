"""Canonical polyadic fits, shared by ``cp3`` and ``cp4``: a kernel as a sum of R rank-one terms.

In whitened coordinates the layer's problem is to approximate ``T`` (out, in, *spatial) by ``sum_r u_r o p_r o k_r ...``
in the norm of ``C``. Whitening by K, the Kronecker product of C's means over all modes but one, brings C near the
identity, so that

* plain alternating least squares, whose normal equations are R x R (Kolda and Bader 2009, equation 3.4), do most;
* sweeps in the norm of C itself do the rest: the outputs' factor is a regression, the others' normal equations are
  solved by conjugate gradients from the plain ones. Where those would take too long (``WORK``: kernels of more than
  about 128 x 128 x 3 x 3) only the regression is left of them, so the stated errors are true at any size.

**Degenerate terms**, which grow without bound and cancel, make a fit useless in float32 and for training. As in the
error-preserving correction (Phan et al. 2020, "Stable low-rank tensor decomposition for compression of convolutional
neural networks") the sum of the terms' squared norms is kept small, here within each least squares, which minimises
``error + PENALTY * sum_r ||term_r||^2``. That only multiplies the diagonals of the normal equations by 1 + PENALTY, and
takes PENALTY^2 of the energy of terms that do not cancel.

Ranks grow along a lattice: the terms of one rank and the leading terms of what they leave out start the next.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import Fit, Problem, bias_parameters, fill, floor_of, geometry, problems, relative, thin
from search.decompose.projection import conjugate_gradients
from search.decompose.tightening import tightened
from search.decompose.variational import by_inputs, by_outputs, variational_rank
from search.matrices import weight_of
from search.spec import CurvePoint
from tenfold.layers import factorized_like

__all__ = ["CP"]

PENALTY = 1e-4
RANKS, LARGE_RANKS = 24, 10
"""Ranks on the lattice, for kernels up to ``LARGE`` weights and above."""
LARGE = 1 << 20
GROWTH_SWEEPS, GROWTH_GAIN = 12, 1e-3
"""Plain sweeps at each rank of the lattice, in single precision, and the part of the error that one must gain."""
REFITTED, CURVE_SWEEPS = 5, 2
"""Points of a curve that are fitted further, and for how many sweeps; the others follow them (``tightening``)."""
PLAIN_SWEEPS, EXACT_SWEEPS, WARM_SWEEPS = 60, 8, 2
"""Sweeps at the rank that is wanted; exact ones from a fitted start."""
WORK = 3e9
"""Multiply-adds that the sweeps of one kind may take: about 0.2 s on one core."""
ITERATIONS = 4
"""Conjugate-gradient steps for one factor."""

Terms = tuple[Tensor, ...]
"""Factor matrices with the terms in columns: (out, R), (in, R), one for each spatial mode; columns but the first's are
of norm one."""


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
        grown = [dict(zip(path, _grow(white, path), strict=True)) for white in whites]
        sizes = None if statistics is None else statistics.input_sizes
        points = []
        for ranks in lattice:
            lost = [_refit(w, terms[ranks[0]], exact=True)[1] for w, terms in zip(whites, grown, strict=True)]
            errors = [part.floor + error for part, error in zip(parts, lost, strict=True)]
            parameters, macs = self.cost(layer, ranks, output_positions, input_sizes=sizes)
            points.append(CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=relative(parts, errors)))
        weight = geometry(layer)[1]
        dense = (weight.numel() + bias_parameters(layer), weight.numel() * output_positions)

        def fitted(ranks: tuple[int, ...]) -> float:
            ends = [
                _sweeps(w, terms[ranks[0]], CURVE_SWEEPS, exact=True)[1] for w, terms in zip(whites, grown, strict=True)
            ]
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
    *_, grown = _grow(w, path)
    tried = [grown, _sweeps(w, grown, PLAIN_SWEEPS, exact=False)[0]]
    if path[-1] >= _exact_rank(*w.target.shape):
        # There the spectral terms are exact, which alternating steps reach only in the limit.
        tried.append(_spectral(w.target, path[-1]))
    terms, error = min((_refit(w, terms, exact=True) for terms in tried), key=lambda found: found[1])
    return (terms, error) if w.moments is None else _sweeps(w, terms, EXACT_SWEEPS, exact=True)


def _resume(w: _Whitened, part: Problem, links: Sequence[Tensor]) -> tuple[Terms, float]:
    """A few sweeps from the links of a fitted layer."""
    last, *modes = links
    white = [torch.linalg.solve(unroot, mode.T) for unroot, mode in zip(w.unroots, modes, strict=True)]
    return _sweeps(w, (part.rows[:, None] * last, *white), WARM_SWEEPS, exact=w.moments is not None)


def _grow(w: _Whitened, path: Iterable[int]) -> Iterator[Terms]:
    """Terms at each of the rising ranks of ``path``, as if C were the identity.

    In single precision, the target brought to norm one: nothing here is final.
    """
    size = w.target.norm().clamp_min(1e-150)
    target = (w.target / size).float()
    plain = replace(w, target=target, cross=target.flatten(1), moments=None)
    terms = _spectral(target, 0)
    for rank in path:
        rest = target - (terms[0] @ _features(terms[1:]).T).reshape(target.shape)
        new = _spectral(rest, rank - terms[0].shape[1])
        joined = tuple(torch.cat(both, 1) for both in zip(terms, new, strict=True))
        terms, _ = _sweeps(plain, joined, GROWTH_SWEEPS, exact=False, gain=GROWTH_GAIN)
        out, *modes = (factor.double() for factor in terms)
        yield (out * size, *modes)


def _spectral(t: Tensor, count: int) -> Terms:
    """The ``count`` strongest of mutually orthogonal terms that sum to ``t``."""
    found = _orthogonal_terms(t)
    strongest = found[0].norm(dim=0).argsort(descending=True)[:count]
    return tuple(factor[:, strongest] for factor in found)


def _exact_rank(out: int, c_in: int, *spatial: int) -> int:
    """Terms of which every kernel is a sum: those of the singular values of one matrix for each tap."""
    return min(out, c_in) * math.prod(spatial)


def _orthogonal_terms(t: Tensor) -> Terms:
    """Split along the principal directions of the last mode, each slice along those of its own last mode, and so on."""
    flat = t.flatten(0, -2)
    vectors = torch.linalg.eigh(flat.T @ flat).eigenvectors
    if t.dim() == 2:
        return flat @ vectors, vectors
    parts = []
    for vector, part in zip(vectors.T, (flat @ vectors).T.reshape(-1, *t.shape[:-1]), strict=True):
        inner = _orthogonal_terms(part)
        parts.append((*inner, vector[:, None].expand(-1, inner[0].shape[1])))
    return tuple(torch.cat(factors, 1) for factors in zip(*parts, strict=True))


def _sweeps(w: _Whitened, terms: Terms, most: int, *, exact: bool, gain: float = 1e-5) -> tuple[Terms, float]:
    """At most ``most`` affordable sweeps, as long as each gains ``gain`` of the error; the result with its error.

    Unless ``exact``, both as if C were the identity; then at least one sweep is made.
    """
    out, n = w.cross.shape
    work = terms[0].shape[1] * n * (2 * ITERATIONS * n if exact else 2 * out)
    terms, error = _refit(w, terms, exact=exact)
    for _ in range(min(most, int(WORK / work) if exact else max(1, int(WORK / work)))):
        found, new = _sweep(w, terms, exact=exact)
        gained = error - new
        if gained <= 0:
            break
        terms, error = found, new
        if gained < gain * error:
            break
    return terms, error


def _sweep(w: _Whitened, terms: Terms, *, exact: bool) -> tuple[Terms, float]:
    """Each factor once, for all the others: those of the modes, then the outputs'. Also the error."""
    out, *modes = terms
    pulled = (w.cross if exact else w.target.flatten(1)).T @ out
    outputs = _inflated(out.T @ out)
    for m in range(len(modes)):
        # Plain normal equations: factor @ gram = right.
        gram = outputs * _gram([*modes[:m], *modes[m + 1 :]])
        right = _contract(pulled, modes, m)
        modes[m] = _exact_mode(w, modes, m, right, outputs, gram) if exact else _solved(right, gram)
    return _refit(w, (out, *(mode / mode.norm(dim=0).clamp_min(_tiny(mode)) for mode in modes)), exact=exact)


def _exact_mode(w: _Whitened, modes: Sequence[Tensor], m: int, right: Tensor, outputs: Tensor, gram: Tensor) -> Tensor:
    """The factor of mode ``m`` in the norm of C, from the present one."""
    root = _root(gram)

    def apply(x: Tensor) -> Tensor:
        f = _features([*modes[:m], x, *modes[m + 1 :]])
        return _contract((f if w.moments is None else w.moments @ f) @ outputs, modes, m)

    return conjugate_gradients(apply, lambda r: torch.cholesky_solve(r.T, root).T, modes[m], right, ITERATIONS)


def _refit(w: _Whitened, terms: Terms, *, exact: bool) -> tuple[Terms, float]:
    """The outputs' factor by regression, and the error; unless ``exact``, both as if C were the identity."""
    modes = terms[1:]
    f = _features(modes)
    if exact and w.moments is not None:
        gram, cross, base = f.T @ (w.moments @ f), w.cross @ f, w.base
    else:
        t = w.target.flatten(1)
        gram, cross, base = _gram(modes), t @ f, float(t.square().sum())
    out = _solved(cross, _inflated(gram))
    return (out, *modes), max(base + float((out * (out @ gram - 2 * cross)).sum()), 0.0)


def _features(modes: Sequence[Tensor]) -> Tensor:
    """Column by column the Kronecker product of ``modes``: (n, R)."""
    product = modes[0]
    for mode in modes[1:]:
        product = (product[:, None] * mode).flatten(0, 1)
    return product


def _gram(modes: Sequence[Tensor]) -> Tensor:
    """Inner products of the columns of ``_features(modes)``: (R, R)."""
    product = modes[0].T @ modes[0]
    for mode in modes[1:]:
        product = product * (mode.T @ mode)
    return product


def _contract(x: Tensor, modes: Sequence[Tensor], keep: int) -> Tensor:
    """``x`` (n, R) summed against every mode but ``keep``, column by column: (size of that mode, R)."""
    x = x.reshape(*(len(mode) for mode in modes), -1)
    before, after = range(keep), range(keep + 1, len(modes))
    for mode in (modes[j] for j in reversed(after)):
        x = (x * mode).sum(-2)
    for mode in (modes[j] for j in before):
        x = (x * mode.reshape(len(mode), *(1,) * (x.dim() - 2), -1)).sum(0)
    return x


def _inflated(gram: Tensor) -> Tensor:
    """Normal equations with the penalty on the terms' norms."""
    return gram + PENALTY * torch.diag(gram.diagonal())


def _root(gram: Tensor) -> Tensor:
    """The Cholesky factor of normal equations, some of whose terms may be zero."""
    jitter = 1e3 * torch.finfo(gram.dtype).eps * gram.diagonal().mean() + _tiny(gram)
    root: Tensor = torch.linalg.cholesky(gram + jitter * torch.eye(len(gram), dtype=gram.dtype))
    return root


def _tiny(x: Tensor) -> float:
    """What may be added to a number, or divided by, without harm."""
    return 1e-150 if x.dtype == torch.float64 else 1e-30


def _solved(right: Tensor, gram: Tensor) -> Tensor:
    return torch.cholesky_solve(right.T, _root(gram)).T


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
