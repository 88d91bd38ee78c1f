"""Whatever is killed in the middle of a trial, the job ends once and well."""

import psutil
import pytest

from db import artifacts, trials
from db.tables import TERMINAL_JOBS, JobState
from search.spec import TrialState

OWNER = "somebody"


def assert_ended_once_and_well(house, job_id, trials_asked):
    job = house.until_done(job_id)
    assert (job.state, job.reason_code) == (JobState.DONE, "kept_budget"), job.reason
    ends = [m for m in house.told(job_id, "state") if "keeps the budget" in m]
    assert len(ends) == 1, "the job ended once"
    with house.db.read() as s:
        rows = trials.page(s, OWNER, job_id, limit=1000).items
        made = artifacts.page(s, OWNER, job_id).items
    assert [r.number for r in rows] == list(range(trials_asked))
    assert all(r.state is TrialState.DONE for r in rows)
    assert len({(a.trial, a.filename) for a in made}) == len(made) == 1


def lost_attempts(house, job_id):
    """Those followed by another, and those that were a trial's last."""
    given_up = [m for m in house.told(job_id, "trial") if " failed: " in m]
    return len(house.told(job_id, "attempt")) + len(given_up)


def test_a_job_runs_through_real_workers_and_a_real_broker(house):
    house.start(workers=2)
    job_id = house.submit(trials=6, parallel=2)
    assert_ended_once_and_well(house, job_id, 6)


@pytest.mark.long
def test_killing_the_compute_process_costs_an_attempt_of_one_trial(house):
    house.control(steps=10)
    house.start(workers=1)
    job_id = house.submit(trials=2)
    worker = house.until_a_trial_runs(job_id)
    house.compute_of(psutil.Process(worker.process.pid)).kill()
    house.until(lambda: house.told(job_id, "attempt"))
    house.control(steps=1)
    assert_ended_once_and_well(house, job_id, 2)
    assert len(house.told(job_id, "attempt")) == 1
    assert "SIGKILL" in house.told(job_id, "attempt")[0]


def test_killing_a_worker_ends_its_compute_process_and_another_worker_takes_over_from_the_checkpoint(house):
    house.control(steps=30)
    house.start(workers=2)
    job_id = house.submit(trials=2)
    worker = house.until_a_trial_runs(job_id)
    compute = house.compute_of(psutil.Process(worker.process.pid))
    worker.process.kill()
    _, alive = psutil.wait_procs([compute], timeout=5)
    assert not alive, "the compute process outlived its worker"
    house.until(lambda: any("stopped answering" in m for m in house.told(job_id, "attempt")))
    house.control(steps=2)
    assert_ended_once_and_well(house, job_id, 2)
    resumed = (house.folder / "scratch" / "log.txt").read_text().splitlines()
    assert resumed[0] != "resumed at 0"
    house.until(lambda: len(list((house.folder / "scratch").glob("run-*.lock"))) <= 1)


@pytest.mark.long
def test_killing_the_broker_does_not_disturb_a_job_under_way(house):
    house.control(steps=10)
    house.start(workers=2)
    job_id = house.submit(trials=3, parallel=2)
    house.until_a_trial_runs(job_id)
    broker = house.group.services[0]
    (server,) = psutil.Process(broker.process.pid).children()
    server.kill()
    broker.process.wait(10)
    house.control(steps=1)
    house.until_tended(lambda: broker.process is not None and broker.process.poll() is None)
    assert_ended_once_and_well(house, job_id, 3)
    second = house.submit(trials=2)
    assert_ended_once_and_well(house, second, 2)


def test_a_broker_that_is_away_when_a_job_is_submitted_only_delays_it(house):
    house.start(workers=1)
    broker = house.group.services[0]
    broker.process.kill()
    broker.process.wait(10)
    job_id = house.submit(trials=2)
    house.until_tended(lambda: broker.process is not None and broker.process.poll() is None)
    assert_ended_once_and_well(house, job_id, 2)


@pytest.mark.long
def test_stopping_a_worker_gives_its_task_back_at_no_cost(house):
    house.control(steps=30)
    house.start(workers=2)
    job_id = house.submit(trials=2)
    worker = house.until_a_trial_runs(job_id)
    worker.process.terminate()
    worker.process.wait(15)
    house.control(steps=1)
    assert_ended_once_and_well(house, job_id, 2)
    assert any("is stopping" in m for m in house.told(job_id, "attempt"))
    assert not any("stopped answering" in m for m in house.told(job_id, "attempt"))


@pytest.mark.long
def test_a_storm_of_kills_still_ends_the_job_once(house):
    house.control(steps=40)  # so long that the job cannot end before the last kill
    house.start(workers=2)
    job_id = house.submit(trials=8, parallel=2)
    for round_ in range(4):
        before = lost_attempts(house, job_id)
        worker = house.until_a_trial_runs(job_id)
        target = psutil.Process(worker.process.pid)
        (house.compute_of(target) if round_ % 2 else target).kill()
        house.until_tended(lambda before=before: lost_attempts(house, job_id) > before)
    house.control(steps=1)
    house.until_tended(lambda: house.job(job_id).state in TERMINAL_JOBS, 120)
    job = house.job(job_id)
    assert job.state is JobState.DONE
    assert len([m for m in house.told(job_id, "state") if "keeps the budget" in m]) == 1
