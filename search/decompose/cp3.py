"""``cp3`` (Lebedev et al. 2015, with the kernel's axes kept together; Gusak et al. 2019): 1 x 1 to R channels, a
depthwise k x k, 1 x 1 back. The kernel is a sum of R terms in x taps x out, found as ``cp`` says.
"""

from collections.abc import Sequence

from torch import nn

from search.decompose.base import bias_parameters, conv_of, conv_reason, geometry, input_positions
from search.decompose.cp import CP

__all__ = ["CP3"]


class CP3(CP):
    name = "cp3"
    links = ("first", "depthwise")

    def applies_to(self, layer: nn.Module) -> str | None:
        reason = conv_reason(layer)
        if reason is None and self.modes(layer)[1] == 1:
            reason = "a 1 x 1 kernel is a matrix already: svd does it with one link less"
        return reason or (None if self.ranks(layer) else "no rank makes it smaller")

    def modes(self, layer: nn.Module) -> tuple[int, ...]:
        groups, weight = geometry(layer)
        c_in = conv_of(layer).in_channels // groups
        return c_in, weight.shape[2] // c_in

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        groups, weight = geometry(layer)
        c_in, taps = self.modes(layer)
        first, rest = (groups * ranks[0] * size for size in (c_in, taps + weight.shape[1]))
        macs = first * input_positions(layer, output_positions, input_sizes) + rest * output_positions
        return first + rest + bias_parameters(layer), macs
