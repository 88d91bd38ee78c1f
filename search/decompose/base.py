"""What every decomposition offers, and the least-squares problem that all of them solve.

One layer is, per group, ``y = W x`` with ``x`` the (im2col) input of ``n = in * taps`` entries ordered channel by
channel, taps inside. Minimising the *output* error under second moments ``C = E[x x^T]`` (of the compressed network's
own input) and ``D = E[y x^T]`` (with the original's output) splits by completing the square::

    E||M (y - V x)||^2  =  floor + ||M (B - V) C^1/2||_F^2        B = (D + ridge W)(C + ridge I)^-1

so every method approximates ``B`` by a structured ``V`` in the norm of ``C``, with rows weighed by ``M``. Without
statistics C = I, D = W and this is the plain weight error.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.matrices import matrices, weight_from
from search.spec import CurvePoint
from tenfold.layers import FactorizedLayer
from tenfold.layers.base import CONVS, TRANSPOSED, Conv, ConvTranspose

__all__ = [
    "CONVS",
    "Fit",
    "Method",
    "Problem",
    "bias_parameters",
    "conv2d_of",
    "conv2d_sizes",
    "conv_of",
    "conv_reason",
    "dense_cost",
    "fill",
    "floor_of",
    "geometry",
    "input_positions",
    "middle_positions",
    "output_positions_of",
    "problems",
    "ranks_between",
    "relative",
    "separable_reason",
    "thin",
]

MAX_POINTS = 60
RIDGE = 1e-6
"""Relative to the mean diagonal of C: enough for float64, far below the noise of a calibration set."""


@dataclass(frozen=True)
class Fit:
    """A factorized layer and its relative output error E||M(y - y^)||^2 / E||M(y - Ey)||^2 on the statistics."""

    module: FactorizedLayer
    error: float


class Method(Protocol):
    """One decomposition. Ranks are per group.

    ``output_positions``: how often the weight is applied to one sample: once for each output position, or for each
    *input* position of a transposed convolution.
    """

    @property
    def name(self) -> str: ...

    def applies_to(self, layer: nn.Module) -> str | None:
        """None when the layer can be decomposed, else the reason why not."""

    def ranks(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        """The lattice of ranks worth trying, all strictly cheaper in parameters than the dense layer."""

    def full_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        """Each rank's largest value, at which the form is exact whatever the weight is."""

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        """``(parameters, macs of one sample)`` of the factorized layer.

        ``input_sizes``: spatial sizes of the layer's input; without them the MACs of links that come before the
        stride are estimated from the strides (exact for the usual padding of half a kernel).
        """

    def variational_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        """The ranks that analytic variational Bayes finds in the weight (``vbmf``), each at least 1."""

    def factorize(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        statistics: Statistics | None = None,
        *,
        metric: Tensor | None = None,
        start: nn.Module | None = None,
    ) -> Fit:
        """The best factorized layer of these ranks.

        ``metric``: (out,) weight of each output's squared error. ``start``: a layer of the same method and ranks,
        fitted to nearly the same statistics, from which iterations may go on.
        """

    def curve(
        self,
        layer: nn.Module,
        statistics: Statistics | None,
        output_positions: int,
        *,
        metric: Tensor | None = None,
    ) -> tuple[CurvePoint, ...]:
        """Error against cost, cheapest first, at most 60 points, none dominated.

        None has as many parameters as the dense layer, or more MACs.
        """


@dataclass
class Problem:
    """One group's weighted least squares, in float64. ``m``: rows' weights (square roots of the metric)."""

    target: Tensor
    """B: (out, in * taps)."""
    moments: Tensor
    """C with its ridge: (in * taps, in * taps), or its diagonal, (in * taps,), where nothing else is in it."""
    rows: Tensor
    """M's diagonal: (out,)."""
    floor: float
    """What no linear map of this input can explain: E||M(y - B x)||^2."""
    energy: float
    """E||M(y - E y)||^2."""

    @property
    def weighed(self) -> Tensor:
        return self.rows[:, None] * self.target

    @cached_property
    def base(self) -> float:
        """The error of V = 0 without the floor: ||M B C^1/2||^2."""
        return float((self.spread(self.weighed) * self.weighed).sum())

    @cached_property
    def white(self) -> bool:
        """C is the identity: the plain weight error, for which much has a closed form."""
        return self.moments.dim() == 1 and bool((self.moments == 1).all())

    @cached_property
    def full(self) -> Tensor:
        """C as a matrix, whatever it is."""
        return torch.diag(self.moments) if self.moments.dim() == 1 else self.moments

    def spread(self, rows: Tensor) -> Tensor:
        """``rows @ C``: (rows, in * taps)."""
        if self.white:
            return rows
        return rows * self.moments if self.moments.dim() == 1 else rows @ self.moments

    def error(self, weight: Tensor) -> float:
        """E||M(y - V x)||^2 of a candidate ``V``: (out, in * taps)."""
        gap = self.rows[:, None] * (self.target - weight)
        return self.floor + float((self.spread(gap) * gap).sum())


def problems(layer: nn.Module, statistics: Statistics | None, metric: Tensor | None = None) -> list[Problem]:
    """The layer's least-squares problems, one for each group."""
    groups, weight = geometry(layer)
    weight = weight.detach().to(torch.float64)
    out = weight.shape[1]
    rows = torch.ones(groups, out, dtype=torch.float64)
    if metric is not None:
        rows = metric.detach().to("cpu", torch.float64).clamp_min(0).sqrt().reshape(groups, out)
        # A row of weight zero would leave its outputs undetermined.
        rows = rows.clamp_min(1e-3 * float(rows.max().clamp_min(1e-30)))
    solved = []
    for g in range(groups):
        w, m = weight[g].cpu(), rows[g]
        if statistics is None:
            energy = float((m[:, None] * w).square().sum())
            solved.append(Problem(w, torch.ones(w.shape[1], dtype=w.dtype), m, 0.0, max(energy, 1e-30)))
            continue
        if isinstance(layer, nn.Embedding):
            solved.append(_look_up(layer, w, m, statistics))
            continue
        c, d = statistics.second[g], statistics.cross[g]
        scale = float(c.diagonal().mean())
        ridge = RIDGE * scale if scale > 0 else 1.0
        eye = torch.eye(len(c), dtype=c.dtype)
        # Sums in float32 leave a singular C (dead inputs, few samples) indefinite: the ridge must be well above that.
        while ridge < scale and int(torch.linalg.cholesky_ex(c + 0.1 * ridge * eye).info):
            ridge *= 10
        c = c + ridge * eye
        d = d + ridge * w
        b = torch.cholesky_solve(d.T, torch.linalg.cholesky(c)).T
        energy = float((m.square() * statistics.energy[g]).sum())
        explained = float((m.square()[:, None] * b * d).sum())
        solved.append(Problem(b, c, m, max(energy - explained, 0.0), max(energy, 1e-30)))
    return solved


def _look_up(layer: nn.Embedding, w: Tensor, m: Tensor, statistics: Statistics) -> Problem:
    """An Embedding's problem: each token by itself, weighed by how often it comes.

    Each counts as seen half a time more (Krichevsky and Trofimov 1981), wanting its own row: those that the
    calibration data lack have a say too.
    """
    half = 0.5 / statistics.count
    c, d = statistics.second[0] + half, statistics.cross[0] + half * w
    b = d / c
    if layer.padding_idx is not None:
        b[:, layer.padding_idx] = w[:, layer.padding_idx]
    energy = float((m.square() * (statistics.energy[0] + half * w.square().sum(1))).sum())
    explained = float((m.square()[:, None] * b * d).sum())
    of_mean = float((m * d.sum(1)).square().sum() / c.sum())
    return Problem(b, c, m, max(energy - explained, 0.0), max(energy - of_mean, 1e-30))


def relative(parts: Sequence[Problem], errors: Sequence[float]) -> float:
    """Groups' absolute errors as one relative error."""
    return sum(errors) / sum(p.energy for p in parts)


def floor_of(parts: Sequence[Problem]) -> float:
    """The relative error that no linear map of the input can take away."""
    return relative(parts, [p.floor for p in parts])


def geometry(layer: nn.Module) -> tuple[int, Tensor]:
    """``(groups, weight as (groups, out / groups, in / groups * taps))``."""
    weight = matrices(layer)
    return len(weight), weight


def conv_of(layer: nn.Module) -> Conv | ConvTranspose:
    """The layer, known to be a convolution, transposed or not.

    Raises:
        TypeError: it is not (``applies_to`` says so beforehand).
    """
    if not isinstance(layer, Conv | ConvTranspose):
        raise TypeError(f"expected a convolution, got {type(layer).__name__}")
    return layer


def conv2d_of(layer: nn.Module) -> nn.Conv2d:
    """The layer, known to be a Conv2d.

    Raises:
        TypeError: it is not (``applies_to`` says so beforehand).
    """
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"expected a Conv2d, got {type(layer).__name__}")
    return layer


def conv2d_sizes(layer: nn.Module) -> tuple[int, int, int, int]:
    """``(kernel rows, kernel columns, in channels, out channels)``, channels per group."""
    conv = conv2d_of(layer)
    rows, columns = conv.kernel_size
    return rows, columns, conv.in_channels // conv.groups, conv.out_channels // conv.groups


def conv_reason(layer: nn.Module, *, transposed: bool = False) -> str | None:
    """Why a layer is not a convolution that the channel methods can take, or None. ``transposed``: those too."""
    if not isinstance(layer, Conv | ConvTranspose) or (isinstance(layer, ConvTranspose) and not transposed):
        return f"{type(layer).__name__} is not a convolution"
    if min(layer.in_channels, layer.out_channels) // layer.groups < 2:
        return f"depthwise: {layer.groups} groups of {layer.in_channels} input channels leave no channels to combine"
    return None


def separable_reason(method: str, layer: nn.Module) -> str | None:
    """Why a layer is not an image convolution whose rows and columns a method can separate, or None."""
    if not isinstance(layer, nn.Conv2d):
        return f"{method} replaces Conv2d, not {type(layer).__name__}"
    if min(layer.kernel_size) == 1:
        return f"a kernel of {layer.kernel_size} has nothing to separate"
    return conv_reason(layer)


def fill(layer: nn.Module, new: FactorizedLayer, **links: Tensor) -> FactorizedLayer:
    """Copy factors into ``new`` (any shape with the right number of elements) and the dense layer's bias.

    ``links``: by the name of a parameter, or of the submodule whose matrices they are.
    """
    parameters = dict(new.named_parameters())
    with torch.no_grad():
        for name, value in links.items():
            if name in parameters:
                parameters[name].copy_(value.reshape(parameters[name].shape))
            else:
                parameters[f"{name}.weight"].copy_(weight_from(new.get_submodule(name), value))
        bias = getattr(layer, "bias", None)
        if new.output_bias is not None and isinstance(bias, Tensor):
            new.output_bias.copy_(bias)
    new.train(layer.training)
    return new


def bias_parameters(layer: nn.Module) -> int:
    bias = getattr(layer, "bias", None)
    return int(bias.numel()) if isinstance(bias, Tensor) else 0


def dense_cost(layer: nn.Module, output_positions: int) -> tuple[int, float]:
    """``(parameters, macs of one sample)`` of the dense layer.

    A look-up multiplies nothing, so no factors of an Embedding can save MACs: they must only save parameters, and
    what they cost is told. That is what the infinity says to ``thin``.
    """
    weight = geometry(layer)[1]
    macs = math.inf if isinstance(layer, nn.Embedding) else weight.numel() * output_positions
    return weight.numel() + bias_parameters(layer), macs


def ranks_between(low: int, high: int, count: int) -> list[int]:
    """At most ``count`` integers of [low, high], denser at the low end, where a step means most."""
    if high < low:
        return []
    if high - low + 1 <= count:
        return list(range(low, high + 1))
    grid = torch.linspace(0, 1, count, dtype=torch.float64) ** 1.5
    return sorted({low + round(float(t) * (high - low)) for t in grid})


def thin(points: Sequence[CurvePoint], dense: tuple[int, float]) -> tuple[CurvePoint, ...]:
    """What is worth offering, cheapest first, at most 60 points.

    A point with as many parameters as the dense layer, or more MACs, never is; one with the dense layer's MACs saves
    parameters alone. A point is worth it when nothing cheaper is as good, counting parameters, MACs, or both relative
    to the dense layer.
    """
    cheaper = [p for p in points if p.parameters < dense[0] and p.macs <= dense[1]]
    costs: tuple[Callable[[CurvePoint], float], ...] = (
        lambda p: p.parameters,
        lambda p: p.macs,
        lambda p: p.parameters / dense[0] + p.macs / dense[1],
    )
    kept: dict[tuple[int, ...], CurvePoint] = {}
    for cost in costs:
        best = math.inf
        for p in sorted(cheaper, key=lambda p: (cost(p), p.error)):
            if p.error < best:
                best = p.error
                kept[p.ranks] = p
    ordered = sorted(kept.values(), key=lambda p: (p.parameters, p.macs))
    if len(ordered) > MAX_POINTS:
        ordered = [ordered[i * (len(ordered) - 1) // (MAX_POINTS - 1)] for i in range(MAX_POINTS)]
    return tuple(ordered)


def input_positions(layer: nn.Module, output_positions: int, input_sizes: Sequence[int] | None) -> int:
    """How often a pointwise link before the kernel is applied; without the input's sizes, as the strides say."""
    if not isinstance(layer, CONVS):
        return output_positions
    return output_positions * math.prod(layer.stride) if input_sizes is None else math.prod(input_sizes)


def output_positions_of(layer: nn.Module, output_positions: int, input_sizes: Sequence[int] | None) -> int:
    """How often a pointwise link behind the kernel is applied: a transposed convolution has outputs of its own number.

    Without the input's sizes, as the strides say.
    """
    if not isinstance(layer, TRANSPOSED):
        return output_positions
    if input_sizes is None:
        return output_positions * math.prod(layer.stride)
    return math.prod(_sizes_along(layer, input_sizes))


def middle_positions(layer: nn.Module, output_positions: int, input_sizes: Sequence[int] | None) -> int:
    """How many outputs a k x 1 link has: it strides along the first axis, and the others are still the input's."""
    if input_sizes is None:
        first, *others = conv_of(layer).stride
        return output_positions * (first if isinstance(layer, TRANSPOSED) else math.prod(others))
    return _sizes_along(layer, input_sizes)[0] * math.prod(input_sizes[1:])


def _sizes_along(layer: nn.Module, input_sizes: Sequence[int]) -> tuple[int, ...]:
    """Spatial output sizes of a convolution for spatial ``input_sizes``."""
    layer = conv_of(layer)
    if isinstance(layer, ConvTranspose):
        axes = zip(
            *(input_sizes, layer.stride, layer.padding, layer.dilation, layer.kernel_size, layer.output_padding),
            strict=True,
        )
        return tuple((n - 1) * s - 2 * p + d * (k - 1) + extra + 1 for n, s, p, d, k, extra in axes)
    if isinstance(layer.padding, str):
        before = after = [0] * len(layer.kernel_size)
        if layer.padding == "same":
            both = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            before, after = [b // 2 for b in both], [b - b // 2 for b in both]
    else:
        before = after = list(layer.padding)
    return tuple(
        (n + b + a - d * (k - 1) - 1) // s + 1
        for n, b, a, d, k, s in zip(
            input_sizes, before, after, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    )
