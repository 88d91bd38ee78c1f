"""A job's science end to end, as the compute process asks it: profile, trials, refining, export, a second stage."""

import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from search import latency, reload, trial
from search.allocate import allocate, point_rise, predicted
from search.bench import Bench, read_weights
from search.decompose import method_of
from search.errors import BadBaseline, BadRequest
from search.fixed import check_fixed
from search.ground import ground_of
from search.latency import Latency
from search.reconstruct import reconstruct
from search.session import Session, inspect_data, inspect_model
from search.space import analytic
from search.spec import (
    Budget,
    Cost,
    DataSpec,
    FineTune,
    JobSpec,
    Layers,
    Metric,
    Outcome,
    Plan,
    Profile,
    Rung,
    SearchSpec,
    SitePlan,
    Storage,
    Task,
    Transform,
    TrialRecord,
    TrialResult,
    TrialState,
    TrialWork,
)
from search.vbmf import evbmf_rank
from tenfold import exporting
from tenfold.applying import apply
from tenfold.layers.chains import LowRankLinear

from .decompose.contract import true_error

pytestmark = pytest.mark.usefixtures("short_measurements")

DATA = DataSpec(transform=Transform(scale=1 / 16), validation=0.3)
JOB = JobSpec(
    budget=Budget(max_drop=0.02),
    fine_tune=FineTune(epochs=3, short_epochs=1, batch_size=64, learning_rate=0.03),
    search=SearchSpec(calibration_samples=256),
)

MODES = {"in_modes": "8x8x8", "out_modes": "4x4x4"}
"""Of ``fc1``."""


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(512, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


@dataclass
class Uploads:
    model: Path
    data: Path
    unlabelled: Path


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Uploads:
    folder = tmp_path_factory.mktemp("uploads")
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype(np.float32)
    np.savez(folder / "digits.npz", x=images, y=labels)
    np.savez(folder / "unlabelled.npz", x=images)
    torch.manual_seed(0)
    network, x, y = Digits(), torch.from_numpy(images[:1000]) / 16, torch.from_numpy(labels[:1000])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(8):
        for rows in torch.randperm(1000).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    exporting.export(network, x[:2], folder / "digits.pt2")
    return Uploads(folder / "digits.pt2", folder / "digits.npz", folder / "unlabelled.npz")


def opened(uploads: Uploads, scratch: Path, spec: JobSpec = JOB, data_spec: DataSpec = DATA) -> Session:
    data = uploads.data if data_spec.task is not Task.FIDELITY else uploads.unlabelled
    return Session(uploads.model, data, data_spec=data_spec, spec=spec, scratch=scratch)


@dataclass
class Opened:
    session: Session
    profile: Profile
    plan: Plan


@pytest.fixture(scope="module")
def job(uploads: Uploads, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    session = opened(uploads, tmp_path_factory.mktemp("scratch"))
    profile = session.profile(0, None)
    fixed = profile.costs.parameters - sum(s.dense_parameters for s in profile.sites)
    return Opened(session, profile, allocate(profile.sites, 0.35, fixed_parameters=fixed))


def work(plan: Plan, rung: Rung, stage: int = 0, parent: int | None = None) -> TrialWork:
    epochs = {Rung.CHEAP: 0, Rung.SHORT: 1, Rung.FULL: 3}[rung]
    return TrialWork(number=3, stage=stage, parent=parent, params={}, plan=plan, rung=rung, epochs=epochs)


def record(plan: Plan, *results: TrialResult, stage: int = 0) -> TrialRecord:
    return TrialRecord(
        number=3,
        stage=stage,
        parent=None,
        params={},
        plan=plan,
        state=TrialState.DONE,
        rung=results[-1].rung,
        results={r.rung: r for r in results},
    )


def test_inspection_tells_layers_and_splits(uploads: Uploads, tmp_path: Path) -> None:
    model = inspect_model(uploads.model, "auto", None, tmp_path / "m")
    assert [layer.name for layer in model.layers if layer.compressible][-3:] == ["conv2", "fc1", "fc2"]
    splits = inspect_data(uploads.data, DATA, tmp_path / "d").splits
    assert splits.train + splits.select + splits.verify == 1797


def test_a_profile_has_the_baseline_and_curves_below_the_dense_cost(job: Opened) -> None:
    profile = job.profile
    assert profile.metric is Metric.ACCURACY
    assert profile.value > 0.9
    assert profile.max_drop == 0.02
    assert profile.costs.parameters == 144 + 32 + 4640 + 32832 + 650
    assert profile.costs.macs == 64 * 144 + 64 * 4608 + 512 * 64 + 640
    assert profile.costs.latency_ms is not None
    sites = {s.site: s for s in profile.sites}
    assert {"conv2", "fc1"} <= set(sites)
    assert set(sites["fc1"].curves) == {"svd", "tt_matrix", "r_cp", "r_tucker"}
    assert "tucker2" in sites["conv2"].curves
    for site in profile.sites:
        assert site.sensitivity >= 0
        assert set(site.evbmf) == set(site.curves)
        for curve in site.curves.values():
            assert all(p.parameters < site.dense_parameters for p in curve)


def test_the_layer_that_matters_more_is_measured_as_more_sensitive(job: Opened) -> None:
    assert sum(s.sensitivity for s in job.profile.sites) > 0


def test_costs_counted_on_the_built_network_are_those_predicted(job: Opened, tmp_path: Path) -> None:
    result = job.session.trial(work(job.plan, Rung.CHEAP), job.profile, None, None, None, tmp_path)
    predicted = job.profile.costs.parameters
    macs = job.profile.costs.macs
    for site in job.profile.sites:
        if site.site in job.plan:
            chosen = job.plan[site.site]
            point = next(p for p in site.curves[chosen.method] if p.ranks == chosen.ranks)
            predicted += point.parameters - site.dense_parameters
            macs += point.macs - site.dense_macs
    assert (result.costs.parameters, result.costs.macs) == (predicted, macs)


def test_rungs_build_on_each_other_and_the_last_checks_the_budget(job: Opened, tmp_path: Path) -> None:
    session, profile, plan = job.session, job.profile, job.plan
    cheap = session.trial(work(plan, Rung.CHEAP), profile, None, None, None, tmp_path / "cheap")
    weights = tmp_path / "cheap" / "weights.safetensors"
    assert cheap.outcome is Outcome.OK
    assert cheap.value is not None
    assert cheap.drop == pytest.approx(profile.value - cheap.value)
    assert cheap.costs.parameters <= 0.35 * profile.costs.parameters
    assert cheap.verify_drop is None
    short = session.trial(work(plan, Rung.SHORT), profile, None, weights, None, tmp_path / "short")
    assert short.epochs == 1
    assert short.value is not None
    assert short.value >= cheap.value
    full = session.refine(
        record(plan, cheap, short),
        3,
        profile,
        None,
        tmp_path / "short" / "weights.safetensors",
        None,
        tmp_path / "full",
    )
    assert full.rung is Rung.FULL
    assert [r.epoch for r in full.curve] == [1, 2, 3]
    assert full.verify_interval is not None
    assert full.verify_drop is not None
    assert full.verify_interval.low <= full.verify_drop <= full.verify_interval.high
    assert full.keeps_budget == (full.verify_drop <= 0.02 + 1e-9)
    assert full.costs.latency_ms is not None


def test_the_same_work_gives_the_same_network(job: Opened, tmp_path: Path) -> None:
    for name in ("a", "b"):
        job.session.trial(work(job.plan, Rung.SHORT), job.profile, None, None, None, tmp_path / name)
    first, second = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def test_a_candidate_trains_at_its_own_learning_rate(job: Opened, tmp_path: Path) -> None:
    def last_rate(**params: float) -> float:
        mine = work(job.plan, Rung.SHORT).model_copy(update={"params": params})
        out = tmp_path / str(len(params))
        out.mkdir()
        return job.session.trial(mine, job.profile, None, None, None, out).curve[-1].learning_rate

    assert last_rate(learning_rate_scale=0.5) == pytest.approx(0.5 * last_rate())


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_share_of_a_rungs_epochs_is_spent_block_by_block(
    uploads: Uploads, job: Opened, tmp_path: Path, share: float
) -> None:
    recipe = JOB.fine_tune.model_copy(update={"sequential": share})
    session = opened(uploads, tmp_path / "scratch", JOB.model_copy(update={"fine_tune": recipe}))
    plan = {"conv2": SitePlan(method="svd", ranks=(3,)), "fc1": SitePlan(method="svd", ranks=(3,))}
    cheap = session.trial(work(plan, Rung.CHEAP), job.profile, None, None, None, tmp_path / "cheap")
    for rung, epochs in ((Rung.SHORT, 1), (Rung.FULL, 3)):
        result = session.trial(work(plan, rung), job.profile, None, None, None, tmp_path / rung)
        assert result.epochs == pytest.approx(epochs, abs=0.1)
        assert result.curve[-1].epoch == result.epochs
        assert any("block by block (2 of them)" in note for note in result.notes)
        assert ("trained in float32" in result.notes) == (share < 1)
        assert result.drop < cheap.drop


def test_an_exported_candidate_answers_alike_and_is_reported(job: Opened, tmp_path: Path) -> None:
    session = job.session
    result = session.trial(work(job.plan, Rung.SHORT), job.profile, None, None, None, tmp_path / "t")
    done = record(job.plan, result)
    files = session.export(done, tmp_path / "t" / "weights.safetensors", job.profile, tmp_path / "out", front=[done])
    assert [(f["format"], f["filename"]) for f in files] == [
        ("pt2", "model.pt2"),
        ("onnx", "model.onnx"),
        ("safetensors", "model.safetensors"),
        ("safetensors", "plan.json"),
        ("report", "report.json"),
        ("report", "report.html"),
        ("report", "check.npz"),
        ("report", "reload.py"),
    ]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for name in ("model.pt2", "model.onnx"):
        found = reload.check(tmp_path / "out" / name, tmp_path / "out" / "check.npz")
        assert found["max_difference"] < 1e-4
        assert found["value"] == pytest.approx(report["after"]["verify_value"], abs=0.005)
    assert report["after"]["parameters"] == result.costs.parameters
    assert {layer["name"] for layer in report["layers"] if layer["method"]} == set(job.plan)
    assert len(report["inputs"]["model sha256"]) == 64
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text()


def test_a_fixed_layer_has_the_modes_it_was_given_in_every_file(uploads: Uploads, tmp_path: Path) -> None:
    given = SitePlan(method="tt_matrix", ranks=(5, 4), options=MODES)
    layers = Layers(include=("conv2",), fixed={"fc1": given})
    session = opened(uploads, tmp_path / "scratch", JOB.model_copy(update={"layers": layers, "methods": ("svd",)}))
    profile = session.profile(0, None)
    ground = ground_of(session.bench.spec, profile, None)
    plan = ground.complete({"conv2": SitePlan(method="svd", ranks=(4,))})
    assert plan["fc1"] == given
    result = session.trial(work(plan, Rung.SHORT), profile, None, None, None, tmp_path / "t")
    conv2, fc1 = 4 * (144 + 32) + 32, 8 * 4 * 5 + 5 * 8 * 4 * 4 + 4 * 8 * 4 + 64
    assert result.costs.parameters == 144 + 32 + conv2 + fc1 + 650
    assert ground.costs(plan) == (result.costs.parameters, result.costs.macs)
    session.export(record(plan, result), tmp_path / "t" / "weights.safetensors", profile, tmp_path / "out")
    for name in ("model.pt2", "model.onnx"):
        assert reload.check(tmp_path / "out" / name, tmp_path / "out" / "check.npz")["max_difference"] < 1e-4
    entries = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert entries["fc1"]["options"] == MODES
    network = apply(Digits(), entries, load_file(tmp_path / "out" / "model.safetensors")).eval()
    assert network.fc1.shape.in_modes == (8, 8, 8)
    check = np.load(tmp_path / "out" / "check.npz")
    answers = network(torch.from_numpy(check["input_0"])).detach()
    torch.testing.assert_close(answers, torch.from_numpy(check["expected"]), rtol=1e-4, atol=1e-4)
    again = session.profile(1, tmp_path / "t" / "weights.safetensors")
    assert ground_of(session.bench.spec, again, plan).costs({}) == (result.costs.parameters, result.costs.macs)


def inputs_of(network: nn.Module, name: str, batches: Sequence[tuple[Tensor, ...]]) -> Tensor:
    seen: list[Tensor] = []
    hook = network.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in batches:
            network(*batch)
    hook.remove()
    return torch.cat(seen)


def test_a_fixed_layer_off_its_curve_has_its_own_error(uploads: Uploads, job: Opened, tmp_path: Path) -> None:
    """What its outputs lose on the calibration data, in the total that is predicted too."""
    fixed = {
        "conv2": SitePlan(method="tucker2", ranks=(9, 5)),
        "fc1": SitePlan(method="tt_matrix", ranks=(5, 20), options=MODES),
    }
    offered = {site.site: site.curves for site in job.profile.sites}
    assert all(point.ranks != fixed["conv2"].ranks for point in offered["conv2"]["tucker2"])
    assert fixed["fc1"].ranks[1] > max(ranks[1] for ranks in method_of("tt_matrix", MODES).ranks(Digits().fc1))
    spec = JOB.model_copy(update={"layers": Layers(include=("fc2",), fixed=fixed), "methods": ("svd",)})
    session = opened(uploads, tmp_path / "scratch", spec)
    profile = session.profile(0, None)
    plan = ground_of(spec, profile, None).complete({})
    original, batches = session.bench.original, session.bench.calibration
    compressed = reconstruct(original, original, plan, lambda: batches, sequential=False)
    points = {}
    for site in (site for site in profile.sites if site.site in fixed):
        entry = fixed[site.site]
        points[site.site] = next(p for p in site.curves[entry.method] if p.ranks == entry.ranks)
        before, after = (copy.deepcopy(n.get_submodule(site.site)) for n in (original, compressed))
        lost = true_error(before, after, inputs_of(original, site.site, batches))
        assert points[site.site].error == pytest.approx(lost, rel=0.02)
        assert lost > 0.01
    total = sum(point_rise(site, points[site.site]) for site in profile.sites if site.site in points)
    assert predicted(plan, profile.sites)[2] == pytest.approx(total)
    assert total > 0


def test_rounded_files_are_measured_by_themselves(uploads: Uploads, job: Opened, tmp_path: Path) -> None:
    """Also int8 of so small a network is near it; a clean process finds what the report says."""
    session = opened(uploads, tmp_path / "scratch", JOB.model_copy(update={"storage": tuple(Storage)}))
    result = session.trial(work(job.plan, Rung.SHORT), job.profile, None, None, None, tmp_path / "t")
    out = tmp_path / "out"
    files = session.export(record(job.plan, result), tmp_path / "t" / "weights.safetensors", job.profile, out)
    sizes = {f["filename"]: (out / f["filename"]).stat().st_size for f in files}
    assert sizes["model-int8.onnx"] < sizes["model-float16.onnx"] < sizes["model.onnx"]
    for storage, kind in ((Storage.FLOAT16, onnx.TensorProto.FLOAT16), (Storage.INT8, onnx.TensorProto.INT8)):
        held = onnx.load(out / f"model-{storage}.onnx").graph.initializer
        assert {t.data_type for t in held if math.prod(t.dims[1:]) > 1} == {kind}
    rows = json.loads((out / "report.json").read_text())["storage"]
    assert [row["weights"] for row in rows] == ["float32", "float16", "int8"]
    told = {row["weights"]: row for row in rows}
    for storage in Storage:
        for suffix in ("pt2", "onnx"):
            found = reload.check(out / f"model-{storage}.{suffix}", out / "check.npz")
            assert found["max_difference"] < 1e-4
            assert found["value"] == pytest.approx(told[storage]["verify_value"], abs=0.005)
        assert told[storage]["verify_value"] == pytest.approx(told["float32"]["verify_value"], abs=0.03)
    assert "Fewer bits" in (out / "report.html").read_text()


def test_an_export_measures_each_network_once(
    uploads: Uploads, job: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(uploads, tmp_path / "scratch", JOB.model_copy(update={"storage": (Storage.INT8,)}))
    assert session.bench.on_verify.finite
    timed, verified = [], []
    measure, verify = latency.measure, Bench.verify
    monkeypatch.setattr(
        latency, "measure", lambda *pair, **how: timed.append(pair) or measure(*pair, **how, seconds=0.1)
    )
    monkeypatch.setattr(Bench, "verify", lambda bench, network: verified.append(network) or verify(bench, network))
    result = TrialResult(rung=Rung.CHEAP, value=0.9, drop=0.01, costs=job.profile.costs, seconds=1.0)
    session.export(record(job.plan, result), None, job.profile, tmp_path / "out")
    assert len(timed) == 2  # one layout against the other, then the better one against the original
    assert len(verified) == 2  # with its weights as they are, and rounded
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["storage"][0]["verify_value"] == report["after"]["verify_value"]


def test_a_second_stage_starts_from_the_tuned_network_and_never_grows(job: Opened, tmp_path: Path) -> None:
    session = job.session
    first = session.trial(work(job.plan, Rung.SHORT), job.profile, None, None, None, tmp_path / "t")
    parent = tmp_path / "t" / "weights.safetensors"
    profile = session.profile(1, parent)
    assert profile.stage == 1
    assert profile.value == pytest.approx(first.value)
    assert profile.costs.parameters == job.profile.costs.parameters
    at_start = {}
    for site in profile.sites:
        if site.site in job.plan:
            chosen = job.plan[site.site]
            at_start[site.site] = next(p for p in site.curves[chosen.method] if p.ranks == chosen.ranks)
    assert set(at_start) == set(job.plan)
    same = session.trial(work(job.plan, Rung.CHEAP, 1, 3), profile, parent, None, None, tmp_path / "u")
    assert same.costs.parameters == first.costs.parameters
    assert same.drop is not None
    assert same.drop <= 0.03  # nothing was cut: as good as the tuned network, but for the choice of statistics
    inputs, _ = next(iter(session.bench.data.verify.batches(64)))
    tuned, again = (read_weights(session.bench.original, tmp_path / f / "weights.safetensors")[0] for f in "tu")
    with torch.no_grad():
        wanted, original = tuned(*inputs), session.bench.original(*inputs)
        forgotten = (original - wanted).norm()
        assert (again(*inputs) - wanted).norm() < 0.2 * forgotten  # what it had learnt is still there


@pytest.mark.parametrize("w", [0.8, 1.0])
def test_a_search_starts_at_the_very_ranks_of_variational_bayes(job: Opened, w: float) -> None:
    """As numpy finds them in the two unfoldings; their error is what the outputs lose on the calibration data."""
    session, profile = job.session, job.profile
    conv2 = session.bench.original.get_submodule("conv2")
    weight = conv2.weight.detach().double().numpy()
    chosen = [evbmf_rank(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)) for axis in (1, 0)]
    curve = next(site.curves["tucker2"] for site in profile.sites if site.site == "conv2")
    wanted = []
    for rank, highest in zip(chosen, np.array([p.ranks for p in curve]).max(0), strict=True):
        wanted.append(max(1, min(highest, math.floor(highest - w * (highest - rank)))))
    plan = analytic(ground_of(session.bench.spec, profile, None), w)
    assert plan["conv2"] == SitePlan(method="tucker2", ranks=tuple(wanted))
    point = next(p for p in curve if p.ranks == tuple(wanted))
    original, batches = session.bench.original, session.bench.calibration
    compressed = reconstruct(original, original, {"conv2": plan["conv2"]}, lambda: batches, sequential=False)
    before, after = (copy.deepcopy(n.get_submodule("conv2")) for n in (original, compressed))
    lost = true_error(before, after, inputs_of(original, "conv2", batches))
    assert point.error == pytest.approx(lost, rel=0.02)


def test_a_lost_parent_is_an_outcome_with_advice(job: Opened, tmp_path: Path) -> None:
    result = job.session.trial(work(job.plan, Rung.CHEAP, 1, 2), job.profile, None, None, None, tmp_path)
    assert result.outcome is Outcome.LOST_REFERENCE
    assert result.value is None


def test_latency_is_measured_when_it_is_minimized(uploads: Uploads, job: Opened, tmp_path: Path) -> None:
    spec = JOB.model_copy(update={"minimize": (Cost.LATENCY,)})
    result = opened(uploads, tmp_path, spec).trial(
        work(job.plan, Rung.CHEAP), job.profile, None, None, None, tmp_path / "out"
    )
    assert result.costs.latency_ms is not None
    assert result.costs.dense_latency_ms is not None


def test_layers_that_are_slower_factorized_stay_dense_where_latency_is_minimized(
    uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a timer that finds two of three slower, one of which was given."""
    plan = {
        "conv2": SitePlan(method="cp3", ranks=(20,)),
        "fc1": SitePlan(method="svd", ranks=(8,)),
        "fc2": SitePlan(method="svd", ranks=(4,)),
    }
    fixed = Layers(fixed={"fc2": plan["fc2"]})
    session = opened(uploads, tmp_path, JOB.model_copy(update={"minimize": (Cost.LATENCY,), "layers": fixed}))
    profile = session.profile(0, None)
    took = {site: Latency(3.0, 2.0, 0.1) for site in ("conv2", "fc2")}
    monkeypatch.setattr(trial, "slower", lambda bench, plan: took)
    cheap = session.trial(work(plan, Rung.CHEAP), profile, None, None, None, tmp_path / "cheap")
    assert cheap.left_dense == {"conv2": plan["conv2"]}
    assert "conv2 (1.50)" in cheap.notes[0]
    left = {site: plan[site] for site in ("fc1", "fc2")}
    assert cheap.built(plan) == left
    assert cheap.costs.parameters == profile.costs.parameters - 512 * 64 + 8 * (512 + 64) - 640 + 4 * (64 + 10)
    weights = tmp_path / "cheap" / "weights.safetensors"
    assert read_weights(session.bench.original, weights)[1] == left

    monkeypatch.setattr(trial, "slower", None)  # later rungs are of what there is
    short = session.trial(work(left, Rung.SHORT), profile, None, weights, None, tmp_path / "short")
    assert short.left_dense == {}
    assert read_weights(session.bench.original, tmp_path / "short" / "weights.safetensors")[1] == left
    assert short.costs.parameters == cheap.costs.parameters


def test_layers_are_not_timed_where_latency_is_not_minimized(
    job: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "slower", None)
    result = job.session.trial(work(job.plan, Rung.CHEAP), job.profile, None, None, None, tmp_path)
    assert result.left_dense == {}
    assert result.outcome is Outcome.OK


def test_a_candidate_of_which_nothing_is_left_is_the_original(
    uploads: Uploads, job: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(uploads, tmp_path, JOB.model_copy(update={"minimize": (Cost.LATENCY,)}))
    monkeypatch.setattr(trial, "slower", lambda bench, plan: dict.fromkeys(plan, Latency(2.0, 1.0, 0.0)))
    result = session.trial(work(job.plan, Rung.CHEAP), job.profile, None, None, None, tmp_path / "out")
    assert result.left_dense == job.plan
    assert result.costs.parameters == job.profile.costs.parameters
    assert read_weights(session.bench.original, tmp_path / "out" / "weights.safetensors")[1] == {}


def test_a_layer_that_really_is_slower_is_found(job: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LowRankLinear.forward

    def slow(layer: LowRankLinear, x: Tensor) -> Tensor:
        if layer.ranks == (8,):
            time.sleep(0.02)
        return forward(layer, x)

    monkeypatch.setattr(LowRankLinear, "forward", slow)
    plan = {"fc1": SitePlan(method="svd", ranks=(8,)), "fc2": SitePlan(method="svd", ranks=(4,))}
    found = trial.slower(job.session.bench, plan)
    assert found["fc1"].compressed_ms >= 20
    assert found["fc1"].dense_ms < found["fc1"].compressed_ms


def test_fidelity_needs_no_labels(uploads: Uploads, tmp_path: Path) -> None:
    spec = JOB.model_copy(update={"budget": Budget(max_drop=0.05), "methods": ("svd",)})
    session = opened(uploads, tmp_path, spec, DATA.model_copy(update={"task": Task.FIDELITY}))
    profile = session.profile(0, None)
    assert (profile.metric, profile.value) == (Metric.OUTPUT_ERROR, 0.0)
    plan = {"fc1": SitePlan(method="svd", ranks=(16,))}
    cheap = session.trial(work(plan, Rung.CHEAP), profile, None, None, None, tmp_path / "cheap")
    short = session.trial(
        work(plan, Rung.SHORT), profile, None, tmp_path / "cheap" / "weights.safetensors", None, tmp_path / "short"
    )
    assert cheap.value is not None
    assert short.value is not None
    assert 0 < short.value <= cheap.value < 0.2


def failing_profile(uploads: Uploads, scratch: Path, data: DataSpec = DATA, **update: object) -> str:
    session = opened(uploads, scratch, JOB.model_copy(update=update), data)
    with pytest.raises((BadBaseline, BadRequest)) as raised:
        session.profile(0, None)
    return raised.value.code


def test_a_value_that_the_original_does_not_reach_is_refused(uploads: Uploads, tmp_path: Path) -> None:
    assert failing_profile(uploads, tmp_path, budget=Budget(min_value=0.9999)) == "budget_unreachable"


def test_a_baseline_far_from_the_expected_is_suspicious(uploads: Uploads, tmp_path: Path) -> None:
    assert failing_profile(uploads, tmp_path, budget=Budget(max_drop=0.01, expect=0.6)) == "baseline_suspicious"


def test_a_wrong_normalisation_shows_as_a_baseline_near_chance(uploads: Uploads, tmp_path: Path) -> None:
    wrong = DATA.model_copy(update={"transform": Transform(scale=1e-6, mean=(9.0,), std=(1.0,))})
    assert failing_profile(uploads, tmp_path, wrong) == "baseline_suspicious"


def test_excluding_every_layer_leaves_nothing_to_compress(uploads: Uploads, tmp_path: Path) -> None:
    assert failing_profile(uploads, tmp_path, layers=Layers(exclude=("*",))) == "no_compressible_layer"


def test_a_fixed_method_that_does_not_fit_is_refused(uploads: Uploads, tmp_path: Path) -> None:
    fixed = {"fc1": SitePlan(method="tucker2", ranks=(2, 2))}
    assert failing_profile(uploads, tmp_path, layers=Layers(fixed=fixed)) == "method_does_not_apply"


@pytest.mark.parametrize(
    ("plan", "code"),
    [
        (SitePlan(method="svd", ranks=(99_999,)), "bad_rank"),
        (SitePlan(method="svd", ranks=(2, 2)), "bad_rank"),
        (SitePlan(method="svd", ranks=()), "bad_rank"),
        (SitePlan(method="svd", ranks=(2,), options={"x": 1}), "unknown_option"),
        (SitePlan(method="tt_matrix", ranks=(2, 2), options={"modes": "8x8x8"}), "unknown_option"),
        (SitePlan(method="tt_matrix", ranks=(2, 2), options=MODES | {"in_modes": "8x8x9"}), "method_does_not_apply"),
        (SitePlan(method="tt_matrix", ranks=(2,), options=MODES), "bad_rank"),
    ],
)
def test_a_fixed_plan_that_cannot_be_is_refused(uploads: Uploads, tmp_path: Path, plan: SitePlan, code: str) -> None:
    assert failing_profile(uploads, tmp_path, layers=Layers(fixed={"fc1": plan})) == code


@pytest.mark.parametrize(
    ("site", "method", "ranks", "said"),
    [
        ("fc1", "svd", (2, 2), "the ranks [2, 2]: it takes 1 here; give for example [56]"),
        ("fc1", "svd", (60,), "the ranks [60]: 34,624 parameters would replace 32,832; give for example [56]"),
        ("conv2", "tucker2", (17, 4), "the ranks [17, 4]: at [16, 32] it is exact here, and no rank can be higher"),
    ],
)
def test_refused_ranks_say_why_and_what_would_do(site: str, method: str, ranks: tuple[int, ...], said: str) -> None:
    with pytest.raises(BadRequest) as refused:
        check_fixed({site: SitePlan(method=method, ranks=ranks)}, Digits(), ())
    assert refused.value.code == "bad_rank"
    assert f"layers.fixed: {site}: {method} was given {said}" in str(refused.value)
    example = json.loads(str(refused.value).rpartition("example ")[2])
    check_fixed({site: SitePlan(method=method, ranks=tuple(example))}, Digits(), ())


def test_only_included_layers_and_methods_are_profiled(uploads: Uploads, tmp_path: Path) -> None:
    spec = JOB.model_copy(update={"layers": Layers(include=("conv*",)), "methods": ("svd",)})
    profile = opened(uploads, tmp_path, spec).profile(0, None)
    assert {s.site for s in profile.sites} <= {"conv1", "conv2"}
    assert {m for s in profile.sites for m in s.curves} == {"svd"}


@pytest.mark.parametrize(
    ("update", "code"),
    [
        ({"methods": ("magic",)}, "unknown_method"),
        ({"budget": Budget(metric=Metric.MSE, max_drop=0.1)}, "metric_not_of_task"),
    ],
)
def test_a_job_that_cannot_be_done_is_refused_on_opening(
    uploads: Uploads, tmp_path: Path, update: dict[str, object], code: str
) -> None:
    with pytest.raises(BadRequest) as raised:
        opened(uploads, tmp_path, JOB.model_copy(update=update))
    assert raised.value.code == code


def test_a_min_value_becomes_a_drop_on_the_select_split(uploads: Uploads, tmp_path: Path) -> None:
    spec = JOB.model_copy(update={"budget": Budget(min_value=0.8), "methods": ("svd",)})
    profile = opened(uploads, tmp_path, spec).profile(0, None)
    assert profile.max_drop == pytest.approx(profile.value - 0.8)


def test_rows_that_the_original_was_trained_on_are_noticed_and_at_last_learnt_from(
    uploads: Uploads, tmp_path: Path
) -> None:
    """Labels that only the select rows' own answers agree with."""
    with np.load(uploads.data) as stored:
        x, y = stored["x"], stored["y"]
    noisy = y.copy()
    noisy[1400::5] = (noisy[1400::5] + 1) % 10
    np.savez(
        tmp_path / "d.npz",
        x_train=x[:1000],
        y_train=y[:1000],
        x_val=x[:400],
        y_val=y[:400],
        x_test=x[1400:],
        y_test=noisy[1400:],
    )
    spec = JOB.model_copy(update={"methods": ("svd",)})
    session = Session(uploads.model, tmp_path / "d.npz", data_spec=DATA, spec=spec, scratch=tmp_path)
    profile = session.profile(0, None)
    assert "trained on the select rows" in profile.notes[0]
    plan = allocate(profile.sites, 0.35)
    for rung, learnt in ((Rung.SHORT, False), (Rung.FULL, True)):
        result = session.trial(work(plan, rung), profile, None, None, None, tmp_path / rung)
        assert any("is learnt from too" in note for note in result.notes) == learnt


def test_ranks_are_multiples_where_the_device_wants_them(uploads: Uploads, tmp_path: Path) -> None:
    spec = JOB.model_copy(update={"layers": Layers(rank_multiple=4)})
    profile = opened(uploads, tmp_path, spec).profile(0, None)
    ranks = [p.ranks for site in profile.sites for curve in site.curves.values() for p in curve]
    assert ranks
    assert all(rank % 4 == 0 for each in ranks for rank in each)
