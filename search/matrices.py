"""A layer as the matrices that it multiplies its input with, one for each group: what every method factorizes.

``y = W x`` with ``x`` of ``n = in / groups * taps`` entries, channel by channel, taps inside:

* a Linear's ``x`` is its input, an Embedding's is the token as a unit vector (only its index is ever kept); ``W`` is
  the weight of a Linear, and turned round that of an Embedding or a TurnedLinear;
* a convolution's is the window under the kernel;
* a transposed convolution is a convolution whose input has ``stride - 1`` zeros between its entries, with the kernel
  turned round. So its ``x`` is a window too, mostly zeros, and second moments of such windows over *output* positions
  hold the overlap of neighbouring inputs exactly.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.layers import TurnedLinear
from tenfold.layers.base import CONVS, TRANSPOSED, Conv, ConvTranspose

__all__ = ["groups_of", "has_windows", "matrices", "taps_of", "weight_from", "weight_of", "windows"]


def weight_of(layer: nn.Module) -> Tensor:
    """The layer's weight, typed."""
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(layer).__name__} has no weight tensor")
    return weight


def has_windows(layer: nn.Module) -> bool:
    """Whether the layer slides a kernel along axes that come after the channels."""
    return isinstance(layer, Conv | ConvTranspose)


def groups_of(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, Conv | ConvTranspose) else 1


def taps_of(layer: nn.Module) -> int:
    """Entries of the kernel; 1 without one."""
    return math.prod(layer.kernel_size) if isinstance(layer, Conv | ConvTranspose) else 1


def matrices(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """(groups, out / groups, n): of the layer's own weight, or of another ``weight`` of the same shape."""
    weight = weight_of(layer) if weight is None else weight
    if isinstance(layer, nn.Embedding | TurnedLinear):
        return weight.T[None]
    groups = groups_of(layer)
    if isinstance(layer, TRANSPOSED):  # (in, out / groups, *kernel)
        turned = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(3).flip(-1)
        return turned.flatten(2)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def weight_from(layer: nn.Module, matrix: Tensor) -> Tensor:
    """The weight, in the layer's own shape, that has these matrices: (groups, out / groups, n) or that many entries."""
    shape = weight_of(layer).shape
    if isinstance(layer, nn.Embedding | TurnedLinear):
        return matrix.reshape(shape[1], shape[0]).T
    if isinstance(layer, TRANSPOSED):
        groups = layer.groups
        turned = matrix.reshape(groups, shape[1], shape[0] // groups, -1).flip(-1).transpose(1, 2)
        return turned.reshape(shape)
    return matrix.reshape(shape)


def windows(layer: nn.Module, x: Tensor) -> Tensor:
    """What lies under the kernel at each output, as a view of the padded input: (batch, *out, in, *kernel)."""
    if isinstance(layer, TRANSPOSED):
        x, stride = _spread(layer, x), (1,) * len(layer.kernel_size)
    elif isinstance(layer, CONVS):
        stride = layer.stride
        if any(layer._reversed_padding_repeated_twice):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    else:
        raise TypeError(f"{type(layer).__name__} has no windows")
    for axis, (size, dilation) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
        # The dilated extent along this axis, then every dilation-th entry of it.
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, stride[axis])[..., ::dilation]
    return x.movedim(1, 1 + len(layer.kernel_size))


def _spread(layer: Any, x: Tensor) -> Tensor:
    """The input of a transposed convolution with zeros between its entries and around them, or cropped."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], layer.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in layer.stride))] = x
    around: list[int] = []
    for size, dilation, padding, extra in zip(
        layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True
    ):
        before = dilation * (size - 1) - padding
        around = [before, before + extra, *around]  # F.pad counts from the last axis
    return F.pad(wide, around)
