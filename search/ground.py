"""The ground a stage searches on: the sites that may change, what every plan has, and the arithmetic of costs.

A later stage starts from a compressed network. Its plans name *every* site that is compressed, so that a plan always
rebuilds from the original: a site that the search leaves alone keeps the replacement it had (``base``), and no site
may grow back beyond it. Nor does a stage regroup: layers that the parent has decomposed together stay together (their
group is then a site like any other), and layers that it has replaced one by one stay apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from search.spec import Cost, CurvePoint, JobSpec, Plan, Profile, SiteChoice, SitePlan

__all__ = ["Ground", "below", "ground_of", "point_of"]


@dataclass(frozen=True)
class Ground:
    profile: Profile
    sites: tuple[SiteChoice, ...]
    """Searchable, in the network's order. ``dense_*`` is what the site costs when a plan leaves it as it was: the
    original layer, or at a later stage the replacement it already had. No layer is in two."""
    groups: tuple[SiteChoice, ...]
    """Of ``sites`` that may be decomposed together instead."""
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
        saved = {site.site: _saving(site) for site in self.sites}
        for group in self.groups:
            own = [saved.pop(name) for name in group.members]
            joint = _saving(group)
            saved[group.site] = max(joint[0], sum(s[0] for s in own)), max(joint[1], sum(s[1] for s in own))
        parameters -= sum(s[0] for s in saved.values())
        macs -= sum(s[1] for s in saved.values())
        dense = self.profile.costs
        return min(parameters / max(dense.parameters, 1), macs / max(dense.macs, 1))

    def point(self, site: str, plan: SitePlan) -> CurvePoint | None:
        return self._points.get((site, plan.method, plan.ranks))

    def costs(self, plan: Plan) -> tuple[int, int]:
        """(parameters, multiply-accumulates) of the whole network under ``plan``, before it is built."""
        parameters, macs = self.parameters, self.macs
        for site in (*self.sites, *self.groups):
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

    def weights(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The sites' ``weights``, and for each group what its members' come to, by how sensitive they are."""
        found = dict(weights)
        by_name = {site.site: site for site in self.sites}
        for group in self.groups:
            total = sum(by_name[name].sensitivity for name in group.members)
            found[group.site] = sum(by_name[n].sensitivity * weights.get(n, 1.0) for n in group.members) / total
        return found

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
    open_sites = {site.site: site for site in profile.sites if _may_change(spec, site.site)}
    given = {name for site, entry in base.items() for name in entry.members or (site,)}
    groups = [
        group
        for group in profile.groups
        if (group.site in base or given.isdisjoint(group.members)) and open_sites.keys() >= group.members.keys()
    ]
    together = {name for group in groups if group.site not in base for name in group.members}
    found: dict[str, SiteChoice] = {}
    for site in (*profile.sites, *profile.groups):
        start = _start_point(site, base.get(site.site))
        if start is not None:
            parameters += start.parameters - site.dense_parameters
            macs += start.macs - site.dense_macs
        frozen = site.site in spec.layers.fixed or (site.site in before and start is None)
        replaced = site.site in given and site.site not in base  # as a member of a group of the base
        if frozen or replaced or not (site in groups if site.members else site.site in open_sites):
            continue
        curves = {
            method: kept
            for method, curve in site.curves.items()
            if (spec.methods == "auto" or method in spec.methods) and (kept := below(curve, start))
        }
        if not curves and site.site not in together:
            continue
        costs = (start.parameters, start.macs) if start else (site.dense_parameters, site.dense_macs)
        update = {
            "curves": curves,
            "dense_parameters": costs[0],
            "dense_macs": costs[1],
            "sensitivity": max(site.sensitivity, floor),
        }
        found[site.site] = site.model_copy(update=update)
    choices = tuple(found[g.site] for g in groups if g.site in found and g.site not in base)
    usable = {name for group in choices for name in group.members}
    kept_sites = [s for s in found.values() if s not in choices and (s.curves or s.site in usable)]
    order = {site.site: position for position, site in enumerate(profile.sites)}
    kept_sites.sort(key=lambda s: min(order[name] for name in s.members or (s.site,)))
    every = (*kept_sites, *choices)
    points = {(s.site, method, p.ranks): p for s in every for method, curve in s.curves.items() for p in curve}
    methods = tuple(sorted({method for site in every for method in site.curves}))
    return Ground(profile, tuple(kept_sites), choices, base, methods, parameters, macs, points)


def _saving(site: SiteChoice) -> tuple[int, int]:
    """The most that a site can save, of parameters and of multiply-accumulates."""
    points = [p for curve in site.curves.values() for p in curve]
    parameters = min((p.parameters for p in points), default=site.dense_parameters)
    macs = min((p.macs for p in points), default=site.dense_macs)
    return max(0, site.dense_parameters - parameters), max(0, site.dense_macs - macs)


def _may_change(spec: JobSpec, site: str) -> bool:
    included = any(fnmatchcase(site, pattern) for pattern in spec.layers.include)
    return included and not any(fnmatchcase(site, pattern) for pattern in spec.layers.exclude)


def _start_point(site: SiteChoice, plan: SitePlan | None) -> CurvePoint | None:
    """What the site costs at the stage's start: its point, which a profile puts on the curve."""
    if plan is None or plan.members.keys() != site.members.keys():
        return None
    return point_of(site.curves, plan)


def point_of(curves: Mapping[str, Sequence[CurvePoint]], plan: SitePlan) -> CurvePoint | None:
    """The point of a plan's method and ranks, if a curve has it."""
    return next((p for p in curves.get(plan.method, ()) if p.ranks == plan.ranks), None)


def below(curve: tuple[CurvePoint, ...], start: CurvePoint | None) -> tuple[CurvePoint, ...]:
    """What still makes a site smaller than the ``start`` that it has already."""
    if start is None:
        return curve
    return tuple(
        p
        for p in curve
        if p.parameters <= start.parameters
        and p.macs <= start.macs
        and (p.parameters, p.macs) != (start.parameters, start.macs)
    )
