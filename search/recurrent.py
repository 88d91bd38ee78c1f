"""An LSTM or a GRU as the matrices that it multiplies, by name, and what it multiplies them with.

``ih_l0``: the input weights of layer 0, both directions' gates under each other, for both read the same input;
``hh_l0``, ``hh_l0_reverse``: the recurrent weight of each direction, which multiplies the state of the step before.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["RECURRENT", "gates_of", "named_matrices", "operands", "projection_reason"]

RECURRENT = (nn.LSTM, nn.GRU)


def gates_of(layer: nn.RNNBase) -> int:
    return 4 if isinstance(layer, nn.LSTM) else 3


def directions_of(layer: nn.RNNBase) -> tuple[str, ...]:
    """The endings of the names of each direction's weights."""
    return ("", "_reverse")[: 1 + layer.bidirectional]


def projection_reason(layer: nn.RNNBase) -> str | None:
    """Why its outputs are not its states, or None."""
    return f"its states are projected (proj_size={layer.proj_size})" if layer.proj_size else None


def named_matrices(layer: nn.RNNBase) -> dict[str, Tensor]:
    """``ih_l{k}`` (directions * gates * hidden, in) and ``hh_l{k}{direction}`` (gates * hidden, hidden), in order."""
    found = {}
    for k in range(layer.num_layers):
        ends = [f"l{k}{d}" for d in directions_of(layer)]
        found[f"ih_l{k}"] = torch.cat([layer.get_parameter(f"weight_ih_{end}") for end in ends])
        found |= {f"hh_{end}": layer.get_parameter(f"weight_hh_{end}") for end in ends}
    return found


def operands(layer: nn.RNNBase, x: Tensor, states: Sequence[Tensor]) -> dict[str, Tensor]:
    """(rows, columns of the matrix) for each of ``named_matrices``: what it multiplies when the layer runs on ``x``.

    ``states``: h and, for an LSTM, c before the first step, (layers * directions, batch, hidden); none for zeros.
    """
    x = x.transpose(0, 1) if layer.batch_first else x
    ends = directions_of(layer)
    if not states:
        zeros = x.new_zeros(layer.num_layers * len(ends), x.shape[1], layer.hidden_size)
        states = [zeros, zeros] if isinstance(layer, nn.LSTM) else [zeros]
    found = {}
    for k in range(layer.num_layers):
        found[f"ih_l{k}"] = x.flatten(0, 1)
        begin = [s[k * len(ends) : (k + 1) * len(ends)] for s in states]
        x = _one_layer(layer, k, x, begin)
        for i, (end, y) in enumerate(zip(ends, x.chunk(len(ends), -1), strict=True)):
            before = [begin[0][i : i + 1], y[:-1]] if not end else [y[1:], begin[0][i : i + 1]]
            found[f"hh_l{k}{end}"] = torch.cat(before).flatten(0, 1)
    return found


def _one_layer(layer: nn.RNNBase, k: int, x: Tensor, states: list[Tensor]) -> Tensor:
    """The outputs of one layer of several: (steps, batch, directions * hidden)."""
    names = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * layer.bias
    weights: list[Tensor] = [layer.get_parameter(f"{n}_l{k}{d}") for d in directions_of(layer) for n in names]
    both = layer.bidirectional
    if isinstance(layer, nn.LSTM):
        return torch.lstm(x, states, weights, layer.bias, 1, 0.0, False, both, False)[0]
    return torch.gru(x, states[0], weights, layer.bias, 1, 0.0, False, both, False)[0]
