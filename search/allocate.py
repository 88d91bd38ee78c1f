"""Which method and which ranks for each site, so that the whole network meets a cost: torch-free.

The predicted loss is taken as separable: the sum over sites of the loss that each one's relative error brings alone
(``expected_rise``). That makes it a knapsack with one choice a site, over *all* methods' points, solved by dynamic
programming on a grid of costs fine enough (``GRID``) to lose little; a Lagrangian over convex hulls would do for convex
curves, but measured losses are not convex. What the grid leaves of the budget is filled with any point that still fits.

A group that may be decomposed together is one choice more: at each cost, the better of its members' own choices and of
one joint point for all of them. No layer is in two groups, so the program stays one pass over layers and groups.
"""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from search.errors import BadRequest
from search.spec import Cost, CurvePoint, Plan, SiteChoice, SitePlan

__all__ = ["allocate", "equal_rate", "expected_rise", "point_rise", "predicted"]

GRID = 2000
"""Cells of the cost grid, at least; 100 for each site where that is more."""


@dataclass(frozen=True)
class _Option:
    cost: float
    """A fraction of the network's dense cost."""
    loss: float
    plan: SitePlan | None
    """None: the dense layer."""


@dataclass
class _Block:
    """Sites that are chosen one by one, or all at once by their group."""

    names: list[str] = field(default_factory=list)
    own: list[list[_Option]] = field(default_factory=list)
    group: str = ""
    joint: list[_Option] = field(default_factory=list)

    @property
    def branches(self) -> list[list[list[_Option]]]:
        """Alternatives; each is a list of tables, of which each gives one option."""
        return [self.own, [self.joint]] if self.joint else [self.own]

    @property
    def least(self) -> float:
        """The cheapest that it can be."""
        return min(_cheapest(tables) for tables in self.branches)


def allocate(
    sites: Sequence[SiteChoice],
    target: float,
    *,
    groups: Sequence[SiteChoice] = (),
    cost: Mapping[Cost, float] | None = None,
    weights: Mapping[str, float] | None = None,
    methods: Collection[str] | None = None,
    cap: float | None = None,
    fixed_parameters: int = 0,
    fixed_macs: int = 0,
) -> Plan:
    """The plan of least predicted loss whose cost is at most ``target`` of the dense network's.

    Args:
        sites: the layers that can change, with their curves.
        groups: those of them that may be decomposed together; each layer is in one at most.
        target: fraction kept of the weighted cost of the *whole* network, (0, 1].
        cost: weight of each cost (default: parameters alone); each is counted relative to its dense total. Bytes
            count as parameters; latency, which only a measurement tells, counts as MACs.
        weights: multiplies a site's or a group's predicted loss; 1 where it is absent.
        methods: the methods allowed; None allows all.
        cap: largest relative error allowed at a site; its most exact point stays allowed.
        fixed_parameters, fixed_macs: of what cannot change.

    Returns:
        The plan, in which no layer is twice. Those that stay dense are absent. If even the smallest plan costs more
        than ``target``, that one.

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

    def table(site: SiteChoice, *, stays: bool) -> list[_Option]:
        factor = (weights or {}).get(site.site, 1.0)
        options = [_Option(price(site.dense_parameters, site.dense_macs), 0.0, None)] if stays else []
        for method, point in _points(site, methods, cap):
            plan = site.entry(method, point)
            options.append(_Option(price(point.parameters, point.macs), factor * point_rise(site, point), plan))
        return _undominated(options)

    blocks: dict[str, _Block] = {}
    group_of = {name: group for group in groups for name in group.members}
    for site in sites:
        group = group_of.get(site.site)
        if group is None:
            block = blocks[site.site] = _Block()
        elif group.site not in blocks:
            block = blocks[group.site] = _Block(group=group.site, joint=table(group, stays=False))
        else:
            block = blocks[group.site]
        block.names.append(site.site)
        block.own.append(table(site, stays=True))
    return _best(list(blocks.values()), target - price(fixed_parameters, fixed_macs))


def predicted(plan: Plan, sites: Sequence[SiteChoice], groups: Sequence[SiteChoice] = ()) -> tuple[int, int, float]:
    """``(parameters, macs, error)`` of a plan over ``sites``: error is the sum of the sites' expected rises.

    Raises:
        BadRequest: the plan names a point that is not on the sites' curves.
    """
    parameters = macs = 0
    error = 0.0
    joint = [group for group in groups if group.site in plan]
    taken = {name for group in joint for name in group.members}
    for site in (*(site for site in sites if site.site not in taken), *joint):
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
        error += point_rise(site, found[0])
    return parameters, macs, error


def point_rise(site: SiteChoice, point: CurvePoint) -> float:
    """Rise of the loss that a point brings: a group's is known, a layer's follows from its error."""
    return expected_rise(site, point.error) if point.rise is None else point.rise


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
        plan[site.site] = site.entry(method, best)
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
    """The points that may be used: those with fewer parameters than the dense layer and no more MACs.

    A look-up multiplies nothing, and any factors do: parameters are what they save.
    """
    points = [
        (method, p)
        for method, curve in site.curves.items()
        if methods is None or method in methods
        for p in curve
        if p.parameters < site.dense_parameters and (p.macs <= site.dense_macs or site.dense_macs == 0)
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


def _cheapest(tables: Sequence[Sequence[_Option]]) -> float:
    return sum(table[0].cost for table in tables)


def _best(blocks: Sequence[_Block], budget: float) -> Plan:
    """One option of each table of one branch of each block, least loss in all within the budget; the cheapest of each
    if even those are over it."""
    spare = budget - sum(block.least for block in blocks)
    if spare <= 0 or not blocks:
        return _plan([(block, min(block.branches, key=_cheapest)) for block in blocks], None)
    if sum(sum(t[-1].cost for t in block.own) - block.least for block in blocks) <= spare:
        exact = [(block, block.own) for block in blocks]
        return _plan(exact, [len(t) - 1 for _, tables in exact for t in tables])
    count = sum(len(block.own) for block in blocks)
    cells = max(GRID, 100 * count)

    def width(cost: float) -> int:
        return round(cost / spare * cells)  # to the nearest: an exact fit stays one

    least: NDArray[np.float64] = np.zeros(cells + 1)
    steps: list[_Step] = []
    for block in blocks:
        step = _Step([], np.zeros(cells + 1, np.int8))
        best = np.full(cells + 1, np.inf)
        for number, tables in enumerate(block.branches):
            # Costs in a table are above its cheapest; a branch is moved by what its cheapest is above the block's.
            moved = np.full(cells + 1, np.inf)
            offset = width(_cheapest(tables) - block.least)
            if offset <= cells:
                moved[offset:] = least[: cells + 1 - offset]
            after, picks = _through(tables, moved, width)
            step.branches.append((offset, picks))
            step.branch[after < best] = number
            best = np.minimum(best, after)
        least = best
        steps.append(step)
    for full in range(cells, -1, -1):  # a few cells down at most, where rounding hid an excess
        if not math.isfinite(least[full]):
            break
        chosen, at = _traced(blocks, steps, full, width)
        tables = [t for _, branch in chosen for t in branch]
        if sum(t[i].cost for t, i in zip(tables, at, strict=True)) <= budget + 1e-12:
            return _plan(chosen, _filled(tables, at, budget))
    return _plan([(block, min(block.branches, key=_cheapest)) for block in blocks], None)


@dataclass
class _Step:
    """How one block was passed: of each branch its offset and its tables' picks, and the better branch, by cell."""

    branches: list[tuple[int, list[NDArray[np.int32]]]]
    branch: NDArray[np.int8]


def _through(
    tables: Sequence[Sequence[_Option]], least: NDArray[np.float64], width: Callable[[float], int]
) -> tuple[NDArray[np.float64], list[NDArray[np.int32]]]:
    """The least loss by cell after some tables, and which option each took."""
    cells, picks = len(least) - 1, []
    for table in tables:
        after = least + table[0].loss
        pick = np.zeros(cells + 1, np.int32)
        for j in range(1, len(table)):
            w = width(table[j].cost - table[0].cost)
            if w > cells:
                break
            candidate = least[: cells + 1 - w] + table[j].loss
            better = candidate < after[w:]
            after[w:][better] = candidate[better]
            pick[w:][better] = j
        least = after
        picks.append(pick)
    return least, picks


_Chosen = list[tuple[_Block, list[list[_Option]]]]
"""Each block with the branch it takes."""


def _traced(
    blocks: Sequence[_Block], steps: Sequence[_Step], cell: int, width: Callable[[float], int]
) -> tuple[_Chosen, list[int]]:
    """Back from a cell: the branches taken, and the option of each of their tables."""
    chosen: _Chosen = []
    at: list[int] = []
    for block, step in zip(reversed(blocks), reversed(steps), strict=True):
        number = int(step.branch[cell])
        tables = block.branches[number]
        offset, picks = step.branches[number]
        for table, pick in zip(reversed(tables), reversed(picks), strict=True):
            option = int(pick[cell])
            at.append(option)
            cell -= width(table[option].cost - table[0].cost)
        cell -= offset
        chosen.append((block, tables))
    return chosen[::-1], at[::-1]


def _plan(chosen: _Chosen, at: Sequence[int] | None) -> Plan:
    """The plan of an option for each table; None: the first of each."""
    plan: Plan = {}
    options = iter([0] * sum(len(tables) for _, tables in chosen) if at is None else at)
    for block, tables in chosen:
        names = block.names if tables is block.own else [block.group]
        for name, table in zip(names, tables, strict=True):
            entry = table[next(options)].plan
            if entry is not None:
                plan[name] = entry
    return plan


def _filled(tables: Sequence[Sequence[_Option]], at: list[int], budget: float) -> list[int]:
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
            return at
        _, i, j = max(steps)
        spent, at[i] = spent + tables[i][j].cost - tables[i][at[i]].cost, j
