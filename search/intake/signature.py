"""An uploaded graph's signature, its output structure and the ranges of its sizes, rebuilt."""

import json
import re
from typing import Any

from search.errors import Refused
from search.intake.expressions import is_symbol
from search.intake.graphs import clean_argument_name, clean_bool, clean_float, clean_int
from search.intake.names import Names

__all__ = ["clean_ranges", "clean_signature"]

_KEY = re.compile(r"[A-Za-z0-9_]{1,80}\Z")
_DEPTH_MAX = 8
_LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}


def clean_signature(
    module: dict[str, Any], graph: dict[str, Any], weights: set[str], constants: set[str], names: Names
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The signature, and a call graph of the root alone: flat inputs, outputs in tuples, lists and dicts.

    ``weights`` and ``constants``: what the payloads are called; the signature may name no other.
    """
    signature = module.get("signature")
    if not isinstance(signature, dict):
        raise Refused("bad_json", "the graph has no signature: write the file with tenfold.export")
    specs = signature.get("input_specs")
    outputs = signature.get("output_specs")
    if not isinstance(specs, list) or not isinstance(outputs, list) or len(specs) != len(graph["inputs"]):
        raise Refused("signature", "the signature and the graph disagree about the number of inputs")
    if len(outputs) != len(graph["outputs"]):
        raise Refused("signature", "the signature and the graph disagree about the number of outputs")
    clean_inputs = [_input(s, g, weights, constants, names) for s, g in zip(specs, graph["inputs"], strict=True)]
    clean_outputs = [_output(o, g) for o, g in zip(outputs, graph["outputs"], strict=True)]
    users = sum("user_input" in s or "constant_input" in s for s in clean_inputs)
    if not any("user_input" in s for s in clean_inputs):
        raise Refused("signature", "the model takes no tensor input")
    calls = module.get("module_call_graph")
    root = calls[0] if isinstance(calls, list) and calls and isinstance(calls[0], dict) else {}
    structure = root.get("signature") if root.get("fqn") == "" else None
    out_spec = structure.get("out_spec") if isinstance(structure, dict) else None
    entry = {
        "fqn": "",
        "signature": {
            "inputs": [],
            "outputs": [],
            "in_spec": _dumped(_tuple([_tuple([_LEAF] * users), {**_LEAF, "type": "builtins.dict", "context": "[]"}])),
            "out_spec": _dumped(_out_spec(out_spec, len(clean_outputs))),
            "forward_arg_names": None,
        },
    }
    return {"input_specs": clean_inputs, "output_specs": clean_outputs}, [entry]


def _input(
    spec: object, graph_input: dict[str, Any], weights: set[str], constants: set[str], names: Names
) -> dict[str, Any]:
    kind, inner = next(iter(spec.items())) if isinstance(spec, dict) and len(spec) == 1 else ("", None)
    if not isinstance(inner, dict):
        raise Refused("signature", f"an input is described by {str(spec)[:80]!r}")
    if kind == "user_input":
        if "as_tensor" not in graph_input:
            given = next(iter(graph_input))
            raise Refused("input", f"an input of the model is given as {given!r}: every input must be a tensor")
        return {"user_input": {"arg": graph_input}}
    if kind == "constant_input":
        name = clean_argument_name(inner.get("name"))
        value_kind, value = next(iter((inner.get("value") or {"as_none": True}).items()))
        checks = {"as_none": lambda _: True, "as_int": clean_int, "as_float": clean_float, "as_bool": clean_bool}
        if value_kind not in checks or next(iter(graph_input)) not in checks:
            raise Refused(
                "input", f"the constant input {name!r} is given as {str(value_kind)[:20]!r}: pass tensors only"
            )
        return {"constant_input": {"name": name, "value": {value_kind: checks[value_kind](value)}}}
    if "as_tensor" not in graph_input:
        raise Refused("signature", f"a {kind[:20]!r} of the model is not a tensor")
    arg = graph_input["as_tensor"]
    if kind == "parameter":
        return {"parameter": {"arg": arg, "parameter_name": _known(inner.get("parameter_name"), weights, names)}}
    if kind == "buffer":
        persistent = inner.get("persistent") is True
        name = _known(inner.get("buffer_name"), weights if persistent else weights | constants, names)
        return {"buffer": {"arg": arg, "buffer_name": name, "persistent": persistent}}
    if kind == "tensor_constant":
        return {
            "tensor_constant": {
                "arg": arg,
                "tensor_constant_name": _known(inner.get("tensor_constant_name"), constants, names),
            }
        }
    raise Refused("signature", f"an input of kind {kind[:20]!r} is not read: keep tensors only")


def _known(name: object, held: set[str], names: Names) -> str:
    called = names(name) if isinstance(name, str) else ""
    if called not in held:
        raise Refused("signature", f"the graph uses the tensor {str(name)[:80]!r}, which the file does not hold")
    return called


def _output(spec: object, graph_output: dict[str, Any]) -> dict[str, Any]:
    kind = next(iter(spec)) if isinstance(spec, dict) and len(spec) == 1 else ""
    if kind == "user_output":
        return {"user_output": {"arg": graph_output}}
    raise Refused(
        "signature",
        f"the graph returns a {kind[:24]!r} besides its outputs: export the model in eval mode, "
        "without run_decompositions",
    )


def _tuple(children: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "builtins.tuple", "context": "null", "children_spec": children}


def _dumped(spec: dict[str, Any]) -> str:
    return json.dumps([1, spec])


def _out_spec(text: object, leaves: int) -> dict[str, Any]:
    """The structure of the outputs; whatever container it was, a tuple, list or dict of the same leaves is written."""
    try:
        if not isinstance(text, str) or len(text) > 100_000:
            raise ValueError
        version, raw = json.loads(text)
        if version != 1:
            raise ValueError
        spec, found = _container(raw, 0)
    except (ValueError, TypeError, RecursionError):
        raise Refused(
            "tree_spec", "the structure of the outputs cannot be read: return tensors, tuples or dicts"
        ) from None
    if found != leaves:
        raise Refused("tree_spec", f"the structure of the outputs has {found} leaves for {leaves} outputs")
    return spec


def _container(raw: Any, depth: int) -> tuple[dict[str, Any], int]:
    if depth > _DEPTH_MAX or not isinstance(raw, dict):
        raise ValueError
    children = raw.get("children_spec")
    if not isinstance(children, list) or len(children) > 4096:
        raise ValueError
    if raw.get("type") is None:
        if children:
            raise ValueError
        return dict(_LEAF), 1
    done = [_container(c, depth + 1) for c in children]
    specs, leaves = [d[0] for d in done], sum(d[1] for d in done)
    if raw["type"] == "builtins.list":
        return {"type": "builtins.list", "context": "null", "children_spec": specs}, leaves
    keys = _keys(raw.get("context"), len(specs))
    if keys is not None:
        return {"type": "builtins.dict", "context": json.dumps(keys), "children_spec": specs}, leaves
    return _tuple(specs), leaves


def _keys(context: object, count: int) -> list[str] | None:
    """The keys of a dict, an ordered dict or an output class of transformers; None for anything else."""
    if not isinstance(context, str) or len(context) > 50_000:
        return None
    keys = json.loads(context)
    if isinstance(keys, list) and len(keys) == count and len(set(map(str, keys))) == count and count:
        if all(isinstance(k, str) and _KEY.match(k) for k in keys):
            return keys
        if all(isinstance(k, int) for k in keys):
            return [str(k) for k in keys]
    return None


def clean_ranges(ranges: object) -> dict[str, Any]:
    if not isinstance(ranges, dict) or len(ranges) > 1000:
        raise Refused("range", "the ranges of the sizes are not an object of at most 1000 symbols")
    clean = {}
    for symbol, limits in ranges.items():
        if not is_symbol(symbol) or not isinstance(limits, dict):
            raise Refused("range", f"the range of {symbol[:40]!r} is not that of a size")
        low, high = limits.get("min_val"), limits.get("max_val")
        clean[symbol] = {
            "min_val": None if low is None else clean_int(low),
            "max_val": None if high is None else clean_int(high),
        }
    return clean
