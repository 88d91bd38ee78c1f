import time

import pytest
from sqlalchemy import select, update

from db import jobs, replies, tasks, workers
from db.errors import Conflict
from db.tables import IdempotentReply, Job, JobState, TaskState
from workers.run import Runner
from workers.sweep import Sweeper

OWNER = "somebody"


@pytest.fixture
def sweeper(db, settings):
    return Sweeper(db, settings, "worker-2")


def test_a_lease_that_ran_out_is_taken_up_and_the_task_waits_again(db, settings, submit, sweeper):
    submit()
    with db.begin() as s:
        task = tasks.claim(s, "dead", "cpu", 0.05)
    time.sleep(0.1)
    sweeper.sweep()
    with db.read() as s:
        again = tasks.get(s, task.id)
    assert again.state is TaskState.QUEUED
    assert again.error_code == "worker_lost"


def test_a_live_lease_is_left_alone(db, submit, sweeper):
    submit()
    with db.begin() as s:
        task = tasks.claim(s, "alive", "cpu", 60)
    sweeper.sweep()
    with db.read() as s:
        assert tasks.get(s, task.id).state is TaskState.RUNNING


def test_a_job_that_a_death_left_without_a_task_is_moved_on(db, settings, submit, sweeper, runner, monkeypatch):
    job_id = submit()
    monkeypatch.setattr("workers.run.advance_waiting", lambda *_: 0)
    runner.work()  # inspects, and then dies before it advances the job
    with db.read() as s:
        assert jobs.get(s, OWNER, job_id).state is JobState.QUEUED
    sweeper.sweep()
    with db.read() as s:
        assert jobs.get(s, OWNER, job_id).state is JobState.PROFILING


def test_a_worker_is_seen_with_its_device_and_the_layers_of_its_jail(db, sweeper):
    sweeper.sweep()
    with db.read() as s:
        (row,) = workers.live(s)
    assert row.id == "worker-2"
    assert set(row.jail) >= {"mode", "landlock", "seccomp"}
    assert "×" in row.device or "NVIDIA" in row.device
    sweeper.stop()
    with db.read() as s:
        assert workers.live(s) == []


def test_a_jail_that_is_off_holds_nothing(db, settings):
    Sweeper(db, settings.model_copy(update={"jail": "off"}), "worker-3").be_seen()
    with db.read() as s:
        (row,) = workers.live(s)
    assert row.jail == {"mode": "off", "landlock": False, "seccomp": False, "rlimits": False}


def test_replies_are_forgotten_after_a_day(db, settings, sweeper):
    with db.begin() as s:
        replies.begin(s, OWNER, "old", "hash")
        replies.begin(s, OWNER, "new", "hash")
        s.execute(update(IdempotentReply).where(IdempotentReply.key == "old").values(created_at=0.0))
    sweeper.sweep(collect=True)
    with db.read() as s:
        assert s.scalars(select(IdempotentReply.key)).all() == ["new"]


def test_a_job_whose_rows_cannot_be_read_fails_alone(db, settings, submit, runner):
    broken, healthy = submit(), submit()
    with db.begin() as s:
        row = s.get(Job, broken)
        row.spec = {**row.spec, "of_another_version": 1}
    runner.work()
    with db.read() as s:
        assert jobs.get(s, OWNER, healthy).state is JobState.DONE
        failed = jobs.get(s, OWNER, broken)
    assert (failed.state, failed.reason_code) == (JobState.FAILED, "internal_error")


def test_a_worker_of_another_host_on_sqlite_is_refused(db, sweeper):
    with db.begin() as s:
        workers.seen(s, "other", host="another-host", queue="cpu", device="", jail={})
    with pytest.raises(Conflict, match="one host only"):
        sweeper.be_seen()


def test_a_broken_step_does_not_stop_the_others(db, settings, submit, sweeper, monkeypatch, caplog):
    monkeypatch.setattr(sweeper, "take_up_lost", lambda: 1 / 0)
    sweeper.sweep()
    with db.read() as s:
        assert [w.id for w in workers.live(s)] == ["worker-2"]
    assert "ZeroDivisionError" in caplog.text


def test_two_workers_share_one_job_and_it_ends_once(db, settings, submit, runner):
    import threading

    job_id = submit(trials=6, parallel=2)
    second = Runner(db, settings, "worker-2", compute=runner.processes._compute)
    try:
        for _ in range(20):
            threads = [threading.Thread(target=r.work) for r in (runner, second)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            with db.read() as s:
                job = jobs.get(s, OWNER, job_id)
            if job.state is JobState.DONE:
                break
    finally:
        second.stop()
        second.close()
    assert (job.state, job.reason_code) == (JobState.DONE, "kept_budget"), job.reason
