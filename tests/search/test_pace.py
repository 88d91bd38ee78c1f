"""How long each rung trains, as asked or as the hours allow."""

import pytest

from benchmarks.simulator import Surface, live
from search.pace import epoch_seconds, full_epochs, out_of_time, planned_epochs, short_epochs
from search.promote import has_short_rung
from search.spec import Budget, FineTune, JobSpec, Profile, RefineWork, Rung, SearchSpec, TrialWork

AUTO = FineTune()


def job(hours: float | None, recipe: FineTune = AUTO, trials: int = 12) -> JobSpec:
    return JobSpec(
        budget=Budget(max_drop=0.01), fine_tune=recipe, search=SearchSpec(trials=trials, hours=hours, parallel=1)
    )


def profile(seconds: float) -> Profile:
    return Surface(0, blocks=2).profile(0).model_copy(update={"epoch_seconds": seconds})


def test_what_was_asked_is_done_whatever_the_hours() -> None:
    asked = FineTune(epochs=7, short_epochs=0.5)
    for hours in (None, 0.1, 100):
        spec = job(hours, asked)
        assert short_epochs(spec, profile(60)) == 0.5
        assert full_epochs(spec, profile(60), (), 0.0) == planned_epochs(spec, profile(60)) == 7


def test_without_hours_a_trial_trains_one_epoch_and_a_refinement_ten() -> None:
    assert short_epochs(job(None), profile(60)) == 1
    assert full_epochs(job(None), profile(60), (), 5.0) == 10


@pytest.mark.parametrize(("hours", "epochs"), [(1, 22), (4, 86), (100, 300)])
def test_more_hours_train_longer(hours: float, epochs: float) -> None:
    """60 s an epoch: 60 % of the hours are for refining, 60 % of that for the first."""
    assert planned_epochs(job(hours), profile(60)) == epochs


def test_a_fast_network_gets_longer_trials_and_one_too_slow_for_an_epoch_none() -> None:
    assert short_epochs(job(1), profile(1)) == 2
    assert short_epochs(job(1), profile(120)) == 1.5  # four trials in half of 40 % of the hour
    assert short_epochs(job(1), profile(200)) == 0
    assert not has_short_rung(job(1), profile(200))
    assert has_short_rung(job(None), profile(200))
    life = live(job(0.5, trials=12), Surface(0, blocks=3, epoch_seconds=200), workers=1)
    assert life.finished
    assert not any(w.rung is Rung.SHORT for w in life.asked if isinstance(w, TrialWork))
    assert any(isinstance(w, RefineWork) for w in life.asked)


def test_time_that_is_used_up_shortens_the_next_refinement() -> None:
    spec = job(2)
    lengths = [full_epochs(spec, profile(60), (), elapsed) for elapsed in (0.8, 1.5, 2.5)]
    assert lengths == [43, 18, max(0.1, short_epochs(spec, profile(60)))]


def test_the_pace_of_trainings_that_were_run_counts_more_than_the_profile() -> None:
    surface = Surface(0, blocks=2)
    life = live(job(None), surface)
    trained = [r for record in life.records for r in record.results.values() if r.epochs]
    assert trained
    slow = [
        record.model_copy(
            update={"results": {k: r.model_copy(update={"epoch_seconds": 90.0}) for k, r in record.results.items()}}
        )
        for record in life.records
    ]
    assert epoch_seconds(profile(60), ()) == 60
    assert epoch_seconds(profile(60), slow) == 90


@pytest.mark.parametrize(
    ("recipe", "search"),
    [(AUTO, 0.4), (FineTune(epochs=0), 1.0), (FineTune(epochs=12), 0.8), (FineTune(epochs=600), 0.4)],
)
def test_the_search_leaves_time_for_refining(recipe: FineTune, search: float) -> None:
    """One hour at 60 s an epoch."""
    spec = job(1, recipe)
    assert not out_of_time(spec, profile(60), search - 0.01)
    assert out_of_time(spec, profile(60), search)


def test_a_job_of_so_many_hours_is_done_in_about_so_many() -> None:
    """The simulated clock runs by the epochs that were asked for."""
    for hours in (0.5, 2.0, 8.0):
        life = live(job(hours, trials=30), Surface(0, blocks=3, epoch_seconds=60), workers=1)
        assert life.finished
        assert life.finished[0].ok
        refined = [w.epochs for w in life.asked if isinstance(w, RefineWork)]
        shorts = {w.epochs for w in life.asked if isinstance(w, TrialWork) and w.rung is Rung.SHORT}
        assert refined
        assert max(shorts, default=0) <= min(refined)
        assert refined[0] > 10 * hours
        assert life.hours <= 1.1 * hours


def test_an_extended_job_shares_out_the_hours_that_were_added() -> None:
    """Two hours are spent, two more were given: 0.8 of them for the search."""
    search = SearchSpec(trials=12, hours=4, hours_before=2, parallel=1)
    spec = job(None).model_copy(update={"search": search})
    assert not out_of_time(spec, profile(60), 2.7)
    assert out_of_time(spec, profile(60), 2.8)
    assert planned_epochs(spec, profile(60)) == planned_epochs(job(2), profile(60))
    assert short_epochs(spec, profile(200)) == short_epochs(job(2), profile(200)) > 0
