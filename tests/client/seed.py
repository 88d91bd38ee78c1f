"""Plays the workers: fills a database with jobs in the states that people see, through the service's own functions.

``python -m tests.client.seed FOLDER`` makes such a data folder to look at in the dashboard.
"""

import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from db import blobs, datasets, jobs, keys, models, tasks, uploads, workers
from db.engine import Database
from db.keys import Scope
from db.tables import Task, TaskKind
from search.spec import (
    AskedWork,
    Budget,
    Costs,
    CurvePoint,
    DataInfo,
    DataSpec,
    EpochRecord,
    ExportFormat,
    ExportWork,
    Finished,
    Interval,
    JobSpec,
    LayerInfo,
    Metric,
    ModelInfo,
    Profile,
    ProfileWork,
    RefineWork,
    Rung,
    SearchSpec,
    SiteChoice,
    SitePlan,
    SplitSizes,
    TensorInfo,
    TrialResult,
    TrialWork,
)
from search.spec import Task as DataTask

CHANNELS = (16, 16, 16, 32, 32, 64, 64)
SIDE = (32, 32, 32, 16, 16, 8, 8)
BASE = 0.9173


def _layers() -> tuple[LayerInfo, ...]:
    found = []
    for number, (wide, side) in enumerate(zip(CHANNELS, SIDE, strict=True)):
        before = 3 if number == 0 else CHANNELS[number - 1]
        weights = wide * before * 9
        found.append(
            LayerInfo(
                name=f"layer{number}.conv",
                kind="Conv2d",
                weight=(wide, before, 3, 3),
                output=(wide, side, side),
                parameters=weights,
                macs=weights * side * side,
                compressible=number > 0,
                reason="" if number else "three input channels: no decomposition is smaller",
            )
        )
    return (
        *found,
        LayerInfo(
            name="head", kind="Linear", weight=(10, 64), output=(10,), parameters=650, macs=640, compressible=True
        ),
    )


LAYERS = _layers()
DENSE = Costs(
    parameters=sum(layer.parameters for layer in LAYERS),
    macs=sum(layer.macs for layer in LAYERS),
    bytes=4 * sum(layer.parameters for layer in LAYERS),
)
IMAGE = TensorInfo(name="x", dtype="float32", shape=(None, 3, 32, 32))
MODEL = ModelInfo(
    format="pt2",
    inputs=(IMAGE,),
    outputs=(TensorInfo(name="logits", dtype="float32", shape=(None, 10)),),
    layers=LAYERS,
    parameters=DENSE.parameters,
    macs=DENSE.macs,
    bytes=DENSE.bytes,
)
DATA = DataInfo(
    format="npz",
    task=DataTask.CLASSIFICATION,
    inputs=(IMAGE,),
    target=TensorInfo(name="y", dtype="int64", shape=(None,)),
    classes=10,
    splits=SplitSizes(train=40_000, select=5_000, verify=5_000),
)


def _ranks(layer: LayerInfo) -> list[tuple[int, ...]]:
    most = min(layer.weight[:2])
    return [(rank, rank) if layer.kind == "Conv2d" else (rank,) for rank in range(max(1, most // 8), most, most // 8)]


def _point(layer: LayerInfo, ranks: tuple[int, ...]) -> CurvePoint:
    share = ranks[0] / min(layer.weight[:2])
    kept = 0.12 * share + 0.75 * share**2
    parameters = max(1, round(layer.parameters * kept))
    return CurvePoint(ranks=ranks, parameters=parameters, macs=round(layer.macs * kept), error=(1 - share) ** 2 / 2)


def _method(layer: LayerInfo) -> str:
    return "tucker2" if layer.kind == "Conv2d" else "svd"


def profile(stage: int = 0) -> Profile:
    sites = tuple(
        SiteChoice(
            site=layer.name,
            dense_parameters=layer.parameters,
            dense_macs=layer.macs,
            curves={_method(layer): tuple(_point(layer, ranks) for ranks in _ranks(layer))},
            sensitivity=round(0.3 + 1.4 * abs(math.sin(2 + index)), 3),
        )
        for index, layer in enumerate(LAYERS)
        if layer.compressible
    )
    return Profile(
        stage=stage,
        metric=Metric.ACCURACY,
        value=BASE,
        verify_value=0.9146,
        max_drop=0.01,
        costs=DENSE,
        sites=sites,
        seconds=31.0,
    )


def work(number: int, rung: Rung = Rung.CHEAP) -> TrialWork:
    """Candidate ``number``: how small it is wanders over the range, layer by layer."""
    plan = {}
    for index, layer in enumerate(LAYERS):
        if layer.compressible and (number + index) % 5:
            lattice = _ranks(layer)
            at = 0.5 + 0.45 * math.sin(1.7 * number + 0.6 * index)
            plan[layer.name] = SitePlan(method=_method(layer), ranks=lattice[int(at * len(lattice))])
    return TrialWork(number=number, stage=0, parent=None, params={"cost": 0.3}, plan=plan, rung=rung)


def measured(number: int, rung: Rung) -> TrialResult:
    """What that candidate measures: the smaller, the worse; training heals most of it."""
    plan = work(number).plan
    points = {layer.name: _point(layer, plan[layer.name].ranks) for layer in LAYERS if layer.name in plan}
    after = [points.get(layer.name, layer) for layer in LAYERS]
    costs = Costs(
        parameters=sum(a.parameters for a in after),
        macs=sum(a.macs for a in after),
        bytes=4 * sum(a.parameters for a in after),
        latency_ms=None if rung is Rung.CHEAP else 9.0 * sum(a.macs for a in after) / DENSE.macs + 2,
        dense_latency_ms=None if rung is Rung.CHEAP else 11.0,
    )
    share = costs.parameters / DENSE.parameters
    raw = 0.5 * (1 - share) ** 2.5 + 0.01 * abs(math.sin(7 * number))
    drop = raw * {Rung.CHEAP: 1.0, Rung.SHORT: 0.14, Rung.FULL: 0.05}[rung]
    trained = {Rung.CHEAP: 0, Rung.SHORT: 2, Rung.FULL: 10}[rung]
    curve = tuple(
        EpochRecord(
            epoch=float(epoch),
            loss=0.2 + raw / epoch,
            value=BASE - drop - (raw - drop) / (1 + 3 * epoch),
            learning_rate=0.02 * (1 - (epoch - 1) / trained),
        )
        for epoch in range(1, trained + 1)
    )
    final = rung is Rung.FULL
    return TrialResult(
        rung=rung,
        value=BASE - drop,
        drop=drop,
        loss=0.3 + drop,
        costs=costs,
        seconds=4.0 + 20 * trained,
        epochs=float(trained),
        curve=curve,
        verify_value=0.9146 - drop if final else None,
        verify_drop=drop if final else None,
        verify_interval=Interval(low=drop - 0.004, high=drop + 0.004) if final else None,
        keeps_budget=drop <= 0.01 if final else None,
    )


@dataclass
class Workers:
    """Takes what is queued and finishes it, one step at a time."""

    db: Database
    owner: str = "ann"
    files: dict[str, bytes] = field(default_factory=dict)
    """The last export's content by file name."""

    def inspect(self, refuse: str | None = None) -> int:
        """Every model and data set that waits; ``refuse``: reject them with this sentence. Returns how many."""
        done = 0
        while (task := self._claim()) is not None:
            with self.db.begin() as s:
                if refuse is None:
                    info = MODEL if task.kind is TaskKind.INSPECT_MODEL else DATA
                    tasks.complete_inspection(s, task.id, task.attempt, info)
                else:
                    tasks.fail(s, task.id, task.attempt, "bad_model", refuse, retry=False)
            done += 1
        return done

    def job(self, name: str = "resnet20 at one point", trials: int = 30, hours: float | None = None) -> str:
        """A job whose model and data are ready."""
        blob = blobs.write(self.db, [b"a file of " + name.encode()])
        spec = JobSpec(budget=Budget(max_drop=0.01), search=SearchSpec(trials=trials, hours=hours))
        with self.db.begin() as s:
            upload = uploads.add(s, self.owner, "resnet20.pt2", blob.id).id
            model = models.add(s, self.owner, upload_id=upload, name="resnet20")
            data = datasets.add(s, self.owner, upload_id=upload, name="cifar10", spec=DataSpec())
            made = jobs.add(s, self.owner, model_id=model.id, dataset_id=data.id, name=name, spec=spec).id
        self.inspect()
        return made

    def profile(self, job: str) -> None:
        self.ask(job, ProfileWork(stage=0, parent=None))
        task = self._claim(job)
        assert task is not None
        with self.db.begin() as s:
            assert tasks.complete_profile(s, task.id, task.attempt, profile())

    def trial(self, job: str, number: int, rung: Rung = Rung.CHEAP) -> None:
        self.ask(job, RefineWork(number=number, epochs=10) if rung is Rung.FULL else work(number, rung))
        task = self._claim(job)
        assert task is not None
        blob = blobs.write(self.db, [f"weights of {number} {rung}".encode()])
        with self.db.begin() as s:
            assert tasks.complete_trial(s, task.id, task.attempt, measured(number, rung), blob.id)

    def search(self, job: str, trials: int) -> None:
        self.profile(job)
        for number in range(trials):
            self.trial(job, number)
            if number % 3 == 2:
                self.trial(job, number, Rung.SHORT)

    def export(self, job: str, number: int, *, asked: bool = False) -> None:
        """Files of a trial; ``asked``: somebody has asked for them already."""
        if not asked:
            self.ask(job, ExportWork(number=number))
        task = self._claim(job)
        assert task is not None
        self.files = {
            "model.pt2": bytes(range(256)) * 12_000,
            "model.onnx": b"onnx" * 5_000,
            "report.json": b'{"seed": 0}',
        }
        made = [
            tasks.NewArtifact(
                format=ExportFormat(kind), filename=name, media_type=media, blob_id=blobs.write(self.db, [content]).id
            )
            for (name, content), kind, media in zip(
                self.files.items(),
                ("pt2", "onnx", "report"),
                ("application/octet-stream", "application/octet-stream", "application/json"),
                strict=True,
            )
        ]
        with self.db.begin() as s:
            assert tasks.complete_export(s, task.id, task.attempt, made)

    def finish(self, job: str, best: int | None, *, ok: bool = True, reason: str = "Kept the budget.") -> None:
        code = "kept_budget" if ok else "nothing_smaller"
        self.ask(job, Finished(ok=ok, code=code, reason=reason, best=best))

    def done_job(self, name: str = "resnet20 at one point", trials: int = 30) -> str:
        """From upload to files."""
        job = self.job(name, trials)
        self.search(job, trials)
        with self.db.read() as s:
            best = jobs.get(s, self.owner, job).best
        assert best is not None
        self.trial(job, best, Rung.FULL)
        self.export(job, best)
        self.finish(job, best)
        return job

    def ask(self, job: str, *asked: AskedWork) -> None:
        with self.db.read() as s:
            seen = jobs.advance_snapshot(s, job)
        assert seen is not None
        with self.db.begin() as s:
            assert jobs.apply_work(s, job, seen.version, asked)

    def _claim(self, job: str | None = None) -> Task | None:
        with self.db.begin() as s:
            return tasks.claim(s, "w", "cpu", 90, job)


@contextmanager
def inspecting(workers: Workers, refuse: str | None = None) -> Iterator[None]:
    """A worker that inspects whatever comes."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.05):
            workers.inspect(refuse)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def main(folder: Path) -> None:
    db = Database(f"sqlite:///{folder / 'tenfold.sqlite'}")
    db.migrate()
    with db.begin() as s:
        print(keys.add(s, "ann", "seed", [Scope.ADMIN])[1])
        for number in range(2):
            jail = {"landlock": True, "seccomp": True, "rlimits": number == 0}
            workers.seen(s, f"worker-{number}", host="here", queue="cpu", device="2 cores", jail=jail)
    play = Workers(db)
    play.done_job()
    play.finish(play.job("digits, nothing found"), None, ok=False, reason="No candidate kept the budget: allow more.")
    play.search(play.job("vgg16 overnight", 40), 12)
    db.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
