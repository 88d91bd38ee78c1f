"""Separating kernels that have one input channel in each group: all groups at once, both factors in closed form.

With one input channel ``V x = sum_s Q_s (P_s x)``, ``P_s`` along the first axis of the kernel, ``Q_s`` along the
others. Both alternate as in ``projection``, but a kernel has few entries and a network thousands of such groups: here
the normal equations of every group are solved directly, in one batch (3 x 3 on 960 channels, one core: 1 s for 14).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from search.decompose.base import Problem
from search.decompose.projection import starts

__all__ = ["separate"]

SWEEPS = 50
ENOUGH = 1e-6
"""Of the error: less than that in a sweep ends the search."""


def separate(
    parts: Sequence[Problem], columns: int, rank: int, start: nn.Module | None = None
) -> tuple[Tensor, Tensor, list[float]]:
    """The best ``P`` (groups, rank, rows), ``Q`` (groups, out, rank, columns) and the groups' errors.

    ``parts``: one problem a group, of ``rows * columns`` inputs. ``start``: a fitted layer of these ranks to begin at.
    """
    wanted = torch.stack([part.target for part in parts])
    moments = torch.stack([part.full for part in parts])
    weights = torch.stack([part.rows.square() for part in parts])
    groups, out, n = wanted.shape
    rows = n // columns
    cross = (wanted @ moments).reshape(groups, out, rows, columns)
    shaped = moments.reshape(groups, rows, columns, rows, columns)
    bases = torch.tensor([part.base for part in parts], dtype=torch.float64)

    def last_for(first: Tensor) -> tuple[Tensor, Tensor]:
        """Q for P, the same for every output whatever the outputs weigh, and the errors."""
        gram = torch.einsum("gsi,gicjd,gtj->gsctd", first, shaped, first).flatten(3).flatten(1, 2)
        right = torch.einsum("goic,gsi->gosc", cross, first).flatten(2)
        last = _solved(gram, right.mT).mT
        gains = (weights[:, :, None] * right * last).sum((1, 2))
        return last.reshape(groups, out, rank, columns), (bases - gains).clamp_min(0)

    def first_for(last: Tensor) -> Tensor:
        """P for Q, its rows made orthonormal, which changes nothing else and keeps the next step well conditioned."""
        pairs = torch.einsum("go,gosc,gotd->gsctd", weights, last, last)
        gram = torch.einsum("gsctd,gicjd->gsitj", pairs, shaped).flatten(3).flatten(1, 2)
        right = torch.einsum("go,gosc,goic->gsi", weights, last, cross).flatten(1)
        found = _solved(gram, right[:, :, None]).reshape(groups, rank, rows)
        basis: Tensor = torch.linalg.qr(found.mT).Q
        return basis.mT

    first = torch.stack(starts(parts, columns, rank, start))
    last, errors = last_for(first)
    for _ in range(SWEEPS):
        better = first_for(last)
        moved, after = last_for(better)
        won = after < errors
        first = torch.where(won[:, None, None], better, first)
        last = torch.where(won[:, None, None, None], moved, last)
        gain = float((errors - after)[won].sum())
        errors = torch.minimum(errors, after)
        if gain <= ENOUGH * float(errors.sum()):
            break
    floors = torch.tensor([part.floor for part in parts], dtype=torch.float64)
    return first, last, (floors + errors).tolist()


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    """Of positive matrices that dead inputs may leave singular."""
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-300)
    jitter = 1e-10 * scale[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype)
    found: Tensor = torch.cholesky_solve(right, torch.linalg.cholesky(gram + jitter))
    return found
