"""The life of a job, driven against a synthetic network: it always ends, once, with the right outcome."""

import json

import pytest

from benchmarks.simulator import Life, Surface, live
from search.finish import finish
from search.front import is_cheaper
from search.spec import (
    Budget,
    Cost,
    Costs,
    ExportWork,
    FineTune,
    Finished,
    JobSpec,
    Layers,
    Metric,
    Outcome,
    Profile,
    ProfileWork,
    RefineWork,
    Rung,
    Sampler,
    SearchSpec,
    SitePlan,
    Space,
    TrialRecord,
    TrialState,
    TrialWork,
)
from search.stages import next_work
from search.study import plan_key


def job(trials: int = 16, *, max_drop: float = 0.005, epochs: float = 10.0, **search: object) -> JobSpec:
    return JobSpec.model_validate(
        {
            "budget": Budget(max_drop=max_drop),
            "fine_tune": FineTune(epochs=epochs),
            "search": SearchSpec.model_validate({"trials": trials, **search}),
        }
    )


def small(seed: int = 0, **options: float) -> Surface:
    return Surface(seed, blocks=3, **options)  # type: ignore[arg-type]


def ended(life: Life) -> Finished:
    assert len(life.finished) == 1
    assert not any(r.state in (TrialState.QUEUED, TrialState.RUNNING) for r in life.records)
    return life.finished[0]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_job_ends_once_with_a_verified_smaller_network(workers: int) -> None:
    surface = small()
    life = live(job(), surface, workers=workers)
    finished = ended(life)
    assert (finished.ok, finished.code) == (True, "kept_budget")
    assert finished.best is not None
    best = life.history[finished.best]
    assert best.results[Rung.FULL].keeps_budget
    assert best.results[Rung.FULL].costs.parameters < surface.profile(0).costs.parameters
    assert life.exported == [finished.best]
    assert len(life.records) <= 16
    kinds = [type(work) for work in life.asked]
    assert kinds[0] is ProfileWork
    assert kinds.index(RefineWork) > max(i for i, kind in enumerate(kinds) if kind is TrialWork)
    assert kinds[-2:] == [ExportWork, Finished]


@pytest.mark.parametrize("seed", range(6))
def test_a_job_ends_although_tasks_fail_at_random(seed: int) -> None:
    life = live(job(12, stages=1 + seed % 3), small(seed), workers=3, seed=seed, failing=0.3)
    assert ended(life).code in {"kept_budget", "budget_not_kept"}


def test_a_job_whose_every_task_fails_says_so() -> None:
    life = live(job(), small(), failing=1.0)
    finished = ended(life)
    assert (finished.ok, finished.code) == (False, "every_trial_failed")
    assert len(life.records) < 16  # it does not burn all trials on it


def test_non_finite_candidates_are_reported_as_what_they_are() -> None:
    finished = ended(live(job(8), small(), breaks=lambda record, rung: Outcome.NON_FINITE))
    assert finished.code == "every_trial_failed"
    assert "non-finite" in finished.reason


def test_an_orphan_that_still_looks_alive_does_not_stall_the_job() -> None:
    life = live(job(8), small())
    orphan = life.records[-1].model_copy(update={"state": TrialState.RUNNING, "rung": Rung.CHEAP, "results": {}})
    history = [*life.records[:-1], orphan]
    works = next_work(job(8), life.profiles, history, running=0, k=2, elapsed_hours=0.0, exported=life.exported)
    assert works


def test_the_budget_that_nothing_keeps_ends_with_advice_after_three_checks() -> None:
    surface = small(max_drop=0.005)
    unlucky = {Rung.FULL}
    original = surface.result

    def result(spec, plan, rung, params, epochs):  # type: ignore[no-untyped-def]
        found = original(spec, plan, rung, params, epochs)
        return found.model_copy(update={"keeps_budget": False, "verify_drop": 0.009}) if rung in unlucky else found

    surface.result = result  # type: ignore[method-assign]
    life = live(job(), surface)
    finished = ended(life)
    assert (finished.ok, finished.code, finished.best) == (False, "budget_not_kept", None)
    checked = [r for r in life.records if Rung.FULL in r.results]
    assert len(checked) == 3
    assert all(f"trial {r.number} " in finished.reason for r in checked)
    assert "max_drop" in finished.reason
    assert not life.exported


def test_each_further_check_is_of_a_safer_candidate() -> None:
    surface = small(max_drop=0.005)
    original = surface.result

    def result(spec, plan, rung, params, epochs):  # type: ignore[no-untyped-def]
        found = original(spec, plan, rung, params, epochs)
        short_of = {"keeps_budget": False, "verify_drop": (found.drop or 0) + 0.006}
        return found.model_copy(update=short_of) if rung is Rung.FULL else found

    surface.result = result  # type: ignore[method-assign]
    life = live(job(), surface, workers=1)
    refined = [w.number for w in life.asked if isinstance(w, RefineWork)]
    drops = [life.history[n].results[Rung.FULL].drop or 0.0 for n in refined]
    assert len(refined) > 1
    assert all(later < drops[0] for later in drops[1:])


def test_a_growing_network_is_never_handed_back() -> None:
    surface = small()
    dense = surface.profile(0).costs
    original = surface.result

    def result(spec, plan, rung, params, epochs):  # type: ignore[no-untyped-def]
        slow = surface.costs(plan).model_copy(update={"latency_ms": 2.0, "dense_latency_ms": 1.0})
        return original(spec, plan, rung, params, epochs).model_copy(update={"costs": slow})

    surface.result = result  # type: ignore[method-assign]
    spec = job().model_copy(update={"minimize": (Cost.PARAMETERS, Cost.LATENCY)})
    life = live(spec, surface)
    assert ended(life).code == "nothing_smaller"
    assert not any(is_cheaper(r.results[Rung.CHEAP].costs, dense, spec.minimize) for r in life.records)


def test_a_network_without_compressible_layers_ends_at_once() -> None:
    surface = small()
    spec = job().model_copy(update={"layers": Layers(exclude=("layer.*",))})
    life = live(spec, surface)
    finished = ended(life)
    assert (finished.ok, finished.code) == (False, "no_compressible_layer")
    assert "layer.*" in finished.reason
    assert [type(w) for w in life.asked] == [ProfileWork, Finished]


def test_without_fine_tuning_there_is_no_short_rung_and_one_stage() -> None:
    life = live(job(epochs=0.0, stages=3, max_drop=0.03), small(max_drop=0.03))
    assert ended(life).code == "kept_budget"
    assert not any(Rung.SHORT in r.results for r in life.records)
    assert {r.stage for r in life.records} == {0}


def test_stages_start_from_a_fine_tuned_network_that_keeps_the_budget_and_only_shrink() -> None:
    surface = small(1)
    life = live(job(24, stages=3), surface, workers=2)
    ended(life)
    profiles = [w for w in life.asked if isinstance(w, ProfileWork)]
    assert [w.stage for w in profiles] == [0, 1, 2]
    assert len(life.records) == 24
    for work in profiles[1:]:
        assert work.parent is not None
        parent = life.history[work.parent]
        assert Rung.SHORT in parent.results
        children = [r for r in life.records if r.stage == work.stage]
        assert {r.parent for r in children} == {work.parent}
        for child in children:
            assert set(child.plan) >= set(parent.plan)
            assert surface.costs(child.plan).parameters < surface.costs(parent.plan).parameters


def test_hours_end_the_search_but_not_the_check_and_the_files() -> None:
    spec = job(1000, hours=1.0)
    life = live(spec, small(), workers=2)
    assert ended(life).code == "kept_budget"
    assert 3 <= len(life.records) < 60


@pytest.mark.parametrize(
    ("elapsed", "code", "says"),
    [(1.5, "nothing_tried", "Give it more hours"), (0.5, "nothing_smaller", "No plan makes")],
)
def test_a_job_without_candidates_tells_whether_time_or_plans_were_missing(
    elapsed: float, code: str, says: str
) -> None:
    spec, profile = job(8, hours=1.0), small().profile(0)
    (finished,) = finish(spec, profile, [], running=0, k=1, elapsed_hours=elapsed, exported=[])
    assert isinstance(finished, Finished)
    assert (finished.ok, finished.code) == (False, code)
    assert says in finished.reason


def test_an_extended_job_tries_more_and_ends_again() -> None:
    surface = small()
    life = live(job(8), surface)
    first = len(life.records)
    ended(life)
    life.finished.clear()
    live(job(20), surface, life=life, seed=1)
    assert ended(life).ok
    assert len(life.records) > first + 5


@pytest.mark.parametrize("seed", [0, 11])
def test_an_extension_takes_no_refined_network_back_to_a_lower_rung(seed: int) -> None:
    surface = small(seed, max_drop=0.02)
    life = live(job(8, max_drop=0.02), surface, seed=seed)
    refined = [r.number for r in life.records if Rung.FULL in r.results]
    assert any(Rung.SHORT not in life.history[number].results for number in refined)
    life.finished.clear()
    live(job(60, max_drop=0.02), surface, life=life, seed=seed + 1)
    assert all(life.history[number].rung is Rung.FULL for number in refined)
    assert ended(life).ok


def test_more_of_nothing_new_stops_when_the_space_is_exhausted() -> None:
    surface = Surface(0, blocks=1)
    spec = job(500, epochs=0.0, max_drop=0.5).model_copy(
        update={"methods": ("svd",), "layers": Layers(exclude=("layer.1.*",))}
    )
    life = live(spec, surface)
    ended(life)
    assert len(life.records) <= len(surface.profile(0).sites[0].curves["svd"])


def test_no_plan_is_tried_twice_and_fixed_sites_are_in_all() -> None:
    fixed = {"layer.0.conv": SitePlan(method="svd", ranks=(4,))}
    spec = job(20).model_copy(update={"layers": Layers(fixed=fixed)})
    life = live(spec, small())
    keys = [plan_key(r.plan) for r in life.records]
    assert len(set(keys)) == len(keys)
    assert all(r.plan["layer.0.conv"] == fixed["layer.0.conv"] for r in life.records)


def test_a_lost_profile_of_a_later_stage_does_not_stop_the_job() -> None:
    spec = job(12, stages=2)
    life = live(spec, small())
    first = [r for r in life.records if r.stage == 0]
    stage0 = [
        r.model_copy(
            update={
                "rung": Rung.SHORT if Rung.SHORT in r.results else Rung.CHEAP,
                "results": {rung: x for rung, x in r.results.items() if rung is not Rung.FULL},
            }
        )
        for r in first
    ]
    works = next_work(
        spec, life.profiles[:1], stage0, running=0, k=2, elapsed_hours=0.0, exported=[], failed_profiles=[1]
    )
    assert works
    assert not any(isinstance(w, ProfileWork) for w in works)


def test_the_same_rows_give_the_same_work_also_after_a_round_trip_through_json() -> None:
    spec = job(14)
    life = live(spec, small(), workers=3)
    for n in (3, 7, len(life.records)):
        rows = json.loads(json.dumps([r.model_dump(mode="json") for r in life.records[:n]]))
        again = [TrialRecord.model_validate(row) for row in reversed(rows)]
        profiles = [Profile.model_validate(p.model_dump(mode="json")) for p in life.profiles]
        ask = {"running": 1, "k": 3, "elapsed_hours": 0.0, "exported": []}
        assert (
            next_work(spec, profiles, again, **ask)
            == next_work(  # type: ignore[arg-type]
                spec,
                life.profiles,
                life.records[:n],
                **ask,  # type: ignore[arg-type]
            )
        )


@pytest.mark.parametrize("sampler", list(Sampler))
@pytest.mark.parametrize("space", list(Space))
def test_every_sampler_and_space_carries_a_job_to_its_end(sampler: Sampler, space: Space) -> None:
    trials = 9 if sampler is Sampler.GP else 20
    life = live(job(trials, sampler=sampler, space=space), small())
    assert ended(life).code == "kept_budget"
    assert len(life.records) == trials


def test_several_costs_are_minimized_together() -> None:
    spec = job(20).model_copy(update={"minimize": (Cost.PARAMETERS, Cost.MACS)})
    surface = small()
    finished = ended(live(spec, surface))
    assert finished.ok
    assert "parameters" in finished.reason
    assert "macs" in finished.reason


def test_nothing_is_asked_without_a_free_place_or_before_the_first_profile_is_measured() -> None:
    ask = {"elapsed_hours": 0.0, "exported": []}
    assert next_work(job(), [], [], running=0, k=0, **ask) == []  # type: ignore[arg-type]
    assert next_work(job(), [], [], running=1, k=1, **ask) == []  # type: ignore[arg-type]
    assert next_work(job(), [], [], running=0, k=1, **ask) == [ProfileWork(stage=0, parent=None)]  # type: ignore[arg-type]


def test_a_confidence_makes_the_check_stricter() -> None:
    surface = small(noise=0.002)
    plain, strict = job(), job().model_copy(update={"budget": Budget(max_drop=0.005, confidence=0.95)})
    a, b = live(plain, surface), live(strict, surface)
    assert a.finished[0].ok
    if b.finished[0].ok:
        best = b.history[b.finished[0].best or 0].results[Rung.FULL]
        assert best.verify_interval is not None
        assert best.verify_interval.high <= 0.005


@pytest.mark.parametrize(
    ("metric", "select", "verify", "wanted", "allowed"),
    [
        (Metric.ACCURACY, 0.917, 0.905, 0.895, 0.01),
        (Metric.MSE, 2.0, 2.2, 2.222, 0.01),
        (Metric.OUTPUT_ERROR, 0.0, 0.0, 0.01, 0.01),
    ],
)
def test_a_value_to_keep_is_another_drop_on_the_verify_split(
    metric: Metric, select: float, verify: float, wanted: float, allowed: float
) -> None:
    surface = small(max_drop=0.022)
    spec = job().model_copy(update={"budget": Budget(metric=metric, min_value=wanted)})
    profile, result = surface.profile, surface.result

    def profiled(stage: int) -> Profile:
        return profile(stage).model_copy(update={"metric": metric, "value": select, "verify_value": verify})

    def checked(spec, plan, rung, params, epochs):  # type: ignore[no-untyped-def]
        found = result(spec, plan, rung, params, epochs)
        keeps = None if found.verify_drop is None else found.verify_drop <= allowed
        return found.model_copy(update={"keeps_budget": keeps})

    surface.profile, surface.result = profiled, checked  # type: ignore[method-assign]
    life = live(spec, surface)
    assert ended(life).ok
    assert f"where {allowed:.4f} is allowed" in ended(life).reason
    refined = [w.number for w in life.asked if isinstance(w, RefineWork)]
    assert (
        max(life.history[n].results[Rung.FULL].verify_drop or 0.0 for n in refined) < 0.018
    )  # a drop of 0.022 is what the select split would allow


def test_costs_of_the_original_are_what_shares_refer_to() -> None:
    dense = Costs(parameters=100, macs=100, bytes=400)
    assert is_cheaper(dense.model_copy(update={"parameters": 99}), dense, (Cost.PARAMETERS,))
    assert not is_cheaper(dense, dense, (Cost.PARAMETERS,))
