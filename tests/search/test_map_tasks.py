"""Segmentation and keypoints end to end, as the compute process asks it, on networks small enough to train here."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from search import profiling, reload
from search.allocate import allocate
from search.errors import BadBaseline, BadData
from search.heatmaps import gaussians
from search.session import Session
from search.spec import (
    Budget,
    DataSpec,
    ExportFormat,
    FineTune,
    JobSpec,
    Metric,
    Outcome,
    Plan,
    Profile,
    Rung,
    SearchSpec,
    Task,
    Transform,
    TrialRecord,
    TrialResult,
    TrialState,
    TrialWork,
)
from tenfold import exporting

pytestmark = pytest.mark.usefixtures("short_measurements")

SIDE, ROWS = 32, 160
JOB = JobSpec(
    budget=Budget(max_drop=0.03),
    methods=("svd", "tucker2"),
    fine_tune=FineTune(epochs=3, short_epochs=2, batch_size=16, learning_rate=0.02),
    search=SearchSpec(calibration_samples=32),
)
WITHOUT_ONNX = JOB.model_copy(update={"export": (ExportFormat.PT2, ExportFormat.REPORT)})
SHAPES = DataSpec(task=Task.SEGMENTATION, transform=Transform(scale=1 / 255))
DOTS = DataSpec(task=Task.KEYPOINTS, transform=Transform(scale=1 / 255, augment="crop_flip"), mirror=())


class FCN(nn.Module):
    """A map of logits for background, square, disc."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1)
        self.head = nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv2(torch.relu(self.conv1(x)))))


class Stacked(nn.Module):
    """Two stacks that each give heatmaps of two dots at half the side; the first's are of no use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, stride=2)
        self.body = nn.Conv2d(16, 24, 3, padding=1)
        self.first = nn.Conv2d(24, 2, 1)
        self.last = nn.Conv2d(24, 2, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = torch.relu(self.body(torch.relu(self.stem(x))))
        return [0 * self.first(x), self.last(x)]


def shapes(rows: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Noisy images (rows, 3, 32, 32) of a red square and a green disc, and their class maps, some pixels ignored."""
    random = np.random.default_rng(0)
    x = random.integers(0, 60, (rows, 3, SIDE, SIDE))
    y = np.zeros((rows, SIDE, SIDE), np.uint8)
    grid = np.indices((SIDE, SIDE))
    for row in range(rows):
        (top, left), centre = random.integers(2, 18, 2), random.integers(8, 24, 2)
        square = (grid >= np.array([top, left])[:, None, None]) & (grid < np.array([top, left])[:, None, None] + 10)
        for label, inside in ((1, square.all(0)), (2, np.hypot(*(grid - centre[:, None, None])) < 6)):
            y[row][inside] = label
            x[row][:, inside] = random.integers(0, 60, (3, inside.sum()))
            x[row][label - 1, inside] += 120
    y[:, 0] = 255
    return x.astype(np.uint8), y


def dots(rows: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Noisy images of a red and a green dot, and where they are, x before y, with a third number that says so."""
    random = np.random.default_rng(1)
    x = random.integers(0, 60, (rows, 3, SIDE, SIDE))
    joints = np.ones((rows, 2, 3), np.float32)
    joints[..., :2] = random.uniform(4, SIDE - 5, (rows, 2, 2))
    grid = np.indices((SIDE, SIDE))
    for row in range(rows):
        for j in range(2):
            away = grid - joints[row, j, 1::-1, None, None]
            x[row, j] += (160 * np.exp(-np.square(away).sum(0) / 6)).astype(int)
    joints[::9, 1, 2] = 0
    return x.astype(np.uint8), joints


@dataclass
class Job:
    session: Session
    profile: Profile
    plan: Plan
    spec: DataSpec
    model: Path
    data: Path


def opened(folder: Path, network: nn.Module, spec: DataSpec, arrays: dict[str, Any], job: JobSpec = JOB) -> Job:
    exporting.export(network.eval(), torch.rand(2, 3, SIDE, SIDE), folder / "m.pt2")
    np.savez(folder / "d.npz", **arrays)
    session = Session(folder / "m.pt2", folder / "d.npz", data_spec=spec, spec=job, scratch=folder / "scratch")
    profile = session.profile(0, None)
    fixed = profile.costs.parameters - sum(s.dense_parameters for s in profile.sites)
    plan = allocate(profile.sites, 0.5, fixed_parameters=fixed)
    return Job(session, profile, plan, spec, folder / "m.pt2", folder / "d.npz")


def trained(network: nn.Module, x: np.ndarray[Any, Any], loss: Any, epochs: int) -> nn.Module:
    images = torch.from_numpy(x).float() / 255
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(16):
            optimizer.zero_grad()
            loss(network(images[rows]), rows).backward()
            optimizer.step()
    return network


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> Job:
    torch.manual_seed(0)
    x, y = shapes(ROWS)
    labels = torch.from_numpy(y).long()
    network = trained(
        FCN(), x[:96], lambda out, rows: nn.functional.cross_entropy(out, labels[rows], ignore_index=255), 4
    )
    return opened(tmp_path_factory.mktemp("shapes"), network, SHAPES, {"x": x, "y": y}, WITHOUT_ONNX)


@pytest.fixture(scope="module")
def keypoints(tmp_path_factory: pytest.TempPathFactory) -> Job:
    torch.manual_seed(0)
    x, y = dots(ROWS)
    wanted = gaussians(torch.from_numpy((y[..., :2] + 0.5) / SIDE), SIDE // 2, SIDE // 2, 1.0)
    network = trained(Stacked(), x[:96], lambda out, rows: (3 * wanted[rows] - out[-1]).square().mean(), 6)
    return opened(tmp_path_factory.mktemp("dots"), network, DOTS, {"x": x, "y": y, "length": np.full(ROWS, 6.0)})


def work(plan: Plan, rung: Rung) -> TrialWork:
    epochs = {Rung.CHEAP: 0, Rung.SHORT: 2, Rung.FULL: 3}[rung]
    return TrialWork(number=3, stage=0, parent=None, params={}, plan=plan, rung=rung, epochs=epochs)


def record(plan: Plan, *results: TrialResult) -> TrialRecord:
    return TrialRecord(
        number=3,
        stage=0,
        parent=None,
        params={},
        plan=plan,
        state=TrialState.DONE,
        rung=results[-1].rung,
        results={r.rung: r for r in results},
    )


@pytest.mark.parametrize("name", ["segmentation", "keypoints"])
def test_a_job_goes_from_the_profile_to_files_that_measure_the_same(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    job: Job = request.getfixturevalue(name)
    session, profile, plan = job.session, job.profile, job.plan
    assert profile.metric is {"segmentation": Metric.MIOU, "keypoints": Metric.PCK}[name]
    assert profile.value > 0.75
    assert any(site.sensitivity > 0 for site in profile.sites)
    cheap = session.trial(work(plan, Rung.CHEAP), profile, None, None, None, tmp_path / "cheap")
    weights = tmp_path / "cheap" / "weights.safetensors"
    assert cheap.outcome is Outcome.OK
    assert cheap.value is not None
    assert cheap.costs.parameters <= 0.5 * profile.costs.parameters
    full = session.refine(record(plan, cheap), 3, profile, None, weights, None, tmp_path / "full")
    assert full.value is not None
    assert full.value >= cheap.value
    assert full.verify_drop is not None
    assert full.verify_interval is not None
    assert full.verify_interval.low <= full.verify_drop <= full.verify_interval.high
    assert full.keeps_budget == (full.verify_drop <= 0.03 + 1e-9)
    done = record(plan, cheap, full)
    session.export(done, tmp_path / "full" / "weights.safetensors", profile, tmp_path / "out", front=[done])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["budget"]["metric"] == profile.metric.value
    files = [f for f in ("model.pt2", "model.onnx") if (tmp_path / "out" / f).exists()]
    assert len(files) == (2 if name == "keypoints" else 1)
    for file in files:
        found = reload.check(tmp_path / "out" / file, tmp_path / "out" / "check.npz")
        assert found["max_difference"] < 1e-4
        assert found["value"] == pytest.approx(report["after"]["verify_value"], abs=1e-3)
    assert f"the {profile.metric.value} drops by" in (tmp_path / "out" / "report.html").read_text()


def test_the_last_of_several_heatmaps_counts(keypoints: Job) -> None:
    """The first stack's are zeros."""
    with torch.no_grad():
        first, last = keypoints.session.bench.original(torch.rand(2, 3, SIDE, SIDE))
    assert first.abs().max() == 0
    torch.testing.assert_close(
        keypoints.session.bench.reference[:1],
        keypoints.session.bench.original(*next(keypoints.session.bench.data.select.batches(1))[0])[-1],
    )
    assert last.shape == (2, 2, 16, 16)


def test_pixel_accuracy_may_be_asked_for(segmentation: Job, tmp_path: Path) -> None:
    spec = JOB.model_copy(update={"budget": Budget(metric=Metric.PIXEL_ACCURACY, max_drop=0.01)})
    session = Session(segmentation.model, segmentation.data, data_spec=SHAPES, spec=spec, scratch=tmp_path)
    assert session.bench.on_select.value > segmentation.profile.value


@pytest.mark.parametrize("name", ["segmentation", "keypoints"])
def test_a_wrong_normalisation_shows_as_no_better_than_looking_at_nothing(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    job: Job = request.getfixturevalue(name)
    wrong = job.spec.model_copy(update={"transform": Transform(scale=1e-6)})
    session = Session(job.model, job.data, data_spec=wrong, spec=JOB, scratch=tmp_path)
    with pytest.raises(BadBaseline, match="no better than always answering") as caught:
        session.profile(0, None)
    assert caught.value.code == "baseline_suspicious"


def test_maps_of_another_size_are_refused_on_opening(segmentation: Job, tmp_path: Path) -> None:
    x, y = shapes(20)
    np.savez(tmp_path / "half.npz", x=x, y=y[:, ::2, ::2])
    with pytest.raises(BadData, match="upsample in the network"):
        Session(segmentation.model, tmp_path / "half.npz", data_spec=SHAPES, spec=JOB, scratch=tmp_path)


def test_large_maps_are_probed_with_fewer_samples(segmentation: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of a probe stay within what they may take, whatever their size: here 20 maps of 12 KiB."""
    bench = segmentation.session.bench
    every = profiling._Probe(bench, bench.original)
    monkeypatch.setattr(profiling, "PROBE_BYTES", 20 * 3 * SIDE * SIDE * 4)
    few = profiling._Probe(bench, bench.original)
    assert (len(every.original), len(few.original)) == (len(every.inputs[0]), 20)
    torch.testing.assert_close(few.original, every.original[:20])
