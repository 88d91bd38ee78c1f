"""Run a lifted network on the meta device first: shapes without memory, so that a huge one is never allocated."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from search.errors import BadModel

__all__ = ["refuse_huge"]

_LARGEST = 4 * 2**30
"""Bytes of one intermediate tensor at the few samples a model is checked with."""
_CALLS = 200_000


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > _CALLS:
            raise BadModel("too_large", f"the model runs more than {_CALLS} operators for one batch")
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.numel() * t.element_size() > _LARGEST:
                raise BadModel(
                    "too_large",
                    f"{func} gives a tensor of shape {tuple(t.shape)}, more than {_LARGEST >> 30} GiB: "
                    "check the strides and paddings of the model, or export it with a smaller input",
                )
        return out


def refuse_huge(module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Raises ``BadModel`` (``too_large``). Whatever else goes wrong here, the real run says better."""
    tensors = {name: t.to("meta") for name, t in [*module.named_parameters(), *module.named_buffers()]}
    try:
        with torch.no_grad(), _Watch():
            functional_call(module, tensors, tuple(t.to("meta") for t in inputs))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError):
        return
