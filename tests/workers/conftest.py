import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from db import blobs, datasets, jobs, models, uploads
from db.engine import Database
from db.settings import Settings
from search.spec import Budget, DataSpec, JobSpec, SearchSpec
from workers.run import Runner
from workers.supervise import Child

TOY = Path(__file__).with_name("toy_compute.py")
TOY_JOB = Path(__file__).with_name("toy_job.py")
OWNER = "somebody"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Start toy compute processes; all are closed at the end."""
    children: list[Child] = []

    def starter(*options: str, **keywords: object) -> Child:
        scratch = tmp_path / f"scratch{len(children)}"
        scratch.mkdir()
        command = [sys.executable, str(TOY), "--scratch", str(scratch), "--jail", "off", *options]
        child = Child(command, scratch, **keywords)  # type: ignore[arg-type]
        children.append(child)
        child.ready()
        return child

    yield starter
    for child in children:
        child.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", lease_seconds=2.0, jail="off", redis_url="redis+socket:///nowhere.sock")


@pytest.fixture
def db(settings: Settings) -> Iterator[Database]:
    database = Database(settings.database)
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def runner(db: Database, settings: Settings) -> Iterator[Runner]:
    """A worker without Celery whose compute process plays the toy job."""
    made = Runner(db, settings, "worker-1", compute=[str(TOY_JOB)])
    yield made
    made.stop()
    made.close()


def upload(db: Database, content: bytes) -> str:
    blob = blobs.write(db, [content])
    with db.begin() as s:
        return uploads.add(s, OWNER, "file", blob.id).id


@pytest.fixture
def submit(db: Database) -> Callable[..., str]:
    """Enters a model, a data set and a job as the API does; returns the job's id."""

    def submitter(*, model: bytes = b"toy model", trials: int = 6, parallel: int = 1) -> str:
        model_upload, data_upload = upload(db, model), upload(db, b"toy data")
        spec = JobSpec(budget=Budget(max_drop=0.01), search=SearchSpec(trials=trials, parallel=parallel))
        with db.begin() as s:
            model_id = models.add(s, OWNER, upload_id=model_upload, name="m").id
            data_id = datasets.add(s, OWNER, upload_id=data_upload, name="d", spec=DataSpec()).id
            return jobs.add(s, OWNER, model_id=model_id, dataset_id=data_id, name="j", spec=spec).id

    return submitter
