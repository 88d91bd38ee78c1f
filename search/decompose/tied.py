"""Layers that hold one weight, decomposed once: a site of several layers by a method of one.

The weight is fitted to all its uses together. Layers of one kind multiply it with inputs of the same size, so their
moments are added, each relative to its outputs' energy, and the method does the rest. An encoder and a decoder that
multiplies with its weight turned round, or a Linear that maps to tokens and their Embedding, see the two sides of it:
with ``D`` (n, n) the moments of what the decoder reads, or the tokens' shares on a diagonal, and ``C`` (d, d) those of
what the Linear reads, both relative to the energies,

    sum of relative errors  =  tr (W - V)' D (W - V)  +  tr (W - V) C (W - V)'

In the eigenvectors D = P diag(p) P' and C = Q diag(c) Q' that is ``sum_ij (p_i + c_j) (P'WQ - P'VQ)_ij^2``: a weighted
low-rank approximation (Srebro and Jaakkola 2003), whose factors alternate in closed form. How much each output counts
(a batch norm behind one of them) is left out, for then no eigenvectors part the sum.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import Method, Problem, fill, problems, relative, thin
from search.decompose.joint import Group, JointFit
from search.matrices import matrices, weight_of
from search.spec import CurvePoint
from tenfold.layers import FactorizedLayer, LowRankHead, TurnedLinear, factorized_like, members_like
from tenfold.layers.tied import tie, tied_reason

__all__ = ["Tied", "same_weight"]

SWEEPS = 30
ENOUGH = 1e-4
"""Of the error: less than that in a sweep ends the search."""


def same_weight(network: nn.Module, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Those of the named layers that hold one weight, two or more each, in the order of ``names``."""
    holders: dict[int, list[str]] = {}
    for name in names:
        weight = getattr(network.get_submodule(name), "weight", None)
        if isinstance(weight, Tensor):
            holders.setdefault(id(weight), []).append(name)
    return tuple(tuple(held) for held in holders.values() if len(held) > 1)


class Tied:
    """``JointMethod`` of layers with one weight, by a ``Method`` of one layer."""

    def __init__(self, method: Method) -> None:
        self.name = method.name
        self._method = method

    def applies_to(self, group: Group) -> str | None:
        layers = dict(zip(group.names, group.layers, strict=True))
        if reason := tied_reason(layers):
            return f"{self.name} is a method of one weight: {reason}"
        if len({id(layer.weight) for layer in group.layers}) > 1:
            return f"{self.name} is a method of one weight, and {', '.join(group.names)} each have their own"
        if _is_mixed(group) and self.name != "svd":
            return f"{self.name} has no factors that serve a weight as it is and turned round, as those of svd do"
        return next((reason for layer in group.layers if (reason := self._method.applies_to(layer))), None)

    def ranks(self, group: Group) -> tuple[tuple[int, ...], ...]:
        return self._method.ranks(group.layers[0])

    def full_ranks(self, group: Group) -> tuple[int, ...]:
        return self._method.full_ranks(group.layers[0])

    def cost(
        self,
        group: Group,
        ranks: Sequence[int],
        output_positions: Sequence[int],
        *,
        input_sizes: Sequence[Sequence[int]] | None = None,
    ) -> tuple[int, int]:
        """``(parameters, macs of one sample)`` of all members, the factors counted once."""
        sizes: Sequence[Sequence[int] | None] = input_sizes or [None] * len(group.layers)
        each = [
            self._method.cost(layer, ranks, positions, input_sizes=size or None)
            for layer, positions, size in zip(group.layers, output_positions, sizes, strict=True)
        ]
        biases = [_bias(layer) for layer in group.layers]
        factors = each[0][0] - sum(b.numel() for b in biases[:1] if b is not None)
        own = {id(b): b.numel() for b in biases if b is not None}
        return factors + sum(own.values()), sum(macs for _, macs in each)

    def variational_ranks(self, group: Group) -> tuple[int, ...]:
        return self._method.variational_ranks(group.layers[0])

    def factorize(
        self,
        group: Group,
        ranks: Sequence[int],
        statistics: Sequence[Statistics] | None = None,
        *,
        metrics: Sequence[Tensor | None] | None = None,
    ) -> JointFit:
        if _is_mixed(group):
            a, b = _Sides(group, statistics).fit(ranks[0])
            made = members_like(dict(zip(group.names, group.layers, strict=True)), self.name, ranks, group.members)
            for name, layer in zip(group.names, group.layers, strict=True):
                if not isinstance(made[name], LowRankHead):  # whose factors are an Embedding's
                    read, written = (a, b) if _is_turned(layer) else (b, a)
                    fill(layer, made[name], first=read.T, last=written)
        else:
            first = group.layers[0]
            pooled, metric = _pooled(group, statistics, metrics)
            fit = self._method.factorize(first, ranks, pooled, metric=metric).module
            made = {name: self._around(fit, layer) for name, layer in zip(group.names, group.layers, strict=True)}
            made = tie(dict(zip(group.names, group.layers, strict=True)), made | {group.names[0]: fit})
        for name, layer in zip(group.names, group.layers, strict=True):
            bias, own = _bias(layer), made[name].output_bias
            if bias is not None and own is not None:
                with torch.no_grad():
                    own.copy_(bias)
            made[name].train(layer.training)
        known: Sequence[Statistics | None] = statistics or [None] * len(group.layers)
        parts = zip(group.names, group.layers, known, metrics or [None] * len(group.layers), strict=True)
        errors = tuple(_error(made[name], layer, s, metric) for name, layer, s, metric in parts)
        return JointFit(tuple(made[name] for name in group.names), errors)

    def _around(self, fit: FactorizedLayer, layer: nn.Module) -> FactorizedLayer:
        """A layer like ``layer`` with all that ``fit`` has, besides the bias."""
        new = factorized_like(layer, *fit.plan())
        bias = next((name for name, p in fit.named_parameters() if p is fit.output_bias), None)
        new.load_state_dict({name: v for name, v in fit.state_dict().items() if name != bias}, strict=False)
        return new

    def refit(
        self, module: FactorizedLayer, layer: nn.Module, statistics: Statistics, *, metric: Tensor | None = None
    ) -> float:
        """A member has nothing of its own besides its bias."""
        return _error(module, layer, statistics, metric)

    def curve(
        self,
        group: Group,
        statistics: Sequence[Statistics] | None,
        output_positions: Sequence[int],
        *,
        metrics: Sequence[Tensor | None] | None = None,
    ) -> tuple[CurvePoint, ...]:
        """Each member is told the error of all of them, its relative error being a part of the sum that is fitted."""
        if _is_mixed(group):
            errors = _Sides(group, statistics).curve([r for (r,) in self.ranks(group)])
        else:
            pooled, metric = _pooled(group, statistics, metrics)
            alone = self._method.curve(group.layers[0], pooled, output_positions[0], metric=metric)
            errors = {p.ranks: (p.error,) * len(group.layers) for p in alone}
        sizes = None if statistics is None else [s.input_sizes for s in statistics]
        points = []
        for ranks, each in errors.items():
            parameters, macs = self.cost(group, ranks, output_positions, input_sizes=sizes)
            mean = sum(each) / len(each)
            points.append(CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=mean, errors=each))
        return thin(points, group.dense(output_positions))


def _is_mixed(group: Group) -> bool:
    return len({_is_turned(layer) for layer in group.layers}) > 1


def _is_turned(layer: nn.Module) -> bool:
    """Whether the layer multiplies its inputs, seen as vectors, with its weight turned round."""
    return isinstance(layer, nn.Embedding | TurnedLinear)


def _bias(layer: nn.Module) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _error(module: FactorizedLayer, layer: nn.Module, statistics: Statistics | None, metric: Tensor | None) -> float:
    """The relative output error of one member."""
    parts = problems(layer, statistics, metric)
    rows = matrices(layer, module.dense_weight().detach()).to("cpu", torch.float64)
    return relative(parts, [part.error(row) for part, row in zip(parts, rows, strict=True)])


def _pooled(
    group: Group, statistics: Sequence[Statistics] | None, metrics: Sequence[Tensor | None] | None
) -> tuple[Statistics | None, Tensor | None]:
    """The members' moments as those of one layer, and the mean of their outputs' weights."""
    weights = [None if m is None else m / m.mean().clamp_min(1e-30) for m in metrics or ()]
    given = [m for m in weights if m is not None]
    metric = (
        torch.stack([given[0].new_ones(len(given[0])) if m is None else m for m in weights]).mean(0) if given else None
    )
    if statistics is None:
        return None, metric
    shares = [1 / max(float(s.energy.sum()), 1e-30) for s in statistics]
    total = sum(shares)
    shares = [share / total for share in shares]

    def mean(name: str) -> Tensor:
        summed: Tensor = sum(share * getattr(s, name) for share, s in zip(shares, statistics, strict=True))
        return summed

    pooled = Statistics(
        mean("second"),
        mean("cross"),
        mean("energy"),
        mean("mean_input"),
        mean("mean_output"),
        sum(s.count for s in statistics),
        statistics[0].input_sizes,
    )
    return pooled, metric


class _Sides:
    """The weight W (n, d), used as it is and turned round, and how much each entry of its rotated error counts."""

    def __init__(self, group: Group, statistics: Sequence[Statistics] | None) -> None:
        known: Sequence[Statistics | None] = statistics or [None] * len(group.layers)
        self.parts = [problems(layer, s)[0] for layer, s in zip(group.layers, known, strict=True)]
        self.turned = [_is_turned(layer) for layer in group.layers]
        sides = list(zip(self.parts, self.turned, strict=True))
        self.left, self._left_basis = _principal([part for part, turned in sides if turned])
        """p: (n,), and P."""
        self.right, self._right_basis = _principal([part for part, turned in sides if not turned])
        """c: (d,), and Q."""
        weight = weight_of(group.layers[0]).detach().to("cpu", torch.float64)
        self.weight = _seen(_seen(weight, self._right_basis).T, self._left_basis).T
        """P'WQ: (n, d)."""

    def start(self) -> tuple[Tensor, Tensor]:
        """All factors at once, (n, k) and (d, k), in falling importance: the SVD in the separable norm next to ours."""
        left = (self.left + self.right.mean()).sqrt()
        left = left.clamp_min(1e-6 * float(left.max()))
        right = (self.right + self.left.mean()).sqrt()
        right = right.clamp_min(1e-6 * float(right.max()))
        u, s, v = torch.linalg.svd(left[:, None] * self.weight * right, full_matrices=False)
        return u * s.sqrt() / left[:, None], v.T * s.sqrt() / right[:, None]

    def fit(self, rank: int) -> tuple[Tensor, Tensor]:
        """A (n, rank) and B (d, rank) with ``A B'`` nearest to W, of equal norm in each column."""
        a, b = (factor[:, :rank] for factor in self.start())
        error = self._loss(a, b)
        for _ in range(SWEEPS):
            better = _rows(self.weight, b, self.left, self.right)
            moved = _rows(self.weight.T, better, self.right, self.left)
            after = self._loss(better, moved)
            if after >= error:
                break
            a, b, gain, error = better, moved, error - after, after
            if gain <= ENOUGH * error:
                break
        scale = (b.norm(dim=0) / a.norm(dim=0).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
        return _back(a * scale, self._left_basis), _back(b / scale, self._right_basis)

    def _loss(self, a: Tensor, b: Tensor) -> float:
        gap = (self.weight - a @ b.T).square()
        return float((gap.sum(1) * self.left).sum() + (gap.sum(0) * self.right).sum())

    def curve(self, ranks: Sequence[int]) -> dict[tuple[int, ...], tuple[float, ...]]:
        """Each member's relative error at the start of each rank, all from one decomposition."""
        a, b = self.start()
        a, b = _back(a, self._left_basis), _back(b, self._right_basis)
        found = []
        for part, turned in zip(self.parts, self.turned, strict=True):
            left, right = (b, a) if turned else (a, b)  # of a matrix that is (d, n)
            cross, inner = part.spread(part.weighed) @ right, part.spread(right.T) @ right
            rows = part.rows[:, None] * left
            gained = 2 * (rows * cross).sum(0)
            spent = (rows.T @ rows) * inner
            # Of the leading blocks: what each rank adds to the sum over all pairs.
            added = 2 * spent.tril(-1).sum(1) + spent.diagonal()
            lost = (part.base - (gained - added).cumsum(0)).clamp_min(0)
            found.append((part.floor + lost) / part.energy)
        return {(r,): tuple(float(errors[r - 1]) for errors in found) for r in ranks}


def _principal(parts: Sequence[Problem]) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues, (n,), and eigenvectors, (n, n), of the parts' moments together, each relative to its energy.

    No eigenvectors where all moments are diagonal: those are the axes themselves.
    """
    if all(part.moments.dim() == 1 for part in parts):
        return torch.stack([part.moments / part.energy for part in parts]).sum(0), None
    values, vectors = torch.linalg.eigh(torch.stack([part.full / part.energy for part in parts]).sum(0))
    return values.clamp_min(0), vectors


def _seen(rows: Tensor, basis: Tensor | None) -> Tensor:
    return rows if basis is None else rows @ basis


def _back(columns: Tensor, basis: Tensor | None) -> Tensor:
    return columns if basis is None else basis @ columns


def _rows(wanted: Tensor, factor: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Rows ``a_i`` of least ``sum_j (own_i + other_j) (wanted_ij - a_i . factor_j)^2``, all at once.

    ``factor' factor`` and ``factor' diag(other) factor`` are made diagonal together, which leaves each row its own
    diagonal system.
    """
    plain = factor.T @ factor
    plain = plain + 1e-12 * plain.diagonal().mean().clamp_min(1e-300) * torch.eye(len(plain), dtype=plain.dtype)
    lower = torch.linalg.cholesky(plain)
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(plain), dtype=plain.dtype), upper=False)
    weighed = inverse @ ((factor.T * other) @ factor) @ inverse.T
    values, vectors = torch.linalg.eigh(weighed)
    turned = inverse.T @ vectors
    right = own[:, None] * (wanted @ factor) + (wanted * other) @ factor
    solved: Tensor = (right @ turned / (own[:, None] + values.clamp_min(0)).clamp_min(1e-300)) @ turned.T
    return solved
