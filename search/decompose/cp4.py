"""``cp4`` (Lebedev et al. 2015): 1 x 1 to R channels, depthwise k x 1, depthwise 1 x k, 1 x 1 back. The kernel is a sum
of R terms in x rows x columns x out, found as ``cp`` says.
"""

from collections.abc import Sequence

from torch import nn

from search.decompose.base import (
    bias_parameters,
    conv2d_of,
    geometry,
    input_positions,
    middle_positions,
    separable_reason,
)
from search.decompose.cp import CP

__all__ = ["CP4"]


class CP4(CP):
    name = "cp4"
    links = ("first", "rows", "columns")

    def applies_to(self, layer: nn.Module) -> str | None:
        return separable_reason(self.name, layer) or (None if self.ranks(layer) else "no rank makes it smaller")

    def modes(self, layer: nn.Module) -> tuple[int, ...]:
        conv = conv2d_of(layer)
        return conv.in_channels // conv.groups, *conv.kernel_size

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        groups, weight = geometry(layer)
        c_in, rows, columns = self.modes(layer)
        first, tall, rest = (groups * ranks[0] * size for size in (c_in, rows, columns + weight.shape[1]))
        macs = (
            first * input_positions(layer, output_positions, input_sizes)
            + tall * middle_positions(layer, output_positions, input_sizes)
            + rest * output_positions
        )
        return first + tall + rest + bias_parameters(layer), macs
