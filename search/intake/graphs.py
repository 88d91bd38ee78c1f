"""An uploaded graph, rebuilt node by node from an allow-list of operators, argument kinds and names."""

import re
from typing import Any

from search.errors import Refused
from search.intake.allowed import DROPPED, HIGHER_ORDER, PYTHON_OPS, aten_allowed
from search.intake.expressions import clean_expression
from search.intake.names import Names

__all__ = ["GraphVetter", "clean_argument_name", "clean_dtype", "clean_float", "clean_int"]

_NODES_MAX = 60_000
_NESTING_MAX = 3
_LIST_MAX = 65_536
_SIZE_BITS_MAX = 120
"""Sizes are Python integers at run time; forty squarings in a row would fill the memory."""

_GEOMETRY = {
    **dict.fromkeys(("stride", "padding", "dilation", "output_padding", "kernel_size", "pad"), 4096),
    "output_size": 65_536,
    "num_layers": 256,
    "interpolation_mode": 2,
    "padding_mode": 2,
}
"""Largest values of what torch does not check: a transposed convolution of stride 20000 crashes, layers are counted."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,400}\Z")
_STRING = re.compile(r"[a-z_]{0,24}\Z")
_EQUATION = re.compile(r"[A-Za-z,.\-> ]{1,200}\Z")
_OVERLOAD = re.compile(r"[A-Za-z0-9_]{1,40}\Z")
_PATH = re.compile(r"(?=.{0,400}\Z)(?:[^.,;\[\]]+(?:\.[^.,;\[\]]+)*)?\Z", re.DOTALL)
_REPEATED = re.compile(r"@\d+")
"""How torch marks a path at every call but the first."""
_TYPE = re.compile(r"[A-Za-z0-9_.<>\[\]]{1,300}\Z")
_DEVICES = ("cpu", "cuda", "mps", "xpu")
_DTYPES = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13})


def _shown(value: object) -> str:
    return repr(str(value)[:80])


def clean_int(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise Refused("argument", f"{_shown(value)} stands where a 64-bit integer belongs")
    return value


def clean_float(value: object) -> float | str:
    """Non-finite ones travel as the strings that torch's own reader turns back."""
    if value in ("Infinity", "-Infinity", "NaN") and isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e308 or value != value:
        if isinstance(value, float):
            return "NaN" if value != value else ("Infinity" if value > 0 else "-Infinity")
        raise Refused("argument", f"{_shown(value)} stands where a number belongs")
    return float(value)


def clean_bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise Refused("argument", f"{_shown(value)} stands where true or false belongs")
    return value


def clean_argument_name(value: object) -> str:
    if not isinstance(value, str) or not _IDENTIFIER.match(value):
        raise Refused("name", f"{_shown(value)} is not a name of letters, digits and underscores")
    return value


def clean_dtype(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value not in _DTYPES:
        raise Refused(
            "dtype", f"scalar type {_shown(value)} is not read: use float32, float64, float16, bfloat16, int or bool"
        )
    return value


def _enumerated(value: object, largest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
        raise Refused("argument", f"{_shown(value)} is not one of 0 to {largest}")
    return value


def _only(value: object, what: str) -> tuple[str, Any]:
    """The one member of a union."""
    if not isinstance(value, dict) or len(value) != 1:
        raise Refused("bad_json", f"{what} is {_shown(value)}, not an object with one member")
    ((kind, inner),) = value.items()
    return kind, inner


def _list(value: object) -> list[Any]:
    if not isinstance(value, list) or len(value) > _LIST_MAX:
        raise Refused("bad_json", f"{_shown(value)} is not a list of at most {_LIST_MAX}")
    return value


def _dict(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused("bad_json", f"{_shown(value)} is not an object")
    return value


def _tensor(value: object) -> dict[str, str]:
    return {"name": clean_argument_name(_dict(value).get("name"))}


def _device(value: object) -> dict[str, Any]:
    if _dict(value).get("type") not in _DEVICES:
        raise Refused("device", f"the device {_shown(value)} is not known: export the model on the CPU")
    return {"type": "cpu", "index": None}  # wherever it was written, it is read on the CPU


def _symbolic(value: object, plain: str) -> dict[str, Any]:
    """A SymInt / SymBool / SymFloat value: an integer, or an expression with the size it had when it was exported."""
    kind, inner = _only(value, "a size")
    if kind == "as_int" == plain:
        return {"as_int": clean_int(inner)}
    if kind == "as_bool" == plain:
        return {"as_bool": clean_bool(inner)}
    if kind != "as_expr":
        raise Refused("symbolic_expression", f"a size is given as {kind!r}")
    expression: dict[str, Any] = {"expr_str": clean_expression(_dict(inner).get("expr_str")), "hint": None}
    hint = inner.get("hint")
    if hint is not None:
        hint_kind, hint_value = _only(hint, "a size's hint")
        if hint_kind == "as_int":
            expression["hint"] = {"as_int": clean_int(hint_value)}
        elif hint_kind == "as_bool":
            expression["hint"] = {"as_bool": clean_bool(hint_value)}
        else:
            raise Refused("symbolic_expression", f"a size's hint is given as {hint_kind!r}")
    return {"as_expr": expression}


def _symbolic_argument(value: object, plain: str) -> dict[str, Any]:
    kind, inner = _only(value, "a size argument")
    if kind == "as_name":
        return {"as_name": clean_argument_name(inner)}
    if kind != plain:
        raise Refused("argument", f"a size argument is given as {kind!r}")
    checks = {"as_int": clean_int, "as_bool": clean_bool, "as_float": clean_float}
    return {kind: checks[plain](inner)}  # type: ignore[operator]


def _optional_tensor(value: object) -> dict[str, Any]:
    kind, inner = _only(value, "an optional tensor")
    if kind == "as_none":
        return {"as_none": True}
    if kind == "as_tensor":
        return {"as_tensor": _tensor(inner)}
    raise Refused("argument", f"an optional tensor is given as {kind!r}")


class GraphVetter:
    """Counts nodes over all nested graphs. ``graph`` raises ``Refused`` at the first thing that is not allowed."""

    def __init__(self, names: Names) -> None:
        self.nodes = 0
        self._names = names

    def graph(self, value: dict[str, Any], depth: int = 0) -> dict[str, Any]:
        if depth > _NESTING_MAX:
            raise Refused("nesting", f"graphs are nested deeper than {_NESTING_MAX}")
        if _dict(value.get("custom_obj_values") or {}):
            raise Refused("custom_object", "the graph uses custom objects: keep tensors and plain numbers only")
        if _dict(value.get("sym_float_values") or {}):
            raise Refused(
                "symbolic_float", "the graph computes with symbolic fractions of its sizes: use integer sizes"
            )
        bits: dict[str, int] = {}
        nodes = []
        for node in _list(value.get("nodes")):
            self.nodes += 1
            if self.nodes > _NODES_MAX:
                raise Refused("too_large", f"the graph has more than {_NODES_MAX} nodes")
            clean = self._node(_dict(node), depth, bits)
            if clean is not None:
                nodes.append(clean)
        return {
            "inputs": [self._argument(a, depth) for a in _list(value.get("inputs"))],
            "outputs": [self._argument(a, depth) for a in _list(value.get("outputs"))],
            "nodes": nodes,
            "tensor_values": {
                clean_argument_name(k): self._tensor_meta(v) for k, v in _dict(value.get("tensor_values")).items()
            },
            "sym_int_values": {
                clean_argument_name(k): _symbolic(v, "as_int") for k, v in _dict(value.get("sym_int_values")).items()
            },
            "sym_bool_values": {
                clean_argument_name(k): _symbolic(v, "as_bool") for k, v in _dict(value.get("sym_bool_values")).items()
            },
            "is_single_tensor_return": value.get("is_single_tensor_return") is True,
            "custom_obj_values": {},
            "sym_float_values": {},
        }

    def _tensor_meta(self, value: object) -> dict[str, Any]:
        meta = _dict(value)
        if meta.get("layout") != 7:
            raise Refused("layout", "a tensor of the graph is not dense: use strided tensors")
        sizes, strides = _list(meta.get("sizes")), _list(meta.get("strides"))
        if len(sizes) != len(strides) or len(sizes) > 16:
            raise Refused("argument", f"a tensor of the graph has {len(sizes)} sizes and {len(strides)} strides")
        return {
            "dtype": clean_dtype(meta.get("dtype")),
            "sizes": [_symbolic(s, "as_int") for s in sizes],
            "requires_grad": meta.get("requires_grad") is True,
            "device": _device(meta.get("device")),
            "strides": [_symbolic(s, "as_int") for s in strides],
            "storage_offset": _symbolic(meta.get("storage_offset"), "as_int"),
            "layout": 7,
        }

    def _node(self, node: dict[str, Any], depth: int, bits: dict[str, int]) -> dict[str, Any] | None:
        target = self._target(node.get("target"))
        if target is None:
            return None
        strings = _EQUATION if target.startswith("torch.ops.aten.einsum.") else _STRING
        inputs = []
        for i in _list(node.get("inputs")):
            name, kind = _dict(i).get("name"), i.get("kind")
            clean: dict[str, Any] = {
                "name": "" if name == "" else clean_argument_name(name),
                "arg": self._argument(i.get("arg"), depth, strings),
            }
            if kind is not None:
                clean["kind"] = _enumerated(kind, 2)
            inputs.append(clean)
        if target in HIGHER_ORDER:
            # Autocast names its device in words; like every device, it becomes the CPU.
            for i in inputs:
                if "as_string" in i["arg"]:
                    i["arg"] = {"as_string": "cpu"}
        elif any("as_graph" in i["arg"] for i in inputs):
            raise Refused("argument", f"{target} takes a graph as argument")
        for i in inputs:
            if i["name"] in _GEOMETRY:
                _bound_geometry(target, i["name"], i["arg"])
        outputs = [self._argument(o, depth) for o in _list(node.get("outputs"))]
        _bound_sizes(target, inputs, outputs, bits)
        out: dict[str, Any] = {
            "target": target,
            "inputs": inputs,
            "outputs": outputs,
            "metadata": self._metadata(node.get("metadata")),
        }
        if isinstance(node.get("is_hop_single_tensor_return"), bool):
            out["is_hop_single_tensor_return"] = node["is_hop_single_tensor_return"]
        if node.get("name") is not None:
            out["name"] = clean_argument_name(node["name"])
        return out

    def _target(self, target: object) -> str | None:
        if isinstance(target, str) and len(target) < 120:
            if target in PYTHON_OPS or target in HIGHER_ORDER:
                return target
            parts = target.split(".")
            if len(parts) == 5 and parts[:3] == ["torch", "ops", "aten"] and _OVERLOAD.match(parts[4]):
                if parts[3] in DROPPED:
                    return None
                if aten_allowed(parts[3], parts[4]):
                    return target
        if target in (
            "torch.ops.aten._transformer_encoder_layer_fwd.default",
            "torch.ops.aten._native_multi_head_attention.default",
        ):
            raise Refused(
                "operator",
                f"the graph calls {_shown(target)}, the fused inference path: write the file with tenfold.export, or "
                "call torch.backends.mha.set_fastpath_enabled(False) before torch.export.export",
            )
        raise Refused(
            "operator",
            f"the graph calls {_shown(target)}, which is not among the operators this server runs: "
            "rewrite that part of the model with standard layers",
        )

    def _argument(self, value: object, depth: int, strings: re.Pattern[str] = _STRING) -> dict[str, Any]:
        kind, inner = _only(value, "an argument")
        match kind:
            case "as_none":
                clean: Any = True
            case "as_tensor":
                clean = _tensor(inner)
            case "as_tensors":
                clean = [_tensor(t) for t in _list(inner)]
            case "as_int":
                clean = clean_int(inner)
            case "as_ints":
                clean = [clean_int(i) for i in _list(inner)]
            case "as_float":
                clean = clean_float(inner)
            case "as_floats":
                clean = [clean_float(i) for i in _list(inner)]
            case "as_bool":
                clean = clean_bool(inner)
            case "as_bools":
                clean = [clean_bool(i) for i in _list(inner)]
            case "as_string":
                if not isinstance(inner, str) or not strings.match(inner):
                    raise Refused("string", f"the text argument {_shown(inner)} is not a lower-case word")
                clean = inner
            case "as_sym_int":
                clean = _symbolic_argument(inner, "as_int")
            case "as_sym_ints":
                clean = [_symbolic_argument(i, "as_int") for i in _list(inner)]
            case "as_sym_bool":
                clean = _symbolic_argument(inner, "as_bool")
            case "as_sym_bools":
                clean = [_symbolic_argument(i, "as_bool") for i in _list(inner)]
            case "as_scalar_type":
                clean = clean_dtype(inner)
            case "as_memory_format":
                clean = _enumerated(inner, 4)
            case "as_layout":
                clean = 7
                if inner != 7:
                    raise Refused("layout", f"layout {_shown(inner)} is not dense: use strided tensors")
            case "as_device":
                clean = _device(inner)
            case "as_optional_tensor":
                clean = _optional_tensor(inner)
            case "as_optional_tensors":
                clean = [_optional_tensor(t) for t in _list(inner)]
            case "as_graph":
                clean = {
                    "name": clean_argument_name(_dict(inner).get("name")),
                    "graph": self.graph(_dict(inner.get("graph")), depth + 1),
                }
            case _:
                raise Refused(
                    "argument", f"an argument is given as {_shown(kind)}: keep tensors and plain numbers only"
                )
        return {kind: clean}

    def _metadata(self, value: object) -> dict[str, str]:
        """Only where in the user's own modules the node stood."""
        stack = value.get("nn_module_stack") if isinstance(value, dict) else None
        if not isinstance(stack, str) or len(stack) > 20_000:
            return {}
        kept: list[str] = []
        for entry in stack.split(";"):
            parts = entry.split(",")
            if len(parts) == 3 and _PATH.match(parts[1]) and _TYPE.match(parts[2]):
                path = self._names(_REPEATED.sub("", parts[1])) if parts[1] else ""
                kept.append(f"k{len(kept)},{path},{parts[2].translate(_NO_BRACKETS)}")
        return {"nn_module_stack": ";".join(kept)} if kept else {}


_NO_BRACKETS = {ord(c): "_" for c in "<>[]"}


def _bound_geometry(target: str, name: str, arg: dict[str, Any]) -> None:
    kind, inner = next(iter(arg.items()))
    values = [inner] if kind == "as_int" else inner if kind == "as_ints" else []
    if any(abs(v) > _GEOMETRY[name] for v in values):
        raise Refused("argument", f"{target} has {name} {values[:6]}; at most {_GEOMETRY[name]} is run")


def _bound_sizes(
    target: str, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], bits: dict[str, int]
) -> None:
    """Keep Python integers small: a bound on each size's bits, from those it is computed from."""
    if not target.startswith("_operator."):
        return
    widths = []
    for i in inputs:
        kind, inner = next(iter(i["arg"].items()))
        if kind == "as_int":
            widths.append(abs(inner).bit_length())
        elif kind == "as_sym_int":
            widths.append(abs(inner["as_int"]).bit_length() if "as_int" in inner else bits.get(inner["as_name"], 40))
    width = (sum(widths) if target == "_operator.mul" else max(widths, default=0)) + 1
    if width > _SIZE_BITS_MAX:
        raise Refused("huge_size", f"the graph multiplies sizes to more than {_SIZE_BITS_MAX} bits")
    for o in outputs:
        kind, inner = next(iter(o.items()))
        if kind == "as_sym_int" and "as_name" in inner:
            bits[inner["as_name"]] = width
