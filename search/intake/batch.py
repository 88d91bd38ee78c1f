"""At which batch sizes a lifted network really runs, found by running it."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from search.intake.lifted import all_outputs

__all__ = ["free_batch"]

_TOLERANCE = 1e-4
"""Relative: matrix products of another batch size may add up in another order."""
_SHAPE_OPS = frozenset(
    {
        "view",
        "reshape",
        "_unsafe_view",
        "expand",
        "zeros",
        "ones",
        "full",
        "new_zeros",
        "new_ones",
        "new_full",
        "repeat",
        "rand",
    }
)

Inputs = Callable[[int], tuple[Tensor, ...]]


def free_batch(
    module: fx.GraphModule, inputs: Inputs, exported: int, symbolic: bool
) -> tuple[fx.GraphModule, Literal["any"] | int]:
    """The network and its batch: ``any`` if samples come out the same at other sizes, else ``exported``.

    ``inputs(n)``: n samples whose first ``exported`` are always the same. A file exported at a fixed size has that size
    written into its reshapes; they are rewritten to follow the input, and the result is kept only if it checks.
    Raises whatever the network raises at its own batch size.
    """
    with torch.no_grad():
        reference = all_outputs(module(*inputs(exported)))
        # B + 1 catches what only multiples of B survive; not worth its time for large B.
        sizes = (1, exported + 1, 2 * exported) if exported <= 64 else (1, 2 * exported)
        if _agrees(module, inputs, exported, reference, sizes):
            return module, "any"
        if symbolic:
            return module, exported
        rewritten = _rewritten(module, exported)
        if _agrees(rewritten, inputs, exported, reference, (exported, *sizes)):
            return rewritten, "any"
    return module, exported


def _agrees(
    module: fx.GraphModule,
    inputs: Inputs,
    exported: int,
    reference: Sequence[tuple[str, Tensor]],
    sizes: Sequence[int],
) -> bool:
    """Whether the samples that two batches share come out the same."""
    for n in sizes:
        try:
            found = all_outputs(module(*inputs(n)))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        if len(found) != len(reference):
            return False
        shared = min(n, exported)
        for (_, a), (_, b) in zip(found, reference, strict=True):
            if a.dim() == 0 or b.dim() == 0 or a.shape[0] != n or b.shape[0] != exported or a.shape[1:] != b.shape[1:]:
                return False
            if not _close(a[:shared], b[:shared]):
                return False
    return True


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    both = torch.isfinite(a) & torch.isfinite(b)
    scale = b[both].abs().max().item() if bool(both.any()) else 0.0
    return torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * scale + 1e-12, equal_nan=True)


def _rewritten(module: fx.GraphModule, exported: int) -> fx.GraphModule:
    """A copy whose literal shapes follow the first input's batch."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    places = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_after(places[-1]):
        batch = graph.call_function(torch.ops.aten.sym_size.int, (places[0], 0))
    for node in list(graph.nodes):
        if node.op != "call_function" or getattr(node.target, "_opname", "") not in _SHAPE_OPS:
            continue
        at = next((i for i, a in enumerate(node.args) if isinstance(a, list | tuple)), None)
        if at is None:
            continue
        shape: list[Any] = list(node.args[at])  # type: ignore[arg-type]
        place = _batch_place(shape, exported)
        if place is None:
            continue
        times = shape[place] // exported
        with graph.inserting_before(node):
            shape[place] = batch if times == 1 else graph.call_function(operator.mul, (batch, times))
        node.update_arg(at, shape)
    graph.lint()
    return fx.GraphModule(module, graph, class_name="Lifted").eval()


def _batch_place(shape: list[Any], exported: int) -> int | None:
    """Where a literal shape holds the batch: the size itself before a multiple of it, the first of each.

    Attention and recurrent layers put it second, or fold it with the heads. A wrong guess fails the check.
    """
    if not all(isinstance(s, int) for s in shape):
        return None
    multiples = [] if exported == 1 else [i for i, s in enumerate(shape) if s > 0 and s % exported == 0]
    return next((i for i, s in enumerate(shape) if s == exported), multiples[0] if multiples else None)
