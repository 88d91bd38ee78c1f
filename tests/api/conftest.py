"""The whole API on a real database; what workers would write is written through ``db.tasks``, as they do."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from db import blobs, jobs, keys, tasks
from db.engine import Database
from db.keys import Scope
from db.settings import Settings
from db.tables import Task, TaskKind
from search.spec import (
    AskedWork,
    Costs,
    CurvePoint,
    DataInfo,
    ExportFormat,
    ExportWork,
    Finished,
    LayerInfo,
    Metric,
    ModelInfo,
    Plan,
    Profile,
    ProfileWork,
    Rung,
    SiteChoice,
    SitePlan,
    SplitSizes,
    TrialResult,
    TrialWork,
)
from search.spec import Task as DataTask

MODEL = ModelInfo(
    format="pt2",
    inputs=(),
    outputs=(),
    layers=(
        LayerInfo(name="fc", kind="Linear", weight=(10, 8), output=(10,), parameters=90, macs=800, compressible=True),
        LayerInfo(
            name="norm",
            kind="BatchNorm1d",
            weight=(10,),
            output=(10,),
            parameters=10,
            macs=200,
            compressible=False,
            reason="a norm has nothing to decompose",
        ),
    ),
    parameters=100,
    macs=1000,
    bytes=400,
)
DATA = DataInfo(
    format="npz",
    task=DataTask.CLASSIFICATION,
    inputs=(),
    target=None,
    classes=10,
    splits=SplitSizes(train=8, select=4, verify=4),
)
PROFILE = Profile(
    stage=0,
    metric=Metric.ACCURACY,
    value=0.9,
    verify_value=0.89,
    max_drop=0.01,
    costs=Costs(parameters=100, macs=1000, bytes=400),
    sites=(
        SiteChoice(
            site="fc",
            dense_parameters=90,
            dense_macs=800,
            curves={"svd": (CurvePoint(ranks=(2,), parameters=46, macs=360, error=0.25),)},
            sensitivity=1.5,
        ),
    ),
    seconds=1.0,
)


def result(rung: Rung = Rung.CHEAP, *, drop: float | None = 0.005, parameters: int = 50, **more: Any) -> TrialResult:
    costs = Costs(parameters=parameters, macs=500, bytes=4 * parameters)
    value = None if drop is None else 0.9 - drop
    return TrialResult(**{"rung": rung, "value": value, "drop": drop, "costs": costs, "seconds": 1.0, **more})


@dataclass
class Service:
    """A client that sends a key, and short ways to states that tests start from."""

    client: TestClient
    db: Database
    secret: str
    owner: str = "ann"
    result: Callable[..., TrialResult] = field(default=result)

    def request(self, method: str, path: str, **more: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.secret}", **more.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **more)

    def get(self, path: str, **more: Any) -> Any:
        return self.request("GET", path, **more)

    def post(self, path: str, **more: Any) -> Any:
        return self.request("POST", path, **more)

    def delete(self, path: str) -> Any:
        return self.request("DELETE", path)

    def as_owner(self, owner: str, *scopes: Scope) -> "Service":
        with self.db.begin() as s:
            _, secret = keys.add(s, owner, f"{owner}'s", scopes or (Scope.READ, Scope.SUBMIT))
        return Service(self.client, self.db, secret, owner)

    def upload(self, content: bytes = b"weights") -> str:
        return str(self.post("/v1/uploads", params={"filename": "net.pt2"}, content=content).json()["id"])

    def model_and_data(self) -> tuple[str, str]:
        """Not inspected yet."""
        upload = self.upload()
        model = self.post("/v1/models", json={"upload": upload, "name": "net"}).json()["id"]
        return model, self.post("/v1/datasets", json={"upload": upload, "name": "data"}).json()["id"]

    def job_body(self, **more: Any) -> dict[str, Any]:
        model, data = self.model_and_data()
        return {"model": model, "dataset": data, "budget": {"max_drop": 0.01}, "search": {"trials": 4}, **more}

    def new_job(self, **more: Any) -> str:
        reply = self.post("/v1/jobs", json=self.job_body(**more))
        assert reply.status_code == 202, reply.text
        return str(reply.json()["id"])

    def claim(self) -> Task:
        with self.db.begin() as s:
            task = tasks.claim(s, "worker", "cpu", 90)
        assert task is not None
        return task

    def inspect(self) -> None:
        """Both waiting inspections find what they hoped for."""
        for _ in range(2):
            task = self.claim()
            with self.db.begin() as s:
                info = MODEL if task.kind is TaskKind.INSPECT_MODEL else DATA
                assert tasks.complete_inspection(s, task.id, task.attempt, info)

    def apply(self, job_id: str, work: Sequence[AskedWork]) -> None:
        with self.db.read() as s:
            seen = jobs.advance_snapshot(s, job_id)
        assert seen is not None
        with self.db.begin() as s:
            assert jobs.apply_work(s, job_id, seen.version, work)

    def searching_job(
        self, trials: int = 1, *, profile: Profile = PROFILE, plan: Plan | None = None, **more: Any
    ) -> str:
        """Profiled, with ``trials`` queued."""
        job_id = self.new_job(**more)
        self.inspect()
        self.apply(job_id, [ProfileWork(stage=0, parent=None)])
        task = self.claim()
        with self.db.begin() as s:
            assert tasks.complete_profile(s, task.id, task.attempt, profile)
        plan = plan or {"fc": SitePlan(method="svd", ranks=(2,))}
        work = [TrialWork(number=n, stage=0, parent=None, params={}, plan=plan, rung=Rung.CHEAP) for n in range(trials)]
        self.apply(job_id, work)
        return job_id

    def complete_trial(self, measured: TrialResult) -> None:
        task = self.claim()
        weights = blobs.write(self.db, [b"tensors"]).id
        with self.db.begin() as s:
            assert tasks.complete_trial(s, task.id, task.attempt, measured, weights)

    def done_job(self, content: bytes = b"0123456789", **more: Any) -> str:
        """Finished, with one artifact ``mödel.pt2`` of trial 0."""
        job_id = self.searching_job(**more)
        self.complete_trial(result(Rung.FULL, keeps_budget=True, verify_value=0.885, verify_drop=0.005))
        self.apply(job_id, [ExportWork(number=0)])
        task = self.claim()
        blob = blobs.write(self.db, [content])
        made = tasks.NewArtifact(
            format=ExportFormat.PT2,
            filename="mödel.pt2",
            media_type="application/zip",
            blob_id=blob.id,
            facts={"value": 0.9},
        )
        with self.db.begin() as s:
            assert tasks.complete_export(s, task.id, task.attempt, [made])
        self.apply(job_id, [Finished(ok=True, code="kept_budget", reason="Halved.", best=0)])
        return job_id


def _service(url: str, folder: Path, **more: Any) -> Iterator[Service]:
    settings = Settings(data_dir=folder, database_url=url, **more)
    app = create_app(settings)
    with TestClient(app) as client:
        with app.state.db.begin() as s:
            _, secret = keys.add(s, "ann", "ann's", [Scope.READ, Scope.SUBMIT])
        yield Service(client, app.state.db, secret)


@pytest.fixture(autouse=True)
def no_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are not woken here: the rows wait for a sweeper."""
    monkeypatch.delenv("TENFOLD_REDIS_URL", raising=False)


@pytest.fixture
def service(sqlite_url: str, tmp_path: Path) -> Iterator[Service]:
    yield from _service(sqlite_url, tmp_path)


@pytest.fixture
def on_both(database_url: str, tmp_path: Path) -> Iterator[Service]:
    """The service on SQLite, and again on PostgreSQL."""
    yield from _service(database_url, tmp_path)


@pytest.fixture
def small_service(sqlite_url: str, tmp_path: Path) -> Iterator[Service]:
    """One with limits that a test can reach."""
    yield from _service(
        sqlite_url, tmp_path, max_upload_bytes=1000, max_stored_bytes=1500, max_live_jobs=1, requests_per_minute=20
    )
