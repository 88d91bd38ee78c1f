"""Which method and which ranks for each site, so that the whole network meets a cost: torch-free.

The predicted loss is taken as separable: the sum over sites of weight * sensitivity * relative error. For a given
cost the best mix then lies on each site's lower convex hull over *all* methods' points (Lagrange multipliers);
walking all hulls' segments together in the order of their slopes visits those optima from cheap to dear. What is left
of the budget after the last segment that fits is filled with any point that fits, steepest first.
"""

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from search.errors import BadRequest
from search.spec import Cost, CurvePoint, Plan, SiteChoice, SitePlan

__all__ = ["allocate", "equal_rate", "predicted"]


@dataclass(frozen=True)
class _Option:
    cost: float
    """A fraction of the network's dense cost."""
    loss: float
    plan: SitePlan | None
    """None: the dense layer."""


def allocate(
    sites: Sequence[SiteChoice],
    target: float,
    *,
    cost: Mapping[Cost, float] | None = None,
    weights: Mapping[str, float] | None = None,
    methods: Collection[str] | None = None,
    cap: float | None = None,
    fixed_parameters: int = 0,
    fixed_macs: int = 0,
) -> Plan:
    """The plan of least predicted loss whose cost is at most ``target`` of the dense network's.

    Args:
        sites: what can change, with its curves.
        target: fraction kept of the weighted cost of the *whole* network, (0, 1].
        cost: weight of each cost (default: parameters alone); each is counted relative to its dense total. Bytes
            count as parameters; latency, which only a measurement tells, counts as MACs.
        weights: multiplies a site's predicted loss; 1 where it is absent.
        methods: the methods allowed; None allows all.
        cap: largest relative error allowed at a site; its most exact point stays allowed.
        fixed_parameters, fixed_macs: of what cannot change.

    Returns:
        The plan. Sites that stay dense are absent. If even the smallest plan costs more than ``target``, that one.

    Raises:
        BadRequest: ``target`` or the cost weights make no sense.
    """
    if not 0 < target <= 1:
        raise BadRequest("bad_target", f"the target is a fraction of the dense cost in (0, 1], got {target}")
    mix = _mix(cost)
    dense_parameters = fixed_parameters + sum(s.dense_parameters for s in sites)
    dense_macs = fixed_macs + sum(s.dense_macs for s in sites)

    def price(parameters: int, macs: int) -> float:
        return mix[0] * parameters / max(dense_parameters, 1) + mix[1] * macs / max(dense_macs, 1)

    tables = []
    for site in sites:
        factor = (weights or {}).get(site.site, 1.0) * site.sensitivity
        options = [_Option(price(site.dense_parameters, site.dense_macs), 0.0, None)]
        for method, point in _points(site, methods, cap):
            plan = SitePlan(method=method, ranks=point.ranks)
            options.append(_Option(price(point.parameters, point.macs), factor * point.error, plan))
        tables.append(_undominated(options))
    chosen = _walk(tables, target - price(fixed_parameters, fixed_macs))
    return {site.site: option.plan for site, option in zip(sites, chosen, strict=True) if option.plan is not None}


def predicted(plan: Plan, sites: Sequence[SiteChoice]) -> tuple[int, int, float]:
    """``(parameters, macs, error)`` of a plan over ``sites``: error is the sum of sensitivity * relative error.

    Raises:
        BadRequest: the plan names a point that is not on the sites' curves.
    """
    parameters = macs = 0
    error = 0.0
    for site in sites:
        entry = plan.get(site.site)
        if entry is None:
            parameters, macs = parameters + site.dense_parameters, macs + site.dense_macs
            continue
        found = [p for p in site.curves.get(entry.method, ()) if p.ranks == entry.ranks]
        if not found:
            raise BadRequest(
                "unknown_point", f"{site.site}: no point {entry.method} {entry.ranks} on its curves; profile it first"
            )
        parameters, macs = parameters + found[0].parameters, macs + found[0].macs
        error += site.sensitivity * found[0].error
    return parameters, macs, error


def equal_rate(sites: Sequence[SiteChoice], rate: float, method: str) -> Plan:
    """Every site at the largest point of ``method`` that keeps at most ``rate`` of its parameters, else the smallest.

    Sites that the method cannot make smaller are absent.
    """
    plan: Plan = {}
    for site in sites:
        points = site.curves.get(method, ())
        if not points:
            continue
        fitting = [p for p in points if p.parameters <= rate * site.dense_parameters]
        best = min(fitting, key=lambda p: p.error) if fitting else min(points, key=lambda p: p.parameters)
        plan[site.site] = SitePlan(method=method, ranks=best.ranks)
    return plan


def _mix(cost: Mapping[Cost, float] | None) -> tuple[float, float]:
    """Weights of parameters and MACs, adding up to one."""
    cost = {Cost.PARAMETERS: 1.0} if cost is None else cost
    if any(w < 0 or not math.isfinite(w) for w in cost.values()) or sum(cost.values()) <= 0:
        raise BadRequest("bad_cost_weights", f"cost weights must not be negative and one must count, got {dict(cost)}")
    parameters = cost.get(Cost.PARAMETERS, 0.0) + cost.get(Cost.BYTES, 0.0)
    macs = cost.get(Cost.MACS, 0.0) + cost.get(Cost.LATENCY, 0.0)
    return parameters / (parameters + macs), macs / (parameters + macs)


def _points(site: SiteChoice, methods: Collection[str] | None, cap: float | None) -> list[tuple[str, CurvePoint]]:
    """The points that may be used; none that fails to be strictly cheaper than the dense layer."""
    points = [
        (method, p)
        for method, curve in site.curves.items()
        if methods is None or method in methods
        for p in curve
        if p.parameters < site.dense_parameters and p.macs < site.dense_macs
    ]
    if cap is None or not points:
        return points
    least = min(p.error for _, p in points)
    return [(m, p) for m, p in points if p.error <= max(cap, least)]


def _undominated(options: Sequence[_Option]) -> list[_Option]:
    """Cheapest first, each better than all cheaper ones."""
    kept: list[_Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _hull(options: Sequence[_Option]) -> list[int]:
    """Indices of the lower convex hull of (cost, loss)."""
    hull: list[int] = []
    for i, c in enumerate(options):
        while len(hull) >= 2:
            a, b = options[hull[-2]], options[hull[-1]]
            if (b.loss - a.loss) * (c.cost - a.cost) < (c.loss - a.loss) * (b.cost - a.cost):
                break
            hull.pop()
        hull.append(i)
    return hull


def _walk(tables: Sequence[Sequence[_Option]], budget: float) -> list[_Option]:
    """Steepest hull segments first while they fit, then any single step that fits."""
    hulls = [_hull(t) for t in tables]
    at = [0] * len(tables)
    spent = sum(t[0].cost for t in tables)
    slack = 1e-12

    def slope(a: _Option, b: _Option) -> float:
        return (a.loss - b.loss) / max(b.cost - a.cost, 1e-300)

    queue = [(-slope(t[h[0]], t[h[1]]), i, 1) for i, (t, h) in enumerate(zip(tables, hulls, strict=True)) if len(h) > 1]
    heapq.heapify(queue)
    while queue:
        _, i, step = heapq.heappop(queue)
        table, hull = tables[i], hulls[i]
        extra = table[hull[step]].cost - table[at[i]].cost
        if spent + extra > budget + slack:
            continue
        spent, at[i] = spent + extra, hull[step]
        if step + 1 < len(hull):
            heapq.heappush(queue, (-slope(table[hull[step]], table[hull[step + 1]]), i, step + 1))
    while True:
        steps = [
            (slope(table[at[i]], table[j]), i, j)
            for i, table in enumerate(tables)
            for j in range(at[i] + 1, len(table))
            if spent + table[j].cost - table[at[i]].cost <= budget + slack
        ]
        if not steps:
            return [table[i] for table, i in zip(tables, at, strict=True)]
        _, i, j = max(steps)
        spent, at[i] = spent + tables[i][j].cost - tables[i][at[i]].cost, j
