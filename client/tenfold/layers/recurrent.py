"""LSTM and GRU with low-rank weights.

In each layer ``first`` takes the input of every step to ``ranks[0]`` numbers at once, and the gates of both directions
read those; each direction's recurrent weight is ``weight_hh @ state`` with ``state`` (``ranks[1]``, hidden).

Two ways lead through the recurrent product. Step by step through both factors costs fewer multiplications but one
Python (or graph) operation after the other; torch's own fused kernel with the weight rebuilt once a call costs those
of the dense layer. On one CPU thread at a quarter of the rank the steps took 10.5 ms against 27 ms dense and 41 ms
rebuilt for 1,024 hidden units (batch 1, 32 steps), and were ahead for 512, but took 2.0 against 1.3 and 1.5 for 256
(64 steps). So the steps are taken where each saves ``WORTH`` multiplications or more, and where they are few: an
exported graph has every one of them (128 make 2,059 ONNX nodes and a .pt2 file of 1.4 MB, in half a minute or more).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FactorizedLayer

__all__ = ["LowRankGRU", "LowRankLSTM", "LowRankRecurrent", "saves", "steps_pay"]

WORTH = 1 << 19
UNROLLED = 64


def saves(rank: int, shape: Sequence[int]) -> bool:
    """Whether factors of this rank are smaller than a matrix of ``shape``; else it is left whole."""
    return rank * (shape[0] + shape[1]) < shape[0] * shape[1]


def steps_pay(rank: int, gates: int, hidden: int, steps: int) -> bool:
    """Whether to go step by step through both factors of the recurrent weight; see the module."""
    shape = gates * hidden, hidden
    return saves(rank, shape) and steps <= UNROLLED and shape[0] * hidden - rank * (shape[0] + hidden) >= WORTH


class LowRankRecurrent(FactorizedLayer):
    """What LSTM and GRU share. ``ranks``: of the input weights and of the recurrent ones, the same in every layer.

    A matrix that its rank would not make smaller is left whole.
    """

    gates: ClassVar[int]
    method = "svd"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        ranks: Sequence[int],
        *,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        kind: type[nn.RNNBase] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """``kind``: the dense layer's class, where that is one derived from torch's."""
        super().__init__(ranks)
        if len(self.ranks) != 2:
            raise ValueError(f"{type(self).__name__} takes 2 ranks (input, recurrent), got {self.ranks}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        self.kind: type[nn.RNNBase] = kind or self.replaces[0]  # type: ignore[assignment]
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        bound = hidden_size**-0.5

        def weight(name: str, *shape: int) -> None:
            self.register_parameter(name, nn.Parameter(torch.empty(*shape, **make).uniform_(-bound, bound)))

        low, state = self.ranks
        self.directions = ("", "_reverse")[: 1 + bidirectional]
        rows = self.gates * hidden_size
        for k in range(num_layers):
            width = input_size if k == 0 else hidden_size * len(self.directions)
            if saves(low, (rows * len(self.directions), width)):
                self.add_module(f"first_l{k}", nn.Linear(width, low, bias=False, **make))
                width = low
            for d in self.directions:
                weight(f"weight_ih_l{k}{d}", rows, width)
                if saves(state, (rows, hidden_size)):
                    weight(f"state_l{k}{d}", state, hidden_size)
                    weight(f"weight_hh_l{k}{d}", rows, state)
                else:
                    weight(f"weight_hh_l{k}{d}", rows, hidden_size)
                if bias:
                    weight(f"bias_ih_l{k}{d}", rows)
                    weight(f"bias_hh_l{k}{d}", rows)

    @classmethod
    def like(cls, layer: nn.Module, ranks: Sequence[int]) -> "LowRankRecurrent":
        if not isinstance(layer, cls.replaces) or not isinstance(layer, nn.RNNBase) or layer.proj_size:
            projected = f" with proj_size={layer.proj_size}" if isinstance(layer, nn.RNNBase) else ""
            raise ValueError(
                f"{cls.__name__} replaces a {cls.replaces[0].__name__} without projection, "
                f"got {type(layer).__name__}{projected}"
            )
        w = layer.get_parameter("weight_ih_l0")
        return cls(
            layer.input_size,
            layer.hidden_size,
            ranks,
            num_layers=layer.num_layers,
            bias=layer.bias,
            batch_first=layer.batch_first,
            dropout=layer.dropout,
            bidirectional=layer.bidirectional,
            kind=type(layer),
            device=w.device,
            dtype=w.dtype,
        )

    @property
    def output_bias(self) -> Tensor | None:
        """None: what the biases give passes the gates."""
        return None

    def matrix_ih(self, k: int, direction: str) -> Tensor:
        """(gates * hidden, in): layer ``k``'s input weight, for direction ``""`` or ``"_reverse"``."""
        w, first = self.get_parameter(f"weight_ih_l{k}{direction}"), self._modules.get(f"first_l{k}")
        return w if first is None else w @ first.weight  # type: ignore[operator]

    def matrix_hh(self, k: int, direction: str) -> Tensor:
        """(gates * hidden, hidden): layer ``k``'s recurrent weight."""
        w, state = self.get_parameter(f"weight_hh_l{k}{direction}"), self._parameters.get(f"state_l{k}{direction}")
        return w if state is None else w @ state

    def dense_weight(self) -> Tensor:
        return self.matrix_ih(0, "")

    def dense(self) -> nn.RNNBase:
        w = self.get_parameter("weight_ih_l0")
        kind: Any = self.kind
        layer: nn.RNNBase = kind(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            device=w.device,
            dtype=w.dtype,
        )
        with torch.no_grad():
            for k in range(self.num_layers):
                for d in self.directions:
                    layer.get_parameter(f"weight_ih_l{k}{d}").copy_(self.matrix_ih(k, d))
                    layer.get_parameter(f"weight_hh_l{k}{d}").copy_(self.matrix_hh(k, d))
                    for name in (f"bias_ih_l{k}{d}", f"bias_hh_l{k}{d}") if self.bias else ():
                        layer.get_parameter(name).copy_(self.get_parameter(name))
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, layers={self.num_layers}, {super().extra_repr()}"

    def _run(self, x: Tensor, states: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """The outputs, and each state after the last step: (layers * directions, batch, hidden)."""
        if not isinstance(x, Tensor) or x.dim() != 3:
            what = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{type(self).__name__} takes (batch, steps, features) or steps first, got {what}")
        x = x.transpose(0, 1) if self.batch_first else x
        count = len(self.directions)
        if states is None:
            zeros = x.new_zeros(self.num_layers * count, x.shape[1], self.hidden_size)
            states = [zeros] * (2 if self.gates == 4 else 1)
        finals: list[list[Tensor]] = [[] for _ in states]
        for k in range(self.num_layers):
            if k and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            first = self._modules.get(f"first_l{k}")
            x, ends = self._layer(k, x if first is None else first(x), [s[k * count : (k + 1) * count] for s in states])
            for final, end in zip(finals, ends, strict=True):
                final.append(end)
        return x.transpose(0, 1) if self.batch_first else x, [torch.cat(f) for f in finals]

    def _layer(self, k: int, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One layer: ``x`` (steps, batch, features), each state (directions, batch, hidden)."""
        if not steps_pay(self.ranks[1], self.gates, self.hidden_size, x.shape[0]):
            return self._fused(k, x, states)
        outputs, ends = [], []
        for i, d in enumerate(self.directions):
            y, end = self._steps(k, d, x.flip(0) if d else x, [s[i] for s in states])
            outputs.append(y.flip(0) if d else y)
            ends.append(end)
        return torch.cat(outputs, -1), [torch.stack(s) for s in zip(*ends, strict=True)]

    def _fused(self, k: int, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        weights = []
        for d in self.directions:
            weights += [self.get_parameter(f"weight_ih_l{k}{d}"), self.matrix_hh(k, d)]
            if self.bias:
                weights += [self.get_parameter(f"bias_ih_l{k}{d}"), self.get_parameter(f"bias_hh_l{k}{d}")]
        both = self.bidirectional
        if self.gates == 4:
            y, h, c = torch.lstm(x, states, weights, self.bias, 1, 0.0, self.training, both, False)
            return y, [h, c]
        y, h = torch.gru(x, states[0], weights, self.bias, 1, 0.0, self.training, both, False)
        return y, [h]

    def _steps(self, k: int, d: str, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One direction, in the order of its steps; each state (batch, hidden)."""
        bias_ih, bias_hh = (self._parameters.get(f"bias_{name}_l{k}{d}") for name in ("ih", "hh"))
        from_input = F.linear(x, self.get_parameter(f"weight_ih_l{k}{d}"), bias_ih)
        w, state = self.get_parameter(f"weight_hh_l{k}{d}"), self.get_parameter(f"state_l{k}{d}")
        outputs = []
        for step in from_input.unbind(0):
            states = self._step(step, F.linear(F.linear(states[0], state), w, bias_hh), states)
            outputs.append(states[0])
        return torch.stack(outputs), states

    def _step(self, from_input: Tensor, from_state: Tensor, states: list[Tensor]) -> list[Tensor]:
        """The states after one step, the output first, from what the gates read: (batch, gates * hidden) each."""
        raise NotImplementedError


class LowRankLSTM(LowRankRecurrent):
    """Called as torch's LSTM, ``(x, (h, c)) -> (y, (h, c))``, or flat, ``(x, h, c) -> (y, h, c)``."""

    gates = 4
    replaces = (nn.LSTM,)

    def forward(self, x: Tensor, hx: Any = None, c: Tensor | None = None) -> Any:
        y, states = self._run(x, hx if c is None else (hx, c))
        return (y, *states) if c is not None else (y, tuple(states))

    def _step(self, from_input: Tensor, from_state: Tensor, states: list[Tensor]) -> list[Tensor]:
        i, f, g, o = (from_input + from_state).chunk(4, -1)
        c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return [o.sigmoid() * c.tanh(), c]


class LowRankGRU(LowRankRecurrent):
    """Called as torch's GRU: ``(x, h) -> (y, h)``."""

    gates = 3
    replaces = (nn.GRU,)

    def forward(self, x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, states = self._run(x, None if hx is None else [hx])
        return y, states[0]

    def _step(self, from_input: Tensor, from_state: Tensor, states: list[Tensor]) -> list[Tensor]:
        (r, z, n), (rh, zh, nh) = from_input.chunk(3, -1), from_state.chunk(3, -1)
        z = (z + zh).sigmoid()
        return [(1 - z) * (n + (r + rh).sigmoid() * nh).tanh() + z * states[0]]
