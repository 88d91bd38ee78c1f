import itertools

import pytest

from search.allocate import allocate, equal_rate, predicted
from search.errors import BadRequest
from search.spec import Cost, CurvePoint, SiteChoice, SitePlan


def site(
    name: str, steepness: float, *, dense: int = 1000, method: str = "svd", sensitivity: float = 1.0
) -> SiteChoice:
    points = tuple(
        CurvePoint(ranks=(r,), parameters=r * dense // 10, macs=r * dense, error=2.0 ** (-steepness * r))
        for r in range(1, 10)
    )
    return SiteChoice(
        site=name,
        dense_parameters=dense,
        dense_macs=10 * dense,
        curves={method: points},
        sensitivity=sensitivity,
    )


def cost_of(plan: dict[str, SitePlan], sites: list[SiteChoice]) -> float:
    return predicted(plan, sites)[0] / sum(s.dense_parameters for s in sites)


def test_the_target_is_met_and_nearly_used_up() -> None:
    sites = [site(f"s{i}", 0.2 + 0.1 * i, dense=900 + 37 * i) for i in range(12)]
    for target in (0.2, 0.35, 0.5, 0.8):
        kept = cost_of(allocate(sites, target), sites)
        assert target - 0.02 < kept <= target + 1e-9


def test_it_is_as_good_as_trying_every_combination() -> None:
    sites = [site("a", 0.3), site("b", 0.9, sensitivity=3.0), site("c", 0.5, dense=600)]
    options = [[None, *s.curves["svd"]] for s in sites]
    budget = 0.5 * sum(s.dense_parameters for s in sites)
    best = min(
        sum(0.0 if p is None else s.sensitivity * p.error for s, p in zip(sites, combination, strict=True))
        for combination in itertools.product(*options)
        if sum(s.dense_parameters if p is None else p.parameters for s, p in zip(sites, combination, strict=True))
        <= budget
    )
    assert predicted(allocate(sites, 0.5), sites)[2] <= 1.0001 * best


def test_a_sensitive_site_keeps_more() -> None:
    sites = [site("a", 0.4), site("b", 0.4)]
    plan = allocate(sites, 0.5, weights={"b": 50.0})
    assert "b" not in plan or plan["b"].ranks > plan["a"].ranks


def test_the_better_method_is_taken_site_by_site() -> None:
    better = site("a", 0.9, method="tucker2").curves["tucker2"]
    a = site("a", 0.3).model_copy(update={"curves": {"svd": site("a", 0.3).curves["svd"], "tucker2": better}})
    plan = allocate([a, site("b", 0.5)], 0.4)
    assert plan["a"].method == "tucker2"
    assert plan["b"].method == "svd"
    assert allocate([a, site("b", 0.5)], 0.4, methods={"svd"})["a"].method == "svd"


def test_a_look_up_is_replaced_for_its_parameters_though_factors_multiply() -> None:
    embedding = site("embed", 0.5).model_copy(update={"dense_macs": 0})
    assert "embed" in allocate([embedding, site("b", 0.5)], 0.3)


def test_what_cannot_change_counts_toward_the_target() -> None:
    sites = [site("a", 0.4), site("b", 0.4)]
    plan = allocate(sites, 0.5, fixed_parameters=500)
    assert predicted(plan, sites)[0] + 500 <= 0.5 * 2500


def test_several_costs_are_weighed_together() -> None:
    sites = [site("a", 0.4), site("b", 0.4)]
    plan = allocate(sites, 0.5, cost={Cost.PARAMETERS: 1.0, Cost.MACS: 3.0})
    parameters, macs, _ = predicted(plan, sites)
    assert 0.25 * parameters / 2000 + 0.75 * macs / 20000 <= 0.5 + 1e-9


def test_points_that_grow_a_cost_are_never_used() -> None:
    grown = CurvePoint(ranks=(99,), parameters=10, macs=10_001, error=0.0)
    a = SiteChoice(site="a", dense_parameters=1000, dense_macs=10_000, curves={"svd": (grown,)})
    assert allocate([a], 0.5) == {}


def test_a_cap_keeps_poor_points_out_but_not_the_best_one() -> None:
    sites = [site("a", 0.4), site("b", 0.4)]
    plan = allocate(sites, 0.05, cap=0.3)
    assert all(p.error <= 0.3 for s in sites for p in s.curves["svd"] if p.ranks == plan[s.site].ranks)


def test_an_unreachable_target_gives_the_smallest_plan() -> None:
    sites = [site("a", 0.4), site("b", 0.4)]
    assert all(entry.ranks == (1,) for entry in allocate(sites, 0.01).values())


def test_keeping_everything_changes_nothing() -> None:
    assert allocate([site("a", 0.4)], 1.0) == {}


@pytest.mark.parametrize("target", [0.0, 1.5, -1.0])
def test_a_senseless_target_is_refused(target: float) -> None:
    with pytest.raises(BadRequest, match=str(target)):
        allocate([site("a", 0.4)], target)


def test_equal_rate_keeps_the_rate_at_every_site() -> None:
    sites = [site("a", 0.4), site("b", 0.9, dense=500), site("c", 0.4, method="tucker2")]
    plan = equal_rate(sites, 0.55, "svd")
    assert plan["a"].ranks == plan["b"].ranks == (5,)
    assert "c" not in plan


def test_a_point_off_the_curve_cannot_be_predicted() -> None:
    with pytest.raises(BadRequest, match=r"svd \(77,\)"):
        predicted({"a": SitePlan(method="svd", ranks=(77,))}, [site("a", 0.4)])


def group(name: str, members: list[SiteChoice], rises: list[float]) -> SiteChoice:
    """Joint points whose costs are shares of the members' together."""
    dense = sum(s.dense_parameters for s in members)
    points = tuple(
        CurvePoint(ranks=(r, r), parameters=r * dense // 8, macs=r * dense, error=0.5, errors=(0.5, 0.5), rise=rise)
        for r, rise in enumerate(rises, start=1)
    )
    return SiteChoice(
        site=name,
        members={s.site: (i,) for i, s in enumerate(members)},
        dense_parameters=dense,
        dense_macs=10 * dense,
        curves={"joint": points},
    )


def test_layers_are_taken_together_only_where_that_is_better_as_every_combination_shows() -> None:
    sites = [site(name, steepness) for name, steepness in zip("abcde", (0.2, 0.5, 0.9, 0.4, 0.3), strict=True)]
    groups = [group("ab", sites[:2], [0.9, 0.4, 0.3]), group("ce", [sites[2], sites[4]], [1.1, 0.6, 0.05])]
    taken: set[str] = set()
    for target in (0.12, 0.2, 0.3, 0.45, 0.7):
        best = float("inf")
        for joint in itertools.product((False, True), repeat=2):
            used = [g for g, yes in zip(groups, joint, strict=True) if yes]
            members = {name for g in used for name in g.members}
            free = [s for s in sites if s.site not in members]
            for chosen in itertools.product(*(g.curves["joint"] for g in used)):
                left = target * 5000 - sum(p.parameters for p in chosen)
                for own in itertools.product(*([None, *s.curves["svd"][::2]] for s in free)):
                    spent = sum(
                        s.dense_parameters if p is None else p.parameters for s, p in zip(free, own, strict=True)
                    )
                    if spent <= left:
                        rises = [p.rise or 0.0 for p in chosen] + [p.error for p in own if p is not None]
                        best = min(best, sum(rises))
        plan = allocate(sites, target, groups=groups)
        parameters, _, loss = predicted(plan, sites, groups)
        assert parameters <= target * 5000
        assert loss <= 1.0001 * best
        for g in groups:
            assert g.site not in plan or not plan.keys() & g.members.keys()
            assert g.site not in plan or plan[g.site].members == g.members
        taken |= plan.keys()
    assert {"ab", "b", "ce", "c"} <= taken  # each way is the better one somewhere


def test_a_group_weighs_and_is_forbidden_like_any_site() -> None:
    sites = [site("a", 0.2), site("b", 0.2)]
    groups = [group("ab", sites, [0.2])]
    assert "ab" in allocate(sites, 0.3, groups=groups)
    assert "ab" not in allocate(sites, 0.3, groups=groups, weights={"ab": 50.0})
    assert "ab" not in allocate(sites, 0.3, groups=groups, methods={"svd"})
    assert "ab" in equal_rate([*sites, *groups], 0.3, "joint")
