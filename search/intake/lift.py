"""Lifting: an exported program as a *fresh* graph whose compute calls are real modules under the user's own names.

``ep.module()`` is no use here: it cannot be switched to training, its layers cannot be swapped and hooks see nothing.
So a new graph is written next to a new module tree, node by node.
"""

import operator
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from search.errors import BadModel
from search.intake.packed import Rows, divided, layer_of, packed
from search.intake.portable import make_portable, out_of_place
from search.intake.recognize import RECOGNIZERS, Built, turned
from tenfold.layers import TurnedLinear

__all__ = ["InputFacts", "Lift", "lift"]

_COUNTER = "num_batches_tracked"
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")
_WITHOUT_WEIGHTS = {"Attention": "attention", "RReLU": "rrelu"}
"""Names for calls that are no module of the user's; every other one is a dropout."""
_HIGHER_ORDER = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


@dataclass(frozen=True)
class InputFacts:
    """One tensor input as the file describes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """With the sizes it was exported at."""
    varies: tuple[bool, ...]
    """Which of them are symbolic."""


@dataclass(frozen=True)
class Lift:
    module: fx.GraphModule
    inputs: tuple[InputFacts, ...]
    skipped: tuple[str, ...]
    locked: dict[str, str]
    """Modules that must stay as they are, and why."""
    calls: dict[str, str]
    """Modules that are calls of the user's own code, such as ``F.linear(x, embed.weight)``, and their tensors, to the
    names of the weights that these read."""


def lift(ep: ExportedProgram) -> Lift:
    """``ep``: a program of the training dialect (as ``torch.export.export`` gives). Raises ``BadModel``."""
    return _Lifter(ep).run()


@dataclass
class _Site:
    """A module to be: its place in the tree and what it shares."""

    name: str
    built: Built


@dataclass
class _Lifter:
    ep: ExportedProgram
    graph: fx.Graph = field(default_factory=fx.Graph)
    root: nn.Module = field(default_factory=nn.Module)
    source: dict[fx.Node, str] = field(default_factory=dict)
    """Placeholder, or a part of one that is a layer's own, to the canonical name of its tensor."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Canonical name to every name the tensor has."""
    owners: dict[str, str] = field(default_factory=dict)
    """The part of a tensor to the name of the layer whose weight it can be."""
    sites: dict[fx.Node, _Site] = field(default_factory=dict)
    names: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, None] = field(default_factory=dict)
    locked: dict[str, str] = field(default_factory=dict)
    inputs: list[InputFacts] = field(default_factory=list)
    env: dict[fx.Node, Any] = field(default_factory=dict)
    _flat: set[fx.Node] = field(default_factory=set)
    _fresh: set[fx.Node] = field(default_factory=set)
    """Nodes of the exported graph whose value no other shares."""
    _attributes: dict[str, str] = field(default_factory=dict)

    def run(self) -> Lift:
        self._collect_tensors()
        self._divide()
        self._recognize()
        self._place_modules()
        held = self._held()
        for node in self.ep.graph.nodes:
            if node not in held:
                self._emit(node)
        module = fx.GraphModule(self.root, self.graph, class_name="Lifted")
        module.graph.eliminate_dead_code()
        self._lock({str(n.target) for n in module.graph.nodes if n.op == "get_attr"})
        stored = {t.dtype for t in self.ep.state_dict.values() if t.dtype.is_floating_point}
        make_portable(module, stored - {torch.float32})
        return Lift(module.eval(), tuple(self.inputs), tuple(self.skipped), dict(self.locked), self._calls())

    # ---------------------------------------------------------------- tensors

    def _collect_tensors(self) -> None:
        placeholders = [n for n in self.ep.graph.nodes if n.op == "placeholder"]
        canonical: dict[object, str] = {}
        wanted: dict[str, str] = {}
        for name, t in [*self.ep.state_dict.items(), *self.ep.constants.items()]:
            if not isinstance(t, Tensor):
                raise BadModel("custom_object", f"the model holds {name!r}, which is not a tensor")
            key = (t.data_ptr(), t.dtype, tuple(t.shape), t.stride()) if t.numel() else name
            wanted[name] = canonical.setdefault(key, name)
            self.aliases[wanted[name]].add(name)
        trainable = any(t.requires_grad for t in self.ep.state_dict.values())
        for node, spec in zip(placeholders, self.ep.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                self._input(node, spec.arg)
                continue
            name = wanted[str(spec.target)]
            self.source[node] = name
            if name not in self.tensors:
                is_parameter = spec.kind is InputKind.PARAMETER
                self.tensors[name] = _own(self._stored(name), parameter=is_parameter, thaw=not trainable)

    def _stored(self, name: str) -> Tensor:
        state: dict[str, Any] = self.ep.state_dict
        t: Tensor = state[name] if name in state else self.ep.constants[name]
        return t

    def _input(self, node: fx.Node, arg: object) -> None:
        if isinstance(arg, ConstantArgument):
            self.env[node] = arg.value
            return
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise BadModel("input", f"the input {node.name!r} is not a tensor: every input of the model must be one")
        new = self.graph.placeholder(node.name)
        self.env[node] = new
        shape = tuple(_size(s) for s in value.shape)
        self.inputs.append(
            InputFacts(node.name, _full(value.dtype), shape, tuple(not isinstance(s, int) for s in value.shape))
        )

    def _divide(self) -> None:
        """Parts of a tensor become tensors of their own where each of them is a linear layer's weight or bias."""
        parts = divided(self.source, self.tensors)
        for name, nodes in parts.items():
            for node, rows in nodes.items():
                self.source[node] = self._part(name, rows)
        # A layer whose bias stays a part is none, so that its weight stays one too, and the other way round.
        while whole := [n for n, nodes in parts.items() if not all(self._is_linears(node, node) for node in nodes)]:
            for node in [node for name in whole for node in parts.pop(name)]:
                del self.source[node]

    def _part(self, name: str, rows: Rows) -> str:
        part, whole = f"{name}[{rows[0]}:{rows[1]}]", self.tensors[name]
        if part not in self.tensors:
            value = whole.detach()[slice(*rows)].clone()
            is_parameter = isinstance(whole, nn.Parameter)
            self.tensors[part] = nn.Parameter(value, requires_grad=whole.requires_grad) if is_parameter else value
            self.aliases[part] = {f"{alias}[{rows[0]}:{rows[1]}]" for alias in self.aliases[name]}
            self.owners[part] = layer_of(_owner(name), rows, len(whole))
        return part

    def _is_linears(self, tensor: fx.Node, node: fx.Node) -> bool:
        """Whether all that read ``node``, which is ``tensor`` or that turned round, are linear layers that hold it."""
        for user in node.users:
            if turned(user) is node:
                if not self._is_linears(tensor, user):
                    return False
                continue
            built = RECOGNIZERS[user.target](_bind(user), self) if user.target in RECOGNIZERS else None
            if built is None or not isinstance(built.module, nn.Linear) or built.transposed:
                return False
            if tensor not in built.tensors.values() or node in built.inputs:
                return False
        return True

    def weight(self, node: object) -> Tensor | None:
        return self.tensors[self.source[node]] if isinstance(node, fx.Node) and node in self.source else None

    def rank(self, node: object) -> int:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return value.dim() if isinstance(value, Tensor) else 0

    # ---------------------------------------------------------------- modules

    def _recognize(self) -> None:
        found: dict[fx.Node, Built] = {}
        for node in self.ep.graph.nodes:
            if node.op != "call_function" or node.target not in RECOGNIZERS:
                continue
            arguments = _bind(node)
            built = RECOGNIZERS[node.target](arguments, self)
            if built is None:
                self._note_function(node, arguments)
                continue
            if built.first_of_tuple and any(u.args[1] != 0 and u.users for u in node.users):
                continue
            found[node] = built
        self._turn(found)
        made: dict[object, _Site] = {}
        # A module of the user's has its own name, whatever else multiplies with its weight before.
        for node in sorted(found, key=lambda n: not self._is_modules(n, found[n])):
            built = found[node]
            key = _identity(built, self.source) if built.tensors else node
            if key not in made:
                made[key] = _Site(self._name(node, built), built)
            self.sites[node] = _Site(made[key].name, built)

    def _turn(self, found: dict[fx.Node, Built]) -> None:
        """A matrix that some layers hold as it is and others turned round stays one tensor.

        One that is only used turned round becomes a layer's so, if a single product reads it. Those of several, or of
        an ``F.linear``, whose own weight is no tensor of the file, stay calls.
        """
        uses: dict[str, dict[object, Built]] = defaultdict(dict)
        for built in found.values():
            for attribute, tensor in built.tensors.items():
                if attribute.startswith("weight"):
                    uses[self.source[tensor]][_identity(built, self.source)] = built
        for node, built in list(found.items()):
            if not built.transposed:
                continue
            own = _identity(built, self.source)
            others = [b for key, b in uses[self.source[built.tensors["weight"]]].items() if key != own]
            if any(not b.transposed for b in others):
                linear: Any = built.module
                module = TurnedLinear(linear.in_features, linear.out_features, linear.bias is not None, "meta")
                found[node] = Built(module, built.inputs, built.tensors)
            elif others or node.target is torch.ops.aten.linear.default:
                del found[node]
                self._note_function(node, _bind(node))

    def _holders(self) -> dict[str, dict[str, str]]:
        """Tensor to the layers that multiply with it, each with its own name for it."""
        holders: dict[str, dict[str, str]] = defaultdict(dict)
        for site in self.sites.values():
            for attribute, node in site.built.tensors.items():
                if attribute.startswith("weight"):
                    holders[self.source[node]].setdefault(site.name, attribute)
        return holders

    def _note_function(self, node: fx.Node, arguments: dict[str, Any]) -> None:
        for what in ("weight", "bias"):
            value = arguments.get(what)
            if not isinstance(value, fx.Node) or self.weight(value) is not None:
                continue
            where = _path(node) or "the model itself"
            op = str(node.target).split(".")[1]
            whole = packed(value, self.source)
            why = (
                f"its {what} is computed from others"
                if whole is None
                else f"its {what} is a part of {whole}, whose rows are not each one linear layer's own (give each use "
                "a module of its own)"
            )
            self.skipped[f"a {op} in {where}: {why}, so it runs but is not compressed"] = None
            return

    def _name(self, node: fx.Node, built: Built) -> str:
        """The user's own name: from the module stack if it owns the weight, else from the weight."""
        where = _path(node)
        weight = built.tensors.get("weight") or built.tensors.get("weight_ih_l0")
        if weight is None:
            kind = type(built.module).__name__
            own = _stack_type(node).endswith(("Dropout", "Dropout1d", "Dropout2d", "Dropout3d")) and where
            name = where if own else ".".join(filter(None, (where, _WITHOUT_WEIGHTS.get(kind, "dropout"))))
        else:
            if self._is_modules(node, built):
                name = where
            else:
                name = self.owners.get(self.source[weight]) or _owner(self.source[weight])
        unique, k = name or "root", 2
        while unique in self.names:
            unique, k = f"{name or 'root'}_{k}", k + 1
        self.names[unique] = built.module
        return unique

    def _is_modules(self, node: fx.Node, built: Built) -> bool:
        """Whether the call is made inside the module that has this weight."""
        where, weight = _path(node), built.tensors.get("weight")
        return bool(where) and weight is not None and f"{where}.weight" in self.aliases[self.source[weight]]

    def _place_modules(self) -> None:
        for name in sorted(self.names, key=lambda n: n.count(".")):
            site = next(s for s in self.sites.values() if s.name == name and s.built.module is self.names[name])
            module = self.names[name]
            for attribute, node in site.built.tensors.items():
                value = self.tensors[self.source[node]]
                if site.built.transposed and attribute == "weight":
                    value = nn.Parameter(value.detach().t().contiguous(), requires_grad=value.requires_grad)
                _set(module, attribute, value)
            self._restore_counter(module, site)
            parent, leaf = self._container(name)
            parent.add_module(leaf, module)

    def _restore_counter(self, module: nn.Module, site: _Site) -> None:
        if getattr(module, _COUNTER, None) is None:
            return
        mean = site.built.tensors["running_mean"]
        name = self.source[mean].rpartition(".")[0] + "." + _COUNTER
        stored = self.ep.state_dict.get(name)
        setattr(module, _COUNTER, stored.detach().clone() if stored is not None else torch.tensor(0))

    def _container(self, name: str) -> tuple[nn.Module, str]:
        *path, leaf = name.split(".")
        at = self.root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        return at, leaf

    def _held(self) -> set[fx.Node]:
        """Nodes that nothing reads but layers that hold their value: tensors cut into parts or turned round."""
        held: set[fx.Node] = set()
        for node in reversed(self.ep.graph.nodes):
            others = node.users.keys() - held - self.sites.keys()
            read = any(node in self.sites[user].built.inputs for user in node.users if user in self.sites)
            if node.users and not others and not read:
                held.add(node)
        return held

    def _calls(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for node, site in self.sites.items():
            read = {attribute: self.source[held] for attribute, held in site.built.tensors.items()}
            weight = read.get("weight", "")
            if not weight or site.built.transposed or _projects(node, weight):
                continue
            if f"{site.name}.weight" not in self.aliases[weight]:
                found |= {site.name: weight, **{f"{site.name}.{attribute}": name for attribute, name in read.items()}}
        return found

    def _lock(self, read: set[str]) -> None:
        """Layers whose weight is also used where no decomposition follows: outside them, or in a recurrent layer.

        ``read``: the attributes that the graph reads itself.
        """
        for site in self.sites.values():
            held = [self.source[node] for name, node in site.built.tensors.items() if name.startswith("weight")]
            if len({*held}) < len(held):
                self.locked[site.name] = "one of its weights is in it several times, and each would get its own factors"
        for tensor, layers in self._holders().items():
            for name in layers:
                others = [n for n in layers if n != name]
                if self._attributes.get(tensor) in read:
                    self.locked[name] = "its weight is also used outside the layer"
                elif others and {*layers.values()} != {"weight"}:
                    self.locked[name] = (
                        f"its weight is shared with {', '.join(others)}, and recurrent layers share factors only where "
                        "they share all weights and biases, as one module that is called twice does"
                    )

    # ---------------------------------------------------------------- graph

    def _emit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            return
        if node.op == "output":
            self._output(node)
        elif node.op == "get_attr":
            self.env[node] = node  # the graph of a higher-order call, copied with it
        elif node in self.sites:
            site = self.sites[node]
            args = tuple(fx.map_arg(a, self._value) for a in site.built.inputs)
            while args and args[-1] is None:
                args = args[:-1]
            # create_node: Graph.call_module looks for the name in the graph's old owner.
            self.env[node] = self.graph.create_node("call_module", site.name, args)
            if "Dropout" not in type(site.built.module).__name__:  # in eval mode those hand on their input
                self._fresh.add(node)
            if site.built.first_of_tuple:
                self._flat.add(node)
        elif node.target is operator.getitem and node.args[0] in self._flat:
            if node.args[1] == 0:  # the others (saved means) have no users
                self.env[node] = self.env[node.args[0]]  # type: ignore[index]
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            self._higher_order(node)
        elif not self._is_bookkeeping(node):
            target = out_of_place(node, self._fresh)
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._value)
            self.env[node] = self.graph.create_node("call_function", target, args, kwargs, node.name)

    def _is_bookkeeping(self, node: fx.Node) -> bool:
        """Checks, and the counter that batch norm modules keep themselves."""
        packet = getattr(node.target, "_opname", "")
        if packet.startswith(_CHECKS):
            return True
        first = node.args[0] if node.args else None
        if packet == "add_" and isinstance(first, fx.Node) and first in self.source:
            return self.source[first].rpartition(".")[2] == _COUNTER
        return False

    def _value(self, node: fx.Node) -> Any:
        if node in self.source:
            return self._attribute(self.source[node])
        return self.env[node]

    def _attribute(self, name: str) -> fx.Node:
        if name not in self._attributes:
            value = self.tensors[name]
            parent, leaf = self._container(name)
            held = getattr(parent, leaf, None)
            while held is not None and held is not value:
                leaf += "_"
                held = getattr(parent, leaf, None)
            if held is None:
                _set(parent, leaf, value)
            self._attributes[name] = ".".join([*name.split(".")[:-1], leaf])
        return self.graph.create_node("get_attr", self._attributes[name], name=f"{name.replace('.', '_')}_")

    def _higher_order(self, node: fx.Node) -> None:
        op = str(node.target)
        if not any(h in op for h in _HIGHER_ORDER):
            raise BadModel(
                "operator", f"the graph has control flow ({op}): write the model without torch.cond or loops"
            )
        what = "no_grad" if "grad" in op else "autocast"
        args: list[Any] = []
        for a in node.args:
            if isinstance(a, fx.Node) and a.op == "get_attr":
                inner = getattr(self.ep.graph_module, str(a.target))
                clean = fx.Graph()
                clean.output(clean.graph_copy(inner.graph, {}))
                name, k = f"_{what}", 2
                while hasattr(self.root, name):
                    name, k = f"_{what}_{k}", k + 1
                self.root.add_module(name, fx.GraphModule(inner, clean))
                args.append(self.graph.create_node("get_attr", name))
                self._note_skipped(node, what)
            else:
                args.append(fx.map_arg(a, self._value))
        self.env[node] = self.graph.create_node("call_function", node.target, tuple(args), {}, node.name)

    def _note_skipped(self, node: fx.Node, what: str) -> None:
        used = [self.source[a] for a in node.args if isinstance(a, fx.Node) and a in self.source]
        inside = sorted({_owner(n) for n in used if not n.endswith("bias")})
        if inside:
            names = ", ".join(inside[:6]) + (" and more" if len(inside) > 6 else "")
            self.skipped[f"{names}: runs inside a {what} block, so it is not compressed"] = None

    def _output(self, node: fx.Node) -> None:
        specs = self.ep.graph_signature.output_specs
        if any(s.kind is not OutputKind.USER_OUTPUT for s in specs):
            raise BadModel(
                "signature", "the graph changes its own tensors: export it in eval mode, without run_decompositions"
            )
        returned: Any = node.args[0]
        leaves = [self._value(v) if isinstance(v, fx.Node) else v for v in returned]
        signature = self.ep.module_call_graph[0].signature
        if signature is None:
            raise BadModel(
                "tree_spec", "the file does not say how its outputs are arranged: write it with tenfold.export"
            )
        value, rest = _structure(signature.out_spec, leaves)
        if rest:
            raise BadModel("tree_spec", f"the outputs have {len(rest)} tensors more than their structure")
        self.graph.output(value)


# -------------------------------------------------------------------- helpers


def _full(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def _own(t: Tensor, *, parameter: bool, thaw: bool) -> Tensor:
    """The tensor alone in its memory and in float32; every weight of a wholly frozen file learns again."""
    data = t.detach()
    if data.dtype.is_floating_point and data.dtype is not torch.float32:
        data = data.to(torch.float32)
    if not data.is_contiguous() or data.untyped_storage().nbytes() != data.numel() * data.element_size():
        data = data.contiguous().clone()
    if parameter:
        return nn.Parameter(data, requires_grad=(t.requires_grad or thaw) and data.dtype.is_floating_point)
    return data


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    if isinstance(value, nn.Parameter):
        if name in module._buffers:
            del module._buffers[name]
        module.register_parameter(name, value)
    elif name in module._parameters:
        # A weight that the file holds as a buffer: it stays one that does not learn.
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(name, value)


def _size(s: Any) -> int:
    if isinstance(s, int):
        return s
    hint = s.node.hint
    return int(hint) if hint is not None else 2


def _bind(node: fx.Node) -> dict[str, Any]:
    """Arguments by their schema names, defaults filled in."""
    out: dict[str, Any] = {"__target__": node.target}
    for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = a.default_value if a.has_default_value() else None
        out[a.name] = node.args[i] if i < len(node.args) else node.kwargs.get(a.name, default)
    return out


def _identity(built: Built, source: dict[fx.Node, str]) -> object:
    """Equal for two calls of the same module."""
    tensors = tuple(sorted((k, source[n]) for k, n in built.tensors.items()))
    return type(built.module), repr(built.module), built.transposed, tensors


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    stack = node.meta.get("nn_module_stack") or {}
    entries = [(re.sub(r"@\d+", "", path), str(kind)) for path, kind in stack.values()]
    return [e for e in entries if re.fullmatch(r"[\w.]*", e[0]) and "metadata_hook" not in e[0]]


def _path(node: fx.Node) -> str:
    stack = _stack(node)
    return stack[-1][0] if stack else ""


def _stack_type(node: fx.Node) -> str:
    stack = _stack(node)
    return stack[-1][1] if stack else ""


def _owner(name: str) -> str:
    """``layer1.0.conv1.weight`` to ``layer1.0.conv1``; MultiheadAttention's ``in_proj_weight`` to ``in_proj``."""
    for ending in (".weight", "_weight", ".weight_ih_l0"):
        if name.endswith(ending):
            return name[: -len(ending)]
    return "root" if name in ("weight", "weight_ih_l0") else name + "_op"


def _projects(node: fx.Node, weight: str) -> bool:
    """Whether ``weight`` is a projection's in an ``nn.MultiheadAttention``: tenfold.apply makes a layer of it."""
    name = weight.partition("[")[0].rpartition(".")[2]
    inside = _stack_type(node).endswith("MultiheadAttention")
    return name == "in_proj_weight" or (inside and name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"))


def _structure(spec: pytree.TreeSpec, leaves: list[Any]) -> tuple[Any, list[Any]]:
    """The outputs in tuples, lists and dicts; output classes of transformers become dicts."""
    if spec.type is None:
        return leaves[0], leaves[1:]
    values = []
    for child in spec.children():
        value, leaves = _structure(child, leaves)
        values.append(value)
    keys = spec.context
    if spec.type is list:
        return values, leaves
    if isinstance(keys, list) and len(keys) == len(values) and all(isinstance(k, str) for k in keys):
        return dict(zip(keys, values, strict=True)), leaves
    return tuple(values), leaves
