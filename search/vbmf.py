"""Ranks by analytic variational Bayes (Nakajima et al. 2013), as MUSCO uses them. Imports no torch."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from search.spec import CurvePoint

__all__ = ["WEAKENINGS", "analysed_form", "evbmf_rank", "weakened", "weakened_ranks"]

WEAKENINGS = (0.8, 1.0)
"""The w that a search starts from: MUSCO's default, and EVBMF's ranks as they are."""
_FORMS = ("tucker2", "svd")
"""MUSCO's forms, best first: of kernels and of matrices. Others follow by name where these are not to be had."""


def evbmf_rank(matrix: NDArray[np.floating], shape: tuple[int, int] | None = None) -> int:
    """How many singular values stand out of the noise, by the global solution of empirical variational Bayes.

    Args:
        matrix: (rows, columns), or its singular values when ``shape`` says what they came from.
        shape: ``(rows, columns)`` of the matrix behind the singular values.

    Raises:
        ValueError: the array is empty, or is neither a matrix nor singular values with a shape.

    Source: with L <= M, a = L / M and t = 2.5129 sqrt(a): x = (1 + t)(1 + a / t); the noise s2 minimises the free
    energy; rank = #{s > sqrt(M s2 x)}.
    """
    values: NDArray[np.float64] = np.asarray(matrix, dtype=np.float64)
    if shape is None:
        if values.ndim != 2 or not values.size:
            raise ValueError(f"evbmf_rank takes a matrix, or singular values with a shape; got shape {values.shape}")
        shape = (values.shape[0], values.shape[1])
        values = np.asarray(np.linalg.svd(values, compute_uv=False), dtype=np.float64)
    small, large = sorted(shape)
    spectrum = np.sort(values.ravel())[::-1][:small]
    if not spectrum.size or spectrum[0] <= 0:
        return 0
    spectrum = np.maximum(spectrum, spectrum[0] * 1e-12)
    alpha = small / large
    tau = 2.5129 * math.sqrt(alpha)
    x_bar = (1 + tau) * (1 + alpha / tau)
    noise = _noise(spectrum, small, large, x_bar)
    return int((spectrum > math.sqrt(large * noise * x_bar)).sum())


def weakened(rank: int, full: int, w: float) -> int:
    """MUSCO's weakened rank ``R - w (R - R_EVBMF)``, rounded down, at least 1: w = 0 keeps all, w = 1 takes EVBMF's."""
    return max(1, min(full, int(full - w * (full - rank))))


def analysed_form(curves: Mapping[str, Sequence[CurvePoint]]) -> str | None:
    """The method whose ranks are analysed, of those with points on their curve; None where there is none."""
    able = [method for method, curve in curves.items() if curve]
    return min(able, key=lambda m: (_FORMS.index(m) if m in _FORMS else len(_FORMS), m), default=None)


def weakened_ranks(curve: Sequence[CurvePoint], chosen: Sequence[int], w: float) -> tuple[int, ...]:
    """EVBMF's ranks ``chosen``, weakened towards the highest ranks of the ``curve``, which still make the site smaller.

    Raises:
        ValueError: the curve is empty, or its points have another number of ranks.
    """
    highest = [max(ranks) for ranks in zip(*(p.ranks for p in curve), strict=True)]
    return tuple(weakened(rank, most, w) for rank, most in zip(chosen, highest, strict=True))


def _noise(spectrum: NDArray[np.float64], small: int, large: int, x_bar: float) -> float:
    """The noise variance that minimises the free energy between its known bounds."""
    alpha = small / large
    start = max(0, min(math.ceil(small / (1 + alpha)) - 1, len(spectrum)) - 1) + 1
    tail = spectrum[min(start, len(spectrum) - 1) :]
    upper = float((spectrum**2).sum()) / (small * large)
    lower = max(float(tail[0] ** 2) / (large * x_bar), float((tail**2).mean()) / large)
    if lower >= upper:
        return upper

    def free_energy(noise: float) -> float:
        x = spectrum**2 / (large * noise)
        above, below = x[x > x_bar], x[x <= x_bar]
        half = above - (1 + alpha)
        tau = 0.5 * (half + np.sqrt(np.maximum(half**2 - 4 * alpha, 0)))
        terms = (below - np.log(below)).sum() + (above - tau).sum() + np.log((tau + 1) / above).sum()
        return float(terms + alpha * np.log(tau / alpha + 1).sum() + (small - len(spectrum)) * math.log(noise))

    # In units of the upper bound, so that the solver's absolute tolerance means something at any scale.
    found = minimize_scalar(lambda t: free_energy(t * upper), bounds=(lower / upper, 1.0), method="bounded")
    return float(found.x) * upper
