"""A job from acceptance to its end, and what its owner can do to it."""

import random
import time

import pytest
from sqlalchemy import func, select

from db import artifacts, assignments, blobs, datasets, events, jobs, models, tasks, trials
from db.errors import Conflict, NotFound
from db.tables import TERMINAL_JOBS, Artifact, Job, JobState, Task, TaskKind, TaskState, Trial
from search.errors import BadRequest
from search.spec import (
    Cost,
    ExportFormat,
    ExportWork,
    Finished,
    JobSpec,
    Outcome,
    ProfileWork,
    RefineWork,
    Rung,
    TrialState,
)


def _snapshot(house, job_id):
    with house.db.read() as s:
        return jobs.advance_snapshot(s, job_id)


def _do(house, action, job_id, owner="ann", **more):
    with house.db.begin() as s:
        return action(s, owner, job_id, **more)


def _done_job(house, **search):
    """Of one trial, which is handed back."""
    job_id = house.searching_job(trials=1, **search)
    house.run_trial(job_id, house.result())
    house.apply(job_id, [Finished(ok=True, code="kept_budget", reason="Done.", best=0)])
    return job_id


def _spend(house, job_id, *, seconds):
    with house.db.begin() as s:
        s.get(Job, job_id).spent_seconds = seconds


def _artifact(house, name="model.pt2", content=b"exported"):
    blob = blobs.write(house.db, [content])
    return tasks.NewArtifact(ExportFormat.PT2, name, "application/octet-stream", blob.id, {"value": 0.9})


def test_a_job_waits_for_its_model_and_its_data(house):
    job_id = house.new_job()
    assert _snapshot(house, job_id) is None
    with house.db.read() as s:
        assert jobs.ready_to_advance(s) == []
    house.inspect_all()
    with house.db.read() as s:
        assert jobs.ready_to_advance(s) == [job_id]


def test_the_whole_life_of_a_job(house):
    job_id = house.ready_job()
    seen = _snapshot(house, job_id)
    assert (seen.state, seen.running, seen.free, seen.history, seen.profiles) == (JobState.QUEUED, 0, 2, (), ())

    house.apply(job_id, [ProfileWork(stage=0, parent=None)])
    assert house.job(job_id).state is JobState.PROFILING
    task = house.claim()
    with house.db.begin() as s:
        assert tasks.complete_profile(s, task.id, 1, house.profile())

    house.apply(job_id, [house.trial_work(0), house.trial_work(1)])
    seen = _snapshot(house, job_id)
    assert (seen.state, seen.running, seen.free) == (JobState.SEARCHING, 2, 0)
    assert seen.profiles == (house.profile(),)
    house.run_trial(job_id, house.result(drop=0.3), b"weights 0")
    house.run_trial(job_id, house.result(drop=0.004), b"weights 1")

    house.apply(job_id, [RefineWork(number=1, epochs=10)])
    assert house.job(job_id).state is JobState.REFINING
    with house.db.read() as s:
        assert s.get(Trial, (job_id, 1)).rung is Rung.FULL
    house.run_trial(job_id, house.result(Rung.FULL, drop=0.001, keeps_budget=True), b"weights 1 full")

    house.apply(job_id, [ExportWork(number=1)])
    task = house.claim()
    with house.db.read() as s:
        given = assignments.of(s, task)
    assert b"".join(blobs.read(house.db, given.weights)) == b"weights 1 full"
    assert given.record.results.keys() == {Rung.CHEAP, Rung.FULL}
    assert given.profile == house.profile()
    files = [_artifact(house), _artifact(house, "report.html", b"<p>")]
    with house.db.begin() as s:
        assert tasks.complete_export(s, task.id, 1, files)
    seen = _snapshot(house, job_id)
    assert (seen.state, seen.exported, seen.running) == (JobState.EXPORTING, (1,), 0)

    house.apply(job_id, [Finished(ok=True, code="kept_budget", reason="Half the size.", best=1)])
    job = house.job(job_id)
    assert (job.state, job.reason_code, job.reason, job.best) == (JobState.DONE, "kept_budget", "Half the size.", 1)
    assert job.started_at <= job.finished_at
    assert _snapshot(house, job_id) is None
    with house.db.read() as s:
        messages = [event.message for event in events.page(s, "ann", job_id).items]
    assert messages == [
        "Accepted.",
        "Stage 0: measuring the starting network.",
        "Stage 0: the original network has accuracy 0.9; 0 layers can be compressed.",
        "Searching.",
        "Trial 0 (cheap): value 0.6, drop 0.3, 50 parameters.",
        "Trial 1 (cheap): value 0.896, drop 0.004, 50 parameters.",
        "Trial 1 goes on to its full rung.",
        "Refining trial 1: training it for 10 epochs and checking it on unseen data.",
        "Trial 1 (full): value 0.899, drop 0.001, 50 parameters; on unseen data it keeps the budget.",
        "Writing the files of trial 1 and loading them again.",
        "Trial 1 is exported: model.pt2, report.html.",
        "Half the size.",
    ]


def test_what_the_search_wrote_comes_back_as_it_was(house):
    job_id = house.searching_job(trials=1)
    record = _snapshot(house, job_id).history[0]
    asked = house.trial_work(0)
    assert (record.plan, record.params) == (asked.plan, asked.params)
    assert list(record.plan) == list(asked.plan), "the order of sites"
    assert list(record.params) == list(asked.params), "the order of parameters"
    with house.db.read() as s:
        (task,) = tasks.live(s, job_id)
    assert task.work == asked.model_dump(mode="json")


def test_work_asked_at_an_old_version_is_refused(house, together):
    job_id = house.searching_job()
    version = _snapshot(house, job_id).version

    def advance():
        with house.db.begin() as s:
            return jobs.apply_work(s, job_id, version, [house.trial_work(0)])

    assert sorted(together([advance] * 6)) == [False] * 5 + [True]
    assert len(_snapshot(house, job_id).history) == 1


@pytest.mark.parametrize("kind", ["gap", "running", "absent"])
def test_impossible_work_is_an_error_and_changes_nothing(house, kind):
    job_id = house.searching_job(trials=1)
    seen = _snapshot(house, job_id)
    wrong = {"gap": house.trial_work(5), "running": house.trial_work(0, Rung.SHORT), "absent": ExportWork(number=9)}
    with pytest.raises(ValueError), house.db.begin() as s:
        jobs.apply_work(s, job_id, seen.version, [house.trial_work(1), wrong[kind]])
    assert _snapshot(house, job_id).version == seen.version
    assert len(_snapshot(house, job_id).history) == 1


def test_a_promotion_is_the_same_trial_at_the_next_rung(house):
    job_id = house.searching_job(trials=1)
    house.run_trial(job_id, house.result(), b"cheap")
    house.apply(job_id, [house.trial_work(0, Rung.SHORT)])
    record = _snapshot(house, job_id).history[0]
    assert (record.state, record.rung) == (TrialState.QUEUED, Rung.SHORT)
    house.run_trial(job_id, house.result(Rung.SHORT, drop=0.002))
    (record,) = _snapshot(house, job_id).history
    assert (record.state, record.rung) == (TrialState.DONE, Rung.SHORT)
    assert record.results.keys() == {Rung.CHEAP, Rung.SHORT}


def test_the_plan_of_a_trial_is_what_was_built_of_it(house):
    job_id = house.searching_job(trials=1)
    asked = house.trial_work(0).plan
    house.run_trial(job_id, house.result(left_dense={"layer2.conv": asked["layer2.conv"]}), b"cheap")
    (record,) = _snapshot(house, job_id).history
    assert record.plan == {"layer1.conv": asked["layer1.conv"]}
    assert record.asked == asked


def test_a_result_without_a_value_fails_its_trial(house):
    job_id = house.searching_job(trials=1)
    house.run_trial(job_id, house.result(value=None, outcome=Outcome.NON_FINITE))
    assert _snapshot(house, job_id).history[0].state is TrialState.FAILED
    with house.db.read() as s:
        assert trials.get(s, "ann", job_id, 0).error == Outcome.NON_FINITE.value


def test_best_is_the_smallest_trial_that_keeps_the_budget(house):
    job_id = house.searching_job(trials=4, parallel=4)
    seen = []
    for drop, parameters in ((0.2, 10), (0.009, 60), (0.001, 80), (0.01, 40)):
        house.run_trial(job_id, house.result(drop=drop, parameters=parameters))
        seen.append(house.job(job_id).best)
    assert seen == [None, 1, 1, 3]


def test_best_falls_back_when_the_best_fails_on_unseen_data(house):
    job_id = house.searching_job(trials=2)
    house.run_trial(job_id, house.result(drop=0.005, parameters=40))
    house.run_trial(job_id, house.result(drop=0.005, parameters=50))
    house.apply(job_id, [RefineWork(number=0, epochs=10)])
    house.run_trial(job_id, house.result(Rung.FULL, drop=0.005, parameters=40, keeps_budget=False))
    assert house.job(job_id).best == 1


def test_best_goes_by_the_cost_that_is_minimised(house):
    job_id = house.searching_job(trials=2, minimize=(Cost.BYTES,))
    house.run_trial(job_id, house.result(parameters=40))
    house.run_trial(job_id, house.result(parameters=30))
    assert house.job(job_id).best == 1


# ------------------------------------------------------------------------------------------------ cancel


def test_cancelling_ends_what_waits_at_once_and_what_runs_by_its_heartbeat(house):
    job_id = house.searching_job(trials=2)
    running = house.claim()
    job = _do(house, jobs.cancel, job_id)
    assert job.state is JobState.CANCELLING
    with house.db.read() as s:
        assert trials.counts(s, job_id) == {TrialState.RUNNING: 1, TrialState.CANCELLED: 1}
    assert house.claim(warm_job=job_id) is None
    with house.db.begin() as s:
        assert tasks.heartbeat(s, running.id, 1, 90).cancel
    with house.db.begin() as s:
        assert tasks.fail(s, running.id, 1, "stopped", "ended on request", retry=True)
    assert house.job(job_id).state is JobState.CANCELLED
    assert house.task(running.id).state is TaskState.CANCELLED
    with house.db.read() as s:
        assert trials.counts(s, job_id) == {TrialState.CANCELLED: 2}


def test_cancelling_a_job_that_runs_nothing_ends_it_at_once(house):
    job_id = house.searching_job(trials=2)
    assert _do(house, jobs.cancel, job_id).state is JobState.CANCELLED
    assert _do(house, jobs.cancel, job_id).state is JobState.CANCELLED, "again, without effect"
    waiting = house.new_job()
    assert _do(house, jobs.cancel, waiting).state is JobState.CANCELLED


def test_a_result_that_arrives_while_cancelling_is_kept_and_ends_the_job(house):
    job_id = house.searching_job(trials=1)
    task = house.claim()
    _do(house, jobs.cancel, job_id)
    with house.db.begin() as s:
        assert tasks.complete_trial(s, task.id, 1, house.result())
    assert house.job(job_id).state is JobState.CANCELLED
    with house.db.read() as s:
        assert trials.counts(s, job_id) == {TrialState.DONE: 1}


def test_a_worker_lost_while_cancelling_ends_the_job_too(house):
    job_id = house.searching_job(trials=1)
    task = house.claim()
    _do(house, jobs.cancel, job_id)
    with house.db.begin() as s:
        tasks.get(s, task.id).lease_until = 1.0
    with house.db.begin() as s:
        assert tasks.requeue_or_fail(s, task.id, 1) is TaskState.CANCELLED
    assert house.job(job_id).state is JobState.CANCELLED


def test_a_cancelled_promotion_goes_back_to_the_rung_it_had(house):
    job_id = house.searching_job(trials=1)
    house.run_trial(job_id, house.result())
    house.apply(job_id, [house.trial_work(0, Rung.SHORT)])
    _do(house, jobs.cancel, job_id)
    with house.db.read() as s:
        trial = trials.get(s, "ann", job_id, 0)
    assert (trial.state, trial.rung) == (TrialState.DONE, Rung.CHEAP)


def test_a_finished_job_cannot_be_cancelled(house):
    job_id = house.searching_job()
    house.apply(job_id, [Finished(ok=True, code="kept_budget", reason="Done.")])
    with pytest.raises(Conflict) as caught:
        _do(house, jobs.cancel, job_id)
    assert caught.value.code == "job_finished"


def test_a_terminal_job_never_has_a_live_trial_whatever_happens_at_once(house, together):
    """Workers that claim, finish and lose tasks, against advancing, cancelling, pausing and ending, in every order."""
    job_ids = [house.searching_job(trials=3, parallel=3) for _ in range(3)]

    def worker(seed):
        rng = random.Random(seed)
        for _ in range(25):
            task = house.claim(f"w{seed}", warm_job=rng.choice(job_ids))
            if task is None:
                continue
            with house.db.begin() as s:
                choice = rng.random()
                if choice < 0.6:
                    tasks.complete_trial(s, task.id, task.attempt, house.result(drop=rng.random() / 50))
                elif choice < 0.9:
                    tasks.fail(s, task.id, task.attempt, "crashed", "It crashed.", retry=True)

    def advance(seed):
        for n in range(25):
            for job_id in job_ids:
                seen = _snapshot(house, job_id)
                if seen is None or not seen.free:
                    continue
                ends = n == 20 and job_id == job_ids[0]
                work = Finished(ok=True, code="kept_budget", reason="Done.") if ends else None
                with house.db.begin() as s:
                    jobs.apply_work(s, job_id, seen.version, [work or house.trial_work(len(seen.history))])

    def meddle():
        for action in (jobs.pause, jobs.resume, jobs.pause, jobs.resume, jobs.cancel):
            _do(house, action, job_ids[1])
        _do(house, jobs.cancel, job_ids[2])

    returned = together([*(lambda seed=seed: worker(seed) for seed in range(4)), lambda: advance(9), meddle])
    assert returned == [None] * 6

    with house.db.read() as s:
        live = select(func.count()).select_from(Trial).join(Job, Job.id == Trial.job_id)
        live = live.where(Job.state.in_(TERMINAL_JOBS), Trial.state.in_(("queued", "running")))
        assert s.scalar(live) == 0
        for job_id in job_ids:
            numbers = [t.number for t in s.scalars(select(Trial).where(Trial.job_id == job_id).order_by(Trial.number))]
            assert numbers == list(range(len(numbers)))
            for trial in s.scalars(select(Trial).where(Trial.job_id == job_id, Trial.state.in_(("queued", "running")))):
                of_it = select(Task).where(Task.job_id == job_id, Task.trial == trial.number)
                states = [task.state.value for task in s.scalars(of_it)]
                assert trial.state.value in states, "a live trial has its live task"


# ------------------------------------------------------------------------------------------------ pause, extend, export


def test_pausing_keeps_the_state_to_return_to_and_stops_the_clock(house):
    job_id = house.searching_job(trials=1)
    job = _do(house, jobs.pause, job_id)
    assert (job.state, job.resume_to, job.active_since) == (JobState.PAUSED, JobState.SEARCHING, None)
    assert _snapshot(house, job_id) is None
    job = _do(house, jobs.resume, job_id)
    assert (job.state, job.resume_to) == (JobState.SEARCHING, None)
    _spend(house, job_id, seconds=3600)
    assert _snapshot(house, job_id).elapsed_hours == pytest.approx(1.0, abs=0.01)


def test_a_running_trial_of_a_paused_job_finishes(house):
    job_id = house.searching_job(trials=1)
    task = house.claim()
    _do(house, jobs.pause, job_id)
    with house.db.begin() as s:
        assert not tasks.heartbeat(s, task.id, 1, 90).cancel
        assert tasks.complete_trial(s, task.id, 1, house.result())
    assert house.job(job_id).state is JobState.PAUSED


@pytest.mark.parametrize(("action", "code"), [(jobs.pause, "job_not_active"), (jobs.resume, "job_not_paused")])
def test_a_finished_job_cannot_be_paused_or_resumed(house, action, code):
    job_id = house.searching_job()
    _do(house, jobs.cancel, job_id)
    with pytest.raises(Conflict) as caught:
        _do(house, action, job_id)
    assert caught.value.code == code


def test_extending_a_done_job_searches_on(house):
    job_id = _done_job(house)
    job = _do(house, jobs.extend, job_id, trials=5)
    assert (job.state, job.finished_at, job.reason_code, job.best) == (JobState.SEARCHING, None, None, 0)
    seen = _snapshot(house, job_id)
    assert seen.spec.search.trials == 15
    assert len(seen.history) == 1


def test_extending_a_job_of_some_hours_counts_from_what_it_spent(house):
    job_id = _done_job(house, hours=1.0)
    _spend(house, job_id, seconds=5400)
    _do(house, jobs.extend, job_id, trials=5, hours=2.0)
    search = _snapshot(house, job_id).spec.search
    assert (search.hours, search.hours_before) == (3.5, 1.5)


def test_a_job_without_time_left_is_extended_by_hours_only(house):
    job_id = _done_job(house, hours=1.0)
    _spend(house, job_id, seconds=3600)
    with pytest.raises(BadRequest, match="used 1 of its 1 hours") as caught:
        _do(house, jobs.extend, job_id, trials=5)
    assert caught.value.code == "hours_used_up"
    assert house.job(job_id).state is JobState.DONE
    _spend(house, job_id, seconds=3000)
    _do(house, jobs.extend, job_id, trials=5)
    assert _snapshot(house, job_id).spec.search.hours == 1.0


def test_hours_are_not_added_to_a_job_without_a_limit(house):
    job_id = house.searching_job(trials=1)
    house.apply(job_id, [Finished(ok=True, code="kept_budget", reason="Done.")])
    with pytest.raises(BadRequest, match="by trials alone") as caught:
        _do(house, jobs.extend, job_id, trials=5, hours=1.0)
    assert caught.value.code == "no_limit_of_hours"


def test_a_job_at_work_cannot_be_extended(house):
    with pytest.raises(Conflict) as caught:
        _do(house, jobs.extend, house.searching_job(), trials=5)
    assert caught.value.code == "job_not_extendable"


def test_a_job_whose_model_was_rejected_cannot_be_extended(house):
    job_id = house.new_job()
    task = house.claim()
    with house.db.begin() as s:
        tasks.fail(s, task.id, 1, "not_a_model", "the file is a JPEG", retry=False)
    with pytest.raises(Conflict, match="JPEG") as caught:
        _do(house, jobs.extend, job_id, trials=5)
    assert caught.value.code == "job_not_extendable"


def test_a_job_cannot_be_extended_without_end(house):
    job_id = house.searching_job(trials=1)
    house.apply(job_id, [Finished(ok=True, code="kept_budget", reason="Done.")])
    with pytest.raises(BadRequest, match="trials") as caught:
        _do(house, jobs.extend, job_id, trials=1_000_000)
    assert caught.value.code == "bad_extension"


def test_one_more_point_is_exported_while_the_job_stays_done(house):
    job_id = house.searching_job(trials=2)
    house.run_trial(job_id, house.result(), b"zero")
    house.run_trial(job_id, house.result())
    house.apply(job_id, [Finished(ok=True, code="kept_budget", reason="Done.", best=0)])
    task = _do(house, jobs.request_export, job_id, number=0)
    assert _do(house, jobs.request_export, job_id, number=0).id == task.id, "asked twice, done once"
    claimed, first, newer = house.claim(), _artifact(house), _artifact(house, content=b"newer")
    assert (claimed.id, claimed.kind) == (task.id, TaskKind.EXPORT)
    with house.db.begin() as s:
        assert not tasks.heartbeat(s, task.id, 1, 90).cancel
        assert tasks.complete_export(s, task.id, 1, [first])
    assert house.job(job_id).state is JobState.DONE
    again = _do(house, jobs.request_export, job_id, number=0)
    house.claim()
    with house.db.begin() as s:
        assert tasks.complete_export(s, again.id, 1, [newer])
        assert len(artifacts.page(s, "ann", job_id).items) == 1, "an export again replaces the files"
    with pytest.raises(Conflict) as caught:
        _do(house, jobs.request_export, job_id, number=1)
    assert caught.value.code == "trial_not_exportable"


def test_a_failed_extra_export_leaves_the_job_done(house):
    job_id = house.searching_job(trials=1)
    house.run_trial(job_id, house.result(), b"zero")
    house.apply(job_id, [Finished(ok=True, code="kept_budget", reason="Done.", best=0)])
    task = _do(house, jobs.request_export, job_id, number=0)
    house.claim()
    with house.db.begin() as s:
        tasks.fail(s, task.id, 1, "export_differs", "the reloaded file differs", retry=False)
    assert house.job(job_id).state is JobState.DONE


# ------------------------------------------------------------------------------------------------ delete, owners


def test_deleting_a_job_leaves_nothing_of_it(house):
    job_id = house.searching_job(trials=2)
    house.run_trial(job_id, house.result(), b"zero")
    with pytest.raises(Conflict) as caught:
        _do(house, jobs.delete, job_id)
    assert caught.value.code == "job_not_finished"
    _do(house, jobs.cancel, job_id)
    job = house.job(job_id)
    with pytest.raises(Conflict) as caught:
        _do(house, models.delete, job.model_id)
    assert caught.value.code == "model_in_use"
    assert job_id in caught.value.message
    _do(house, jobs.delete, job_id)
    with house.db.begin() as s:
        for table in (Job, Trial, Artifact):
            assert s.scalar(select(func.count()).select_from(table)) == 0
        models.delete(s, "ann", job.model_id)
        datasets.delete(s, "ann", job.dataset_id)
        assert s.scalar(select(func.count()).select_from(Task)) == 0


def test_deleting_a_model_under_inspection_fences_the_inspection_out(house):
    job_id = house.new_job()
    job = house.job(job_id)
    task = house.claim()
    _do(house, jobs.cancel, job_id)
    _do(house, jobs.delete, job_id)
    _do(house, models.delete, job.model_id)
    with house.db.begin() as s:
        assert tasks.heartbeat(s, task.id, 1, 90) is None
        assert not tasks.fail(s, task.id, 1, "x", "y", retry=True)


def test_nobody_sees_or_touches_what_another_owns(house):
    job_id = house.searching_job("ann", trials=1)
    house.run_trial(job_id, house.result(), b"zero")
    job = house.job(job_id)
    actions = (jobs.get, jobs.cancel, jobs.pause, jobs.resume, jobs.delete)
    for action in actions:
        with pytest.raises(NotFound) as caught:
            _do(house, action, job_id, "bob")
        assert caught.value.code == "job_not_found"
    with house.db.begin() as s:
        for getter, id_ in ((models.get, job.model_id), (datasets.get, job.dataset_id), (models.delete, job.model_id)):
            with pytest.raises(NotFound):
                getter(s, "bob", id_)
        with pytest.raises(NotFound):
            trials.get(s, "bob", job_id, 0)
        for pages in (trials.page, events.page, artifacts.page):
            assert pages(s, "bob", job_id).items == []
        assert trials.all_records(s, "bob", job_id) == []
        assert jobs.profiles(s, "bob", job_id) == []
        assert jobs.page(s, "bob").items == models.page(s, "bob").items == datasets.page(s, "bob").items == []
        spec = jobs.advance_snapshot(s, job_id).spec
        with pytest.raises(NotFound, match=job.model_id):
            jobs.add(s, "bob", model_id=job.model_id, dataset_id=job.dataset_id, name="theirs", spec=spec)


def test_a_rejected_model_takes_no_new_job(house):
    job_id = house.new_job()
    task = house.claim()
    with house.db.begin() as s:
        tasks.fail(s, task.id, 1, "not_a_model", "the file is a JPEG", retry=False)
    job = house.job(job_id)
    with pytest.raises(Conflict, match="JPEG") as caught, house.db.begin() as s:
        jobs.add(
            s, "ann", model_id=job.model_id, dataset_id=job.dataset_id, name="x", spec=JobSpec.model_validate(job.spec)
        )
    assert caught.value.code == "model_rejected"


def test_live_jobs_are_counted_for_the_quota(house):
    first = house.new_job()
    house.new_job()
    house.new_job("bob")
    _do(house, jobs.cancel, first)
    with house.db.read() as s:
        assert jobs.live_count(s, "ann") == 1


def test_five_thousand_trials_page_fast(house):
    job_id = house.searching_job()
    work, measured = house.trial_work(0), house.result().model_dump(mode="json")
    plan = {f"layer{n}.conv": {"method": "svd", "ranks": [8], "options": {}} for n in range(6)}
    with house.db.begin() as s:
        same = {"job_id": job_id, "stage": 0, "params": work.params, "plan": plan, "results": {"cheap": measured}}
        same |= {"state": TrialState.DONE, "rung": Rung.CHEAP, "created_at": 1.0}
        rows = [{**same, "number": n} for n in range(5000)]
        s.execute(Trial.__table__.insert(), rows)
    start = time.perf_counter()
    with house.db.read() as s:
        numbers, cursor, pages = [], None, 0
        while True:
            page = trials.page(s, "ann", job_id, cursor, 100)
            numbers += [trial.number for trial in page.items]
            pages, cursor = pages + 1, page.next
            if cursor is None:
                break
    assert numbers == list(range(5000))
    assert pages == 50
    assert (time.perf_counter() - start) / pages < 0.2
    start = time.perf_counter()
    assert len(_snapshot(house, job_id).history) == 5000
    assert time.perf_counter() - start < 10
