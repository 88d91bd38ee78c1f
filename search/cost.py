"""What a network costs, counted on the real module: never from a formula about what it should be."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from search.spec import Costs
from tenfold.layers.planning import one_sample

__all__ = ["count", "macs", "parameters", "stored_bytes"]


def count(module: nn.Module, example: Sequence[Tensor]) -> Costs:
    """Parameters, MACs of one sample and stored bytes. ``example``: the inputs, batch first (any batch size)."""
    return Costs(parameters=parameters(module), macs=macs(module, example), bytes=stored_bytes(module))


def parameters(module: nn.Module) -> int:
    """Elements of the parameters; tensors that layers share count once, also when only their memory is shared."""
    unique = {_memory(p): p.numel() for p in module.parameters()}
    return sum(unique.values())


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers, shared ones once."""
    unique = {_memory(t): t.numel() * t.element_size() for t in module.state_dict().values() if isinstance(t, Tensor)}
    return sum(unique.values())


def macs(module: nn.Module, example: Sequence[Tensor]) -> int:
    """Multiply-accumulates of one sample, from the matrix products and convolutions that really ran.

    Fused kernels hide their products from torch's counter (attention on the CPU, recurrent and bilinear layers all
    count 0 there), so they are switched off for this one pass, or given a formula. Element-wise work, norms, pooling
    and look-ups count nothing, as is the custom. Nor does what a layer makes of its factors once and then keeps: the
    network has run before. A batch is computed in the way of one sample, as exported files with a free batch do.
    """
    batch = example[0].shape[0]
    training = module.training
    module.eval()
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten._trilinear: _trilinear_flops,
            torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops,
        },
    )
    try:
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.cudnn.flags(enabled=False),
            one_sample(),
        ):
            module(*example)
            with counter:
                module(*example)
    finally:
        module.train(training)
    return int(counter.get_total_flops()) // 2 // batch


def _recurrent_flops(
    x: tuple[int, int, int], from_input: tuple[int, int], from_state: tuple[int, int], *_: Any, **__: Any
) -> int:
    """One direction of one layer as oneDNN runs it: both products at every step. ``x``: (steps, batch, in)."""
    steps, batch, _features = x
    return 2 * steps * batch * (from_input[0] * from_input[1] + from_state[0] * from_state[1])


def _trilinear_flops(
    a: tuple[int, ...],
    b: tuple[int, ...],
    c: tuple[int, ...],
    expand_a: list[int],
    expand_b: list[int],
    expand_c: list[int],
    *_: Any,
    **__: Any,
) -> int:
    """nn.Bilinear: the product of all axes once the three operands are broadcast to each other."""

    def expanded(shape: tuple[int, ...], axes: list[int]) -> list[int]:
        sizes = list(shape)
        for axis in sorted(axes):
            sizes.insert(axis, 1)
        return sizes

    total = 2
    for sizes in zip(expanded(a, expand_a), expanded(b, expand_b), expanded(c, expand_c), strict=True):
        total *= max(sizes)
    return total


def _memory(t: Tensor) -> tuple[object, ...]:
    if t.numel() == 0 or t.is_meta:
        return (id(t),)
    return (t.data_ptr(), t.dtype, tuple(t.shape), tuple(t.stride()))
