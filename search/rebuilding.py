"""Training through the dense weight, built from the factors at each step, where that is quicker than the chain.

A chain of small layers does fewer multiplications but moves more: on a processor, where channels are few, reading and
writing what is between its links costs more than the multiplications that it saves. With nothing between the links,
a factorized layer is its dense weight exactly, and gradients reach the factors through the product. Which form a
layer takes changes how long a step is, not what is learnt; files and measured costs are always the chain's.
"""

import copy
import time
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search.precision import Precision, synchronize
from tenfold.layers import FactorizedLayer
from tenfold.layers.base import ConvChain, TransposedChain

__all__ = ["chained", "quicker_rebuilt", "rebuild"]

CLEARLY = 0.95
"""The rebuilt form must take less than this share of the chain's time."""
REPEATS = 3

_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def quicker_rebuilt(module: nn.Module, run: Callable[[nn.Module], Any], precision: Precision) -> tuple[str, ...]:
    """The names of the factorized layers whose forward and backward pass take less time rebuilt.

    Each is timed alone, in training mode on the input that it gets when ``run`` runs the network (a copy of it).
    """
    probe = copy.deepcopy(module).train()
    precision.prepare(probe)
    found: list[str] = []
    handles = [
        layer.register_forward_pre_hook(_timing(name, precision, found))
        for name, layer in probe.named_modules()
        if isinstance(layer, FactorizedLayer) and _rebuilt_forward(layer) is not None
    ]
    with torch.no_grad():
        run(probe)
    for handle in handles:
        handle.remove()
    return tuple(found)


def rebuild(module: nn.Module, names: Iterable[str]) -> None:
    """Let the layers of these names compute with their dense weight, until ``chained``."""
    for name in names:
        layer = module.get_submodule(name)
        forward = _rebuilt_forward(layer)
        if forward is not None:
            layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]


def chained(module: nn.Module) -> None:
    """Every layer in its own form again."""
    for layer in module.modules():
        if isinstance(layer, FactorizedLayer):
            layer.__dict__.pop("forward", None)


def _rebuilt_forward(layer: nn.Module) -> Callable[[FactorizedLayer, Tensor], Tensor] | None:
    if isinstance(layer, TransposedChain):
        return _convolve_transposed
    if isinstance(layer, ConvChain):
        return _convolve if layer.padding_mode == "zeros" else None
    return _multiply if isinstance(layer, FactorizedLayer) and layer.replaces == (nn.Linear,) else None


def _convolve(layer: Any, x: Tensor) -> Tensor:
    convolution = _CONVOLUTIONS[len(layer.kernel_size) - 1]
    return convolution(
        x, _weight(layer, x), layer.output_bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def _convolve_transposed(layer: Any, x: Tensor) -> Tensor:
    convolution = _TRANSPOSED[len(layer.kernel_size) - 1]
    return convolution(
        *(x, _weight(layer, x), layer.output_bias, layer.stride, layer.padding),
        *(layer.output_padding, layer.groups, layer.dilation),
    )


def _multiply(layer: FactorizedLayer, x: Tensor) -> Tensor:
    return F.linear(x, _weight(layer, x), layer.output_bias)


def _weight(layer: FactorizedLayer, x: Tensor) -> Tensor:
    """In float32 whatever the activations are in: products of factors lose more by rounding than sums do."""
    with torch.autocast(x.device.type, enabled=False):
        return layer.dense_weight()


def _timing(name: str, precision: Precision, found: list[str]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
        chain, rebuilt = copy.deepcopy(layer), copy.deepcopy(layer)
        for form in (chain, rebuilt):
            form._forward_pre_hooks.clear()
        rebuild(rebuilt, ("",))
        x = args[0].detach()
        times: dict[str, list[float]] = {"chain": [], "rebuilt": []}
        for _ in range(REPEATS):
            times["chain"].append(_seconds(chain, x, precision))
            times["rebuilt"].append(_seconds(rebuilt, x, precision))
        if min(times["rebuilt"]) < CLEARLY * min(times["chain"]):
            found.append(name)

    return hook


def _seconds(layer: nn.Module, x: Tensor, precision: Precision) -> float:
    x = x.requires_grad_(x.is_floating_point())
    synchronize(x)
    start = time.perf_counter()
    with torch.enable_grad(), precision.autocast((x,)):
        layer(x).sum().backward()
    synchronize(x)
    return time.perf_counter() - start
