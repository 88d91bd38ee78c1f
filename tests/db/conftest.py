"""A database with something in it, built through the same functions that the service uses."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import select

from db import blobs, datasets, jobs, models, tasks, uploads
from db.engine import Database
from db.tables import Job, Task, TaskKind, TaskState
from search.spec import (
    AskedWork,
    Budget,
    Cost,
    Costs,
    DataInfo,
    DataSpec,
    JobSpec,
    Metric,
    ModelInfo,
    Profile,
    ProfileWork,
    Rung,
    SearchSpec,
    SitePlan,
    SplitSizes,
    TrialResult,
    TrialWork,
)
from search.spec import Task as DataTask

MODEL = ModelInfo(format="pt2", inputs=(), outputs=(), layers=(), parameters=100, macs=1000, bytes=400)
DATA = DataInfo(
    format="npz",
    task=DataTask.CLASSIFICATION,
    inputs=(),
    target=None,
    classes=10,
    splits=SplitSizes(train=8, select=4, verify=4),
)


def profile(stage: int = 0, max_drop: float = 0.01) -> Profile:
    costs = Costs(parameters=100, macs=1000, bytes=400)
    return Profile(
        stage=stage,
        metric=Metric.ACCURACY,
        value=0.9,
        verify_value=0.9,
        max_drop=max_drop,
        costs=costs,
        sites=(),
        seconds=1.0,
    )


def trial_work(number: int, rung: Rung = Rung.CHEAP) -> TrialWork:
    plan = {
        "layer2.conv": SitePlan(method="svd", ranks=(4,)),
        "layer1.conv": SitePlan(method="svd", ranks=(number + 1,)),
    }
    return TrialWork(number=number, stage=0, parent=None, params={"z": 1, "a": 0.5}, plan=plan, rung=rung)


def result(rung: Rung = Rung.CHEAP, *, drop: float = 0.005, parameters: int = 50, **more: Any) -> TrialResult:
    costs = Costs(parameters=parameters, macs=500, bytes=4 * parameters)
    return TrialResult(**{"rung": rung, "value": 0.9 - drop, "drop": drop, "costs": costs, "seconds": 1.0, **more})


@dataclass
class House:
    """Short ways to states that tests start from; ``owner`` and ``queue`` default to one each."""

    db: Database
    profile: Callable[..., Profile] = field(default=profile)
    trial_work: Callable[..., TrialWork] = field(default=trial_work)
    result: Callable[..., TrialResult] = field(default=result)

    def upload(self, owner: str = "ann", content: bytes = b"weights") -> str:
        blob = blobs.write(self.db, [content])
        with self.db.begin() as s:
            return uploads.add(s, owner, "net.pt2", blob.id).id

    def new_job(
        self,
        owner: str = "ann",
        *,
        parallel: int = 2,
        minimize: tuple[Cost, ...] = (Cost.PARAMETERS,),
        hours: float | None = None,
    ) -> str:
        """A job whose model and data still wait for inspection."""
        upload = self.upload(owner)
        search = SearchSpec(trials=10, parallel=parallel, hours=hours)
        spec = JobSpec(budget=Budget(max_drop=0.01), minimize=minimize, search=search)
        with self.db.begin() as s:
            model = models.add(s, owner, upload_id=upload, name="net")
            data = datasets.add(s, owner, upload_id=upload, name="data", spec=DataSpec())
            return jobs.add(s, owner, model_id=model.id, dataset_id=data.id, name="job", spec=spec).id

    def ready_job(self, owner: str = "ann", **more: Any) -> str:
        """… and whose model and data are ready."""
        job_id = self.new_job(owner, **more)
        self.inspect_all()
        return job_id

    def inspect_all(self) -> None:
        """Inspects every model and data set that waits for it; they are claimed before all else."""
        while self._waiting_inspections():
            task = self.claim("inspector")
            assert task is not None
            info = MODEL if task.kind is TaskKind.INSPECT_MODEL else DATA
            with self.db.begin() as s:
                assert tasks.complete_inspection(s, task.id, task.attempt, info)

    def _waiting_inspections(self) -> bool:
        kinds = (TaskKind.INSPECT_MODEL, TaskKind.INSPECT_DATA)
        with self.db.read() as s:
            waiting = select(Task.id).where(Task.kind.in_(kinds), Task.state == TaskState.QUEUED)
            return s.scalar(waiting.limit(1)) is not None

    def searching_job(self, owner: str = "ann", trials: int = 0, **more: Any) -> str:
        """… and which is profiled and has ``trials`` queued trials."""
        job_id = self.ready_job(owner, **more)
        self.apply(job_id, [ProfileWork(stage=0, parent=None)])
        task = self.claim("profiler", warm_job=job_id)
        assert task is not None
        assert task.job_id == job_id
        with self.db.begin() as s:
            assert tasks.complete_profile(s, task.id, task.attempt, profile())
        if trials:
            self.apply(job_id, [trial_work(n) for n in range(trials)])
        return job_id

    def apply(self, job_id: str, work: Sequence[AskedWork]) -> None:
        with self.db.read() as s:
            seen = jobs.advance_snapshot(s, job_id)
        assert seen is not None
        with self.db.begin() as s:
            assert jobs.apply_work(s, job_id, seen.version, work)

    def claim(
        self, worker: str = "w", *, warm_job: str | None = None, lease_s: float = 90, queue: str = "cpu"
    ) -> Task | None:
        with self.db.begin() as s:
            return tasks.claim(s, worker, queue, lease_s, warm_job)

    def run_trial(self, job_id: str, measured: TrialResult, weights: bytes | None = None) -> Task:
        """Claims the next task of the job and completes it with ``measured``."""
        task = self.claim(warm_job=job_id)
        assert task is not None
        assert task.job_id == job_id
        blob = None if weights is None else blobs.write(self.db, [weights]).id
        with self.db.begin() as s:
            assert tasks.complete_trial(s, task.id, task.attempt, measured, blob)
        return task

    def job(self, job_id: str, owner: str = "ann") -> Job:
        with self.db.read() as s:
            return jobs.get(s, owner, job_id)

    def task(self, task_id: str) -> Task:
        with self.db.read() as s:
            return tasks.get(s, task_id)


@pytest.fixture
def house(database: Database) -> House:
    return House(database)


@pytest.fixture
def together() -> Callable[[Sequence[Callable[[], Any]]], list[Any]]:
    """Runs functions in threads that start at one moment; returns what they return, or the exceptions they raise."""

    def run(functions: Sequence[Callable[[], Any]]) -> list[Any]:
        start = threading.Barrier(len(functions))
        results: list[Any] = [None] * len(functions)

        def one(index: int) -> None:
            start.wait()
            try:
                results[index] = functions[index]()
            except Exception as error:
                results[index] = error

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(functions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run
