"""The ground a stage searches on: the sites that may change, what every plan has, and the arithmetic of costs.

A later stage starts from a compressed network. Its plans name *every* site that is compressed, so that a plan always
rebuilds from the original: a site that the search leaves alone keeps the replacement it had (``base``), and no site
may grow back beyond it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from search.spec import Cost, CurvePoint, JobSpec, Plan, Profile, SiteChoice, SitePlan

__all__ = ["Ground", "ground_of"]


@dataclass(frozen=True)
class Ground:
    profile: Profile
    sites: tuple[SiteChoice, ...]
    """Searchable, in the network's order. ``dense_*`` is what the site costs when a plan leaves it as it was: the
    original layer, or at a later stage the replacement it already had."""
    base: Plan
    """What every plan of the stage contains: fixed sites and, at a later stage, the parent's replacements."""
    methods: tuple[str, ...]
    parameters: int
    """Of the network when no searchable site changes."""
    macs: int
    _points: Mapping[tuple[str, str, tuple[int, ...]], CurvePoint] = field(repr=False)

    @property
    def start_share(self) -> float:
        """The starting network's cost as a share of the original's (1 in the first stage), the larger of the two."""
        dense = self.profile.costs
        return max(self.parameters / max(dense.parameters, 1), self.macs / max(dense.macs, 1))

    @property
    def least_share(self) -> float:
        """The smallest share of the original that can be reached, of parameters or of multiply-accumulates."""
        parameters, macs = self.parameters, self.macs
        for site in self.sites:
            points = [p for curve in site.curves.values() for p in curve]
            parameters += min(0, min(p.parameters for p in points) - site.dense_parameters)
            macs += min(0, min(p.macs for p in points) - site.dense_macs)
        dense = self.profile.costs
        return min(parameters / max(dense.parameters, 1), macs / max(dense.macs, 1))

    def point(self, site: str, plan: SitePlan) -> CurvePoint | None:
        return self._points.get((site, plan.method, plan.ranks))

    def costs(self, plan: Plan) -> tuple[int, int]:
        """(parameters, multiply-accumulates) of the whole network under ``plan``, before it is built."""
        parameters, macs = self.parameters, self.macs
        for site in self.sites:
            point = self.point(site.site, plan[site.site]) if site.site in plan else None
            if point is not None:
                parameters += point.parameters - site.dense_parameters
                macs += point.macs - site.dense_macs
        return parameters, macs

    def share(self, plan: Plan, macs_share: float) -> float:
        """Share of the original's cost that ``plan`` keeps, parameters and multiply-accumulates mixed."""
        parameters, macs = self.costs(plan)
        dense = self.profile.costs
        return (1 - macs_share) * parameters / max(dense.parameters, 1) + macs_share * macs / max(dense.macs, 1)

    def saves(self, plan: Plan, minimize: Sequence[Cost]) -> bool:
        """Never grow: predicted strictly cheaper than the original in every minimized cost that counting can predict,
        and than the stage's own start in at least one figure."""
        parameters, macs = self.costs(plan)
        dense = self.profile.costs
        below = {
            Cost.PARAMETERS: parameters < dense.parameters,
            Cost.BYTES: parameters < dense.parameters,
            Cost.MACS: macs < dense.macs,
        }
        return all(below.get(cost, True) for cost in minimize) and (parameters < self.parameters or macs < self.macs)

    def complete(self, plan: Plan) -> Plan:
        """``plan`` over the base, in the network's order."""
        return {**self.base, **plan}


def ground_of(spec: JobSpec, profile: Profile, parent: Plan | None) -> Ground:
    """The ground of ``profile``'s stage; ``parent``: the plan of the network the stage starts from."""
    before = parent or {}
    base: Plan = {**before, **spec.layers.fixed}
    parameters, macs = profile.costs.parameters, profile.costs.macs
    # A site measured as insensitive is still not free: noise of the measurement, and errors that add up.
    floor = max(1e-3 * sum(s.sensitivity for s in profile.sites) / max(len(profile.sites), 1), 1e-12)
    sites: list[SiteChoice] = []
    points: dict[tuple[str, str, tuple[int, ...]], CurvePoint] = {}
    for site in profile.sites:
        start = _start_point(site, base.get(site.site))
        if start is not None:
            parameters += start.parameters - site.dense_parameters
            macs += start.macs - site.dense_macs
        frozen = site.site in spec.layers.fixed or (site.site in before and start is None)
        if frozen or not _may_change(spec, site.site):
            continue
        curves = {
            method: kept
            for method, curve in site.curves.items()
            if (spec.methods == "auto" or method in spec.methods) and (kept := _below(curve, start))
        }
        if not curves:
            continue
        costs = (start.parameters, start.macs) if start else (site.dense_parameters, site.dense_macs)
        update = {
            "curves": curves,
            "dense_parameters": costs[0],
            "dense_macs": costs[1],
            "sensitivity": max(site.sensitivity, floor),
        }
        sites.append(site.model_copy(update=update))
        points |= {(site.site, method, p.ranks): p for method, curve in curves.items() for p in curve}
    methods = tuple(sorted({method for site in sites for method in site.curves}))
    return Ground(profile, tuple(sites), base, methods, parameters, macs, points)


def _may_change(spec: JobSpec, site: str) -> bool:
    included = any(fnmatchcase(site, pattern) for pattern in spec.layers.include)
    return included and not any(fnmatchcase(site, pattern) for pattern in spec.layers.exclude)


def _start_point(site: SiteChoice, plan: SitePlan | None) -> CurvePoint | None:
    """What the site costs at the stage's start: its point on the curve, or the nearest one that is no larger."""
    if plan is None:
        return None
    curve = site.curves.get(plan.method, ())
    inside = [
        p
        for p in curve
        if len(p.ranks) == len(plan.ranks) and all(r <= s for r, s in zip(p.ranks, plan.ranks, strict=True))
    ]
    return max(inside, key=lambda p: (p.parameters, p.macs), default=None)


def _below(curve: tuple[CurvePoint, ...], start: CurvePoint | None) -> tuple[CurvePoint, ...]:
    if start is None:
        return curve
    return tuple(
        p
        for p in curve
        if p.parameters <= start.parameters
        and p.macs <= start.macs
        and (p.parameters, p.macs) != (start.parameters, start.macs)
    )
