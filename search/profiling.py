"""What a stage is searched on: error against cost by layer and method, variational ranks, and how much each counts."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from search.bench import Bench
from search.calibrate import Statistics, collect
from search.chains import follow
from search.decompose import METHODS
from search.decompose.tensor_train import tt_unfoldings
from search.decompose.tt_matrix import TTMatrix
from search.errors import BadRequest
from search.layout import Quick
from search.metrics import class_last, forward
from search.sensitivity import PROBE_ERRORS, measure_rises
from search.spec import CurvePoint, LayerInfo, Plan, SiteChoice, SitePlan
from search.vbmf import evbmf_rank
from tenfold.layers.reshaped import balanced

__all__ = ["measure_sites", "methods_of"]

STATISTICS_BYTES = 1 << 30
"""Of second moments held at a time; more layers take another pass over the calibration data."""
PROBE_ROWS = 256
PROBE_S = 60.0
"""About how long the measuring of effects may take."""


def methods_of(bench: Bench) -> tuple[str, ...]:
    """The methods that the job may use. Raises BadRequest for one that does not exist."""
    if bench.spec.methods == "auto":
        return tuple(METHODS)
    unknown = [m for m in bench.spec.methods if m not in METHODS]
    if unknown:
        raise BadRequest("unknown_method", f"methods names {unknown}; this version has {sorted(METHODS)}")
    return bench.spec.methods


def measure_sites(bench: Bench, layers: Sequence[LayerInfo], start: nn.Module, kept: Plan) -> tuple[SiteChoice, ...]:
    """The choices of every layer that may change, on the ``start`` network of a stage (dense layers throughout).

    ``kept``: what the stage's network has already, and what is fixed; those points are on the curves too, so that
    costs can be told exactly. Raises BadRequest when no layer may change, or a fixed plan does not fit its layer.
    """
    fixed = bench.spec.layers.fixed
    for site, chosen in fixed.items():
        _check_fixed(site, chosen, start)
    methods = methods_of(bench)
    wanted: dict[str, LayerInfo] = {}
    for layer in layers:
        if layer.name in fixed or (layer.compressible and _may_change(bench, layer.name)):
            wanted[layer.name] = layer
    if not any(name not in fixed for name in wanted) and not fixed:
        raise _nothing_to_do(bench, layers)
    importance = _importance(start)
    found: list[SiteChoice] = []
    probe = _Probe(bench, start)
    for group in _groups(start, list(wanted)):
        statistics = collect(start, group, bench.calibration)
        for name in group:
            bench.report(f"profiling {name}", len(found), len(wanted))
            own = {kept[name].method, *methods} if name in kept else set(methods)
            choice = _choice(wanted[name], start, sorted(own), statistics[name], importance.get(name), kept)
            if choice.curves:
                found.append(probe.measure(choice, statistics[name], len(wanted)))
    if not found:
        raise _nothing_to_do(bench, layers)
    order = {layer.name: i for i, layer in enumerate(layers)}
    return tuple(sorted(found, key=lambda c: order[c.site]))


def _choice(
    info: LayerInfo,
    network: nn.Module,
    methods: Sequence[str],
    statistics: Statistics,
    importance: Tensor | None,
    kept: Plan,
) -> SiteChoice:
    layer = network.get_submodule(info.name)
    weight = _weight(layer)
    positions = max(1, info.macs // weight.numel())
    curves: dict[str, tuple[CurvePoint, ...]] = {}
    evbmf: dict[str, tuple[int, ...]] = {}
    for name in methods:
        method = METHODS[name]
        if method.applies_to(layer) is not None:
            continue
        curve = method.curve(layer, statistics, positions, metric=importance)
        if info.name in kept and kept[info.name].method == name:
            ranks = kept[info.name].ranks
            cost = method.cost(layer, ranks, positions, input_sizes=statistics.input_sizes)
            curve = _with_start(curve, ranks, cost)
        if curve:
            curves[name] = curve
            evbmf[name] = _evbmf(name, layer)
    return SiteChoice(
        site=info.name, dense_parameters=info.parameters, dense_macs=info.macs, curves=curves, evbmf=evbmf
    )


def _with_start(curve: tuple[CurvePoint, ...], ranks: tuple[int, ...], cost: tuple[int, int]) -> tuple[CurvePoint, ...]:
    """The curve with the stage's own starting point on it, which is exact: its weight has just these ranks."""
    if any(p.ranks == ranks for p in curve):
        return curve
    start = CurvePoint(ranks=ranks, parameters=cost[0], macs=cost[1], error=0.0)
    return tuple(sorted((*curve, start), key=lambda p: (p.parameters, p.macs)))


def _evbmf(method: str, layer: nn.Module) -> tuple[int, ...]:
    """Ranks by variational Bayes of the unfoldings that a method cuts; per group, the largest of all groups.

    ``r_cp`` has no unfolding whose rank is its own: (s1, t1) against the rest bounds it from below.
    """
    parts = _weight(layer).detach().double().chunk(int(getattr(layer, "groups", 1)))

    def rank(by: str) -> int:
        return max(1, *(evbmf_rank(_unfolded(part, by).numpy()) for part in parts))

    if method == "tucker2":
        return rank("in"), rank("out")
    if method == "tt":
        return rank("in"), rank("rows"), rank("out")
    tensor_train = METHODS[method]
    if isinstance(tensor_train, TTMatrix):
        modes = tensor_train.modes(layer)
        found = [[_rank_of_gram(u) for u in tt_unfoldings(part.flatten(1), *modes)] for part in parts]
        return tuple(max(1, *ranks) for ranks in zip(*found, strict=True))
    if method == "svd_input":
        return (rank("in"),)
    if method in ("cp3", "cp4"):
        # No sum of fewer terms has these ranks in both unfoldings.
        return (max(rank("in"), rank("out")),)
    if method == "r_tucker":
        return rank("in1"), rank("in2"), rank("out1"), rank("out2")
    return (rank({"spatial_svd": "rows", "r_cp": "pair"}.get(method, "out")),)


def _rank_of_gram(matrix: Tensor) -> int:
    """EVBMF from the eigenvalues of the short side: an unfolding in the middle of a train is as large as it can be."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values = torch.linalg.eigvalsh(short @ short.T).clamp_min(0).sqrt()
    return evbmf_rank(values.numpy(), (matrix.shape[0], matrix.shape[1]))


def _unfolded(weight: Tensor, by: str) -> Tensor:
    """(out, in, *kernel) as a matrix: outputs, inputs, (inputs, kernel rows), or reshaped modes apart from the rest."""
    if by == "in":
        return weight.transpose(0, 1).flatten(1)
    if by == "rows":
        return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    if by in ("in1", "in2", "out1", "out2", "pair"):
        (t1, t2), (s1, s2) = balanced(weight.shape[0]), balanced(weight.shape[1])
        modes = weight.reshape(t1, t2, s1, s2, -1)
        if by == "pair":
            return modes.permute(0, 2, 1, 3, 4).flatten(2).flatten(0, 1)
        return modes.movedim(("out1", "out2", "in1", "in2").index(by), 0).flatten(1)
    return weight.flatten(1)


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
        began = time.perf_counter()
        self.inputs = tuple(torch.cat(xs)[:PROBE_ROWS] for xs in zip(*bench.calibration, strict=True))
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
        with torch.no_grad():
            return forward(Quick(network.eval()), self.inputs, self.bench.runtime.fixed_batch).float()

    def _loss(self, network: nn.Module) -> float:
        """KL from the original's answers in nats, or the relative squared error."""
        answers, wanted = self._answers(network), self.original
        if self.bench.classes:
            y, t = class_last(answers).log_softmax(-1), class_last(wanted).log_softmax(-1)
            return float(F.kl_div(y, t, log_target=True, reduction="none").sum(-1).mean())
        return float((answers - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum().clamp_min(1e-12))


def _groups(network: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Layers whose second moments fit in memory together."""
    group: list[str] = []
    used = 0
    for name in names:
        layer = network.get_submodule(name)
        weight = _weight(layer)
        width = weight[0].numel()
        size = 8 * (int(getattr(layer, "groups", 1)) * width * width + len(weight) * width)
        if group and used + size > STATISTICS_BYTES:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    if group:
        yield group


def _weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.get_parameter("weight")
    return weight


def _may_change(bench: Bench, name: str) -> bool:
    layers = bench.spec.layers
    return any(fnmatchcase(name, p) for p in layers.include) and not any(fnmatchcase(name, p) for p in layers.exclude)


def _check_fixed(site: str, chosen: SitePlan, network: nn.Module) -> None:
    method = chosen.method
    try:
        layer = network.get_submodule(site)
    except AttributeError:
        raise BadRequest("unknown_site", f"layers.fixed names {site!r}, which is no layer of this network") from None
    if method not in METHODS:
        raise BadRequest("unknown_method", f"layers.fixed: {site}: no method {method!r}; there are {sorted(METHODS)}")
    reason = METHODS[method].applies_to(layer)
    if reason is not None:
        raise BadRequest("method_does_not_apply", f"layers.fixed: {site}: {method} does not apply: {reason}")
    lattice = METHODS[method].ranks(layer)
    most = tuple(max(ranks) for ranks in zip(*lattice, strict=True))
    fits = len(chosen.ranks) == len(most) and all(rank <= top for rank, top in zip(chosen.ranks, most, strict=True))
    if not fits or METHODS[method].cost(layer, chosen.ranks, 1)[0] >= sum(p.numel() for p in layer.parameters()):
        raise BadRequest(
            "bad_rank",
            f"layers.fixed: {site}: {method} takes {len(most)} ranks of at most {list(most)} that together make the "
            f"layer smaller, got {list(chosen.ranks)}",
        )
    if chosen.options:
        raise BadRequest(
            "unknown_option", f"layers.fixed: {site}: {method} takes no options, got {sorted(chosen.options)}"
        )


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
