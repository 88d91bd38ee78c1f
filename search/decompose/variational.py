"""Ranks by analytic variational Bayes (``vbmf``) of the unfoldings that a method cuts."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from search.matrices import matrices, taps_of
from search.vbmf import evbmf_rank

__all__ = ["by_inputs", "by_outputs", "by_rows", "variational_rank"]

ZERO = 1e-5
"""Of the largest singular value: below it lies the rounding of a product of factors in float32."""


def variational_rank(layer: nn.Module, unfold: Callable[[Tensor], Tensor]) -> int:
    """The rank that stands out of the noise in one unfolding of the weight, at least 1.

    ``unfold``: from (out, in, *kernel), of one group and in float64, to a matrix. With groups, the largest of all.
    """
    whole = matrices(layer).detach().to("cpu", torch.float64)
    parts = whole.reshape(*whole.shape[:2], whole.shape[2] // taps_of(layer), *getattr(layer, "kernel_size", ()))
    return max(1, *(_rank(unfold(part)) for part in parts))


def _rank(matrix: Tensor) -> int:
    """From the eigenvalues of the short side: the middle unfolding of a train is as large as a matrix can be."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values = torch.linalg.eigvalsh(short @ short.T).clamp_min(0).sqrt()
    return evbmf_rank(values.numpy(), (matrix.shape[0], matrix.shape[1]))


def by_outputs(weight: Tensor) -> Tensor:
    return _core(weight).flatten(1)


def by_inputs(weight: Tensor) -> Tensor:
    return _core(weight).transpose(0, 1).flatten(1)


def _core(weight: Tensor) -> Tensor:
    """The weight in coordinates of the channel directions that it uses, all of them or fewer at a later stage.

    A kernel that was compressed before has exact zeros among its singular values. Beside those, variational Bayes
    would take all others for signal; in the core, as MUSCO decomposes it again, the smallest are noise as ever.
    """
    for axis in (0, 1):
        unfolded = weight.movedim(axis, 0).flatten(1)
        values, vectors = torch.linalg.eigh(unfolded @ unfolded.T)
        used = values > ZERO**2 * values[-1]
        if bool(used.any()) and not bool(used.all()):
            weight = torch.tensordot(vectors[:, used].T, weight.movedim(axis, 0), 1).movedim(0, axis)
    return weight


def by_rows(weight: Tensor) -> Tensor:
    """(in * kernel rows, out * kernel columns), columns all axes but the first."""
    return weight.movedim(0, 2).flatten(2).flatten(0, 1)
