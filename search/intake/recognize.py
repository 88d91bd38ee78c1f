"""Which operators of an exported graph become which modules.

Each recogniser looks at one call and answers with the module that computes exactly the same, or None: then the call
stays a function, still differentiable. Modules are made on the meta device and get the file's own tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from search.intake.modules import Attention, FeatureDropout, FlatGRU, FlatLSTM, FlatRNN

__all__ = ["RECOGNIZERS", "Built", "Tensors", "turned"]

aten = torch.ops.aten


class Tensors(Protocol):
    """What a recogniser may ask about a node of the graph."""

    def weight(self, node: object) -> Tensor | None:
        """The parameter or buffer that the node stands for; None when it is computed."""

    def rank(self, node: object) -> int:
        """Dimensions of the node's value; 0 when unknown."""


@dataclass
class Built:
    """A module in place of a call. ``tensors``: the module's attribute to the graph node whose tensor it takes."""

    module: nn.Module
    inputs: tuple[Any, ...]
    tensors: dict[str, fx.Node]
    transposed: bool = False
    """The weight is stored as (in, out) in the file and as (out, in) in the module."""
    first_of_tuple: bool = False
    """The call returns a tuple of which only the first is the module's output."""


Arguments = dict[str, Any]
Recognizer = Callable[[Arguments, Tensors], Built | None]
RECOGNIZERS: dict[Any, Recognizer] = {}


def recognizes(*targets: Any) -> Callable[[Recognizer], Recognizer]:
    def register(f: Recognizer) -> Recognizer:
        for t in targets:
            RECOGNIZERS[t] = f
        return f

    return register


def _taken(a: Arguments, t: Tensors, names: dict[str, str]) -> dict[str, fx.Node] | None:
    """Module attribute to node, for the arguments that are given; None when one of them is computed in the graph."""
    found = {}
    for argument, attribute in names.items():
        node = a[argument]
        if node is None:
            continue
        if t.weight(node) is None:
            return None
        found[attribute] = node
    return found


def _numbers(values: Any, dims: int) -> tuple[int, ...] | None:
    values = list(values)
    if not all(isinstance(v, int) for v in values):
        return None
    return tuple(values * dims if len(values) == 1 else values)


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@recognizes(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
)
def convolution(a: Arguments, t: Tensors) -> Built | None:
    weight = t.weight(a["weight"])
    tensors = _taken(a, t, {"weight": "weight", "bias": "bias"})
    if weight is None or tensors is None or not 3 <= weight.dim() <= 5:
        return None
    dims = weight.dim() - 2
    output_padding = _numbers(a.get("output_padding", [0]), dims)
    transposed = a.get("transposed", "output_padding" in a)
    stride, dilation = _numbers(a["stride"], dims), _numbers(a["dilation"], dims)
    padding = a["padding"] if isinstance(a["padding"], str) else _numbers(a["padding"], dims)
    groups = a["groups"]
    if stride is None or dilation is None or padding is None or output_padding is None or not isinstance(groups, int):
        return None
    kernel = tuple(weight.shape[2:])
    module: nn.Module
    common = {"stride": stride, "dilation": dilation, "groups": groups, "bias": "bias" in tensors, "device": "meta"}
    if transposed:
        channels = weight.shape[0], weight.shape[1] * groups
        module = _TRANSPOSED[dims - 1](*channels, kernel, padding=padding, output_padding=output_padding, **common)  # type: ignore[arg-type]
    else:
        channels = weight.shape[1] * groups, weight.shape[0]
        module = _CONVS[dims - 1](*channels, kernel, padding=padding, **common)  # type: ignore[arg-type]
    return Built(module, (a["input"],), tensors)


@recognizes(aten.linear.default)
def linear(a: Arguments, t: Tensors) -> Built | None:
    return _linear(a["input"], a["weight"], a["bias"], t, transposed=False)


@recognizes(aten.addmm.default)
def addmm(a: Arguments, t: Tensors) -> Built | None:
    bias = t.weight(a["self"])
    if a["beta"] != 1 or a["alpha"] != 1 or bias is None or bias.dim() != 1:
        return None
    return _linear(a["mat1"], a["mat2"], a["self"], t, transposed=True)


@recognizes(aten.mm.default)
def mm(a: Arguments, t: Tensors) -> Built | None:
    return _linear(a["self"], a["mat2"], None, t, transposed=True)


@recognizes(aten.matmul.default)
def matmul(a: Arguments, t: Tensors) -> Built | None:
    return _linear(a["self"], a["other"], None, t, transposed=True) if t.rank(a["self"]) >= 2 else None


def turned(node: Any) -> Any:
    """The node under a matrix transposition, as decomposed graphs write a linear layer; None when it is none."""
    if not isinstance(node, fx.Node):
        return None
    turned = (
        node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default)
        or (node.target is aten.permute.default and list(node.args[1]) == [1, 0])  # type: ignore[arg-type]
        or (node.target is aten.transpose.int and {*node.args[1:]} in ({0, 1}, {-1, -2}))
    )
    return node.args[0] if turned else None


def _linear(x: Any, weight_node: Any, bias_node: Any, t: Tensors, *, transposed: bool) -> Built | None:
    while (inner := turned(weight_node)) is not None:
        weight_node, transposed = inner, not transposed
    weight = t.weight(weight_node)
    tensors = _taken({"weight": weight_node, "bias": bias_node}, t, {"weight": "weight", "bias": "bias"})
    if weight is None or tensors is None or weight.dim() != 2 or t.weight(x) is not None:
        return None
    shape = (weight.shape[0], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[0])
    bias = t.weight(bias_node)
    if bias is not None and bias.shape != (shape[1],):
        return None
    return Built(nn.Linear(*shape, bias=bias is not None, device="meta"), (x,), tensors, transposed=transposed)


_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_NORM_TENSORS = {"weight": "weight", "bias": "bias"}
_STATISTICS = {"running_mean": "running_mean", "running_var": "running_var"}


@recognizes(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)
def batch_norm(a: Arguments, t: Tensors) -> Built | None:
    kind = _BATCH_NORMS.get(t.rank(a["input"]))
    return None if kind is None else _norm_with_statistics(kind, a, t, first="training" not in a)


_INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


@recognizes(aten.instance_norm.default)
def instance_norm(a: Arguments, t: Tensors) -> Built | None:
    kind = _INSTANCE_NORMS.get(t.rank(a["input"]))
    if kind is None or (a["weight"] is None and a["running_mean"] is None):
        return None  # nothing to hold: the function is exact already
    return _norm_with_statistics(kind, a, t, first=False)


def _norm_with_statistics(kind: Any, a: Arguments, t: Tensors, *, first: bool) -> Built | None:
    tensors = _taken(a, t, _NORM_TENSORS | _STATISTICS)
    if tensors is None or ("weight" in tensors) != ("bias" in tensors):
        return None
    some = next((t.weight(n) for n in tensors.values()), None)
    if some is None or ("running_mean" in tensors) != ("running_var" in tensors):
        return None
    # momentum=None (a cumulative average) is exported as 0.0, which would freeze the statistics.
    momentum = a["momentum"] or None
    module = kind(
        some.shape[0],
        eps=a["eps"],
        momentum=momentum,
        affine="weight" in tensors,
        track_running_stats="running_mean" in tensors,
        device="meta",
    )
    return Built(module, (a["input"],), tensors, first_of_tuple=first)


@recognizes(aten.layer_norm.default, aten.native_layer_norm.default)
def layer_norm(a: Arguments, t: Tensors) -> Built | None:
    tensors = _taken(a, t, _NORM_TENSORS)
    shape = a["normalized_shape"]
    if not tensors or "weight" not in tensors or not all(isinstance(s, int) for s in shape):
        return None
    module = nn.LayerNorm(list(shape), eps=a["eps"], bias="bias" in tensors, device="meta")
    return Built(module, (a["input"],), tensors, first_of_tuple="cudnn_enable" not in a)


@recognizes(aten.rms_norm.default)
def rms_norm(a: Arguments, t: Tensors) -> Built | None:
    tensors = _taken(a, t, {"weight": "weight"})
    shape = a["normalized_shape"]
    if not tensors or not all(isinstance(s, int) for s in shape):
        return None
    return Built(nn.RMSNorm(list(shape), eps=a["eps"], device="meta"), (a["input"],), tensors)


@recognizes(aten.group_norm.default, aten.native_group_norm.default)
def group_norm(a: Arguments, t: Tensors) -> Built | None:
    tensors = _taken(a, t, _NORM_TENSORS)
    weight = t.weight(a["weight"])
    if weight is None or not tensors or len(tensors) != 2:
        return None
    groups = a["num_groups"] if "num_groups" in a else a["group"]
    module = nn.GroupNorm(groups, weight.shape[0], eps=a["eps"], device="meta")
    return Built(module, (a["input"],), tensors, first_of_tuple="num_groups" not in a)


@recognizes(aten.embedding.default)
def embedding(a: Arguments, t: Tensors) -> Built | None:
    weight = t.weight(a["weight"])
    if weight is None or weight.dim() != 2:
        return None
    module = nn.Embedding(
        weight.shape[0],
        weight.shape[1],
        padding_idx=None if a["padding_idx"] == -1 else a["padding_idx"],
        scale_grad_by_freq=a["scale_grad_by_freq"],
        device="meta",
    )
    return Built(module, (a["indices"],), {"weight": a["weight"]})


@recognizes(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def recurrent(a: Arguments, t: Tensors) -> Built | None:
    params = a["params"]
    weights = [w for w in map(t.weight, params) if w is not None]
    # The number of layers is the file's word: it is held against the weights before anything counts up to it.
    if len(weights) != len(params) or not 2 <= 2 * a["num_layers"] <= len(weights):
        return None
    states = a["hx"] if isinstance(a["hx"], list | tuple) else [a["hx"]]
    first, second = weights[:2]
    kind: Any = {
        aten.lstm.input: FlatLSTM,
        aten.gru.input: FlatGRU,
        aten.rnn_tanh.input: FlatRNN,
        aten.rnn_relu.input: FlatRNN,
    }[a["__target__"]]
    gates = {FlatLSTM: 4, FlatGRU: 3, FlatRNN: 1}[kind]
    hidden = first.shape[0] // gates
    directions = 2 if a["bidirectional"] else 1
    per = 2 + 2 * a["has_biases"]
    projected = len(params) == (per + 1) * a["num_layers"] * directions
    options: dict[str, Any] = {"nonlinearity": "relu"} if a["__target__"] is aten.rnn_relu.input else {}
    if projected:
        options["proj_size"] = second.shape[1]
    module = kind(
        first.shape[1],
        hidden,
        a["num_layers"],
        bias=a["has_biases"],
        batch_first=a["batch_first"],
        dropout=a["dropout"] if a["num_layers"] > 1 else 0.0,
        bidirectional=a["bidirectional"],
        device="meta",
        **options,
    )
    names = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * a["has_biases"] + ["weight_hr"] * projected
    suffixes = [f"_l{k}{d}" for k in range(a["num_layers"]) for d in ("", "_reverse")[:directions]]
    attributes = [n + s for s in suffixes for n in names]
    if len(attributes) != len(params):
        return None
    return Built(module, (a["input"], *states), dict(zip(attributes, params, strict=True)))


@recognizes(aten.dropout.default, aten.dropout_.default)
def dropout(a: Arguments, t: Tensors) -> Built | None:
    return Built(nn.Dropout(a["p"]), (a.get("input", a.get("self")),), {})


@recognizes(aten.feature_dropout.default, aten.feature_dropout_.default)
def feature_dropout(a: Arguments, t: Tensors) -> Built | None:
    return Built(FeatureDropout(a["p"]), (a.get("input", a.get("self")),), {})


@recognizes(aten.alpha_dropout.default, aten.alpha_dropout_.default)
def alpha_dropout(a: Arguments, t: Tensors) -> Built | None:
    return Built(nn.AlphaDropout(a["p"]), (a.get("input", a.get("self")),), {})


@recognizes(aten.feature_alpha_dropout.default, aten.feature_alpha_dropout_.default)
def feature_alpha_dropout(a: Arguments, t: Tensors) -> Built | None:
    return Built(nn.FeatureAlphaDropout(a["p"]), (a.get("input", a.get("self")),), {})


@recognizes(aten.rrelu.default, aten.rrelu_.default)
def random_relu(a: Arguments, t: Tensors) -> Built | None:
    return Built(nn.RReLU(a["lower"], a["upper"]), (a["self"],), {})


@recognizes(aten.scaled_dot_product_attention.default)
def attention(a: Arguments, t: Tensors) -> Built | None:
    if not a["dropout_p"]:
        return None
    module = Attention(a["dropout_p"], a["is_causal"], a["scale"], a["enable_gqa"])
    return Built(module, (a["query"], a["key"], a["value"], a["attn_mask"]), {})
