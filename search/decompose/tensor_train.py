"""Tensor trains of a matrix whose rows and columns are written with digits (Oseledets 2011; Novikov et al. 2015)::

    V[(o_1 .. o_d), (i_1 .. i_d)] = G_1[:, o_1, i_1, :] G_2[:, o_2, i_2, :] ... G_d[:, o_d, i_d, :]

A core is (r_{k-1}, o_k, i_k, r_k) with r_0 = r_d = 1. The kernel of a convolution is the matrix out x (in * taps), its
taps one more column digit beside a row digit of size 1: one algebra serves both.

**Whitening.** TT-SVD is near the best train in the Frobenius norm. To make that the norm of C without losing the
digits, C is replaced by C_1 x ... x C_d, C_k its partial trace over all other digits, and the metric likewise by means:
every mode is then whitened by a small matrix of its own, which a core can undo for itself. TT-SVD is done once, at the
highest rank; TT-rounding gives the lower ones from cores alone.

**Refitting.** V is linear in each core, V = P(G), so with W = M^2 the best G solves P'(W P(G) C) = P'(W B C), here by
conjugate gradients, which never raise the error. With the cores on both sides orthonormal and the coordinates white,
P'(W P(.) C) is near the identity, so that a few steps are enough. Each costs one product with C: out n^2
multiplications. Where the budgets leave no step (on a curve beyond about 256 channels of 3 x 3, in a fit beyond 512, or
3000 features of a Linear) the whitened start stands, with its true error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from search.decompose.base import Problem
from tenfold.layers.contracting import build

__all__ = ["Train", "Whitened", "equal_norms", "refit", "train_matrix", "tt_round", "tt_svd", "tt_unfolding", "whiten"]

Train = list[Tensor]

STEPS = 8
"""Conjugate-gradient steps for one core, at most."""
TOLERANCE = 1e-3
"""A sweep that gains less, of the error it began with, is the last."""


def tt_svd(weight: Tensor, out_modes: Sequence[int], in_modes: Sequence[int], rank: int | Sequence[int]) -> Train:
    """The train of ``weight``: (out, in), by truncated SVDs from the first digit to the last (Oseledets 2011, alg. 1).

    Args:
        rank: the most that each r_k may be, or one for each of r_1 .. r_{d-1}; no r_k exceeds what is exact.

    Raises:
        ValueError: the modes do not make up the weight.
    """
    d = len(out_modes)
    if d != len(in_modes) or weight.shape != (math.prod(out_modes), math.prod(in_modes)):
        raise ValueError(
            f"tt_svd needs modes of the weight's size, got {tuple(out_modes)} x {tuple(in_modes)} for a weight of "
            f"{tuple(weight.shape)}"
        )
    rest = _paired_digits(weight, out_modes, in_modes)
    cores, r = [], 1
    for o, i, most in zip(out_modes[:-1], in_modes[:-1], _spread(rank, d), strict=True):
        basis, rest = _leading(rest.reshape(r * o * i, -1), most)
        cores.append(basis.reshape(r, o, i, -1))
        r = cores[-1].shape[3]
    return [*cores, rest.reshape(r, out_modes[-1], in_modes[-1], 1)]


def tt_unfolding(matrix: Tensor, out_modes: Sequence[int], in_modes: Sequence[int], k: int) -> Tensor:
    """The matrix whose rank is the train's r_k: the first k digits of both against all others."""
    return _paired_digits(matrix, out_modes, in_modes).flatten(0, 2 * k - 1).flatten(1)


def tt_round(cores: Sequence[Tensor], rank: int | Sequence[int]) -> Train:
    """The train at lower ranks, without its matrix (Oseledets 2011, alg. 2): QR back, truncated SVDs forth.

    After the QRs all cores to the right are orthonormal, so that the SVD of one core is that of the whole train.
    """
    cores = _right_orthonormal(cores)
    for k, most in enumerate(_spread(rank, len(cores))):
        r, o, i, _ = cores[k].shape
        basis, rest = _leading(cores[k].reshape(r * o * i, -1), most)
        cores[k] = basis.reshape(r, o, i, -1)
        cores[k + 1] = torch.tensordot(rest, cores[k + 1], 1)
    return cores


@dataclass(frozen=True)
class Whitened:
    """A problem in coordinates where every mode of C and of the metric is white on average, and a train for it."""

    problem: Problem
    cores: Train
    row_factors: tuple[Tensor, ...]
    """(o_k, o_k) for each core, diagonal: the mode's part of the metric."""
    column_factors: tuple[Tensor, ...]
    """(i_k, i_k) for each core: C_k^1/2."""

    def at(self, ranks: Sequence[int]) -> Train:
        """The train of these ranks, in the white coordinates."""
        return tt_round(self.cores, ranks)

    def enter(self, cores: Sequence[Tensor]) -> Train:
        """A train of the layer, brought to the white coordinates."""
        factors = zip(cores, self.row_factors, self.column_factors, strict=True)
        return [torch.einsum("rois,po,ij->rpjs", core, rows, columns) for core, rows, columns in factors]

    def leave(self, cores: Sequence[Tensor]) -> Train:
        """A train in the white coordinates, brought to the layer's own."""
        factors = zip(cores, self.row_factors, self.column_factors, strict=True)
        return [
            torch.einsum("rois,po,ij->rpjs", core, torch.linalg.inv(rows), torch.linalg.inv(columns))
            for core, rows, columns in factors
        ]


def whiten(problem: Problem, out_modes: Sequence[int], in_modes: Sequence[int], rank: int | Sequence[int]) -> Whitened:
    """The problem in white coordinates and its TT-SVD at the highest ranks that will be asked for."""
    target, metric = problem.target, problem.rows.square()
    scale = torch.ones_like(metric)[:, None]
    row_factors = []
    for k, o in enumerate(out_modes):
        means = metric.reshape(math.prod(out_modes[:k]), o, -1).mean((0, 2))
        row_factors.append((means / metric.mean()).sqrt().diag())
        scale = _along_rows(scale, out_modes, k, row_factors[-1])
    if problem.white:
        column_factors = [torch.eye(i, dtype=target.dtype) for i in in_modes]
        moments = problem.moments
    else:
        target, moments, column_factors = _white_columns(problem, in_modes)
    white = Problem(scale * target, moments, problem.rows / scale[:, 0], problem.floor, problem.energy)
    return Whitened(white, tt_svd(white.target, out_modes, in_modes, rank), tuple(row_factors), tuple(column_factors))


def _white_columns(problem: Problem, in_modes: Sequence[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """B and C with every column digit whitened, and the factors C_k^1/2 that did it."""
    target = problem.target
    moments = problem.full
    factors = []
    for k, i in enumerate(in_modes):
        before, behind = math.prod(in_modes[:k]), math.prod(in_modes[k + 1 :])
        blocks = problem.full.reshape(before, i, behind, before, i, behind)
        values, vectors = torch.linalg.eigh(torch.einsum("aibajb->ij", blocks))
        values = values.clamp_min(1e-6 * float(values.max()) + 1e-300)
        # Of mean square 1, so that C keeps its size whatever the number of modes.
        root = (vectors * (values / values.mean()).sqrt()) @ vectors.T
        factors.append(root)
        target = _along_rows(target.T, in_modes, k, root).T
        unroot = torch.linalg.inv(root)
        moments = _along_rows(_along_rows(moments, in_modes, k, unroot).T, in_modes, k, unroot)
    return target, moments, factors


def refit(problem: Problem, cores: Train, *, sweeps: int, macs: float) -> tuple[Train, float]:
    """``sweeps`` rounds of least squares over all cores with ``macs`` multiplications at most: never worse.

    Returns the train and its error E||M(y - V x)||^2.
    """
    metric = problem.rows.square()[:, None]
    gap = problem.target - train_matrix(cores)
    pull = metric * problem.spread(gap)  # W (B - V) C: minus half the gradient with respect to V
    error = float(torch.dot(gap.flatten(), pull.flatten()))
    del gap  # as large as the layer, of which a sweep holds a few already
    # Products with C that each core may take; few sweeps of many steps do more than many of few.
    # One with the identity costs nothing beside those with the cores.
    product = pull.numel() * (max(len(core) for core in cores) if problem.white else pull.shape[1])
    products = int(macs / (len(cores) * product))
    sweeps = min(sweeps, max(1, products // STEPS))
    steps = min(STEPS, products // sweeps)
    for _ in range(sweeps if steps else 0):
        cores = _right_orthonormal(cores)
        behind = _products_behind(cores)
        before = torch.ones(1, 1, 1, dtype=pull.dtype)
        for k in range(len(cores)):
            cores[k], pull = _better_core(cores[k], before, behind[k], problem, pull, steps)
            if k + 1 < len(cores):
                r, o, i, s = cores[k].shape
                q, rest = torch.linalg.qr(cores[k].reshape(r * o * i, s))
                cores[k], cores[k + 1] = q.reshape(r, o, i, -1), torch.tensordot(rest, cores[k + 1], 1)
                joined = torch.einsum("abr,rois->aobis", before, cores[k])
                before = joined.reshape(before.shape[0] * o, before.shape[1] * i, -1)
        found = float(((problem.target - train_matrix(cores)) * pull).sum())
        gain, error = error - found, found
        if gain < TOLERANCE * error:
            break
    return cores, problem.floor + max(error, 0.0)


def equal_norms(cores: Train) -> Train:
    """The same train with cores of equal norm: what gradient descent and low precision like."""
    norms = torch.stack([core.norm() for core in cores]).clamp_min(1e-30)
    mean = norms.log().mean().exp()
    return [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]


def _better_core(
    core: Tensor, before: Tensor, behind: Tensor, problem: Problem, pull: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Conjugate gradients on a core beside ``before`` (O_<, I_<, r) and ``behind`` (s, O_>, I_>); and the new pull."""
    _, o, i, _ = core.shape
    metric = problem.rows.square()[:, None]
    digits = (before.shape[0], o, behind.shape[1], before.shape[1], i, behind.shape[2])

    def spread(x: Tensor) -> Tensor:
        left = torch.einsum("abr,rois->aobis", before, x)
        return torch.einsum("aobis,syz->aoybiz", left, behind).reshape(pull.shape)

    def gather(x: Tensor) -> Tensor:
        half = torch.einsum("aoybiz,abr->royiz", x.reshape(digits), before)
        return torch.einsum("royiz,syz->rois", half, behind)

    residual = gather(pull)
    direction, rho = residual, float(residual.square().sum())
    enough = 1e-20 * rho
    for _ in range(steps):
        image = metric * problem.spread(spread(direction))
        along = gather(image)
        curvature = float((direction * along).sum())
        if rho <= enough or curvature <= 0:
            break
        step = rho / curvature
        core, residual, pull = core + step * direction, residual - step * along, pull.sub_(image, alpha=step)
        rho, previous = float(residual.square().sum()), rho
        direction = residual + (rho / previous) * direction
    return core, pull


def _paired_digits(matrix: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> Tensor:
    """(out, in) as (o_1, i_1, o_2, i_2, ..)."""
    d = len(out_modes)
    return matrix.reshape(*out_modes, *in_modes).permute([axis for k in range(d) for axis in (k, d + k)])


def train_matrix(cores: Sequence[Tensor]) -> Tensor:
    """(out, in) of a train."""
    return build(cores)[0, :, :, 0]


def _products_behind(cores: Train) -> Train:
    """For each core the product of all behind it: (r_k, O_>, I_>)."""
    found = [torch.ones(1, 1, 1, dtype=cores[0].dtype)]
    for core in reversed(cores[1:]):
        joined = torch.einsum("rois,syz->royiz", core, found[-1])
        found.append(joined.reshape(core.shape[0], core.shape[1] * found[-1].shape[1], -1))
    return found[::-1]


def _right_orthonormal(cores: Sequence[Tensor]) -> Train:
    """The same train; every core but the first has orthonormal rows as (r_{k-1}, o_k i_k r_k)."""
    cores = list(cores)
    for k in range(len(cores) - 1, 0, -1):
        q, rest = torch.linalg.qr(cores[k].flatten(1).T)
        cores[k] = q.T.reshape(-1, *cores[k].shape[1:])
        cores[k - 1] = torch.tensordot(cores[k - 1], rest, ([3], [1]))
    return cores


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading left singular vectors (rows, r), and what they leave of the matrix (r, columns).

    From the Gram matrix of the shorter side: a train at low rank needs few of many, and columns may be a million.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    q, square = torch.linalg.qr(matrix) if tall else (None, matrix)
    vectors = torch.linalg.eigh(square @ square.T).eigenvectors.flip(1)[:, :rank]
    return vectors if q is None else q @ vectors, vectors.T @ square


def _along_rows(matrix: Tensor, modes: Sequence[int], k: int, factor: Tensor) -> Tensor:
    """A matrix whose row digit ``k`` is multiplied by ``factor`` (symmetric)."""
    digits = matrix.reshape(math.prod(modes[:k]), modes[k], -1)
    return torch.matmul(factor, digits).reshape(matrix.shape)


def _spread(rank: int | Sequence[int], d: int) -> tuple[int, ...]:
    ranks = (rank,) * (d - 1) if isinstance(rank, int) else tuple(rank)
    if len(ranks) != d - 1 or any(r < 1 for r in ranks):
        raise ValueError(f"a train of {d} cores has {d - 1} ranks of at least 1, got {ranks}")
    return ranks
