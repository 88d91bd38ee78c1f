"""Canonical polyadic fits in the plain norm, which ``cp3``, ``cp4`` and ``r_cp`` start from: a tensor as a sum of R
rank-one terms.

Alternating least squares, whose normal equations are R x R (Kolda and Bader 2009, equation 3.4). Ranks grow along a
lattice: the terms of one rank and the leading terms of what they leave out start the next.

**Degenerate terms**, which grow without bound and cancel, make a fit useless in float32 and for training. As in the
error-preserving correction (Phan et al. 2020, "Stable low-rank tensor decomposition for compression of convolutional
neural networks") the sum of the terms' squared norms is kept small, here within each least squares, which minimises
``error + PENALTY * sum_r ||term_r||^2``. That only multiplies the diagonals of the normal equations by 1 + PENALTY. The
last sweep of all takes ``RIDGE`` in its place, so that terms that do not cancel lose nothing by it.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = [
    "PENALTY",
    "RIDGE",
    "Terms",
    "contracted",
    "features",
    "gram",
    "grow",
    "inflated",
    "normalized",
    "pulled",
    "refit",
    "root",
    "solved",
    "spectral",
    "summed",
    "sweeps",
]

PENALTY, RIDGE = 1e-2, 1e-4
"""ResNet-32 with all convolutions at a fifth by cp3, trained for four epochs, keeps 71 % with this, 58 with 1e-3 and 28
with 1e-4; weight errors rise by about one per cent from each to the next."""
GROWTH_SWEEPS, GROWTH_GAIN = 12, 1e-3
"""At each rank of the lattice, in single precision, and the part of the error that one must gain."""
WIDE, SPARE, POWERS = 64, 4, 2
"""Columns from which on subspace iteration is quicker; its directions beyond those that are wanted, and its rounds."""
WORK = 3e9
"""Multiply-adds that sweeps may take: about 0.2 s on one core."""

Terms = tuple[Tensor, ...]
"""Factor matrices (size of the mode, R) with the terms in columns; columns but the first factor's are of norm one."""


def grow(target: Tensor, path: Iterable[int]) -> Iterator[Terms]:
    """Terms at each of the rising ranks of ``path``, found in single precision."""
    size = target.norm().clamp_min(1e-150)
    single = (target / size).float()
    terms: Terms = tuple(single.new_zeros(size, 0) for size in single.shape)
    for rank in path:
        new = spectral(single - summed(terms), rank - terms[0].shape[1], rough=True)
        joined = tuple(torch.cat(both, 1) for both in zip(terms, new, strict=True))
        terms, _ = sweeps(single, joined, GROWTH_SWEEPS, GROWTH_GAIN)
        first, *rest = (factor.double() for factor in terms)
        yield (first * size, *rest)


def sweeps(target: Tensor, terms: Terms, most: int, gain: float = 1e-5) -> tuple[Terms, float]:
    """At most ``most`` affordable sweeps, and at least one, as long as each gains ``gain`` of the error; the result
    with its error."""
    work = 2 * terms[0].shape[1] * target.numel()
    terms, error = refit(target, terms)
    for _ in range(min(most, max(1, int(WORK / work)))):
        found, new = _sweep(target, terms)
        gained = error - new
        if gained <= 0:
            break
        terms, error = found, new
        if gained < gain * error:
            break
    return _sweep(target, terms, RIDGE)


def _sweep(target: Tensor, terms: Terms, penalty: float = PENALTY) -> tuple[Terms, float]:
    """Each factor once, for all the others, the first one last. Also the error."""
    first, *modes = terms
    seen = target.flatten(1).T @ first
    outputs = inflated(first.T @ first, penalty)
    for m in range(len(modes)):
        others = [*modes[:m], *modes[m + 1 :]]
        # Plain normal equations: factor @ gram = right.
        modes[m] = solved(contracted(seen, modes, m), outputs * gram(others) if others else outputs)
    return refit(target, (first, *normalized(modes)), penalty)


def refit(target: Tensor, terms: Terms, penalty: float = PENALTY) -> tuple[Terms, float]:
    """The first factor by regression, and the error."""
    modes, flat = terms[1:], target.flatten(1)
    normal, cross = gram(modes), flat @ features(modes)
    first = solved(cross, inflated(normal, penalty))
    error = float(flat.square().sum()) + float((first * (first @ normal - 2 * cross)).sum())
    return (first, *modes), max(error, 0.0)


def spectral(t: Tensor, count: int, *, rough: bool = False) -> Terms:
    """The ``count`` strongest of mutually orthogonal terms that sum to ``t``; ``rough``: about these, far sooner."""
    found = _orthogonal_terms(t, count if rough else t.numel())
    strongest = found[0].norm(dim=0).argsort(descending=True)[:count]
    return tuple(factor[:, strongest] for factor in found)


def _orthogonal_terms(t: Tensor, most: int) -> Terms:
    """Split along the principal directions of the last mode, each slice along those of its own last mode, and so on.

    ``most``: so many of each matrix that is left are enough; where that is few of many they are not exact.
    """
    if t.dim() == 2:
        few = t.shape[1] >= WIDE and 4 * most < min(t.shape)
        vectors = _leading(t, most) if few else _principal(t)
        return t @ vectors, vectors
    flat = t.flatten(0, -2)
    vectors, parts = _principal(flat), []
    for vector, part in zip(vectors.T, (flat @ vectors).T.reshape(-1, *t.shape[:-1]), strict=True):
        inner = _orthogonal_terms(part, most)
        parts.append((*inner, vector[:, None].expand(-1, inner[0].shape[1])))
    return tuple(torch.cat(factors, 1) for factors in zip(*parts, strict=True))


def _principal(matrix: Tensor) -> Tensor:
    """All right singular vectors: (columns, columns)."""
    vectors: Tensor = torch.linalg.eigh(matrix.T @ matrix).eigenvectors
    return vectors


def _leading(matrix: Tensor, count: int) -> Tensor:
    """About the first right singular vectors, (columns, count), by subspace iteration (Halko et al. 2011)."""
    drawn = torch.randn(matrix.shape[1], count + SPARE, generator=torch.Generator().manual_seed(0)).to(matrix)
    for _ in range(POWERS):
        drawn = torch.linalg.qr(matrix.T @ (matrix @ drawn)).Q
    return (drawn @ _principal(matrix @ drawn))[:, -count:]


def summed(terms: Terms) -> Tensor:
    """The tensor that the terms sum to."""
    return (terms[0] @ features(terms[1:]).T).reshape([len(factor) for factor in terms])


def pulled(tensor: Tensor, terms: Terms, keep: int) -> Tensor:
    """``tensor`` against every factor but one, term by term: (size of that mode, R)."""
    return tensor.movedim(keep, 0).flatten(1) @ features([*terms[:keep], *terms[keep + 1 :]])


def features(modes: Sequence[Tensor]) -> Tensor:
    """Column by column the Kronecker product of ``modes``: (n, R)."""
    product = modes[0]
    for mode in modes[1:]:
        product = (product[:, None] * mode).flatten(0, 1)
    return product


def gram(modes: Sequence[Tensor]) -> Tensor:
    """Inner products of the columns of ``features(modes)``: (R, R)."""
    product = modes[0].T @ modes[0]
    for mode in modes[1:]:
        product = product * (mode.T @ mode)
    return product


def contracted(x: Tensor, modes: Sequence[Tensor], keep: int) -> Tensor:
    """``x`` (n, R) summed against every mode but ``keep``, column by column: (size of that mode, R)."""
    x = x.reshape(*(len(mode) for mode in modes), -1)
    before, after = range(keep), range(keep + 1, len(modes))
    for mode in (modes[j] for j in reversed(after)):
        x = (x * mode).sum(-2)
    for mode in (modes[j] for j in before):
        x = (x * mode.reshape(len(mode), *(1,) * (x.dim() - 2), -1)).sum(0)
    return x


def normalized(modes: Sequence[Tensor]) -> list[Tensor]:
    """Columns of norm one."""
    return [mode / mode.norm(dim=0).clamp_min(_tiny(mode)) for mode in modes]


def inflated(normal: Tensor, penalty: float = PENALTY) -> Tensor:
    """Normal equations with a penalty on the terms' norms."""
    return normal + penalty * torch.diag(normal.diagonal())


def root(normal: Tensor) -> Tensor:
    """The Cholesky factor of normal equations, some of whose terms may be zero."""
    jitter = 1e3 * torch.finfo(normal.dtype).eps * normal.diagonal().mean() + _tiny(normal)
    found: Tensor = torch.linalg.cholesky(normal + jitter * torch.eye(len(normal), dtype=normal.dtype))
    return found


def _tiny(x: Tensor) -> float:
    """What may be added to a number, or divided by, without harm."""
    return 1e-150 if x.dtype == torch.float64 else 1e-30


def solved(right: Tensor, normal: Tensor) -> Tensor:
    return torch.cholesky_solve(right.T, root(normal)).T
