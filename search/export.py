"""The files of one compressed network. Each loads without Tenfold, and none tells where it was made."""

import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnxscript import ir
from onnxscript.optimizer import optimize_ir
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from search import report
from search.intake import Answer, first_output, last_output
from search.metrics import Samples, forward
from search.spec import ExportFormat, Metric, Plan, Storage, TensorInfo
from search.storage import narrowed
from search.surgery import named_sites
from tenfold import exporting
from tenfold.applying import apply

__all__ = ["export_all", "plan_json", "round_weights", "save_weights", "write_check", "write_onnx", "write_pt2"]

CHECK_ROWS = 2048
CHECK_BYTES = 16 << 20
"""Of the inputs and answers in check.npz, whichever limit comes first."""
CHECK_BATCH = 32
FOLDED = 256
"""Constants of an ONNX graph are folded up to so many elements, and beyond where that does not make the file larger: a
kernel's cores stay cores."""
TURNED = 64
"""Smaller matrices are stored twice rather than turned round: a node takes as much room."""
_NARROW = (ir.DataType.FLOAT16, ir.DataType.INT8)
"""What ``search.storage`` keeps weights as."""


class Signature(Protocol):
    """How the network is called; ``search.intake.LiftedModel`` is one."""

    @property
    def inputs(self) -> tuple[TensorInfo, ...]: ...
    @property
    def batch(self) -> Literal["any"] | int: ...
    def example(self, batch: int) -> tuple[Tensor, ...]: ...
    def given(self, name: str) -> str: ...


def export_all(
    module: nn.Module,
    original: nn.Module,
    plan: Plan,
    lifted: Signature,
    out: Path,
    formats: Sequence[ExportFormat],
    facts: Mapping[str, Any],
    rounded: Mapping[Storage, nn.Module] | None = None,
) -> list[Path]:
    """Write the asked formats of ``module`` (which is ``original`` after ``plan``) into ``out``.

    ``model.pt2``, ``model.onnx``, ``model.safetensors`` with ``plan.json``, ``report.json`` with ``report.html``; and
    of each ``rounded`` module the first two, such as ``model-int8.pt2``.
    ``facts`` are the report's; it lists the other files with their SHA-256, so it is written last.
    Raises RuntimeError when the weights and the plan do not give the network back.
    """
    module.eval()
    files: list[Path] = []
    if ExportFormat.PT2 in formats or ExportFormat.ONNX in formats:
        files += _write_graphs(module, lifted, out / "model", formats)
        for storage, other in (rounded or {}).items():
            files += _write_graphs(other, lifted, out / f"model-{storage}", formats)
    if ExportFormat.SAFETENSORS in formats:
        files += _write_weights(module, original, plan, lifted, out)
    if ExportFormat.REPORT in formats:
        files += report.write({**facts, "files": [describe(f) for f in files]}, out)
    return files


def round_weights(module: nn.Module, lifted: Signature, storages: Sequence[Storage]) -> dict[Storage, nn.Module]:
    """``module`` with its weights in each of ``storages``; see ``search.storage``."""
    if not storages:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        graph = write_pt2(module, lifted, Path(folder) / "model.pt2")
        return {storage: narrowed(torch.export.load(graph), storage) for storage in storages}


def save_weights(module: nn.Module, plan: Plan, path: Path, given: Callable[[str], str] = str) -> Path:
    """All tensors of ``module`` by the names that ``given`` makes of its own, with the plan in the header.

    What the layers of one site share is stored once, under the first one's name: the plan tells who shares it. Other
    tied tensors are stored under each name, for a user's own network may not tie them.
    """
    again = _shared_before(module)
    tensors = {
        given(name): t.detach().to("cpu", copy=True).contiguous()
        for name, t in module.state_dict().items()
        if name not in again
    }
    # One key only: safetensors writes several in random order, and equal networks should be equal files.
    save_file(tensors, str(path), metadata={"plan": json.dumps(plan_json(plan, given))})
    return path


def plan_json(plan: Plan, given: Callable[[str], str] = str) -> dict[str, Any]:
    """What ``tenfold.apply`` takes: ``{site: {"method", "ranks", "options"}}``. ``given``: as in ``save_weights``."""
    entries = {}
    for site, chosen in sorted(plan.items()):
        members = {given(name): place for name, place in chosen.members.items()}
        entries[given(site)] = chosen.model_copy(update={"members": members}).model_dump(mode="json")
    return entries


def write_pt2(module: nn.Module, lifted: Signature, path: Path) -> Path:
    """As the client's own exporter writes it: the batch free where the network's is, nothing in it of this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the batch cannot vary is known, and told in the model's layer table
        return exporting.export(module, lifted.example(2 if lifted.batch == "any" else lifted.batch), path)


def write_onnx(graph: Path, names: Sequence[str], path: Path) -> Path:
    """One ONNX file of a ``.pt2`` of ours, at the exporter's own opset, without traces of where it was made."""
    program = torch.export.load(graph)
    outputs = [f"output_{i}" if i else "output" for i in range(len(program.graph_signature.user_outputs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter uses what torch itself has deprecated
        made = torch.onnx.export(
            program, (), dynamo=True, optimize=False, input_names=list(names), output_names=outputs, verbose=False
        )
        if made is None:
            raise AssertionError("the exporter hands its program back where no file is named")
        optimize_ir(made.model, output_size_limit=FOLDED, should_fold=_foldable)
    made.save(path, external_data=False)
    model = onnx.load(path)
    _merge_equal(model.graph)
    _strip(model.graph)
    for function in model.functions:
        _strip(function)
    del model.metadata_props[:]
    onnx.save(model, path)
    return path


def write_check(
    module: nn.Module,
    samples: Samples,
    metric: Metric,
    path: Path,
    *,
    reference: nn.Module | None = None,
    rounded: Mapping[Storage, nn.Module] | None = None,
    fixed_batch: int | None = None,
    answer: Answer = first_output,
) -> Path:
    """Inputs, expected answers and labels (or the ``reference`` network's answers) for ``search/reload.py``."""
    expected_of = {"expected": module, **{f"expected_{s}": m.eval() for s, m in (rounded or {}).items()}}
    answers: dict[str, list[Tensor]] = {name: [] for name in expected_of}
    batch = fixed_batch or CHECK_BATCH
    inputs: list[tuple[Tensor, ...]] = []
    targets, wanted = [], []
    first = next(iter(samples.batches(1)))[0]
    module.eval()
    with torch.no_grad():
        stored = (*first, forward(module, first, fixed_batch, answer))  # a map may be larger than what it is of
        row_bytes = sum(x.numel() * x.element_size() for x in stored)
        limit = max(1, min(len(samples), CHECK_ROWS, CHECK_BYTES // row_bytes))
        for xs, target in samples.batches(batch, limit=limit):
            inputs.append(xs)
            for name, network in expected_of.items():
                answers[name].append(forward(network, xs, fixed_batch, answer).float())
            if reference is not None:
                wanted.append(forward(reference, xs, fixed_batch, answer).float())
            elif target is not None:
                targets.append(target)
    arrays = {f"input_{i}": torch.cat([xs[i] for xs in inputs]).numpy() for i in range(len(first))}
    arrays |= {name: torch.cat(parts).numpy() for name, parts in answers.items()}
    if reference is not None:
        arrays["reference"] = torch.cat(wanted).numpy()
    else:
        arrays["targets"] = torch.cat(targets).numpy()
    facts = {"metric": metric.value, "inputs": len(first), "batch": batch, "last": answer is last_output}
    np.savez(path, facts=np.array(json.dumps(facts)), **arrays)  # type: ignore[arg-type]
    return path


def describe(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"filename": path.name, "bytes": path.stat().st_size, "sha256": digest}


def _write_graphs(module: nn.Module, lifted: Signature, stem: Path, formats: Sequence[ExportFormat]) -> list[Path]:
    graph = write_pt2(module, lifted, stem.with_name(stem.name + ".pt2"))
    files = [graph]
    if ExportFormat.ONNX in formats:
        files.append(write_onnx(graph, [i.name for i in lifted.inputs], stem.with_name(stem.name + ".onnx")))
    if ExportFormat.PT2 not in formats:
        graph.unlink()
        files.remove(graph)
    return files


def _write_weights(module: nn.Module, original: nn.Module, plan: Plan, lifted: Signature, out: Path) -> list[Path]:
    """With the user's own names: these files are for the user's own network."""
    weights = save_weights(module, plan, out / "model.safetensors", lifted.given)
    recipe = out / "plan.json"
    recipe.write_text(json.dumps(plan_json(plan, lifted.given), indent=1) + "\n", encoding="utf-8")
    here = {lifted.given(name): name for name in module.state_dict()}
    tensors = {here[name]: t for name, t in load_file(weights).items()}
    again = apply(original, plan_json(plan), tensors).eval()
    example = lifted.example(2 if lifted.batch == "any" else lifted.batch)
    with torch.no_grad():
        gap = float((forward(again, example) - forward(module, example)).abs().max())
    if not gap <= 1e-4:
        raise RuntimeError(f"model.safetensors and plan.json give a network whose answers differ by {gap}")
    return [weights, recipe]


def _shared_before(module: nn.Module) -> set[str]:
    """Names under which factors appear that an earlier layer has too."""
    seen: set[int] = set()
    again: set[str] = set()
    for site, layer in named_sites(module):
        mine = dict(layer.named_parameters())
        again |= {f"{site}.{name}" for name, parameter in mine.items() if id(parameter) in seen}
        seen |= {id(parameter) for parameter in mine.values()}
    return again


def _foldable(node: ir.Node) -> bool | None:
    """False for what widens a stored weight, which would be stored wide; None: as the optimizer likes."""
    source = node.inputs[0].const_value if node.op_type == "Cast" and node.inputs[0] is not None else None
    return False if source is not None and source.dtype in _NARROW else None


def _merge_equal(graph: Any) -> None:
    """Keep one of tensors that are equal: the exporter gives each layer its own copy of what they share, reshaped.

    One that is another turned round becomes a Transpose, which runtimes do once as they load the graph.
    """
    first: dict[tuple[Any, ...], str] = {}
    renamed: dict[str, str] = {}
    turned = []
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        key = (tensor.data_type, array.shape, array.tobytes())
        other = (tensor.data_type, array.T.shape, array.T.tobytes())
        if array.ndim == 2 and array.size > TURNED and key not in first and other in first:
            turned.append(onnx.helper.make_node("Transpose", [first[other]], [tensor.name], perm=[1, 0]))
            first[key] = tensor.name
        renamed[tensor.name] = first.setdefault(key, tensor.name)
    made = {node.output[0] for node in turned}
    kept = [t for t in graph.initializer if renamed[t.name] == t.name and t.name not in made]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    nodes = [*turned, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def _strip(graph: Any) -> None:
    """Drop traces and notes of a graph, its nodes and the graphs inside them."""
    del graph.metadata_props[:]
    graph.doc_string = ""
    for value in (*getattr(graph, "input", ()), *getattr(graph, "output", ()), *getattr(graph, "value_info", ())):
        if hasattr(value, "metadata_props"):
            del value.metadata_props[:]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip(attribute.g)
