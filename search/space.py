"""What may be chosen in a stage: a guided space (a few global knobs) and a full one (a knob a site).

Both turn the sampler's parameters into a ``Plan`` and know their first points. Parameters that are not knobs of the
space travel along untouched: ``start`` names a given first point, ``learning_rate_scale`` is read by training.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from search.allocate import allocate, equal_rate
from search.ground import Ground
from search.spec import LEARNING_RATE_SCALE, Cost, CurvePoint, JobSpec, Plan, SiteChoice, SitePlan
from search.spec import Space as SpaceKind
from search.vbmf import WEAKENINGS, analysed_form, weakened_ranks

__all__ = [
    "LOWEST",
    "FullSpace",
    "GuidedSpace",
    "Params",
    "SearchSpace",
    "Start",
    "allocated",
    "analytic",
    "at_share",
    "macs_share",
    "space_for",
    "starts",
]

Params = dict[str, str | int | float | bool]

_HIGHEST = 0.95
LOWEST = 0.02
"""Share of the original's cost below which nothing is looked for."""
_FIRST_RATIOS = (0.5, 0.3, 0.75, 0.2, 0.4, 0.6, 0.12, 0.9)
"""Share kept by the allocator's first points; the middle first, then outwards."""
_LATER_RATIOS = (0.7, 0.55, 0.85, 0.45, 0.62, 0.78, 0.35, 0.93)
"""The same at later stages, which start from a compressed network and go on in smaller steps."""
_RATES = (0.33, 0.5)
_LATER_RATES = (0.6, 0.8)


@dataclass(frozen=True)
class Start:
    """A first point: known to be sensible, so it is tried before the sampler is asked."""

    params: Params
    plan: Plan


class SearchSpace(Protocol):
    ground: Ground

    def distributions(self) -> dict[str, BaseDistribution]:
        """Knob to its range; the same in every call, for a study lives on it."""
        ...

    def plan(self, params: Mapping[str, str | int | float | bool]) -> Plan: ...

    def params_of(self, plan: Plan) -> Params:
        """The knobs nearest to a plan that came from elsewhere."""
        ...


def space_for(spec: JobSpec, ground: Ground) -> "GuidedSpace | FullSpace":
    return FullSpace(spec, ground) if spec.search.space is SpaceKind.FULL else GuidedSpace(spec, ground)


def _recipe_knobs(spec: JobSpec) -> dict[str, BaseDistribution]:
    return {LEARNING_RATE_SCALE: FloatDistribution(0.4, 2.5, log=True)} if spec.fine_tune.trains else {}


def macs_share(spec: JobSpec) -> float:
    """How much multiply-accumulates weigh against parameters unless the sampler says otherwise.

    Never one alone: ranks split by parameters only left nearly twice the multiply-accumulates (PEERS, lesson 3).
    """
    speed = sum(cost in (Cost.MACS, Cost.LATENCY) for cost in spec.minimize) / len(spec.minimize)
    return 0.25 + 0.5 * speed


class GuidedSpace:
    """Global knobs that the allocator turns into ranks.

    * ``kept``: share of the original network's cost (log scale)
    * ``macs_share``: 0 = the cost is parameters, 1 = multiply-accumulates
    * ``sensitivity``: exponent on the measured sensitivities, 1 = as measured. They span orders of magnitude between
      layers, so that far from 1 the weights would drown what was measured.
    * ``depth_i``: log2 of the error weight of the i-th quarter of the network, against the last quarter's
    * ``use_<method>``: switches, where there are several methods
    """

    def __init__(self, spec: JobSpec, ground: Ground) -> None:
        self._spec = spec
        self.ground = ground
        self._groups = min(4, len(ground.sites))

    def distributions(self) -> dict[str, BaseDistribution]:
        top = _HIGHEST * self.ground.start_share
        knobs: dict[str, BaseDistribution] = {
            "kept": FloatDistribution(min(max(self.ground.least_share, LOWEST), 0.8 * top), top, log=True),
            "macs_share": FloatDistribution(0.0, 1.0),
            "sensitivity": FloatDistribution(0.75, 1.25),
        }
        knobs |= {f"depth_{i}": FloatDistribution(-2.0, 2.0) for i in range(self._groups - 1)}
        if len(self.ground.methods) > 1:
            knobs |= {f"use_{method}": CategoricalDistribution([True, False]) for method in self.ground.methods}
        return knobs | _recipe_knobs(self._spec)

    def _neutral(self, kept: float) -> Params:
        ranges = self.distributions()
        range_of_kept = ranges["kept"]
        assert isinstance(range_of_kept, FloatDistribution)  # noqa: S101 - for the type checker
        kept = min(max(kept, range_of_kept.low), range_of_kept.high)
        neutral: Params = {"kept": kept, "macs_share": macs_share(self._spec), "sensitivity": 1.0}
        neutral |= {f"depth_{i}": 0.0 for i in range(self._groups - 1)}
        neutral |= {knob: True for knob in ranges if knob.startswith("use_")}
        return neutral | ({LEARNING_RATE_SCALE: 1.0} if LEARNING_RATE_SCALE in ranges else {})

    def plan(self, params: Mapping[str, str | int | float | bool]) -> Plan:
        sites = self.ground.sites
        exponent = float(params["sensitivity"])
        weights = {}
        for position, site in enumerate(sites):
            group = position * self._groups // len(sites)
            depth = float(params.get(f"depth_{group}", 0.0))
            weights[site.site] = 2.0**depth * site.sensitivity ** (exponent - 1.0)
        weights = self.ground.weights(weights)
        methods = {m for m in self.ground.methods if params.get(f"use_{m}", True)}
        return allocated(self.ground, float(params["kept"]), float(params["macs_share"]), weights, methods or None)

    def params_of(self, plan: Plan) -> Params:
        return self._neutral(self.ground.share(plan, macs_share(self._spec)))


class FullSpace:
    """One knob a site, ``site:<name>`` in [0, 1]: how far along the site's best points, cheapest first; the end of
    the range leaves the site as it was. Methods compete point by point: the smallest error at a cost is taken. A group
    that may be decomposed together has a knob too: in its lower half it is, and its members' own do not count."""

    def __init__(self, spec: JobSpec, ground: Ground) -> None:
        self._spec = spec
        self.ground = ground
        self._span = {site.site: 1.0 for site in ground.sites} | {group.site: 0.5 for group in ground.groups}
        self._ladders = {site.site: _ladder(site, macs_share(spec)) for site in (*ground.sites, *ground.groups)}

    def distributions(self) -> dict[str, BaseDistribution]:
        knobs: dict[str, BaseDistribution] = {f"site:{name}": FloatDistribution(0.0, 1.0) for name in self._ladders}
        return knobs | _recipe_knobs(self._spec)

    def plan(self, params: Mapping[str, str | int | float | bool]) -> Plan:
        plan = {}
        for name, ladder in self._ladders.items():
            rung = min(int(float(params[f"site:{name}"]) / self._span[name] * (len(ladder) + 1)), len(ladder))
            if rung < len(ladder):
                plan[name] = ladder[rung][0]
        for group in self.ground.groups:
            if group.site in plan:
                plan = {name: entry for name, entry in plan.items() if name not in group.members}
        return self.ground.complete(plan)

    def params_of(self, plan: Plan) -> Params:
        params: Params = {}
        for name, ladder in self._ladders.items():
            point = self.ground.point(name, plan[name]) if name in plan else None
            rung = len(ladder)
            if point is not None:
                rung = min(range(len(ladder)), key=lambda i: abs(ladder[i][1].parameters - point.parameters))
            params[f"site:{name}"] = self._span[name] * (rung + 0.5) / (len(ladder) + 1)
        return params | ({LEARNING_RATE_SCALE: 1.0} if _recipe_knobs(self._spec) else {})


def starts(spec: JobSpec, space: SearchSpace) -> Iterator[Start]:
    """First points, best guesses first: the allocator's front, one rate everywhere, analytic and weakened ranks.

    One rate everywhere is here because training recovers it as well as the plans with a much smaller error before
    training (PEERS, lesson 1); which of them wins depends on the recipe, so both are measured.
    """
    ground = space.ground
    share = macs_share(spec)
    first = ground.profile.stage == 0
    rates = _RATES if first else _LATER_RATES
    every = (*ground.sites, *ground.groups)
    method = max(ground.methods, key=lambda m: sum(m in site.curves for site in every))
    weak, unweakened = WEAKENINGS

    def allocator(ratio: float) -> Start:
        plan = allocated(ground, ratio * ground.share({}, share), share, None, None)
        return Start(space.params_of(plan) | {"start": "allocator"}, plan)

    def given(name: str, plan: Plan) -> Start:
        return Start(space.params_of(plan) | {"start": name}, plan)

    others = iter(
        (  # not computed before they are wanted
            lambda: given("equal_rate", ground.complete(equal_rate(every, rates[0], method))),
            lambda: given("weakened", analytic(ground, weak)),
            lambda: given("evbmf", analytic(ground, unweakened)),
            lambda: given("equal_rate", ground.complete(equal_rate(every, rates[1], method))),
        )
    )
    for position, ratio in enumerate(_FIRST_RATIOS if first else _LATER_RATIOS):
        yield allocator(ratio)
        if position and (other := next(others, None)) is not None:
            yield other()


def at_share(spec: JobSpec, space: SearchSpace, kept: float) -> Start:
    """The allocator's plan that keeps ``kept`` of the original's cost."""
    plan = allocated(space.ground, kept, macs_share(spec), None, None)
    return Start(space.params_of(plan) | {"start": "boundary"}, plan)


def allocated(
    ground: Ground, kept: float, macs_share: float, weights: dict[str, float] | None, methods: set[str] | None
) -> Plan:
    parameters = ground.parameters - sum(site.dense_parameters for site in ground.sites)
    macs = ground.macs - sum(site.dense_macs for site in ground.sites)
    plan = allocate(
        ground.sites,
        min(kept / ground.share({}, macs_share), 1.0),  # the allocator counts from the stage's own start
        groups=ground.groups,
        cost={Cost.PARAMETERS: 1 - macs_share, Cost.MACS: macs_share},
        weights=weights,
        methods=methods,
        fixed_parameters=parameters,
        fixed_macs=macs,
    )
    return ground.complete(plan)


def analytic(ground: Ground, w: float) -> Plan:
    """The ranks of analytic variational Bayes, weakened: R - w (R - R_EVBMF) (MUSCO); w = 1 takes them as they are.

    Each site by its ``analysed_form``, at the curve's nearest point: a profile has measured those of ``WEAKENINGS``
    themselves where they make the site smaller and every rank may be taken. Layers together only where they have none
    alone. R is the highest rank that still makes the site smaller than it is.
    """
    plan: Plan = {}
    for site in (*ground.sites, *ground.groups):
        method = analysed_form(site.curves)
        if method is None or method not in site.evbmf or not plan.keys().isdisjoint(site.members):
            continue
        curve = site.curves[method]
        wanted = weakened_ranks(curve, site.evbmf[method], w)
        point = min(curve, key=lambda p: (sum(abs(a - b) for a, b in zip(p.ranks, wanted, strict=True)), p.ranks))
        plan[site.site] = site.entry(method, point)
    return ground.complete(plan)


def _ladder(site: SiteChoice, macs_share: float) -> list[tuple[SitePlan, CurvePoint]]:
    """The site's points that no cheaper one beats in error, all methods together, cheapest first."""

    def cost(point: CurvePoint) -> float:
        parameters = point.parameters / max(site.dense_parameters, 1)
        return (1 - macs_share) * parameters + macs_share * point.macs / max(site.dense_macs, 1)

    every = [(cost(p), p.error, method, p) for method, curve in site.curves.items() for p in curve]
    ladder: list[tuple[SitePlan, CurvePoint]] = []
    for share, error, method, point in sorted(every, key=lambda e: e[:3]):
        if share < 1.0 and (not ladder or error < ladder[-1][1].error):
            ladder.append((site.entry(method, point), point))
    return ladder
