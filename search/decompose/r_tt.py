"""``r_tt`` (Su et al. 2018; Garipov et al. 2016): a convolution as a tensor train over the digits of its channels, the
kernel's taps its last core.

The kernel of one group is the matrix out x (in * taps) with row digits (o_1 .. o_d, 1) and column digits
(i_1 .. i_d, taps), so that all of ``tt_matrix`` holds. A group with factors of its own has a train of its own.
Parameters of a group: sum_k r_{k-1} o_k i_k r_k + taps r_d.
"""

import math
from collections.abc import Sequence

from torch import nn

from search.decompose.base import bias_parameters, conv_of, conv_reason, geometry, input_positions
from search.decompose.tt_matrix import TTMatrix
from tenfold.layers.contracting import TTShape, conv_way
from tenfold.layers.tensor_train import conv_modes

__all__ = ["RTT"]


class RTT(TTMatrix):
    name = "r_tt"

    def applies_to(self, layer: nn.Module) -> str | None:
        if isinstance(layer, nn.Linear):
            return "r_tt replaces convolutions, not Linear (tt_matrix is its form for Linear)"
        return conv_reason(layer) or (None if self.ranks(layer) else "no rank makes it smaller")

    def modes(self, layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_modes, in_modes = self._channel_modes(layer)
        return (*out_modes, 1), (*in_modes, conv_of(layer).weight[0, 0].numel())

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        conv = conv_of(layer)
        shape = TTShape(*self._channel_modes(layer), tuple(ranks))
        kernel, r = tuple(conv.kernel_size), ranks[-1]
        positions = input_positions(layer, output_positions, input_sizes), output_positions
        _, work = conv_way(shape, kernel, conv.groups, 1, positions)
        return conv.groups * (shape.parameters + r * math.prod(kernel)) + bias_parameters(layer), work.macs

    def _channel_modes(self, layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        groups, weight = geometry(layer)
        return conv_modes(conv_of(layer).in_channels // groups, weight.shape[1])

    def _links(self, layer: nn.Module) -> tuple[str, ...]:
        return *super()._links(layer)[:-1], "spatial.weight"
