"""A plan made into a network, layer by layer in the order of the graph, each fitted to the input that it will really get.

At every site the compressed network's own input ``x~`` and the output wanted of the layer give the second moments from
which the factors follow in closed form, so that errors of earlier layers are corrected by later ones. What is
wanted looks past the layer (``chains``): behind a batch norm errors are weighed by its scale, before an addition the target
takes up the other operand's error, ``y + (s - s~)``, and before a ReLU only what passes it counts. The last is a
majorisation (after Zhang et al. 2015): where the original is cut off, aim at the present output if that is cut off
too, else at zero; refit; repeat.

Values of both networks stay cached between nodes, so a reconstruction costs about one pass of each, not one a layer.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from search.calibrate import Moments, Statistics, collect
from search.chains import Chain, follow, schedule
from search.decompose import METHODS
from search.errors import BadRequest
from search.spec import Plan
from search.surgery import replace

__all__ = ["Options", "recalibrate_batch_norm", "reconstruct"]

Batches = Callable[[], Iterable[tuple[Tensor, ...]]]
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Options:
    """How a layer's target is made. The defaults are what measured best."""

    residual: bool = True
    """Before an addition, also make up for the other operand's error."""
    relu_sweeps: int = 2
    """Refits toward what passes a following ReLU; 0 matches its input as it is."""
    refit: tuple[str, ...] = ()
    """Dense layers outside the plan that may be refitted too (their size stays)."""
    batch_norm: float = 0.0
    """0 keeps the original's running statistics, 1 takes the compressed network's own, between: a mixture."""
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    """Site to (out,) weights of its outputs' squared errors, instead of a following batch norm's scale."""


@torch.no_grad()
def reconstruct(
    original: fx.GraphModule,
    network: nn.Module,
    plan: Plan,
    batches: Batches | None,
    *,
    sequential: bool = True,
    options: Options | None = None,
    errors: dict[str, float] | None = None,
) -> nn.Module:
    """A copy of ``network`` with the plan's sites factorized.

    Args:
        original: whose outputs are wanted.
        network: a copy of the original, or another network with the same graph (a stage's start, made dense).
        plan: what replaces which site.
        batches: gives the calibration inputs, the same at each call. None: factors of the least weight error.
        sequential: fit each layer to the compressed network's own input; else to the original's.
        options: how targets are made.
        errors: filled with each site's relative output error.

    Raises:
        BadRequest: the plan names a layer or a method that is not there, or one that does not fit.
    """
    network = copy.deepcopy(network).eval()
    for site, entry in plan.items():
        _check(network, site, entry.method)
    found: dict[str, float] = {} if errors is None else errors
    if batches is None or not sequential:
        statistics = {} if batches is None else collect(original, list(plan), batches())
        for site, entry in plan.items():
            layer = network.get_submodule(site)
            fit = METHODS[entry.method].factorize(layer, entry.ranks, statistics.get(site))
            found[site] = fit.error
            replace(network, site, fit.module)
        return network
    walk = _Walk(original, network, plan, list(batches()), options or Options(), found)
    walk.run()
    return network


class _Walk:
    """One pass over the graph of both networks at once, with every live value of every batch kept."""

    def __init__(
        self,
        original: fx.GraphModule,
        network: nn.Module,
        plan: Plan,
        batches: Sequence[tuple[Tensor, ...]],
        options: Options,
        errors: dict[str, float],
    ) -> None:
        self.original, self.network, self.plan, self.options, self.errors = original, network, plan, options, errors
        self.batches = batches
        self.modules = dict(original.named_modules())
        nodes = list(original.graph.nodes)
        self.sites = {
            n: str(n.target) for n in nodes if n.op == "call_module" and (n.target in plan or n.target in options.refit)
        }
        self.chains = {n: follow(n, self.modules) for n in self.sites}
        self.order = schedule(original.graph, self.chains)
        self.wanted: dict[fx.Node, list[Any]] = {}
        self.got: dict[fx.Node, list[Any]] = {}
        self.dirty: set[fx.Node] = set()
        self.same = {
            name: _equal(module, network.get_submodule(name)) for name, module in original.named_modules() if name
        }

    def run(self) -> None:
        was_training = self.original.training
        self.original.eval()
        uses = {n: len(n.users) + sum(c.other is n for c in self.chains.values()) for n in self.order}
        fitted: set[str] = set()
        try:
            for node in self.order:
                if node.op == "output":
                    continue
                self._evaluate_original(node)
                if node in self.sites and self.sites[node] not in fitted:
                    self._fit(node)
                    fitted.add(self.sites[node])
                self._evaluate_network(node)
                for n in [*node.all_input_nodes, *([self.chains[node].other] if node in self.chains else [])]:
                    if n is None:
                        continue
                    uses[n] -= 1
                    if uses[n] <= 0:
                        self.wanted.pop(n, None)
                        self.got.pop(n, None)
        finally:
            self.original.train(was_training)

    # ------------------------------------------------------------------ values

    def _evaluate_original(self, node: fx.Node) -> None:
        self.wanted[node] = [self._call(node, self.original, self.wanted, b) for b in range(len(self.batches))]
        self._write_back(node, self.wanted)

    def _evaluate_network(self, node: fx.Node) -> None:
        if not self._changed(node) and not any(n in self.dirty for n in node.all_input_nodes):
            self.got[node] = self.wanted[node]
            self._write_back(node, self.got)
            return
        self.dirty.add(node)
        module = self.network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, _NORMS) and self.options.batch_norm > 0 and module.running_mean is not None:
            _blend(module, self.got[node.all_input_nodes[0]], self.options.batch_norm)
        self.got[node] = [self._call(node, self.network, self.got, b) for b in range(len(self.batches))]
        self._write_back(node, self.got)

    def _changed(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            mine, theirs = (_attribute(m, str(node.target)) for m in (self.original, self.network))
            return isinstance(mine, Tensor) and not torch.equal(mine, theirs)
        return node.op == "call_module" and not self.same[str(node.target)]

    def _write_back(self, node: fx.Node, values: dict[fx.Node, list[Any]]) -> None:
        """What an in-place operation changed, its other users see too."""
        if _in_place(node, self.modules) and len(node.all_input_nodes[0].users) > 1:
            values[node.all_input_nodes[0]] = values[node]

    def _call(self, node: fx.Node, module: nn.Module, values: dict[fx.Node, list[Any]], batch: int) -> Any:
        if node.op == "placeholder":
            position = [n for n in self.original.graph.nodes if n.op == "placeholder"].index(node)
            return self.batches[batch][position]
        if node.op == "get_attr":
            return _attribute(module, str(node.target))
        args = fx.node.map_arg(node.args, lambda n: values[n][batch])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n][batch])
        if _in_place(node, self.modules):
            # The cached operand may be needed again, or be shared between the two networks.
            args = (args[0].clone(), *args[1:])
        if node.op == "call_module":
            return module.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    # ------------------------------------------------------------------ fitting

    def _fit(self, node: fx.Node) -> None:
        site, source = self.sites[node], node.all_input_nodes[0]
        entry = self.plan.get(site)
        layer = self.network.get_submodule(site)
        if entry is None and source not in self.dirty and self.same[site]:
            return
        aim = _Aim(self, node, site)
        moments = Moments(layer, centred=aim.takes_mean)
        for b, x in enumerate(self.got[source]):
            moments.add(x, aim.target(b, None))
        module = self._solve(site, layer, moments.finish(), aim)
        if aim.chain.relu:
            for _ in range(self.options.relu_sweeps):
                moments.retarget()
                for b, x in enumerate(self.got[source]):
                    moments.add(x, aim.target(b, aim.present(module, x)), target_only=True)
                module = self._solve(site, layer, moments.finish(), aim)
        aim.settle(module)

    def _solve(self, site: str, layer: nn.Module, statistics: Statistics, aim: "_Aim") -> nn.Module:
        entry = self.plan.get(site)
        if entry is None:
            module: nn.Module = refitted(layer, statistics)
        else:
            fit = METHODS[entry.method].factorize(layer, entry.ranks, statistics, metric=aim.metric)
            self.errors[site], module = fit.error, fit.module
        aim.shift = _correct_mean(module, layer, statistics, aim.takes_mean)
        replace(self.network, site, module)
        self.same[site] = False
        return module


class _Aim:
    """What is wanted of one site's output, seen through the chain behind it."""

    def __init__(self, walk: _Walk, node: fx.Node, site: str) -> None:
        self.walk, self.node = walk, node
        chain = walk.chains[node]
        usable = chain.other is not None and chain.other in walk.got and walk.options.residual
        stops = chain.other is not None and not usable
        self.chain = Chain(chain.norm, chain.other if usable else None, chain.relu and not stops)
        layer = walk.network.get_submodule(site)
        self.axis = 1 if isinstance(layer, _CONVS) else -1
        self.shift: Tensor | None = None
        self.norms: tuple[nn.Module, nn.Module] | None = None
        if chain.norm is not None:
            self.norms = walk.original.get_submodule(chain.norm), walk.network.get_submodule(chain.norm)
        self.takes_mean = layer.bias is not None or self.norms is not None
        self.metric = walk.options.importance.get(site)
        if self.metric is None and self.norms is not None:
            self.metric = _affine(self.norms[1])[0].square()

    def target(self, b: int, present: Tensor | None) -> Tensor:
        """The site's wanted output in one batch; ``present``: its output now, for the ReLU's majorisation."""
        y: Tensor = self.walk.wanted[self.node][b]
        if self.norms is None and self.chain.other is None and present is None:
            return y
        z, offset = y, torch.zeros((), dtype=y.dtype)
        scale = torch.ones((), dtype=y.dtype)
        if self.norms is not None:
            (scale_o, shift_o), (scale, shift) = (
                tuple(_wide(v, self.axis, y.dim()) for v in _affine(n)) for n in self.norms
            )
            z, offset = scale_o * y + shift_o, shift
        if self.chain.other is not None:
            z = z + self.walk.wanted[self.chain.other][b]
            offset = offset + self.walk.got[self.chain.other][b]
        if present is not None:
            z = torch.where(z > 0, z, (scale * present + offset).clamp_max(0))
        # A channel that batch norm scales to nothing has no say: its target stays the original's.
        dead = scale.abs() < 1e-6
        return torch.where(dead, y, (z - offset) / torch.where(dead, torch.ones_like(scale), scale))

    def present(self, module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = module(x)
        return y if self.shift is None else y + _wide(self.shift, self.axis, y.dim())

    def settle(self, module: nn.Module) -> None:
        """Give the mean that a layer without bias cannot take to the batch norm behind it."""
        if self.shift is None or self.norms is None or self.chain.norm is None:
            return
        norm = self.norms[1]
        norm.running_mean -= self.shift.to(norm.running_mean.dtype)  # type: ignore[operator,union-attr]
        self.walk.same[self.chain.norm] = False


def refitted(layer: nn.Module, statistics: Statistics) -> nn.Module:
    """The dense layer itself, at the least-squares weight for the statistics."""
    from search.decompose.base import problems

    new = copy.deepcopy(layer)
    weight = torch.cat([p.target for p in problems(layer, statistics)])
    new.weight.copy_(weight.reshape(new.weight.shape))  # type: ignore[operator,union-attr]
    return new


def recalibrate_batch_norm(
    module: nn.Module, batches: Iterable[tuple[Tensor, ...]], *, mixture: float = 1.0
) -> nn.Module:
    """A copy whose batch norms have their running statistics from ``batches``, each given its inputs as they were.

    ``mixture`` 1 takes the new statistics, 0 keeps the old. A network without batch norm comes back as it is.
    """
    module = copy.deepcopy(module)
    norms = [m for m in module.modules() if isinstance(m, _NORMS) and m.running_mean is not None]
    if not norms:
        return module
    kept = [(m.running_mean.clone(), m.running_var.clone(), m.momentum) for m in norms]  # type: ignore[union-attr]
    was_training = module.training
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    with torch.no_grad():
        for batch in batches:
            module(*batch)
    for norm, (mean, var, momentum) in zip(norms, kept, strict=True):
        norm.running_mean.lerp_(mean, 1 - mixture)  # type: ignore[union-attr]
        norm.running_var.lerp_(var, 1 - mixture)  # type: ignore[union-attr]
        norm.momentum = momentum
    return module.train(was_training)


# ---------------------------------------------------------------------- small things


def _check(network: nn.Module, site: str, method: str) -> None:
    try:
        layer = network.get_submodule(site)
    except AttributeError:
        raise BadRequest("unknown_site", f"the plan names {site!r}, which is no layer of this network") from None
    if method not in METHODS:
        raise BadRequest("unknown_method", f"{site}: no method {method!r}; there are {sorted(METHODS)}")
    reason = METHODS[method].applies_to(layer)
    if reason is not None:
        raise BadRequest("method_does_not_apply", f"{site}: {method} does not apply: {reason}")


def _correct_mean(module: nn.Module, layer: nn.Module, statistics: Statistics, takes_mean: bool) -> Tensor | None:
    """Set the bias to E[y] - V E[x]; without one, return it as the shift that a batch norm must take up."""
    if not takes_mean:
        return None
    weight = module.dense_weight() if hasattr(module, "dense_weight") else module.weight  # type: ignore[operator]
    assert isinstance(weight, Tensor)
    groups = statistics.second.shape[0]
    rows = weight.detach().double().flatten(1).unflatten(0, (groups, -1))
    mean = statistics.mean_output - torch.einsum("gon,gn->go", rows, statistics.mean_input).flatten()
    last = module.last if hasattr(module, "last") else module
    if last.bias is not None:  # type: ignore[union-attr]
        last.bias.copy_(mean)  # type: ignore[operator,union-attr]
        return None
    return mean.to(weight.dtype)


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation mode: (channels,), (channels,)."""
    assert isinstance(norm, _NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift + norm.bias if norm.affine else shift


def _wide(value: Tensor, axis: int, dimensions: int) -> Tensor:
    return value if axis == -1 else value.reshape(-1, *(1,) * (dimensions - 2))


def _blend(norm: nn.Module, inputs: Sequence[Tensor], mixture: float) -> None:
    """Move a batch norm's statistics toward those of ``inputs``, per channel over everything else."""
    assert isinstance(norm, _NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    axes = [0, *range(2, inputs[0].dim())]
    count = sum(x.numel() // x.shape[1] for x in inputs)
    mean = torch.stack([x.double().sum(axes) for x in inputs]).sum(0) / count
    square = torch.stack([x.double().square().sum(axes) for x in inputs]).sum(0) / count
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), mixture)
    norm.running_var.lerp_((square - mean.square()).clamp_min(0).to(norm.running_var.dtype), mixture)


def _equal(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in mine.items())


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = name.split(".")[0]
    return (
        name in ("iadd", "imul", "isub")
        or (name.endswith("_") and not name.endswith("__"))
        or bool(node.kwargs.get("inplace", False))
    )
