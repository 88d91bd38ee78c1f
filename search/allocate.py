"""Which method and which ranks for each site, so that the whole network meets a cost: torch-free.

The predicted loss is taken as separable: the sum over sites of the loss that each one's relative error brings alone
(``expected_rise``). That makes it a knapsack with one choice a site, over *all* methods' points, solved by dynamic
programming on a grid of costs fine enough (``GRID``) to lose little; a Lagrangian over convex hulls would do for convex
curves, but measured losses are not convex. What the grid leaves of the budget is filled with any point that still fits.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.errors import BadRequest
from search.spec import Cost, CurvePoint, Plan, SiteChoice, SitePlan

__all__ = ["allocate", "equal_rate", "expected_rise", "predicted"]

GRID = 2000
"""Cells of the cost grid, at least; 100 for each site where that is more."""


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
        factor = (weights or {}).get(site.site, 1.0)
        options = [_Option(price(site.dense_parameters, site.dense_macs), 0.0, None)]
        for method, point in _points(site, methods, cap):
            plan = SitePlan(method=method, ranks=point.ranks)
            options.append(
                _Option(price(point.parameters, point.macs), factor * expected_rise(site, point.error), plan)
            )
        tables.append(_undominated(options))
    chosen = _best(tables, target - price(fixed_parameters, fixed_macs))
    return {site.site: option.plan for site, option in zip(sites, chosen, strict=True) if option.plan is not None}


def predicted(plan: Plan, sites: Sequence[SiteChoice]) -> tuple[int, int, float]:
    """``(parameters, macs, error)`` of a plan over ``sites``: error is the sum of the sites' expected rises.

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
        error += expected_rise(site, found[0].error)
    return parameters, macs, error


def expected_rise(site: SiteChoice, error: float) -> float:
    """Rise of the loss when this site alone has a relative output error of ``error``.

    The loss of a trained network rises faster than the error (about as its square, where it was measured), at each
    layer from another point on; so it is read off the measured points, along straight lines in logarithms, and goes on
    beyond them in proportion below and with the last slope above. Without such points it is proportional.
    """
    knots = [(e, r) for e, r in site.rises if e > 0 and r > 0]
    if not knots or error <= 0:
        return site.sensitivity * max(error, 0.0)
    if error <= knots[0][0]:
        return min(knots[0][1] * error / knots[0][0], knots[0][1])
    steepest = 1.0
    for (e0, r0), (e1, r1) in itertools.pairwise(knots):
        # A measured rise may fall by chance; the expected one does not.
        steepest = max(math.log(max(r1 / r0, 1.0)) / math.log(e1 / e0), 0.0) if e1 > e0 else steepest
        if error <= e1:
            return min(r0 * math.exp(steepest * math.log(error / e0)), max(r0, r1))
    return knots[-1][1] * math.exp(max(steepest, 1.0) * math.log(error / knots[-1][0]))


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
    """The points that may be used: those with fewer parameters than the dense layer and no more MACs."""
    points = [
        (method, p)
        for method, curve in site.curves.items()
        if methods is None or method in methods
        for p in curve
        if p.parameters < site.dense_parameters and p.macs <= site.dense_macs
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


def _best(tables: Sequence[Sequence[_Option]], budget: float) -> list[_Option]:
    """One option of each table, least loss in all within the budget; the cheapest of each if that is over it."""
    spare = budget - sum(t[0].cost for t in tables)
    if spare <= 0 or not tables:
        return [t[0] for t in tables]
    if sum(t[-1].cost - t[0].cost for t in tables) <= spare:
        return [t[-1] for t in tables]
    cells = max(GRID, 100 * len(tables))
    # Costs above each table's cheapest, in cells, to the nearest: an exact fit stays one.
    extra = [[round((o.cost - t[0].cost) / spare * cells) for o in t] for t in tables]
    least: NDArray[np.float64] = np.zeros(cells + 1)
    picks: list[NDArray[np.int32]] = []
    for table, widths in zip(tables, extra, strict=True):
        after = least + table[0].loss
        pick = np.zeros(cells + 1, np.int32)
        for j in range(1, len(table)):
            w = widths[j]
            if w > cells:
                break
            candidate = least[: cells + 1 - w] + table[j].loss
            better = candidate < after[w:]
            after[w:][better] = candidate[better]
            pick[w:][better] = j
        least = after
        picks.append(pick)
    for full in range(cells, -1, -1):  # a few cells down at most, where rounding hid an excess
        at, cell = [0] * len(tables), full
        for i in reversed(range(len(tables))):
            at[i] = int(picks[i][cell])
            cell -= extra[i][at[i]]
        if sum(t[i].cost for t, i in zip(tables, at, strict=True)) <= budget + 1e-12:
            break
    return _filled(tables, at, budget)


def _filled(tables: Sequence[Sequence[_Option]], at: list[int], budget: float) -> list[_Option]:
    """Spend what is left on single steps to better points, the one that helps most for its cost first."""
    spent = sum(t[i].cost for t, i in zip(tables, at, strict=True))
    while True:
        steps = [
            ((table[at[i]].loss - table[j].loss) / (table[j].cost - table[at[i]].cost), i, j)
            for i, table in enumerate(tables)
            for j in range(at[i] + 1, len(table))
            if spent + table[j].cost - table[at[i]].cost <= budget + 1e-12
        ]
        if not steps:
            return [table[i] for table, i in zip(tables, at, strict=True)]
        _, i, j = max(steps)
        spent, at[i] = spent + tables[i][j].cost - tables[i][at[i]].cost, j
