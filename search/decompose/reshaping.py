"""What the reshaped methods (Su et al. 2018) share: channels as two modes each, and a Kronecker-separable whitening.

The moments C of a layer's input tie all entries of (s1, s2, k) together, so modes cannot be cut one at a time in the
norm of C. Starts are found in the norm of the nearest separable thing instead, C ~ C1 (x) C2 (x) Ck (partial traces)
and M ~ m1 (x) m2 (geometric means); what is solved afterwards is solved, and measured, in the norm of C itself.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from search.decompose.base import CONVS, Problem, conv_reason, geometry
from tenfold.layers.reshaped import balanced

__all__ = ["Modes", "Separable", "modes_of", "reshaped_reason", "separable"]


@dataclass(frozen=True)
class Modes:
    """A layer's shape as modes, per group."""

    groups: int
    s: tuple[int, int]
    t: tuple[int, int]
    kernel: tuple[int, ...]
    """Empty for a Linear."""
    stride: int
    """Input positions an output position."""

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def dense(self) -> int:
        """Weights of all groups."""
        return self.groups * math.prod(self.s) * math.prod(self.t) * self.taps


def modes_of(layer: nn.Module) -> Modes:
    groups, weight = geometry(layer)
    sources = int(layer.in_channels) // groups if isinstance(layer, CONVS) else weight.shape[2]
    kernel, stride = (layer.kernel_size, math.prod(layer.stride)) if isinstance(layer, CONVS) else ((), 1)
    return Modes(groups, balanced(sources), balanced(weight.shape[1]), tuple(kernel), stride)


def reshaped_reason(layer: nn.Module, method: str) -> str | None:
    """Why a layer has no channels to reshape, or None.

    A prime number of channels is refused: as 1 x p the mode would not be reshaped at all, and the plain methods do
    that with fewer links.
    """
    if not isinstance(layer, (nn.Linear, *CONVS)):
        return f"{method} replaces Linear and convolutions, not {type(layer).__name__}"
    reason = conv_reason(layer) if isinstance(layer, CONVS) else None
    if reason is not None:
        return reason
    modes = modes_of(layer)
    for what, pair in (("input", modes.s), ("output", modes.t)):
        if pair[0] == 1:
            return f"{pair[1]} {what} channels (per group) are prime: they have no two factors to be reshaped to"
    return None


@dataclass(frozen=True)
class Separable:
    """A problem's norm as a product over the modes, and its target in whitened coordinates."""

    rows: tuple[Tensor, Tensor]
    """m1: (T1,), m2: (T2,)."""
    unroots: tuple[Tensor, Tensor, Tensor]
    """C1^-1/2, C2^-1/2, Ck^-1/2."""
    whitened: Tensor
    """(T1, T2, S1, S2, taps)."""


def separable(problem: Problem, modes: Modes) -> Separable:
    """The nearest separable norm and the target in it."""
    (s1, s2), k = modes.s, modes.taps
    log = problem.rows.log().reshape(modes.t)
    m1, m2 = log.mean(1).exp(), (log.mean(0) - log.mean()).exp()
    if problem.white:
        traces = [torch.eye(size, dtype=torch.float64) for size in (s1, s2, k)]
    else:
        c = problem.full.reshape(s1, s2, k, s1, s2, k)
        total = problem.full.diagonal().sum()
        traces = [torch.einsum(form, c) / total for form in ("abcdbc->ad", "abcaec->be", "abcabf->cf")]
        traces[0] *= total  # the scale of C belongs to the first mode alone
    pairs = [_roots(trace) for trace in traces]
    b = problem.target.reshape(*modes.t, s1, s2, k) * m1[:, None, None, None, None] * m2[:, None, None, None]
    whitened = torch.einsum("tuabc,ad,be,cf->tudef", b, *(root for root, _ in pairs))
    return Separable((m1, m2), (pairs[0][1], pairs[1][1], pairs[2][1]), whitened)


def _roots(c: Tensor) -> tuple[Tensor, Tensor]:
    """``c^1/2, c^-1/2`` of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(c)
    values = values.clamp_min(float(values.max()) * 1e-12 + 1e-300)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
