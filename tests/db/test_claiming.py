"""Who gets which task, and that nobody gets one that another has."""

import time

from sqlalchemy import select

from db import jobs, tasks
from db.tables import Task, TaskKind, TaskState
from search.spec import TrialState


def _add(house, owner, *, at=None, queue="cpu", kind=TaskKind.INSPECT_MODEL, job_id=None):
    with house.db.begin() as s:
        task = tasks.add(s, kind, owner, queue=queue, job_id=job_id)
        if at is not None:
            task.created_at = at
        return task.id


def test_eight_workers_claiming_at_once_never_get_the_same_task(house, together):
    ids = {_add(house, f"owner{n % 3}") for n in range(24)}

    def work():
        got = []
        for _ in range(200):
            task = house.claim("w")
            if task is None:
                break
            got.append(task.id)
        return got

    claimed = together([work] * 8)
    # A worker may find every waiting row locked by another for a moment and stop early: what counts is that no row was
    # given twice; what is left is claimed now.
    flat = [task_id for got in claimed for task_id in got]
    while (task := house.claim("w")) is not None:
        flat.append(task.id)
    assert sorted(flat) == sorted(ids)
    assert {house.task(task_id).attempt for task_id in ids} == {1}


def test_a_claim_starts_a_lease_by_the_database_clock(house):
    task_id = _add(house, "ann")
    with house.db.begin() as s:
        before = house.db.now(s)
    task = house.claim("cpu-1", lease_s=90)
    assert (task.id, task.state, task.attempt, task.worker) == (task_id, TaskState.RUNNING, 1, "cpu-1")
    assert before + 90 <= task.lease_until <= before + 120
    assert task.started_at >= before


def test_nothing_waiting_gives_none(house):
    assert house.claim() is None


def test_a_worker_takes_only_its_own_device_class(house):
    _add(house, "ann", queue="cuda")
    assert house.claim(queue="cpu") is None
    assert house.claim(queue="cuda") is not None


def test_a_claimed_trial_is_running(house):
    job_id = house.searching_job(trials=1)
    house.claim()
    with house.db.read() as s:
        assert [record.state for record in jobs.advance_snapshot(s, job_id).history] == [TrialState.RUNNING]


def test_the_trials_of_a_job_start_in_the_order_of_their_numbers(house):
    house.searching_job(trials=5)
    assert [house.claim().trial for _ in range(5)] == [0, 1, 2, 3, 4]


def test_inspections_come_before_everything(house):
    warm = house.searching_job(trials=2)
    inspection = _add(house, "bob")
    assert house.claim(warm_job=warm).id == inspection


def test_the_warm_job_comes_before_an_older_one(house):
    house.searching_job(trials=1)
    warm = house.searching_job(trials=1)
    assert house.claim(warm_job=warm).job_id == warm


def test_an_owner_who_waited_long_comes_before_the_warm_job(house):
    waiting = house.searching_job("bob", trials=1)
    warm = house.searching_job("ann", trials=3)
    with house.db.begin() as s:
        for row in s.scalars(select(Task).where(Task.owner == "bob")):
            row.created_at -= 1000
            row.started_at = None if row.started_at is None else row.started_at - 1000
    assert house.claim(warm_job=warm).job_id == waiting
    # … once: then bob was served, and ann's next trial may use what the worker has loaded
    assert house.claim(warm_job=warm).job_id == warm


def test_owners_share_the_workers(house):
    house.searching_job("ann", trials=6)
    house.searching_job("bob", trials=2)
    assert sorted(house.claim().owner for _ in range(4)) == ["ann", "ann", "bob", "bob"]


def test_owners_who_run_nothing_take_turns(house):
    house.searching_job("ann", trials=4)
    house.searching_job("bob", trials=4)
    served = []
    for _ in range(6):
        task = house.claim()
        served.append(task.owner)
        with house.db.begin() as s:
            tasks.complete_trial(s, task.id, task.attempt, house.result())
    assert served.count("ann") == served.count("bob") == 3


def test_a_paused_job_starts_nothing_and_goes_on_when_resumed(house):
    job_id = house.searching_job(trials=1)
    with house.db.begin() as s:
        jobs.pause(s, "ann", job_id)
    assert house.claim(warm_job=job_id) is None
    with house.db.read() as s:
        assert tasks.waiting_queues(s) == []
    with house.db.begin() as s:
        jobs.resume(s, "ann", job_id)
    with house.db.read() as s:
        assert tasks.waiting_queues(s) == ["cpu"]
    assert house.claim().job_id == job_id


def test_claims_stay_quick_behind_a_long_history(house):
    job_id = house.searching_job(trials=3)
    with house.db.begin() as s:
        for n in range(5000):
            s.add(
                Task(
                    id=f"old{n}", kind=TaskKind.TRIAL, owner="ann", job_id=job_id, trial=0, work={}, queue="cpu",
                    state=TaskState.DONE, attempt=1, max_attempts=3, created_at=float(n), started_at=float(n),
                )
            )  # fmt: skip
    start = time.perf_counter()
    for _ in range(3):
        assert house.claim() is not None
    assert (time.perf_counter() - start) / 3 < 0.5  # a scan per claim takes seconds
