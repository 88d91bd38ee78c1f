"""``svd``: the layer's matrix ``out x (in * taps)`` at rank r: k x k then 1 x 1; a Linear becomes two.

An Embedding's matrix has a column for each token; it becomes a look-up of r numbers and a Linear.

Data-aware this is reduced-rank regression: with U the top-r eigenvectors of ``M B C B' M``, ``V = M^-1 U U' M B``
is the best matrix of rank r in the norm of C (Eckart-Young in whitened coordinates); one eigendecomposition gives all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import (
    Fit,
    Problem,
    bias_parameters,
    conv_reason,
    dense_cost,
    fill,
    geometry,
    output_positions_of,
    problems,
    ranks_between,
    relative,
    thin,
)
from search.decompose.variational import by_outputs, variational_rank
from search.matrices import has_windows
from search.spec import CurvePoint
from tenfold.layers import factorized_like

__all__ = ["SVD", "spectrum"]


class SVD:
    name = "svd"

    def applies_to(self, layer: nn.Module) -> str | None:
        if isinstance(layer, nn.Linear):
            reason = None if min(layer.weight.shape) > 1 else "a Linear with one input or output has no rank to cut"
        elif isinstance(layer, nn.Embedding):
            reason = None if layer.max_norm is None else "its rows are cut to max_norm as they are looked up"
        elif has_windows(layer):
            reason = conv_reason(layer, transposed=True)
        else:
            reason = f"svd replaces Linear, Embedding and convolutions, not {type(layer).__name__}"
        if reason is None and not self.ranks(layer):
            reason = "no rank makes it smaller"
        return reason

    def ranks(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        _, weight = geometry(layer)
        _, out, n = weight.shape
        # r (out + n) < out n, strictly, so that r is below both.
        return tuple((r,) for r in ranks_between(1, (out * n - 1) // (out + n), 60))

    def full_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        return (min(geometry(layer)[1].shape[1:]),)

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        groups, weight = geometry(layer)
        _, out, n = weight.shape
        first, last = groups * ranks[0] * n, groups * ranks[0] * out
        macs = last * output_positions_of(layer, output_positions, input_sizes)
        if not isinstance(layer, nn.Embedding):  # whose first link only looks up
            macs += first * output_positions
        return first + last + bias_parameters(layer), macs

    def variational_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        return (variational_rank(layer, by_outputs),)

    def factorize(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        statistics: Statistics | None = None,
        *,
        metric: Tensor | None = None,
        start: nn.Module | None = None,
    ) -> Fit:
        r = ranks[0]
        parts = problems(layer, statistics, metric)
        lasts, firsts, errors = [], [], []
        for part in parts:
            values, vectors = spectrum(part)
            u = vectors[:, :r]
            last, first = u / part.rows[:, None], u.T @ part.weighed
            # Equal norms on both sides of each channel: what gradient descent and low precision like.
            scale = (last.norm(dim=0) / first.norm(dim=1).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
            lasts.append(last / scale)
            firsts.append(first * scale[:, None])
            errors.append(part.floor + float(values[r:].sum()))
        new = fill(layer, factorized_like(layer, self.name, ranks), first=torch.cat(firsts), last=torch.cat(lasts))
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
        spectra = [_singular_squares(p) for p in parts]
        sizes = None if statistics is None else statistics.input_sizes
        points = []
        for ranks in self.ranks(layer):
            parameters, macs = self.cost(layer, ranks, output_positions, input_sizes=sizes)
            errors = [p.floor + float(v[ranks[0] :].sum()) for p, v in zip(parts, spectra, strict=True)]
            points.append(CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=relative(parts, errors)))
        return thin(points, dense_cost(layer, output_positions))


def spectrum(part: Problem) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and not negative, and eigenvectors of ``M B C B' M``: (out,), (out, out)."""
    values, vectors = torch.linalg.eigh(part.spread(part.weighed) @ part.weighed.T)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _singular_squares(part: Problem) -> Tensor:
    """The same eigenvalues alone; of the shorter side where C allows it."""
    weighed = part.weighed
    if part.white and weighed.shape[0] > weighed.shape[1]:
        weighed = weighed.T
        gram = weighed @ weighed.T
    else:
        gram = part.spread(weighed) @ weighed.T
    squares: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    return squares
