"""What a stage is searched on: error against cost by layer and method, variational ranks, and how much each counts."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from search.allocate import expected_rise
from search.bench import Bench
from search.calibrate import Statistics, collect
from search.chains import follow
from search.decompose import AUTO, JOINT_METHODS, METHODS, group_of, joint_method_of, method_of, same_weight
from search.errors import BadRequest
from search.fixed import check_fixed
from search.ground import below, point_of
from search.groups import find_groups
from search.layout import Quick
from search.matrices import matrices, weight_of
from search.metrics import class_last, forward
from search.recurrent import RECURRENT, named_matrices
from search.sensitivity import PROBE_ERRORS, measure_rises
from search.snapping import snapped
from search.spec import CurvePoint, LayerInfo, Options, Plan, SiteChoice, SitePlan
from search.vbmf import WEAKENINGS, analysed_form, weakened_ranks

__all__ = ["measure_sites", "methods_of"]

STATISTICS_BYTES = 1 << 30
"""Of second moments held at a time; more layers take another pass over the calibration data. A group whose members'
together are larger is not offered."""
PROBE_ROWS, PROBE_BYTES = 256, 128 << 20
"""Samples that a probe answers, and the most that these answers may take: maps are large."""
PROBE_BATCH = 64
PROBE_S = 60.0
"""About how long the measuring of effects may take."""


def methods_of(bench: Bench) -> tuple[str, ...]:
    """The methods that the job may use. Raises BadRequest for one that does not exist."""
    known = (*METHODS, *JOINT_METHODS)
    if bench.spec.methods == "auto":
        return AUTO if bench.spec.layers.groups in ("auto", {}) else (*AUTO, *JOINT_METHODS)
    unknown = [m for m in bench.spec.methods if m not in known]
    if unknown:
        raise BadRequest("unknown_method", f"methods names {unknown}; this version has {sorted(known)}")
    return bench.spec.methods


def measure_sites(
    bench: Bench, layers: Sequence[LayerInfo], start: nn.Module, held: Plan
) -> tuple[tuple[SiteChoice, ...], tuple[SiteChoice, ...]]:
    """The choices of every layer that may change, and of the groups that may be decomposed together, on the ``start``
    network of a stage (dense layers throughout).

    ``held``: what the stage's network has already. Its points, and those of the plans that are fixed, are on the curves
    whatever the lattice tries, with their own costs and errors. Raises BadRequest when no layer may change, or a fixed
    plan does not fit its layer.
    """
    fixed = bench.spec.layers.fixed
    kept = {**held, **fixed}
    ties = same_weight(start, [layer.name for layer in layers])
    check_fixed(fixed, start, ties)
    alone = [m for m in methods_of(bench) if m in METHODS]
    given = {name for site, chosen in fixed.items() for name in chosen.members or (site,)}
    wanted: dict[str, LayerInfo] = {}
    for layer in layers:
        if layer.name in given or (layer.compressible and _may_change(bench, layer.name)):
            wanted[layer.name] = layer
    if not any(name not in given for name in wanted) and not fixed:
        raise _nothing_to_do(bench, layers)
    free = [layer for name, layer in wanted.items() if name not in given]
    groups = _groups_wanted(bench, free, ties, start, kept)
    together = {name for members, _ in groups.values() for name in members}
    importance = _importance(start)
    found: dict[str, SiteChoice] = {}
    probe, multiple = _Probe(bench, start), bench.spec.layers.rank_multiple
    for batch in _batches(start, list(wanted)):
        statistics = collect(start, batch, bench.calibration)
        for name in batch:
            bench.report(f"profiling {name}", len(found), len(wanted))
            own = {kept[name].method, *alone} if name in kept else set(alone)
            if any(name in tie for tie in ties):
                own = set()
            entry = _Given.of(name, kept, held)
            choice = _choice(wanted[name], start, sorted(own), statistics[name], importance.get(name), entry, multiple)
            if choice.curves:
                found[name] = probe.measure(choice, statistics[name], len(wanted))
            elif name in together:
                # No method of its own may be used; what an error here does to the loss must still be known.
                usual = [_usual(start.get_submodule(name))]
                choice = _choice(wanted[name], start, usual, statistics[name], importance.get(name), None)
                found[name] = probe.measure(choice, statistics[name], len(wanted)).model_copy(update={"curves": {}})
    joint = []
    for position, (name, (members, methods)) in enumerate(groups.items()):
        bench.report(f"profiling {name}", position, len(groups))
        statistics = collect(start, list(members), bench.calibration)
        entry = _Given.of(name, kept, held)
        joint.append(
            _group_choice(name, members, methods, wanted, start, statistics, importance, found, entry, multiple)
        )
    used = tuple(choice for choice in joint if choice.curves)
    members_of_used = {name for choice in used for name in choice.members}
    sites = tuple(found[name] for name in wanted if name in found and (found[name].curves or name in members_of_used))
    if not sites:
        raise _nothing_to_do(bench, layers)
    return sites, used


def _groups_wanted(
    bench: Bench, layers: Sequence[LayerInfo], ties: Sequence[tuple[str, ...]], start: nn.Module, kept: Plan
) -> dict[str, tuple[dict[str, tuple[int, ...]], tuple[str, ...]]]:
    """Members and methods of the groups that may be decomposed together, and of those that hold one weight.

    ``layers``: those that may change; ``ties``: which of all hold one weight. At a later stage, a group that is one
    already stays one, and layers that were replaced on their own stay so.
    """
    alone = tuple(m for m in methods_of(bench) if m in METHODS)
    joint = tuple(m for m in methods_of(bench) if m in JOINT_METHODS)
    found = {
        site: (entry.members, tuple(dict.fromkeys((entry.method, *(alone if entry.method in METHODS else joint)))))
        for site, entry in kept.items()
        if entry.members
    }
    taken = {name for site, entry in kept.items() for name in entry.members or (site,)}
    able = {layer.name for layer in layers}
    offered: dict[str, tuple[dict[str, tuple[int, ...]], tuple[str, ...]]] = {
        "+".join(tie): ({n: (i,) for i, n in enumerate(tie)}, alone) for tie in ties if able.issuperset(tie)
    }
    if joint:
        apart = [layer for layer in layers if not any(layer.name in tie for tie in ties)]
        offered |= {name: (members, joint) for name, members in find_groups(apart, bench.spec.layers).items()}
    for name, (members, methods) in offered.items():
        fits = sum(_statistics_bytes(start.get_submodule(n)) for n in members) <= STATISTICS_BYTES
        if fits and name not in found and taken.isdisjoint(members):
            found[name] = members, methods
    able_to = {
        name: tuple(m for m in methods if joint_method_of(m, {}).applies_to(group_of(start, members)) is None)
        for name, (members, methods) in found.items()
    }
    return {name: (members, able_to[name]) for name, (members, _) in found.items() if able_to[name]}


def _group_choice(
    name: str,
    members: Mapping[str, tuple[int, ...]],
    methods: Sequence[str],
    layers: Mapping[str, LayerInfo],
    network: nn.Module,
    statistics: Mapping[str, Statistics],
    importance: Mapping[str, Tensor],
    alone: Mapping[str, SiteChoice],
    given: "_Given | None",
    multiple: int,
) -> SiteChoice:
    """Curves of the methods of several layers.

    What an error at a member does to the loss is what it does when it comes alone, so that a group and its members' own
    choices are told apart by the same measure.
    """
    group = group_of(network, members)
    infos = [layers[n] for n in group.names]
    positions = [_positions(info, layer) for info, layer in zip(infos, group.layers, strict=True)]
    known = [statistics[n] for n in group.names]
    metrics = [importance.get(n) for n in group.names]
    curves: dict[str, tuple[CurvePoint, ...]] = {}
    evbmf: dict[str, tuple[int, ...]] = {}
    options = given.options if given else {}
    sizes = [s.input_sizes for s in known]
    able = {name: joint_method_of(name, options.get(name, {})) for name in methods}

    def price(method: str, ranks: tuple[int, ...]) -> tuple[int, int]:
        return able[method].cost(group, ranks, positions, input_sizes=sizes)

    def measured(method: str, ranks: tuple[int, ...], *, held: bool = False) -> CurvePoint:
        lost = (0.0,) * len(known) if held else able[method].factorize(group, ranks, known, metrics=metrics).errors
        return _point(ranks, price(method, ranks), sum(lost) / len(lost), lost)

    dense = group.dense(positions)
    for method in methods:
        curve = able[method].curve(group, known, positions, metrics=metrics)
        if multiple > 1:
            grid = len(group.grid) if method in JOINT_METHODS else 0
            curve = snapped(curve, multiple, partial(price, method), dense, grid=grid)
        if given and given.entry.method == method:
            curve = _with_point(curve, measured(method, given.entry.ranks, held=given.held))
        if curve:
            curves[method] = curve
            evbmf[method] = able[method].variational_ranks(group)
    if multiple == 1 and not any(alone[n].curves for n in group.names):
        curves = _with_starts(curves, evbmf, given, dense, price, measured)
    return SiteChoice(
        site=name,
        members={n: tuple(members[n]) for n in group.names},
        dense_parameters=dense[0],
        dense_macs=sum(info.macs for info in infos),
        curves={m: tuple(_with_rise(p, [alone[n] for n in group.names]) for p in c) for m, c in curves.items()},
        options=options,
        evbmf=evbmf,
        sensitivity=sum(alone[n].sensitivity for n in group.names),
    )


def _with_rise(point: CurvePoint, members: Sequence[SiteChoice]) -> CurvePoint:
    rise = sum(expected_rise(site, error) for site, error in zip(members, point.errors, strict=True))
    return point.model_copy(update={"rise": rise})


def _choice(
    info: LayerInfo,
    network: nn.Module,
    methods: Sequence[str],
    statistics: Statistics,
    importance: Tensor | None,
    given: "_Given | None",
    multiple: int = 1,
) -> SiteChoice:
    layer = network.get_submodule(info.name)
    positions = _positions(info, layer)
    curves: dict[str, tuple[CurvePoint, ...]] = {}
    evbmf: dict[str, tuple[int, ...]] = {}
    options = given.options if given else {}
    able = {name: method_of(name, options.get(name, {})) for name in methods}

    def price(name: str, ranks: tuple[int, ...]) -> tuple[int, int]:
        return able[name].cost(layer, ranks, positions, input_sizes=statistics.input_sizes)

    def measured(name: str, ranks: tuple[int, ...], *, held: bool = False) -> CurvePoint:
        error = 0.0 if held else able[name].factorize(layer, ranks, statistics, metric=importance).error
        return _point(ranks, price(name, ranks), error)

    # Of these, a curve may hold points that save parameters alone: it has compared their MACs.
    dense = info.parameters, math.inf if isinstance(layer, (nn.Embedding, *RECURRENT)) else info.macs
    for name, method in able.items():
        if method.applies_to(layer) is not None:
            continue
        curve = method.curve(layer, statistics, positions, metric=importance)
        if multiple > 1:
            curve = snapped(curve, multiple, partial(price, name), dense)
        if given and given.entry.method == name:
            curve = _with_point(curve, measured(name, given.entry.ranks, held=given.held))
        if curve:
            curves[name] = curve
            evbmf[name] = method.variational_ranks(layer)
    if multiple == 1:
        curves = _with_starts(curves, evbmf, given, dense, price, measured)
    return SiteChoice(
        site=info.name,
        dense_parameters=info.parameters,
        dense_macs=info.macs,
        curves=curves,
        options=options,
        evbmf=evbmf,
    )


@dataclass(frozen=True)
class _Given:
    """What replaces a site whatever the search finds."""

    entry: SitePlan
    held: bool
    """The stage's network has it already: its weight is of just these ranks, so that they lose nothing."""

    @classmethod
    def of(cls, site: str, kept: Plan, held: Plan) -> "_Given | None":
        return cls(kept[site], held.get(site) == kept[site]) if site in kept else None

    @property
    def options(self) -> dict[str, Options]:
        """By method."""
        return {self.entry.method: self.entry.options} if self.entry.options else {}


def _with_starts(
    curves: Mapping[str, tuple[CurvePoint, ...]],
    evbmf: Mapping[str, tuple[int, ...]],
    given: "_Given | None",
    dense: tuple[int, float],
    price: Callable[[str, tuple[int, ...]], tuple[int, int]],
    measured: Callable[[str, tuple[int, ...]], CurvePoint],
) -> dict[str, tuple[CurvePoint, ...]]:
    """The curves with the analytic ranks that a search starts from, of their one form, where they save anything.

    ``price`` and ``measured``: parameters and MACs, and the whole point, of a method's ranks. None for a fixed site.
    """
    found = dict(curves)
    if given and not given.held:
        return found
    start = point_of(curves, given.entry) if given else None
    most = (start.parameters, start.macs) if start else dense
    open_curves = {method: below(curve, start) for method, curve in curves.items()}
    form = analysed_form(open_curves)
    if form is None:
        return found
    for ranks in dict.fromkeys(weakened_ranks(open_curves[form], evbmf[form], w) for w in WEAKENINGS):
        parameters, macs = price(form, ranks)
        if parameters < most[0] and macs <= most[1] and all(p.ranks != ranks for p in found[form]):
            found[form] = _with_point(found[form], measured(form, ranks))
    return found


def _point(ranks: tuple[int, ...], cost: tuple[int, int], error: float, errors: tuple[float, ...] = ()) -> CurvePoint:
    return CurvePoint(ranks=ranks, parameters=cost[0], macs=cost[1], error=error, errors=errors)


def _with_point(curve: tuple[CurvePoint, ...], point: CurvePoint) -> tuple[CurvePoint, ...]:
    """The curve with this point on it, in place of what it may have estimated for these ranks."""
    others = (p for p in curve if p.ranks != point.ranks)
    return tuple(sorted((*others, point), key=lambda p: (p.parameters, p.macs)))


def _importance(network: nn.Module) -> dict[str, Tensor]:
    """(out,) weights of a layer's outputs: the squared scale that a batch norm right behind gives each."""
    found: dict[str, Tensor] = {}
    if not isinstance(network, fx.GraphModule):
        return found
    modules = dict(network.named_modules())
    for node in network.graph.nodes:
        chain = follow(node, modules) if node.op == "call_module" else None
        if chain is None or chain.norm is None:
            continue
        norm = modules[chain.norm]
        scale = (norm.running_var + norm.eps).rsqrt()  # type: ignore[operator]
        if norm.weight is not None:
            scale = scale * norm.weight
        found[str(node.target)] = scale.detach().square()
    return found


class _Probe:
    """Measures what an error at one layer does to the loss: a real truncation, put in and taken out again."""

    def __init__(self, bench: Bench, start: nn.Module) -> None:
        self.bench = bench
        self.network = copy.deepcopy(start).eval()
        self.inputs = tuple(torch.cat(xs)[:PROBE_ROWS] for xs in zip(*bench.calibration, strict=True))
        least = bench.runtime.fixed_batch or 16
        one = self._answered(bench.original, slice(0, least))
        rows = max(least, PROBE_BYTES * len(one) // one.nbytes)
        self.inputs = tuple(x[:rows] for x in self.inputs)
        began = time.perf_counter()
        self.original = self._answers(bench.original)
        self.pass_s = time.perf_counter() - began
        self.base = self._loss(self.network)

    def measure(self, choice: SiteChoice, statistics: Statistics, sites: int) -> SiteChoice:
        """``choice`` with its rises of the loss, and the first of them as its slope."""
        expected = self.pass_s * sites * len(PROBE_ERRORS)
        if expected > PROBE_S:
            self._shrink(expected / PROBE_S)
        rises = measure_rises(self.network, choice, statistics, self._loss, self.base)
        slope = rises[0][1] / rises[0][0] if rises else 0.0
        return choice.model_copy(update={"rises": rises, "sensitivity": slope})

    def _shrink(self, factor: float) -> None:
        """Fewer samples, where all sites together would take too long."""
        fixed = self.bench.runtime.fixed_batch
        rows = max(fixed or 16, int(len(self.inputs[0]) / factor))
        self.pass_s = 0.0
        if rows < len(self.inputs[0]):
            self.inputs = tuple(x[:rows] for x in self.inputs)
            self.original = self.original[:rows]
            self.base = self._loss(self.network)

    def _answers(self, network: nn.Module) -> Tensor:
        step, rows = self.bench.runtime.fixed_batch or PROBE_BATCH, len(self.inputs[0])
        return torch.cat([self._answered(network, slice(i, i + step)) for i in range(0, rows, step)])

    def _answered(self, network: nn.Module, rows: slice) -> Tensor:
        runtime, inputs = self.bench.runtime, tuple(x[rows] for x in self.inputs)
        with torch.no_grad():
            return forward(Quick(network.eval()), inputs, runtime.fixed_batch, runtime.answer).float()

    def _loss(self, network: nn.Module) -> float:
        """KL from the original's answers in nats, or the relative squared error."""
        answers, wanted = self._answers(network), self.original
        if self.bench.classes:
            y, t = class_last(answers).log_softmax(-1), class_last(wanted).log_softmax(-1)
            return float(F.kl_div(y, t, log_target=True, reduction="none").sum(-1).mean())
        return float((answers - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum().clamp_min(1e-12))


def _batches(network: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Layers whose second moments fit in memory together."""
    group: list[str] = []
    used = 0
    for name in names:
        size = _statistics_bytes(network.get_submodule(name))
        if group and used + size > STATISTICS_BYTES:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    if group:
        yield group


def _statistics_bytes(layer: nn.Module) -> int:
    if isinstance(layer, RECURRENT):
        return 8 * sum(w.shape[1] * sum(w.shape) for w in named_matrices(layer).values())
    groups, out, n = matrices(layer).shape
    return 8 * groups * n * (out + (1 if isinstance(layer, nn.Embedding) else n))


def _positions(info: LayerInfo, layer: nn.Module) -> int:
    """How often the weight is applied to one sample, all calls together: for an Embedding, how many tokens are looked
    up; the steps of a recurrent layer."""
    if isinstance(layer, nn.Embedding):
        look_ups = info.options["look_ups"]
        return look_ups if isinstance(look_ups, int) else 0
    weights = named_matrices(layer).values() if isinstance(layer, RECURRENT) else (weight_of(layer),)
    return max(1, info.macs // sum(w.numel() for w in weights))


def _usual(layer: nn.Module) -> str:
    """The method whose truncations tell what errors at a layer do."""
    return "svd" if METHODS["svd"].applies_to(layer) is None else "spatial_svd"


def _may_change(bench: Bench, name: str) -> bool:
    layers = bench.spec.layers
    return any(fnmatchcase(name, p) for p in layers.include) and not any(fnmatchcase(name, p) for p in layers.exclude)


def _nothing_to_do(bench: Bench, layers: Sequence[LayerInfo]) -> BadRequest:
    able = [layer.name for layer in layers if layer.compressible]
    if not able:
        reasons: Mapping[str, str] = {layer.name: layer.reason for layer in layers if layer.reason}
        some = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3]) or "it has no layers"
        return BadRequest("no_compressible_layer", f"this network has no layer that can be made smaller ({some})")
    return BadRequest(
        "no_compressible_layer",
        f"of {len(able)} compressible layers none may change with include {list(bench.spec.layers.include)}, exclude "
        f"{list(bench.spec.layers.exclude)} and methods {bench.spec.methods!r}: widen them",
    )
