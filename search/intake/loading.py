"""The way in: an uploaded file to a ``LiftedModel``."""

from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from search.errors import BadModel, TenfoldError
from search.intake.batch import free_batch
from search.intake.dryrun import refuse_huge
from search.intake.formats import detect
from search.intake.lift import InputFacts, lift
from search.intake.lifted import LiftedModel, all_outputs
from search.intake.pretrained import load_pretrained
from search.intake.pt2 import load_pt2_upload
from search.spec import TensorInfo

__all__ = ["lift_program", "load_model"]


def load_model(
    path: Path, *, format: str = "auto", architecture: dict[str, Any] | None = None, scratch: Path
) -> LiftedModel:
    """Take in an upload. ``format``: auto, pt2, safetensors or state_dict (the last two need an ``architecture``).

    ``architecture``: ``{"name": "resnet20_cifar10"}`` with options of that architecture, or
    ``{"transformers": {...config.json...}}``. ``scratch``: a folder that this process may write to.
    Raises ``BadModel`` or ``Refused``; whatever else goes wrong inside torch comes out as ``BadModel`` too.
    """
    kind = detect(path, format)
    try:
        if kind == "pt2":
            program, renamed = load_pt2_upload(path, scratch)
            return lift_program(program, kind, renamed)
        return lift_program(load_pretrained(path, kind, architecture), kind)
    except TenfoldError:
        raise
    except MemoryError:
        raise BadModel("too_large", "the model does not fit into this worker's memory: give the worker more") from None
    except Exception as e:  # the last line of defence: a hostile graph meets every check torch has
        raise BadModel("does_not_run", f"the model could not be rebuilt and run ({_brief(e)}): {_ADVICE}") from e


_INPUT_MAX = 2**28
_ADVICE = (
    "check that torch.export.load(file).module()(example) works where it was made, and export it with tenfold.export"
)


def lift_program(program: ExportedProgram, format: str, renamed: dict[str, str] | None = None) -> LiftedModel:
    """Lift, find the batch sizes that work, and look at the outputs."""
    lifted = lift(program)
    facts = lifted.inputs
    for f in facts:
        if f.dtype.is_complex or not f.shape or 0 in f.shape:
            raise BadModel(
                "input",
                f"the input {f.name!r} has shape {f.shape} of {f.dtype}: give it a batch dimension that is not empty, "
                "and a real type",
            )
        if prod(f.shape) > _INPUT_MAX:
            raise BadModel("input", f"the input {f.name!r} has shape {f.shape}, more than {_INPUT_MAX} elements")
    symbolic = facts[0].varies[0]
    exported = 2 if symbolic else facts[0].shape[0]
    batched = tuple(f.varies[0] if symbolic else f.shape[0] == exported for f in facts)
    limits = tuple(_limit(lifted.module, f.name) for f in facts)
    common = {
        "format": format,
        "skipped": lifted.skipped,
        "locked": lifted.locked,
        "renamed": renamed or {},
        "calls": lifted.calls,
        "sizes": tuple(f.shape for f in facts),
        "limits": limits,
    }
    free = tuple(_info(f, b) for f, b in zip(facts, batched, strict=True))
    draft = LiftedModel(lifted.module, free, (), **common)  # type: ignore[arg-type]

    def inputs(n: int) -> tuple[Tensor, ...]:
        # The first samples are the same whatever n, so that two batches can be compared.
        most = draft.example(2 * exported + 1)
        return tuple(t[:n] if b else t for t, b in zip(most, batched, strict=True))

    try:
        refuse_huge(lifted.module, inputs(2 * exported))
        module, batch = free_batch(lifted.module, inputs, exported, symbolic)
        with torch.no_grad():
            first = all_outputs(module(*inputs(exported)))
            other = all_outputs(module(*inputs(2 * exported))) if batch == "any" else first
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as e:
        raise BadModel("does_not_run", f"the model does not run on random input ({_brief(e)}): {_ADVICE}") from None
    if not first:
        raise BadModel("no_output", "the model returns no tensor: return its logits")
    outputs = tuple(_output(name, a, b) for (name, a), (_, b) in zip(first, other, strict=True))
    known = free if batch == "any" else tuple(_info(f, False) for f in facts)
    return LiftedModel(module, known, outputs, batch=batch, **common)  # type: ignore[arg-type]


def _info(facts: InputFacts, batched: bool) -> TensorInfo:
    shape = tuple(None if v else s for s, v in zip(facts.shape, facts.varies, strict=True))
    return TensorInfo(
        name=facts.name,
        dtype=str(facts.dtype).removeprefix("torch."),
        shape=(None if batched else facts.shape[0], *shape[1:]),
    )


def _output(name: str, one: Tensor, two: Tensor) -> TensorInfo:
    """Sizes that differ between two batches vary."""
    shape = tuple(None if a != b else a for a, b in zip(one.shape, two.shape, strict=True))
    return TensorInfo(name=name, dtype=str(one.dtype).removeprefix("torch."), shape=shape)


_PASSES_ON = frozenset({"to", "_to_copy", "view", "reshape", "flatten", "unsqueeze", "squeeze", "clone", "contiguous"})


def _limit(module: fx.GraphModule, name: str) -> int:
    """The smallest embedding that reads this input directly, or 0."""
    reached = [n for n in module.graph.nodes if n.op == "placeholder" and n.target == name]
    limit = 0
    while reached:
        for user in reached.pop().users:
            layer = module.get_submodule(str(user.target)) if user.op == "call_module" else None
            if isinstance(layer, nn.Embedding):
                limit = min(limit or layer.num_embeddings, layer.num_embeddings)
            elif getattr(user.target, "_opname", "") in _PASSES_ON:
                reached.append(user)
    return limit


def _brief(e: Exception) -> str:
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0][:200]}" if lines else type(e).__name__
