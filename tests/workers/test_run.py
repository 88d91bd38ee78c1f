import json
import os
import threading
import time
from pathlib import Path

import pytest

from db import artifacts, blobs, events, jobs, models, tasks, trials
from db.tables import JobState, TaskKind, TaskState, TrialState
from workers.run import Runner
from workers.scratch import Scratch, sweep
from workers.warm import scratch_root

OWNER = "somebody"
TOY_JOB = Path(__file__).with_name("toy_job.py")


def job_of(db, job_id):
    with db.read() as s:
        return jobs.get(s, OWNER, job_id)


def control(settings, **values):
    folder = scratch_root(settings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "control.json").write_text(json.dumps(values))
    return folder


def live_task(db, job_id):
    with db.read() as s:
        (task,) = tasks.live(s, job_id)
    return task


def a_trial_runs(db, job_id):
    with db.read() as s:
        return any(t.kind is TaskKind.TRIAL and t.state is TaskState.RUNNING for t in tasks.live(s, job_id))


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_one_woken_worker_takes_a_job_from_upload_to_artifacts(db, runner, submit):
    job_id = submit()
    assert runner.work() > 5
    job = job_of(db, job_id)
    assert (job.state, job.reason_code) == (JobState.DONE, "kept_budget"), job.reason
    with db.read() as s:
        made = artifacts.page(s, OWNER, job_id).items
        best = trials.get(s, OWNER, job_id, job.best)
    assert [a.filename for a in made] == ["report.json"]
    assert json.loads(b"".join(blobs.read(db, made[0].blob_id))) == {"number": job.best}
    assert json.loads(b"".join(blobs.read(db, best.weights_blob))) == best.plan


def test_an_upload_that_is_refused_rejects_the_model_and_fails_the_job_with_the_advice(db, runner, submit):
    job_id = submit(model=b"something else")
    runner.work()
    job = job_of(db, job_id)
    assert (job.state, job.reason_code) == (JobState.FAILED, "not_a_model")
    assert "send a toy" in job.reason
    with db.read() as s:
        assert models.get(s, OWNER, job.model_id).reason_code == "not_a_model"


def test_a_profile_that_cannot_be_made_fails_the_job(db, settings, runner, submit):
    control(settings, refuse_profile=True)
    job_id = submit()
    runner.work()
    assert job_of(db, job_id).reason_code == "toy_profile"


def left_in_scratch(settings):
    return [p.name for p in scratch_root(settings).iterdir() if p.name.startswith("run-")]


def test_a_disk_that_is_full_when_an_upload_is_fetched_rejects_it_with_advice(
    db, settings, runner, submit, monkeypatch
):
    def on_a_full_disk(descriptor, mode):
        os.close(descriptor)
        return Path("/dev/full").open(mode)

    monkeypatch.setattr("workers.scratch.os.fdopen", on_a_full_disk)
    job_id = submit()
    runner.work()
    job = job_of(db, job_id)
    assert (job.state, job.reason_code) == (JobState.FAILED, "disk_full")
    assert f"{scratch_root(settings)} is full: free some space, then upload it again" in job.reason
    assert left_in_scratch(settings) == []


def test_a_disk_that_is_full_in_the_profile_fails_the_job_at_once_and_the_job_can_be_extended(
    db, settings, runner, submit
):
    control(settings, full_disk="profile")
    job_id = submit()
    runner.work()
    job = job_of(db, job_id)
    assert (job.state, job.reason_code) == (JobState.FAILED, "disk_full")
    assert "free space" in job.reason
    assert left_in_scratch(settings) == []
    with db.read() as s:
        assert not [e for e in events.page(s, OWNER, job_id, limit=200).items if e.kind == "attempt"]
    control(settings)
    with db.begin() as s:
        jobs.extend(s, OWNER, job_id, trials=1)
    runner.work()
    assert job_of(db, job_id).state is JobState.DONE


def test_a_disk_that_is_full_in_a_trial_fails_that_trial_and_its_half_written_files_are_gone(
    db, settings, runner, submit
):
    control(settings, full_disk="trial")
    job_id = submit(trials=1)
    runner.work()
    with db.read() as s:
        trial = trials.get(s, OWNER, job_id, 0)
    assert trial.state is TrialState.FAILED
    assert "free space" in trial.error
    assert job_of(db, job_id).state is JobState.FAILED
    assert left_in_scratch(settings) == []


def test_where_the_jail_is_required_and_missing_uploads_are_not_opened(db, settings, submit):
    control(settings, no_jail=True)
    required = settings.model_copy(update={"jail": "require"})
    job_id = submit()
    worker = Runner(db, required, "worker-1", compute=[str(TOY_JOB)])
    worker.work()
    worker.stop()
    worker.close()
    job = job_of(db, job_id)
    assert (job.state, job.reason_code) == (JobState.FAILED, "jail_unavailable")
    assert "TENFOLD_JAIL=best_effort" in job.reason


def test_cancelling_ends_the_running_computation_within_a_heartbeat(db, settings, runner, submit):
    control(settings, steps=600)
    job_id = submit()
    working = threading.Thread(target=runner.work)
    working.start()
    try:
        wait_for(lambda: a_trial_runs(db, job_id))
        with db.begin() as s:
            jobs.cancel(s, OWNER, job_id)
        wait_for(lambda: job_of(db, job_id).state is JobState.CANCELLED, seconds=5)
    finally:
        runner.stop()
        working.join(10)
    with db.read() as s:
        assert not tasks.live(s, job_id)
        assert trials.counts(s, job_id).get(TrialState.RUNNING, 0) == 0


def test_a_stopping_worker_gives_its_task_back_and_the_next_goes_on_from_the_checkpoint(db, settings, runner, submit):
    folder = control(settings, steps=15)
    job_id = submit(trials=1)
    working = threading.Thread(target=runner.work)
    working.start()

    def has_checkpoint():
        with db.read() as s:
            live = tasks.live(s, job_id)
        return bool(live) and live[0].checkpoint_blob is not None

    wait_for(has_checkpoint)
    runner.stop()
    working.join(10)
    runner.close()
    with db.read() as s:
        (task,) = tasks.live(s, job_id)
    assert task.state is TaskState.QUEUED
    assert task.max_attempts - task.attempt == 3, "being asked to stop costs no attempt"
    control(settings, steps=3)
    second = Runner(db, settings, "worker-2", compute=runner.processes._compute)
    try:
        second.work()
    finally:
        second.stop()
        second.close()
    first = (folder / "log.txt").read_text().splitlines()[0]
    assert first.startswith("resumed at ")
    assert first != "resumed at 0", "the checkpoint was handed to the next attempt"
    assert job_of(db, job_id).state is JobState.DONE


def test_a_crashed_compute_process_costs_one_attempt_and_the_job_goes_on(db, settings, runner, submit):
    control(settings, steps=5)
    job_id = submit(trials=2)
    working = threading.Thread(target=runner.work)
    working.start()
    wait_for(lambda: a_trial_runs(db, job_id))
    time.sleep(0.3)
    runner.processes.warm.child.kill()
    working.join(60)
    assert job_of(db, job_id).state is JobState.DONE
    with db.read() as s:
        told = [e.message for e in events.page(s, OWNER, job_id, limit=200).items if e.kind == "attempt"]
    assert len(told) == 1
    assert "SIGKILL" in told[0]


def test_a_worker_that_lost_its_lease_ends_its_computation_and_writes_nothing(db, settings, runner, submit):
    control(settings, steps=600)
    job_id = submit(trials=1)
    working = threading.Thread(target=runner.work)
    working.start()
    try:
        wait_for(lambda: a_trial_runs(db, job_id))
        task = live_task(db, job_id)
        with db.begin() as s:
            tasks.fail(s, task.id, task.attempt, "worker_lost", "as another worker's sweeper would", retry=True)
        first = runner.processes.warm.child
        wait_for(lambda: not first.alive, seconds=5)
        wait_for(lambda: live_task(db, job_id).attempt == task.attempt + 1)
        with db.read() as s:
            assert trials.get(s, OWNER, job_id, 0).results == {}
    finally:
        runner.stop()
        working.join(10)


def test_nothing_of_a_compute_process_is_left_behind(db, settings, runner, submit):
    submit()
    runner.work()
    runner.stop()
    runner.close()
    assert left_in_scratch(settings) == []


@pytest.mark.parametrize("kept", [True, False])
def test_scratch_folders_of_dead_workers_are_swept_and_those_of_live_ones_kept(tmp_path: Path, kept: bool):
    folder = Scratch(tmp_path)
    (folder.path / "file").write_text("x")
    if not kept:
        os.close(folder._lock)
    assert sweep(tmp_path) == (0 if kept else 1)
    assert folder.path.exists() is kept
