"""A plan made into a network, layer by layer in graph order, each fitted to the input that it will really get.

At every site the compressed network's own input ``x~`` and the output wanted of the layer give the second moments from
which the factors follow in closed form, so that errors of earlier layers are corrected by later ones. Both networks
are walked together and their live values kept, so a reconstruction costs about one pass of each, not one a layer.
What is wanted of a layer, looking past it, is ``targets``' business.

Layers that share factors cannot be fitted one after the other: what they share is fitted beforehand, to the original's
inputs of all of them; at each of them, the walk then fits what is its own, and its mean. Nor can a layer that is called
more than once, whose later inputs hang on it: it is fitted beforehand to the original's inputs at all its calls.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from search.calibrate import RecurrentMoments, Statistics, collect, moments_of
from search.chains import follow, schedule
from search.decompose import METHODS, OF_SEVERAL, group_of, joint_method_of, method_of
from search.decompose.base import problems
from search.decompose.outputs import fit_weighed
from search.errors import BadRequest
from search.matrices import matrices, weight_from, weight_of
from search.norms import NORMS, affine, blend, recalibrate_batch_norm, typed
from search.recurrent import RECURRENT
from search.spec import Plan, SitePlan
from search.surgery import replace
from search.targets import Options, Target, bias_of, dense_weight
from tenfold.layers import FactorizedLayer

__all__ = ["Options", "fit_alone", "fit_group", "recalibrate_batch_norm", "reconstruct"]

Batches = Callable[[], Iterable[tuple[Tensor, ...]]]


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
        errors: filled with each layer's relative output error.

    Raises:
        BadRequest: the plan names a layer or a method that is not there, one that does not fit, or a layer twice.
    """
    network = copy.deepcopy(network).eval()
    layers = [name for site, entry in plan.items() for name in entry.members or (site,)]
    if twice := sorted({name for name in layers if layers.count(name) > 1}):
        raise BadRequest("layer_twice", f"the plan replaces {twice} at more than one site: keep one of them")
    for site, entry in plan.items():
        _check(network, site, entry)
    found: dict[str, float] = {} if errors is None else errors
    groups = {site: entry for site, entry in plan.items() if entry.members}
    alone = {site: entry for site, entry in plan.items() if not entry.members}
    if batches is None or not sequential:
        statistics = {} if batches is None else collect(original, layers, batches())
        for site, entry in alone.items():
            found[site] = fit_alone(network, site, entry, statistics.get(site))
        for entry in groups.values():
            found |= fit_group(network, entry, statistics)
        return network
    options, was_training = options or Options(), original.training
    original.eval()
    try:
        calls = [str(node.target) for node in original.graph.nodes if node.op == "call_module"]
        again = {name for name in layers if calls.count(name) > 1}
        ahead = {site: entry for site, entry in plan.items() if not again.isdisjoint(entry.members or (site,))}
        for site, entry in ahead.items():
            statistics = collect(original, list(entry.members or (site,)), batches())
            if entry.members:
                found |= fit_group(network, entry, statistics)
            else:
                found[site] = fit_alone(network, site, entry, statistics[site])
        plan = {site: entry for site, entry in plan.items() if site not in ahead}
        shared = _shared(original, network, (entry for entry in plan.values() if entry.members), batches)
        walk = _Walk(original, network, plan, shared, list(batches()), options, found)
        walk.batches = walk.batches[: walk.fitting(options.memory_bytes)]
        walk.run()
    finally:
        original.train(was_training)
    return network


@torch.no_grad()
def fit_alone(network: nn.Module, site: str, entry: SitePlan, statistics: Statistics | None) -> float:
    """Factorize one site in place, as if nothing else changed; the relative output error.

    What the approximation loses of the output's mean goes to the bias, or to the batch norm right behind.
    """
    layer = network.get_submodule(site)
    norm = _norm_behind(network, site, statistics)
    method = method_of(entry.method, entry.options)
    fit = method.factorize(layer, entry.ranks, statistics, metric=_metric(norm))
    _put_alone(network, site, fit.module, statistics, norm)
    return fit.error


@torch.no_grad()
def fit_group(network: nn.Module, entry: SitePlan, statistics: Mapping[str, Statistics]) -> dict[str, float]:
    """Factorize the members of a site of several layers in place, as if nothing else changed; each one's error.

    ``statistics``: of every member, or empty for the least weight error.
    """
    fitted = _fit_together(network, entry, statistics)
    for name, (module, _) in fitted.items():
        known = statistics.get(name)
        _put_alone(network, name, module, known, _norm_behind(network, name, known))
    return {name: error for name, (_, error) in fitted.items()}


def _fit_together(
    network: nn.Module, entry: SitePlan, statistics: Mapping[str, Statistics]
) -> dict[str, tuple[FactorizedLayer, float]]:
    """The members by name, not yet in their places, and their errors."""
    group = group_of(network, entry.members)
    metrics = [_metric(_norm_behind(network, name, statistics.get(name))) for name in group.names]
    known = [statistics[name] for name in group.names] if statistics else None
    method = joint_method_of(entry.method, entry.options)
    fit = method.factorize(group, entry.ranks, known, metrics=metrics)
    return dict(zip(group.names, zip(fit.modules, fit.errors, strict=True), strict=True))


def _shared(
    original: nn.Module, network: nn.Module, groups: Iterable[SitePlan], batches: Batches
) -> dict[str, FactorizedLayer]:
    """The members of all groups, fitted to the original's own inputs; one group's statistics are held at a time."""
    found: dict[str, FactorizedLayer] = {}
    for entry in groups:
        statistics = collect(original, list(entry.members), batches())
        found |= {name: module for name, (module, _) in _fit_together(network, entry, statistics).items()}
    return found


def _put_alone(
    network: nn.Module, site: str, module: FactorizedLayer, statistics: Statistics | None, norm: nn.Module | None
) -> None:
    layer = network.get_submodule(site)
    replace(network, site, module)
    if statistics is not None:
        takes_mean = bias_of(layer) is not None or norm is not None
        shift = _correct_mean(layer, module, statistics, takes_mean)
        if shift is not None and norm is not None:
            typed(norm).running_mean = typed(norm).running_mean - shift


def _metric(norm: nn.Module | None) -> Tensor | None:
    """(out,) weights of a layer's squared errors: what the norm behind it makes of them."""
    return None if norm is None else affine(norm)[0].square()


def _norm_behind(network: nn.Module, site: str, statistics: Statistics | None) -> nn.Module | None:
    if not isinstance(network, fx.GraphModule):
        return None
    linear = isinstance(network.get_submodule(site), nn.Linear | nn.Embedding)
    if linear and statistics is not None and statistics.input_sizes:  # a batch norm over tokens, not over its outputs
        return None
    modules = dict(network.named_modules())
    for node in network.graph.nodes:
        if node.op == "call_module" and node.target == site:
            name = follow(node, modules).norm
            return None if name is None else modules[name]
    return None


class _Walk:
    """One pass over the graph of both networks at once, with every live value of every batch kept."""

    def __init__(
        self,
        original: fx.GraphModule,
        network: nn.Module,
        plan: Plan,
        shared: Mapping[str, FactorizedLayer],
        batches: Sequence[tuple[Tensor, ...]],
        options: Options,
        errors: dict[str, float],
    ) -> None:
        self.original, self.network, self.options, self.errors = original, network, options, errors
        self.shared = shared
        self.plan = {name: entry for site, entry in plan.items() for name in entry.members or (site,)}
        self.batches = batches
        self.modules = dict(original.named_modules())
        nodes = list(original.graph.nodes)
        self.placeholders = [n for n in nodes if n.op == "placeholder"]
        self.sites = {
            n: str(n.target)
            for n in nodes
            if n.op == "call_module" and (n.target in self.plan or n.target in options.refit)
        }
        self.chains = {n: follow(n, self.modules) for n in self.sites}
        self.order = schedule(original.graph, self.chains)
        self.wanted: dict[fx.Node, list[Any]] = {}
        self.got: dict[fx.Node, list[Any]] = {}
        self.dirty: set[fx.Node] = set()
        self.same = {name: _equal(module, network.get_submodule(name)) for name, module in self.modules.items()}

    def run(self) -> None:
        uses = self._uses()
        fitted: set[str] = set()
        for node in self.order:
            if node.op == "output":
                continue
            self._evaluate_original(node)
            site = self.sites.get(node)
            if site is not None and site not in fitted:
                self._fit(node, site)
                fitted.add(site)
            self._evaluate_network(node)
            for n in self._used_up(node, uses):
                self.wanted.pop(n, None)
                self.got.pop(n, None)

    def _uses(self) -> dict[fx.Node, int]:
        """How often each value is still needed: by its users, and by the sites whose target it enters."""
        return {n: len(n.users) + sum(c.other is n for c in self.chains.values()) for n in self.order}

    def _used_up(self, node: fx.Node, uses: dict[fx.Node, int]) -> list[fx.Node]:
        """The values that nobody needs once ``node`` is done."""
        other = self.chains[node].other if node in self.chains else None
        done = []
        for n in [*node.all_input_nodes, *([other] if other is not None else [])]:
            uses[n] -= 1
            if uses[n] <= 0:
                done.append(n)
        return done

    def fitting(self, memory_bytes: int) -> int:
        """How many batches' live values fit: both networks, at the point where most is alive; at least one batch."""
        uses, live, peak = self._uses(), 0, 1
        held: dict[fx.Node, int] = {}
        values: dict[fx.Node, list[Any]] = {}
        for node in self.order:
            if node.op == "output":
                continue
            values[node] = [self._call(node, self.original, values, 0)]
            held[node] = _bytes(values[node][0])
            live += held[node]
            peak = max(peak, live)
            for n in self._used_up(node, uses):
                live -= held.pop(n, 0)
                values.pop(n, None)
        return max(1, memory_bytes // (2 * peak))

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
        if isinstance(module, NORMS) and self.options.batch_norm > 0 and module.running_mean is not None:
            blend(module, self.got[node.all_input_nodes[0]], self.options.batch_norm)
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
            return self.batches[batch][self.placeholders.index(node)]
        if node.op == "get_attr":
            return _attribute(module, str(node.target))
        args: list[Any] = list(fx.node.map_arg(node.args, lambda n: values[n][batch]))  # type: ignore[arg-type]
        kwargs: dict[str, Any] = fx.node.map_arg(node.kwargs, lambda n: values[n][batch])  # type: ignore[assignment]
        if _in_place(node, self.modules):
            # The cached operand may be needed again, or be shared between the two networks.
            args[0] = args[0].clone()
        if node.op == "call_module":
            return module.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = node.target
        return function(*args, **kwargs)

    # ------------------------------------------------------------------ fitting

    def _fit(self, node: fx.Node, site: str) -> None:
        source = node.all_input_nodes[0]
        layer = self.network.get_submodule(site)
        if site not in self.plan and source not in self.dirty and self.same[site]:
            return
        if isinstance(layer, RECURRENT):
            self._fit_recurrent(node, site, layer)
            return
        target = Target(self, node, site, layer)
        moments = moments_of(layer, centred=target.takes_mean)
        moments.see(self.got[source][0])
        for b, x in target.rows(self.got[source]):
            moments.add(x, target.values(b))
        module = self._solve(site, layer, moments.finish(), target, None)
        for _ in range(self.options.relu_sweeps if target.relu else 0):
            moments.retarget()
            for b, x in target.rows(self.got[source]):
                moments.add(x, target.values(b, present=target.present(module, x)), target_only=True)
            module = self._solve(site, layer, moments.finish(), target, module)
        replace(self.network, site, module)
        self.same[site] = False
        norm = target.settle()
        if norm is not None:
            self.same[norm] = False

    def _fit_recurrent(self, node: fx.Node, site: str, layer: nn.RNNBase) -> None:
        """To the network's own inputs and states; what the gates read is wanted as the layer itself would have it."""
        if site not in self.plan:
            return
        moments = RecurrentMoments(layer)
        for b in range(len(self.batches)):
            inputs: Any = fx.node.map_arg(node.args, lambda n, b=b: self.got[n][b])  # type: ignore[misc]
            moments.add(*inputs)
        replace(self.network, site, self._factors(site, layer, moments.finish(), None, None))
        self.same[site] = False

    def _factors(
        self, site: str, layer: nn.Module, statistics: Statistics, metric: Tensor | None, start: nn.Module | None
    ) -> nn.Module:
        entry = self.plan[site]
        method = method_of(entry.method, entry.options)
        fit = fit_weighed(method, layer, entry.ranks, statistics, metric, start)
        self.errors[site] = fit.error
        return fit.module

    def _solve(
        self, site: str, layer: nn.Module, statistics: Statistics, target: Target, start: nn.Module | None
    ) -> nn.Module:
        module: nn.Module
        if site in self.shared:
            module, entry = self.shared[site], self.plan[site]
            joint = joint_method_of(entry.method, entry.options)
            metric = target.metric if target.metric is None or target.metric.dim() == 1 else target.metric.diagonal()
            self.errors[site] = joint.refit(self.shared[site], layer, statistics, metric=metric)
        elif site in self.plan:
            module = self._factors(site, layer, statistics, target.metric, start)
        else:
            module = _refitted(layer, statistics)
        target.shift = _correct_mean(layer, module, statistics, target.takes_mean)
        return module


def _refitted(layer: nn.Module, statistics: Statistics) -> nn.Module:
    """The dense layer itself, at the least-squares weight for the statistics."""
    new = copy.deepcopy(layer)
    weight = torch.cat([p.target for p in problems(layer, statistics)])
    weight_of(new).copy_(weight_from(layer, weight))
    return new


def _correct_mean(layer: nn.Module, module: nn.Module, statistics: Statistics, takes_mean: bool) -> Tensor | None:
    """Set the bias of ``module``, which replaces ``layer``, to E[y] - V E[x]; without one, return it as the shift that
    a batch norm must take up."""
    if not takes_mean:
        return None
    weight = dense_weight(module)
    rows = matrices(layer, weight).double()
    mean = statistics.mean_output - torch.einsum("gon,gn->go", rows, statistics.mean_input).flatten()
    bias = bias_of(module)
    if bias is not None:
        bias.copy_(mean)
        return None
    return mean.to(weight.dtype)


def _check(network: nn.Module, site: str, entry: SitePlan) -> None:
    method = entry.method
    for name in entry.members or (site,):
        try:
            layer = network.get_submodule(name)
        except AttributeError:
            raise BadRequest("unknown_site", f"the plan names {name!r}, which is no layer of this network") from None
    if entry.members:
        if method not in OF_SEVERAL:
            raise BadRequest(
                "unknown_method",
                f"{site}: no method {method!r} of several layers; there are {sorted(OF_SEVERAL)}",
            )
        if reason := joint_method_of(method, entry.options).applies_to(group_of(network, entry.members)):
            raise BadRequest("method_does_not_apply", f"{site}: {method} does not apply: {reason}")
        return
    if method not in METHODS:
        raise BadRequest("unknown_method", f"{site}: no method {method!r}; there are {sorted(METHODS)}")
    reason = method_of(method, entry.options).applies_to(layer)
    if reason is not None:
        raise BadRequest("method_does_not_apply", f"{site}: {method} does not apply: {reason}")


def _equal(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in mine.items())


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(v) for v in value) if isinstance(value, (tuple, list)) else 0


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op not in ("call_module", "call_function", "call_method"):
        return False
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = name.split(".")[0]
    trailing = name.endswith("_") and not name.endswith("__")
    return trailing or name in ("iadd", "imul", "isub") or bool(node.kwargs.get("inplace", False))
