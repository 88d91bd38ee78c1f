"""``svd`` of an LSTM or a GRU: its input weights at one rank, its recurrent weights at another.

Every matrix by itself is a Linear's problem, with the second moments of what it multiplies: the layer's input (or the
outputs of the layer below), or the state of the step before. The error is that of what the gates read, all matrices
together; that inputs and states are correlated is left out. The matrices' lost means go to the biases beside them
(a GRU's recurrent bias is inside its reset gate, so the two are kept apart). Its outputs are not its gates', so weights
of outputs' errors have no say.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import Fit, Problem, problems, ranks_between, relative, thin
from search.decompose.svd import spectrum
from search.recurrent import RECURRENT, gates_of, named_matrices, projection_reason
from search.spec import CurvePoint
from search.vbmf import evbmf_rank
from tenfold.layers import factorized_like
from tenfold.layers.recurrent import LowRankRecurrent, saves, steps_pay

__all__ = ["RecurrentSVD"]

RANKS = 12
"""Ranks tried of each of the two kinds of matrices."""


class RecurrentSVD:
    name = "svd"

    def applies_to(self, layer: nn.Module) -> str | None:
        if not isinstance(layer, RECURRENT):
            return f"the svd of recurrent layers replaces LSTM and GRU, not {type(layer).__name__}"
        return projection_reason(layer) or (None if self.ranks(layer) else "no rank makes it smaller")

    def ranks(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        """Pairs (input, recurrent); the largest of each leaves those matrices whole."""
        weights = named_matrices(_of(layer))
        dense = sum(w.numel() for w in weights.values())
        axes = [_axis(_of_kind(weights, kind)) for kind in ("ih", "hh")]
        return tuple(p for p in itertools.product(*axes) if _factors(weights, p) < dense)

    def full_ranks(self, layer: nn.Module) -> tuple[int, int]:
        weights = named_matrices(_of(layer))
        low, state = (max(min(w.shape) for w in _of_kind(weights, kind)) for kind in ("ih", "hh"))
        return low, state

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        """``output_positions``: steps, of all calls; ``input_sizes``: the steps of one."""
        recurrent = _of(layer)
        steps = math.prod(input_sizes) if input_sizes else output_positions
        weights, gates, hidden = named_matrices(recurrent), gates_of(recurrent), recurrent.hidden_size
        biases = sum(p.numel() for n, p in recurrent.named_parameters() if n.startswith("bias"))
        parameters = _factors(weights, ranks)
        macs = parameters * output_positions
        if saves(ranks[1], (gates * hidden, hidden)) and not steps_pay(ranks[1], gates, hidden, steps):
            # The recurrent weights are rebuilt once a call, and then applied whole.
            shape, count = (gates * hidden, hidden), sum(name.startswith("hh") for name in weights)
            calls = max(1, output_positions // max(steps, 1))
            macs += count * (shape[0] * hidden - ranks[1] * sum(shape)) * output_positions
            macs += count * shape[0] * hidden * ranks[1] * calls
        return parameters + biases, macs

    def factorize(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        statistics: Statistics | None = None,
        *,
        metric: Tensor | None = None,
        start: nn.Module | None = None,
    ) -> Fit:
        recurrent = _of(layer)
        new: Any = factorized_like(layer, self.name, ranks)
        kept, errors = [], []
        with torch.no_grad():
            for name, p in new.named_parameters():
                if name.startswith("bias"):
                    p.copy_(recurrent.get_parameter(name))
            for name, weight, part in _parts(recurrent, statistics):
                rank = ranks[0] if name.startswith("ih") else ranks[1]
                kept.append(part)
                if not saves(rank, weight.shape):
                    errors.append(0.0)
                    _put(new, name, weight, None)
                    continue
                values, vectors = spectrum(part)
                last = vectors[:, :rank]
                first = last.T @ part.target
                scale = (first.norm(dim=1).clamp_min(1e-30)).sqrt()  # equal norms on both sides
                _put(new, name, last * scale, first / scale[:, None])
                errors.append(part.floor + float(values[rank:].sum()))
                if statistics is not None and recurrent.bias:
                    lost = (weight.double().cpu() - last @ first) @ statistics.parts[name].mean_input[0]
                    _shift(new, name, lost)
        new.train(layer.training)
        return Fit(new, relative(kept, errors))

    def curve(
        self,
        layer: nn.Module,
        statistics: Statistics | None,
        output_positions: int,
        *,
        metric: Tensor | None = None,
    ) -> tuple[CurvePoint, ...]:
        recurrent = _of(layer)
        parts = [(name, w, p, spectrum(p)[0]) for name, w, p in _parts(recurrent, statistics)]
        sizes = None if statistics is None else statistics.input_sizes
        points = []
        for ranks in self.ranks(layer):
            errors = []
            for name, w, part, values in parts:
                rank = ranks[0] if name.startswith("ih") else ranks[1]
                errors.append(part.floor + float(values[rank:].sum()) if saves(rank, w.shape) else 0.0)
            error = relative([p for _, _, p, _ in parts], errors)
            parameters, macs = self.cost(layer, ranks, output_positions, input_sizes=sizes)
            points.append(CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=error))
        # Rebuilding costs MACs once a call, however many samples there are: told, but no reason to offer nothing.
        return thin(points, (sum(p.numel() for p in layer.parameters()), math.inf))

    def variational_ranks(self, layer: nn.Module) -> tuple[int, int]:
        """By analytic variational Bayes, the largest of all input and of all recurrent matrices."""
        found = {"ih": 1, "hh": 1}
        for name, weight in named_matrices(_of(layer)).items():
            rank = evbmf_rank(weight.detach().double().cpu().numpy())
            found[name[:2]] = max(found[name[:2]], rank)
        return found["ih"], found["hh"]


def _of(layer: nn.Module) -> nn.RNNBase:
    if not isinstance(layer, RECURRENT):
        raise TypeError(f"expected an LSTM or a GRU, got {type(layer).__name__}")
    return layer


def _of_kind(weights: dict[str, Tensor], kind: str) -> list[Tensor]:
    return [w for name, w in weights.items() if name.startswith(kind)]


def _axis(weights: Sequence[Tensor]) -> list[int]:
    """Ranks to try of matrices that share one: those that make some smaller, and the one that leaves all whole."""
    most = max((w.numel() - 1) // sum(w.shape) for w in weights)
    return [*ranks_between(1, most, RANKS), max(min(w.shape) for w in weights)]


def _factors(weights: dict[str, Tensor], ranks: Sequence[int]) -> int:
    """Elements of all factors, and of the matrices left whole."""
    total = 0
    for name, w in weights.items():
        rank = ranks[0] if name.startswith("ih") else ranks[1]
        total += rank * sum(w.shape) if saves(rank, w.shape) else w.numel()
    return total


def _parts(layer: nn.RNNBase, statistics: Statistics | None) -> Iterator[tuple[str, Tensor, Problem]]:
    for name, weight in named_matrices(layer).items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
        yield name, weight.detach(), problems(linear, None if statistics is None else statistics.parts[name])[0]


def _put(new: LowRankRecurrent, name: str, last: Tensor, first: Tensor | None) -> None:
    """A matrix's factors into the layer; ``first`` is None for one that is left whole."""
    kind, _, end = name.partition("_")
    if kind == "hh":
        new.get_parameter(f"weight_hh_{end}").copy_(last)
        if first is not None:
            new.get_parameter(f"state_{end}").copy_(first)
        return
    for direction, rows in zip(new.directions, last.chunk(len(new.directions)), strict=True):
        new.get_parameter(f"weight_ih_{end}{direction}").copy_(rows)
    if first is not None:
        new.get_parameter(f"first_{end}.weight").copy_(first)


def _shift(new: LowRankRecurrent, name: str, lost: Tensor) -> None:
    """What a matrix's factors lose of the mean, onto the bias beside it."""
    kind, _, end = name.partition("_")
    if kind == "hh":
        new.get_parameter(f"bias_hh_{end}").add_(lost)
        return
    for direction, rows in zip(new.directions, lost.chunk(len(new.directions)), strict=True):
        new.get_parameter(f"bias_ih_{end}{direction}").add_(rows)
