"""Fronts, hypervolume and predictions against oracles and properties."""

import random

import pytest

from benchmarks.simulator import Surface
from search.front import front, hypervolume, improvement, is_cheaper, measured
from search.pace import planned_epochs
from search.predict import Predictor
from search.spec import (
    Budget,
    Cost,
    Costs,
    JobSpec,
    Outcome,
    Rung,
    SitePlan,
    TrialRecord,
    TrialResult,
    TrialState,
)
from search.study import next_trials


def row(number: int, drop: float | None, parameters: int, rung: Rung = Rung.CHEAP, macs: int = 50) -> TrialRecord:
    result = TrialResult(
        rung=rung,
        outcome=Outcome.OK if drop is not None else Outcome.NON_FINITE,
        value=None if drop is None else 0.9 - drop,
        drop=drop,
        costs=Costs(parameters=parameters, macs=macs, bytes=4 * parameters),
        seconds=1.0,
    )
    return TrialRecord(
        number=number,
        stage=0,
        parent=None,
        params={},
        plan={"a": SitePlan(method="svd", ranks=(number + 1,))},
        state=TrialState.DONE,
        rung=rung,
        results={rung: result},
    )


def test_the_front_keeps_what_nothing_beats_cheapest_first() -> None:
    history = [
        row(0, 0.01, 50),
        row(1, 0.02, 50),
        row(2, 0.005, 60),
        row(3, None, 10),
        row(4, 0.3, 20),
        row(5, 0.01, 50),
    ]
    assert [r.number for r in front(history, [Cost.PARAMETERS])] == [4, 0, 2]


def test_the_front_leaves_out_what_grew_when_it_knows_the_original() -> None:
    dense = Costs(parameters=55, macs=100, bytes=220)
    history = [row(0, 0.01, 50), row(1, 0.001, 60)]
    assert [r.number for r in front(history, [Cost.PARAMETERS], dense=dense)] == [0]


@pytest.mark.parametrize(("latency_ms", "cheaper"), [(9.7, False), (9.1, False), (8.9, True)])
def test_a_latency_counts_as_lower_only_by_more_than_chance_explains(latency_ms: float, cheaper: bool) -> None:
    dense = Costs(parameters=50, macs=100, bytes=200)
    costs = dense.model_copy(update={"latency_ms": latency_ms, "dense_latency_ms": 10.0, "latency_noise": 0.05})
    assert is_cheaper(costs, dense, [Cost.LATENCY]) is cheaper


def test_the_highest_usable_rung_is_what_counts() -> None:
    record = row(0, 0.3, 50)
    failed = record.results[Rung.CHEAP].model_copy(update={"rung": Rung.FULL, "outcome": Outcome.OUT_OF_MEMORY})
    short = record.results[Rung.CHEAP].model_copy(update={"rung": Rung.SHORT, "drop": 0.1})
    record = record.model_copy(update={"results": {**record.results, Rung.SHORT: short, Rung.FULL: failed}})
    best = measured(record)
    assert best is not None
    assert best.drop == 0.1


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_hypervolume_agrees_with_counting_random_points(dimensions: int) -> None:
    chance = random.Random(dimensions)
    points = [tuple(chance.random() for _ in range(dimensions)) for _ in range(8)]
    samples = [tuple(chance.random() for _ in range(dimensions)) for _ in range(20_000)]
    hit = sum(any(all(p <= s for p, s in zip(point, sample, strict=True)) for point in points) for sample in samples)
    assert hypervolume(points, (1.0,) * dimensions) == pytest.approx(hit / len(samples), abs=0.015)


def test_improvement_is_what_the_hypervolume_grows_by() -> None:
    points = [(0.2, 0.8), (0.6, 0.3)]
    assert improvement((0.4, 0.5), points, (1.0, 1.0)) == pytest.approx((0.6 - 0.4) * (0.8 - 0.5))
    assert improvement((0.7, 0.9), points, (1.0, 1.0)) == 0.0


SPEC = JobSpec(budget=Budget(max_drop=0.005))


def test_nothing_promoted_still_gives_a_sensible_prediction() -> None:
    surface = Surface(0)
    predictor = Predictor(SPEC, surface.profile(0), [])
    quarter, half = surface.profile(0).costs.parameters // 4, surface.profile(0).costs.parameters // 2
    macs = surface.profile(0).costs.macs
    near = predictor.final(row(0, 0.02, half, macs=macs // 2))
    far = predictor.final(row(1, 0.25, quarter, macs=macs // 4))
    lost = predictor.final(row(2, 0.75, quarter // 4, macs=macs // 16))
    assert near is not None
    assert far is not None
    assert lost is not None
    assert near.mean < far.mean < lost.mean < 0.75
    assert far.mean < 0.25
    assert near.std < far.std < lost.std
    assert near.chance(0.005) > far.chance(0.005) > lost.chance(0.005)


def test_promoted_trials_sharpen_the_predictions() -> None:
    surface = Surface(0)
    profile = surface.profile(0)
    history: list[TrialRecord] = []
    for work in next_trials(SPEC, profile, [], 10):
        results = {
            rung: surface.result(SPEC, work.plan, rung, work.params, epochs)
            for rung, epochs in ((Rung.CHEAP, 0), (Rung.SHORT, 1))
        }
        values = work.model_dump(exclude={"kind", "epochs"}) | {
            "state": TrialState.DONE,
            "rung": Rung.SHORT,
            "results": results,
        }
        history.append(TrialRecord.model_validate(values))
    cheap = [r.model_copy(update={"results": {Rung.CHEAP: r.results[Rung.CHEAP]}, "rung": Rung.CHEAP}) for r in history]

    def wrong(learnt: list[TrialRecord], asked: list[TrialRecord]) -> float:
        predictor = Predictor(SPEC, profile, learnt)
        total = 0.0
        for r in asked:
            final = predictor.final(r)
            assert final is not None
            total += abs(final.mean - surface.drop(r.plan, planned_epochs(SPEC, profile)))
        return total

    near = [r for r in cheap[6:] if (r.results[Rung.CHEAP].drop or 0.0) < 0.3]  # where the budget decides
    assert wrong(history[:6], near) < wrong([], near)


def test_without_training_the_measurement_is_the_prediction() -> None:
    spec = SPEC.model_copy(update={"fine_tune": SPEC.fine_tune.model_copy(update={"epochs": 0.0})})
    final = Predictor(spec, Surface(0).profile(0), []).final(row(0, 0.0123, 50))
    assert final is not None
    assert (final.mean, final.std) == (0.0123, 0.0)
