"""The shared solver: project the input of each tap to ``r`` channels, then map the projected taps to the outputs.

Split the input ``x`` (n = A * T entries, A outer) into T taps ``x_t`` of A entries. A first factor ``P`` (r, A) shared
by all taps and a second ``Q`` (out, r, T) give ``V x = sum_t Q_t P x_t``. This is

* ``svd_input`` and ``tucker2`` with A = input channels, T = kernel positions (Tucker-2 then cuts Q's output rank);
* ``spatial_svd`` with A = (input channels, rows), T = columns.

Given P the best Q is a linear regression and the best Q of output rank ``s`` a reduced-rank regression, nested in s
(one eigendecomposition for all). Given Q the best P solves the normal equations
``sum_tu Q_t' M^2 Q_u P C_ut = sum_t Q_t' M^2 D_t``, by conjugate gradients. P starts from the leading subspace of B in
the whitened coordinates of one tap, nested in r.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search.decompose.base import Problem
from search.matrices import matrices

__all__ = [
    "CURVE_SWEEPS",
    "SWEEPS",
    "WARM_SWEEPS",
    "Nested",
    "alternate",
    "conjugate_gradients",
    "errors_of_inputs",
    "errors_of_ranks",
    "project",
    "projected",
    "refine",
    "refitted",
    "regressors",
    "restrict",
    "restrictions",
    "solve",
    "starts",
]

ITERATIONS = 12
"""Conjugate-gradient steps of one sweep over P."""
SWEEPS = 8
WARM_SWEEPS = 2
REFITTED, CURVE_SWEEPS = 5, 2
"""Points of a curve that are refitted, and for how many rounds; the other points follow them (``tightening``)."""
CURVE_WORK = 1e11
"""Multiply-adds that refitting may take for a whole curve: about two seconds on one core."""


@dataclass
class Nested:
    """Q for a given P with all its output ranks: ``last[:, :s] @ core[:s]`` is the best Q of rank ``s``."""

    last: Tensor
    """(out, min(out, r T)), rows already freed of the metric."""
    core: Tensor
    """(min(out, r T), r * T)."""
    gains: Tensor
    """Explained error of each output rank, descending; their sum is what the whole Q explains."""
    base: float
    """Error of V = 0 without the floor: ||M B C^1/2||^2."""

    def error(self, rank: int) -> float:
        """||M (B - V) C^1/2||^2 at output rank ``rank``."""
        return max(self.base - float(self.gains[:rank].sum()), 0.0)

    def weight(self, rank: int) -> Tensor:
        return torch.matmul(self.last[:, :rank], self.core[:rank])


def project(problem: Problem, taps: int) -> Tensor:
    """All input projections at once: (A, A), row by row in falling importance; the first r rows are P of rank r."""
    if problem.white:
        return _leading_inputs(problem.weighed, taps)
    n = problem.moments.shape[0]
    a = n // taps
    blocks = problem.full.reshape(a, taps, a, taps).diagonal(dim1=1, dim2=3)
    values, vectors = torch.linalg.eigh(blocks.mean(-1))
    values = values.clamp_min(float(values.max()) * 1e-12 + 1e-300)
    root = (vectors * values.sqrt()) @ vectors.T
    unroot = (vectors / values.sqrt()) @ vectors.T
    unfolded = problem.weighed.reshape(-1, a, taps).permute(1, 0, 2).reshape(a, -1)
    leading = torch.linalg.eigh(root @ (unfolded @ unfolded.T) @ root).eigenvectors.flip(-1)
    factor: Tensor = leading.T @ unroot
    return factor


def _leading_inputs(matrix: Tensor, taps: int) -> Tensor:
    """(A, A): an orthonormal basis of the inputs of ``matrix`` (rows, A * taps), in falling importance, by rows."""
    unfolded = matrix.reshape(len(matrix), -1, taps).transpose(0, 1).flatten(1)
    basis: Tensor = torch.linalg.eigh(unfolded @ unfolded.T).eigenvectors.flip(-1).T
    return basis


def restrict(problem: Problem, p: Tensor, taps: int) -> Problem:
    """The problem of what follows ``p`` (r, A): its input has r * taps entries, its floor what ``p`` has lost."""
    return restrictions(problem, p, taps, [len(p)])[len(p)]


def restrictions(problem: Problem, p: Tensor, taps: int, inputs: Sequence[int]) -> dict[int, Problem]:
    """The problems behind the first rows of ``p`` (r, A), for each of the numbers ``inputs`` of them.

    Projected moments are nested, and so are their Cholesky factors: the leading blocks are those of the leading rows.
    """
    whole, crossed = projected(problem, p, taps)
    factor = whole if whole.dim() == 1 else torch.linalg.cholesky(whole)
    found = {}
    for r in inputs:
        n = r * taps
        d = crossed[:, :n]
        c, b = (whole[:n], d) if whole.dim() == 1 else (whole[:n, :n], torch.cholesky_solve(d.T, factor[:n, :n]).T)
        lost = problem.base - float((b * d).sum())
        left = problem.floor + max(lost, 0.0)
        found[r] = Problem(b / problem.rows[:, None], c, problem.rows, left, problem.energy)
    return found


def regressors(problem: Problem, p: Tensor, taps: int) -> Tensor:
    """``M B C P' L^-T`` with ``L L'`` the projected moments: (out, r * taps), all ranks of ``p`` (r, A) at once.

    Its squared norm is what the best Q explains, and its Gram matrix has the eigenvalues of ``Nested.gains``. The
    leading blocks of a Cholesky factor are the factors of the leading blocks, so that the first ``s * taps`` columns
    are those of the first ``s`` rows of ``p``.
    """
    c, d = projected(problem, p, taps)
    if c.dim() == 1:
        return d
    seen: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(c), d.T, upper=False).T
    return seen


def projected(problem: Problem, p: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """Moments of the projected input, (r * taps, r * taps) or (r * taps,) where white, and ``M B C P'``."""
    r, a = p.shape
    if problem.white:
        d = torch.einsum("ra,oat->ort", p, problem.weighed.reshape(-1, a, taps)).flatten(1)
        c = p @ p.T
        if float((c - torch.eye(r, dtype=p.dtype)).abs().max()) < 1e-9:
            return torch.ones(r * taps, dtype=p.dtype), d
        c = torch.einsum("rs,tu->rtsu", c, torch.eye(taps, dtype=p.dtype)).reshape(r * taps, r * taps)
        return c + 1e-10 * c.diagonal().mean().clamp_min(1e-300) * torch.eye(len(c), dtype=c.dtype), d
    half = (p @ problem.full.reshape(a, taps * a * taps)).reshape(r * taps, a, taps)
    c = (p @ half).reshape(r * taps, r * taps)
    d = problem.weighed @ half.reshape(r * taps, a * taps).T
    return c + 1e-10 * c.diagonal().mean().clamp_min(1e-300) * torch.eye(len(c), dtype=c.dtype), d


def errors_of_inputs(problem: Problem, p: Tensor, taps: int) -> Tensor:
    """E||M(y - V x)||^2 with the first 0, 1, .. r rows of ``p`` (r, A) and their best Q: (r + 1,)."""
    gains = regressors(problem, p, taps).square().sum(0).reshape(len(p), taps).sum(1)
    return problem.floor + (problem.base - F.pad(gains.cumsum(0), (1, 0))).clamp_min(0)


def errors_of_ranks(problem: Problem, p: Tensor, taps: int, inputs: Sequence[int]) -> dict[int, Tensor]:
    """For each of the rising numbers ``inputs`` of rows of ``p``, the errors at output ranks 0, 1, ..: (ranks + 1,)."""
    seen = regressors(problem, p, taps)
    found, done = {}, 0
    gram = seen.new_zeros(len(seen), len(seen))
    for r in inputs:
        block = seen[:, done * taps : r * taps]
        gram, done = gram + block @ block.T, r
        # The same eigenvalues, of the shorter side.
        few = seen[:, : r * taps]
        values = torch.linalg.eigvalsh(few.T @ few if r * taps < len(seen) else gram).flip(0).clamp_min(0)
        found[r] = problem.floor + (problem.base - F.pad(values.cumsum(0), (1, 0))).clamp_min(0)
    return found


def solve(problem: Problem, p: Tensor, taps: int) -> Nested:
    """The best second factor for a given ``p`` (r, A), all output ranks from one eigendecomposition."""
    rest = restrict(problem, p, taps)
    b = rest.weighed
    values, vectors = torch.linalg.eigh(rest.spread(b) @ b.T)
    keep = min(b.shape)
    values, vectors = values.flip(0)[:keep].clamp_min(0), vectors.flip(1)[:, :keep]
    return Nested(vectors / problem.rows[:, None], vectors.T @ b, values, problem.base)


def refine(problem: Problem, p: Tensor, q: Tensor, taps: int) -> Tensor:
    """A better ``p`` for a given ``q`` (out, r * taps): conjugate gradients on its normal equations, from ``p``.

    In orthonormal coordinates of what ``q`` hands on: along combinations of P's rows that it does not, the equations
    are singular, and ``p`` stays. Where C is the identity they come apart by input and are solved at once. Else in
    single precision, for the change of ``p`` alone: the error is flat around its least, and is told by ``solve``.
    """
    r, a = p.shape
    weighed = (problem.rows[:, None] * q).reshape(-1, r, taps)
    turn = _inverse_root(torch.einsum("ort,ost->rs", weighed, weighed))
    basis = torch.einsum("ort,rk->okt", weighed, turn)
    gap = problem.weighed - torch.einsum("ort,ra->oat", weighed, p).flatten(1)
    right = torch.einsum("okt,oat->ka", basis, problem.spread(gap).reshape(-1, a, taps))
    k = len(right)
    if problem.white or k == 0:
        return p + turn @ right
    moments = problem.full.reshape(a, taps, a, taps)
    mixing = torch.einsum("okt,olu->ktul", basis, basis).reshape(k * taps * taps, k).float()
    spread, spread_size = _single(moments.permute(3, 1, 0, 2).reshape(taps * taps * a, a))
    right, size = _single(right / spread_size)
    center, _ = _single(_inverse(moments.diagonal(dim1=1, dim2=3).mean(-1)))

    def apply(x: Tensor) -> Tensor:
        return (mixing @ x).reshape(k, taps * taps * a) @ spread

    found = conjugate_gradients(apply, lambda residual: residual @ center, torch.zeros_like(right), right, ITERATIONS)
    return p + turn @ (found.double() * size)


def _single(x: Tensor) -> tuple[Tensor, float]:
    """``x`` in float32 with a largest entry of one, and what that entry was."""
    size = max(float(x.abs().max()), 1e-300)
    return (x / size).float(), size


def refitted(parts: Sequence[Problem], taps: int, inputs: int) -> int:
    """How many points of a curve ``alternate`` may be run for: those of about ``inputs`` rows of P, one round each."""
    a = len(parts[0].moments) // taps
    out, n = parts[0].target.shape
    round_work = out * n * min(out, n) if parts[0].white else ITERATIONS * inputs * (taps * a) ** 2
    return min(REFITTED, int(CURVE_WORK / (CURVE_SWEEPS * len(parts) * round_work)))


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], x: Tensor, right: Tensor, steps: int
) -> Tensor:
    """``steps`` preconditioned steps from ``x`` towards ``apply(x) = right``, ``apply`` linear and positive."""
    residual = right - apply(x)
    z = precondition(residual)
    direction, rho = z, float((residual * z).sum())
    for _ in range(steps):
        if rho <= 0:
            break
        image = apply(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        step = rho / curvature
        x, residual = x + step * direction, residual - step * image
        z = precondition(residual)
        rho, previous = float((residual * z).sum()), rho
        direction = z + (rho / previous) * direction
    return x


def alternate(
    problem: Problem, p: Tensor, taps: int, out_rank: int | None, sweeps: int, nested: Nested | None = None
) -> tuple[Tensor, Nested]:
    """``sweeps`` rounds of Q for P, P for Q; never worse than the start. ``nested``: Q of the start, where it is known.

    Where C is the identity a round is one of HOOI (De Lathauwer, De Moor and Vandewalle 2000): the leading inputs of
    what Q's outputs see; with all outputs the start is that already.
    """
    nested = nested or solve(problem, p, taps)
    rank = len(nested.gains) if out_rank is None else min(out_rank, len(nested.gains))
    for _ in range(sweeps):
        if problem.white:
            seen = (problem.rows[:, None] * nested.last[:, :rank]).T @ problem.weighed
            better = _leading_inputs(seen, taps)[: len(p)]
        else:
            better = refine(problem, p, nested.weight(rank), taps)
            # An orthonormal basis of the same row space: keeps C_P well conditioned and changes nothing else.
            better = torch.linalg.qr(better.T).Q.T
        found = solve(problem, better, taps)
        if found.error(rank) >= nested.error(rank):
            break
        gain = nested.error(rank) - found.error(rank)
        p, nested = better, found
        if gain < 1e-4 * (nested.error(rank) + 1e-300):
            break
    return p, nested


def starts(parts: Sequence[Problem], taps: int, rank: int, start: nn.Module | None) -> list[Tensor]:
    """P of each group to begin with: of a fitted layer, if one is given, else of the whitened subspace."""
    if start is None:
        return [project(part, taps)[:rank] for part in parts]
    return list(matrices(start.get_submodule("first")).detach().to("cpu", torch.float64))


def _inverse(matrix: Tensor) -> Tensor:
    jitter = 1e-6 * matrix.diagonal().mean().clamp_min(1e-300)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix + jitter * torch.eye(len(matrix), dtype=matrix.dtype)))


def _inverse_root(matrix: Tensor) -> Tensor:
    """(r, k): a square root of the inverse of a positive semidefinite matrix, where it has one."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > 1e-6 * values.mean()
    root: Tensor = vectors[:, kept] / values[kept].sqrt()
    return root
