"""Real SQLite, real Valkey, real processes; only the network is a toy."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from db import blobs, datasets, events, jobs, models, tasks, uploads
from db.engine import Database
from db.settings import Settings
from db.tables import Job, JobState, TaskKind, TaskState
from launch import valkey
from launch.processes import Group, Service
from search.spec import Budget, DataSpec, JobSpec, SearchSpec
from workers.queue import wake

OWNER = "somebody"
ROOT = Path(__file__).parents[2]


class House:
    """Valkey and some workers in a folder, with what a test does to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings(data_dir=folder, lease_seconds=2.0, jail="off", redis_url=valkey.url(folder))
        self.db = Database(self.settings.database)
        self.db.migrate()
        self.group = Group()

    def start(self, workers: int) -> None:
        self.group.start(valkey.service(self.folder, self.log("valkey")), ready=lambda: valkey.is_up(self.folder))
        for n in range(workers):
            self.group.start(self.worker(f"worker-{n}"))

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def worker(self, name: str) -> Service:
        environment = {
            "TENFOLD_DATA_DIR": str(self.folder),
            "TENFOLD_REDIS_URL": str(self.settings.redis_url),
            "TENFOLD_LEASE_SECONDS": "2",
            "TENFOLD_JAIL": "off",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        return Service(name, [sys.executable, str(Path(__file__).with_name("worker.py"))], environment, self.log(name))

    def control(self, **values: object) -> None:
        folder = self.folder / "scratch"
        folder.mkdir(exist_ok=True)
        (folder / "control.json").write_text(json.dumps(values))

    def submit(self, *, trials: int = 4, parallel: int = 1) -> str:
        spec = JobSpec(budget=Budget(max_drop=0.01), search=SearchSpec(trials=trials, parallel=parallel))
        model_blob, data_blob = blobs.write(self.db, [b"toy model"]), blobs.write(self.db, [b"toy data"])
        with self.db.begin() as s:
            model_upload = uploads.add(s, OWNER, "m", model_blob.id).id
            data_upload = uploads.add(s, OWNER, "d", data_blob.id).id
            model = models.add(s, OWNER, upload_id=model_upload, name="m").id
            data = datasets.add(s, OWNER, upload_id=data_upload, name="d", spec=DataSpec()).id
            job = jobs.add(s, OWNER, model_id=model, dataset_id=data, name="j", spec=spec).id
        wake("cpu", self.settings.redis_url)
        return job

    def job(self, job_id: str) -> Job:
        with self.db.read() as s:
            return jobs.get(s, OWNER, job_id)

    def told(self, job_id: str, kind: str) -> list[str]:
        with self.db.read() as s:
            return [e.message for e in events.page(s, OWNER, job_id, limit=1000).items if e.kind == kind]

    def until_a_trial_runs(self, job_id: str) -> Service:
        """Until one is under way with a checkpoint; returns the worker that runs it."""

        running: list[Service] = []

        def found() -> bool:
            with self.db.read() as s:
                for task in tasks.live(s, job_id):
                    trial = task.kind is TaskKind.TRIAL and task.state is TaskState.RUNNING
                    if trial and task.checkpoint_blob is not None and (service := self.service_of(task.worker)):
                        running.append(service)
            return bool(running)

        self.until(found)
        return running[0]

    def until_done(self, job_id: str, seconds: float = 60) -> Job:
        self.until(lambda: self.job(job_id).state in (JobState.DONE, JobState.FAILED, JobState.CANCELLED), seconds)
        return self.job(job_id)

    def until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(f"== {p.name}\n{p.read_text()[-3000:]}" for p in self.folder.glob("*.log"))
                pytest.fail(f"waited {seconds} s in vain\n{logs}")
            time.sleep(0.1)

    def until_tended(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        """The same while the launcher starts again what died."""

        def tended() -> bool:
            self.group.tend()
            return condition()

        self.until(tended, seconds)

    def compute_of(self, worker: psutil.Process) -> psutil.Process:
        def found() -> list[psutil.Process]:
            return [c for c in worker.children() if is_a_toy(c)]

        self.until(lambda: bool(found()))
        return found()[0]

    def service_of(self, worker: str | None) -> Service | None:
        """The process of a worker, whose name says its number: HOST-PID-MARK. None for a dead one's, whose lease has
        not run out yet."""
        pid = int(str(worker).split("-")[-2])
        return next((s for s in self.group.services if s.process is not None and s.process.pid == pid), None)

    def close(self) -> None:
        self.group.stop()
        self.db.close()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    try:
        yield made
    finally:
        made.close()
        assert not _orphans(os.getpid(), str(tmp_path)), "processes were left behind"


def is_a_toy(process: psutil.Process) -> bool:
    try:
        return "toy_job" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _orphans(own: int, mark: str) -> list[psutil.Process]:
    left = []
    for process in psutil.process_iter():
        try:
            if process.pid != own and mark in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
        except psutil.Error:
            continue
    return left
