"""Leases, fences and what follows a failure."""

import pytest
from sqlalchemy import select

from db import assignments, blobs, events, jobs, models, tasks
from db.tables import TERMINAL_JOBS, AssetState, JobState, Task, TaskKind, TaskState
from search.spec import Finished, ProfileWork, RefineWork, Rung, TrialState


def _expire(house, task_id):
    with house.db.begin() as s:
        tasks.get(s, task_id).lease_until = 1.0


def _sweep(house):
    with house.db.begin() as s:
        return [tasks.requeue_or_fail(s, task.id, task.attempt) for task in tasks.expired(s)]


def _messages(house, job_id):
    with house.db.read() as s:
        return [event.message for event in events.page(s, "ann", job_id).items]


def _records(house, job_id):
    with house.db.read() as s:
        return jobs.advance_snapshot(s, job_id).history


def test_a_heartbeat_moves_the_lease_and_shows_progress(house):
    house.searching_job(trials=1)
    task = house.claim(lease_s=5)
    with house.db.begin() as s:
        beat = tasks.heartbeat(s, task.id, 1, 90, {"message": "fine-tuning", "done": 1, "of": 4})
    assert beat is not None
    assert not beat.cancel
    now = house.task(task.id)
    assert now.lease_until == pytest.approx(beat.lease_until)
    assert now.lease_until > task.lease_until + 60
    with house.db.begin() as s:
        tasks.heartbeat(s, task.id, 1, 90)
    assert house.task(task.id).progress == {"message": "fine-tuning", "done": 1, "of": 4}


def test_an_expired_lease_gives_the_task_to_another_and_fences_the_first_out(house):
    job_id = house.searching_job(trials=1)
    first = house.claim("cpu-1")
    _expire(house, first.id)
    assert _sweep(house) == [TaskState.QUEUED]
    assert "Trial 0: Worker cpu-1 stopped answering. Trying again (2 of 3)." in _messages(house, job_id)
    second = house.claim("cpu-2")
    assert (second.id, second.attempt) == (first.id, 2)
    with house.db.begin() as s:
        assert tasks.heartbeat(s, first.id, 1, 90) is None
        assert not tasks.complete_trial(s, first.id, 1, house.result(drop=0.5))
        assert not tasks.fail(s, first.id, 1, "x", "y", retry=True)
        assert not tasks.finish(s, first.id, 1)
        assert not tasks.release(s, first.id, 1)
        assert not tasks.save_checkpoint(s, first.id, 1, "blb_x")
        assert tasks.complete_trial(s, second.id, 2, house.result(drop=0.001))
        assert not tasks.complete_trial(s, second.id, 2, house.result(drop=0.5)), "a second write of one attempt"
    assert _records(house, job_id)[0].results[Rung.CHEAP].drop == 0.001


def test_a_late_heartbeat_before_the_sweep_keeps_the_task(house):
    house.searching_job(trials=1)
    task = house.claim()
    _expire(house, task.id)
    with house.db.read() as s:
        late = tasks.expired(s)
    with house.db.begin() as s:
        assert tasks.heartbeat(s, task.id, 1, 90) is not None
    with house.db.begin() as s:
        assert tasks.requeue_or_fail(s, late[0].id, late[0].attempt) is None
    assert house.task(task.id).state is TaskState.RUNNING


def test_two_sweepers_requeue_once(house, together):
    house.searching_job(trials=1)
    task = house.claim()
    _expire(house, task.id)

    def sweep():
        with house.db.begin() as s:
            return tasks.requeue_or_fail(s, task.id, 1)

    assert sorted(map(str, together([sweep] * 4))) == ["None", "None", "None", "queued"]


def test_a_task_lost_three_times_fails_its_trial_and_the_job_goes_on(house):
    job_id = house.searching_job(trials=2)
    for _ in range(3):
        task = house.claim("cpu-1")
        _expire(house, task.id)
        _sweep(house)
    assert house.task(task.id).state is TaskState.FAILED
    assert house.task(task.id).error_code == "worker_lost"
    assert [record.state for record in _records(house, job_id)] == [TrialState.FAILED, TrialState.QUEUED]
    assert house.job(job_id).state is JobState.SEARCHING
    assert any("lower batch_size" in message for message in _messages(house, job_id))


def test_a_retried_failure_waits_for_another_attempt(house):
    job_id = house.searching_job(trials=1)
    task = house.claim()
    with house.db.begin() as s:
        assert tasks.fail(s, task.id, 1, "crashed", "The computation crashed.", retry=True)
    assert house.task(task.id).state is TaskState.QUEUED
    assert _records(house, job_id)[0].state is TrialState.QUEUED
    assert house.claim().attempt == 2


def test_a_failure_that_cannot_be_mended_is_not_tried_again(house):
    job_id = house.searching_job(trials=1)
    task = house.claim()
    with house.db.begin() as s:
        tasks.fail(s, task.id, 1, "bad_rank", "got rank 0", retry=False)
    assert house.task(task.id).state is TaskState.FAILED
    assert _records(house, job_id)[0].state is TrialState.FAILED


def test_a_released_task_costs_no_attempt(house):
    house.searching_job(trials=1)
    for attempt in range(1, 6):
        task = house.claim()
        assert task.attempt == attempt
        with house.db.begin() as s:
            assert tasks.release(s, task.id, attempt)
    assert house.claim().max_attempts - 5 == 3


def test_a_failed_profile_fails_the_job_with_its_reason(house):
    job_id = house.ready_job()
    house.apply(job_id, [ProfileWork(stage=0, parent=None)])
    task = house.claim()
    with house.db.begin() as s:
        tasks.fail(s, task.id, 1, "baseline_off", "the original scores 0.11, expected 0.9", retry=False)
    job = house.job(job_id)
    assert (job.state, job.reason_code) == (JobState.FAILED, "baseline_off")
    assert "0.11" in job.reason
    assert job.finished_at is not None


def test_a_failed_profile_of_a_later_stage_leaves_the_job_with_what_it_has(house):
    job_id = house.searching_job(trials=1)
    house.run_trial(job_id, house.result(), b"weights")
    house.apply(job_id, [ProfileWork(stage=1, parent=0)])
    task = house.claim()
    with house.db.begin() as s:
        tasks.fail(s, task.id, 1, "out_of_memory", "ran out of memory", retry=False)
    assert house.job(job_id).state not in TERMINAL_JOBS
    with house.db.read() as s:
        seen = jobs.advance_snapshot(s, job_id)
    assert (seen.failed_profiles, seen.running) == ((1,), 0)


def test_a_failed_refinement_fails_its_trial_only(house):
    job_id = house.searching_job(trials=1)
    house.run_trial(job_id, house.result())
    house.apply(job_id, [RefineWork(number=0, epochs=10)])
    task = house.claim()
    assert task.kind is TaskKind.REFINE
    with house.db.begin() as s:
        tasks.fail(s, task.id, 1, "out_of_memory", "ran out of memory", retry=False)
    assert house.job(job_id).state is JobState.REFINING
    record = _records(house, job_id)[0]
    assert (record.state, record.rung) == (TrialState.FAILED, Rung.FULL)
    assert Rung.CHEAP in record.results


def test_a_rejected_model_fails_the_jobs_that_wait_for_it(house):
    job_id = house.new_job()
    task = house.claim()
    with house.db.begin() as s:
        tasks.fail(s, task.id, 1, "not_a_model", "the file is a JPEG\x00 image", retry=False)
    job = house.job(job_id)
    assert (job.state, job.reason_code) == (JobState.FAILED, "not_a_model")
    with house.db.read() as s:
        model = models.get(s, "ann", job.model_id)
    assert (model.state, model.reason_code) == (AssetState.REJECTED, "not_a_model")
    assert model.reason == "the file is a JPEG\\0 image"


def test_an_inspection_whose_workers_die_rejects_the_model(house):
    job_id = house.new_job()
    model_id = house.job(job_id).model_id
    for _ in range(3):
        with house.db.begin() as s:
            task = s.scalars(select(Task).where(Task.model_id == model_id)).one()
            task.state, task.attempt, task.worker, task.lease_until = TaskState.RUNNING, task.attempt + 1, "w", 1.0
        _sweep(house)
    with house.db.read() as s:
        assert models.get(s, "ann", model_id).reason_code == "worker_lost"


def test_a_checkpoint_waits_for_the_next_attempt_and_goes_with_the_task(house):
    job_id = house.searching_job(trials=1)
    task = house.claim()
    blob = blobs.write(house.db, [b"half-trained"])
    with house.db.begin() as s:
        assert tasks.save_checkpoint(s, task.id, 1, blob.id)
        tasks.fail(s, task.id, 1, "crashed", "The computation crashed.", retry=True)
    again = house.claim()
    with house.db.read() as s:
        assert assignments.of(s, again).checkpoint == blob.id
    with house.db.begin() as s:
        tasks.complete_trial(s, again.id, 2, house.result())
    assert house.task(task.id).checkpoint_blob is None
    assert house.job(job_id).best == 0


def test_finishing_a_job_fences_out_what_still_runs(house):
    job_id = house.searching_job(trials=3)
    running = house.claim()
    house.apply(job_id, [Finished(ok=True, code="kept_budget", reason="Enough.", best=None)])
    with house.db.begin() as s:
        assert tasks.heartbeat(s, running.id, 1, 90) is None
        assert not tasks.complete_trial(s, running.id, 1, house.result())
        assert tasks.live(s, job_id) == []
    assert house.job(job_id).state is JobState.DONE
