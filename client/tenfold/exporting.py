"""Write the upload file: a network without its code. Needs torch."""

import copy
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

__all__ = ["export"]


def export(model: nn.Module, example: Tensor | Sequence[Tensor], path: str | Path) -> Path:
    """Export ``model`` to ``path`` (a ``.pt2`` file) for upload, and return the path.

    ``example``: the inputs, batch first, of any batch size (one sample is repeated: at batch 1 torch would fix the
    size for good). The model is exported in eval mode on the CPU with a batch size that varies; if its code cannot vary
    it, at the example's size, with a warning. Nothing else goes along: no source paths, no example data.

    The model itself is left as it was. Raises ``ValueError`` for inputs without a batch, ``TypeError`` for a model that
    is no ``nn.Module``, ``RuntimeError`` for a torch older than 2.9, and torch's own errors where the model cannot be
    exported.

    >>> tenfold.export(model, torch.randn(2, 3, 32, 32), "model.pt2")
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9):
        raise RuntimeError(f"torch {torch.__version__} saves weights as pickles, which are refused: use 2.9 or later")
    if not isinstance(model, nn.Module):
        raise TypeError(f"export takes an nn.Module, got {type(model).__name__}")
    inputs = _batched((example,) if isinstance(example, Tensor) else tuple(example))
    target = Path(path)
    if target.suffix != ".pt2":
        target = target.with_name(target.name + ".pt2")
    with _ready(model) as ready, warnings.catch_warnings():
        # What torch says here is about its own internals: LSTMs rearrange their weights while they are traced.
        warnings.simplefilter("ignore")
        program, fixed = _export(ready, inputs)
        _strip(program)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A half-written file must never stand at the target: uploads may be started by a watcher.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            draft = Path(folder) / "model.pt2"
            torch.export.save(program, draft)
            draft.replace(target)
    if fixed is not None:
        warnings.warn(
            f"the model's code fixes the batch size, so it was exported at {inputs[0].shape[0]} ({fixed}); "
            "Tenfold can still compress it, at that size if need be",
            stacklevel=2,
        )
    return target


def _batched(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not inputs or not all(isinstance(t, Tensor) for t in inputs):
        raise ValueError(f"example must be a tensor or a tuple of tensors, got {[type(t).__name__ for t in inputs]}")
    if any(t.dim() == 0 or t.shape[0] == 0 for t in inputs):
        raise ValueError(f"every example needs a batch dimension, got shapes {[tuple(t.shape) for t in inputs]}")
    batch = max(t.shape[0] for t in inputs)
    if any(t.shape[0] != batch for t in inputs):
        raise ValueError(f"the examples have different batch sizes: shapes {[tuple(t.shape) for t in inputs]}")
    cpu = (t.detach().cpu() for t in inputs)
    return tuple(t.repeat(2, *[1] * (t.dim() - 1)) if batch == 1 else t for t in cpu)


@contextmanager
def _ready(model: nn.Module) -> Iterator[nn.Module]:
    """The model on the CPU in eval mode, on the plain code path; put back as it was."""
    on_cpu = all(t.device.type == "cpu" for t in (*model.parameters(), *model.buffers()))
    ready = model if on_cpu else copy.deepcopy(model).cpu()
    modes = {m: m.training for m in ready.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused path is one operator that nothing can be replaced in
    try:
        ready.eval()
        yield ready
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for m, training in modes.items():
            m.training = training


def _export(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[ExportedProgram, str | None]:
    """The program, and None or the first line of why its batch size does not vary."""
    shapes: Any = tuple({0: Dim.DYNAMIC} for _ in inputs)
    try:
        # On clones: torch marks the tensors as dynamic, which the second attempt would still see.
        return torch.export.export(model, tuple(t.clone() for t in inputs), dynamic_shapes=shapes), None
    except Exception as e:  # torch has no one class for what makes a size static
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        return torch.export.export(model, inputs), reason[:200]


def _strip(program: ExportedProgram) -> None:
    """Take out what would tell of the exporting machine: example data and stack traces with source paths."""
    program._example_inputs = None
    for part in program.graph_module.modules():
        for node in getattr(getattr(part, "graph", None), "nodes", ()):
            for key in ("stack_trace", "custom", "from_node", "source_fn_stack", "torch_fn"):
                node.meta.pop(key, None)
