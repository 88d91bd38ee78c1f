"""A site of several layers through a whole job: profile, allocation, trials, a second stage, and the files."""

import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tenfold
from search import cost, latency, trial
from search.allocate import allocate, predicted
from search.bench import read_weights
from search.errors import BadRequest
from search.ground import ground_of
from search.latency import Latency
from search.profiling import methods_of
from search.reconstruct import reconstruct
from search.session import Session
from search.spec import (
    Budget,
    DataSpec,
    FineTune,
    JobSpec,
    Layers,
    Plan,
    Profile,
    Rung,
    SearchSpec,
    SitePlan,
    Transform,
    TrialRecord,
    TrialState,
    TrialWork,
)
from search.surgery import named_sites
from tenfold import exporting
from tenfold.layers import JointLayer

pytestmark = pytest.mark.usefixtures("short_measurements")

GROUP = "stage.*.conv*[16x16x3x3]"
DATA = DataSpec(transform=Transform(scale=1 / 16), validation=0.3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.stage = nn.Sequential(Block(), Block())
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stage(torch.relu(self.stem(x))), 2)
        return self.head(x.mean((2, 3)))


@dataclass
class Uploads:
    network: nn.Module
    model: Path
    data: Path


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Uploads:
    folder = tmp_path_factory.mktemp("uploads")
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype(np.float32)
    np.savez(folder / "digits.npz", x=images, y=labels)
    torch.manual_seed(0)
    network, x, y = Residual(), torch.from_numpy(images[:1000]) / 16, torch.from_numpy(labels[:1000])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(8):
        for rows in torch.randperm(1000).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    network.eval()
    exporting.export(network, x[:2], folder / "digits.pt2")
    return Uploads(network, folder / "digits.pt2", folder / "digits.npz")


def opened(uploads: Uploads, scratch: Path, **changes: object) -> Session:
    spec = JobSpec(
        budget=Budget(max_drop=0.1),
        fine_tune=FineTune(epochs=1, short_epochs=1, batch_size=64, learning_rate=0.02, ema=0.9),
        search=SearchSpec(calibration_samples=192),
    ).model_copy(update=changes)
    return Session(uploads.model, uploads.data, data_spec=DATA, spec=spec, scratch=scratch)


@dataclass
class Job:
    session: Session
    profile: Profile


@pytest.fixture(scope="module")
def job(uploads: Uploads, tmp_path_factory: pytest.TempPathFactory) -> Job:
    methods = ("svd", "joint_tucker", "joint_mps")
    session = opened(uploads, tmp_path_factory.mktemp("scratch"), methods=methods)
    return Job(session, session.profile(0, None))


def work(plan: Plan, rung: Rung, stage: int = 0, parent: int | None = None) -> TrialWork:
    epochs = 0 if rung is Rung.CHEAP else 1
    return TrialWork(number=3, stage=stage, parent=parent, params={}, plan=plan, rung=rung, epochs=epochs)


def joint_plan(job: Job, method: str, share: float) -> Plan:
    """The group alone, at about this share of its parameters."""
    group = job.profile.groups[0]
    point = min(group.curves[method], key=lambda p: abs(p.parameters - share * group.dense_parameters))
    return {GROUP: SitePlan(method=method, ranks=point.ranks, members=group.members)}


def shared_bytes(network: nn.Module) -> int:
    member = next(layer for _, layer in named_sites(network) if isinstance(layer, JointLayer))
    return 4 * cost.parameters(member.shared)


def test_a_profile_offers_the_group_beside_its_members(job: Job) -> None:
    assert [group.site for group in job.profile.groups] == [GROUP]
    group = job.profile.groups[0]
    assert group.members == {f"stage.{b}.conv{c}": (b, c - 1) for b in (0, 1) for c in (1, 2)}
    members = [site for site in job.profile.sites if site.site in group.members]
    assert group.dense_parameters == sum(s.dense_parameters for s in members)
    assert group.dense_macs == sum(s.dense_macs for s in members)
    for method in ("joint_tucker", "joint_mps"):
        assert len(group.evbmf[method]) == len(group.curves[method][0].ranks)
        for point in group.curves[method]:
            assert point.rise is not None
            assert point.rise >= 0
            assert len(point.errors) == 4


@pytest.mark.parametrize("method", ["joint_tucker", "joint_mps"])
def test_a_trial_costs_what_was_predicted_and_shares_its_factors_through_training(
    job: Job, method: str, tmp_path: Path
) -> None:
    plan = joint_plan(job, method, 0.4)
    parameters, macs, _ = predicted(plan, job.profile.sites, job.profile.groups)
    outside = job.profile.costs.parameters - sum(s.dense_parameters for s in job.profile.sites)
    result = job.session.trial(work(plan, Rung.SHORT), job.profile, None, None, None, tmp_path)
    assert result.costs.parameters == parameters + outside
    assert result.costs.macs == macs + job.profile.costs.macs - sum(s.dense_macs for s in job.profile.sites)
    assert result.costs.bytes < job.profile.costs.bytes
    assert result.value is not None
    assert result.value > 0.7
    network, again = read_weights(job.session.bench.original, tmp_path / "weights.safetensors")
    assert again == plan
    members = [layer for _, layer in named_sites(network)]
    assert len(members) == 4
    assert len({id(layer.shared) for layer in members if isinstance(layer, JointLayer)}) == 1
    assert job.session.bench.select(network).value == result.value


def test_a_group_is_timed_as_one_site(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = joint_plan(job, "joint_tucker", 0.6) | {"head": SitePlan(method="svd", ranks=(2,))}
    parts: dict[str, Any] = {}
    measure_parts = latency.measure_parts

    def told(dense: nn.Module, compressed: nn.Module, example: Any, layers: Any, **how: Any) -> dict[str, Latency]:
        parts.update(layers)
        times = measure_parts(dense, compressed, example, layers, **how)
        return {site: replace(time, compressed_ms=2 * time.dense_ms, noise=0.0) for site, time in times.items()}

    monkeypatch.setattr(latency, "measure_parts", told)
    assert trial.slower(job.session.bench, plan).keys() == plan.keys()
    assert parts[GROUP] == tuple(plan[GROUP].members)


def test_reconstruction_in_sequence_beats_the_joint_fit_alone(job: Job) -> None:
    bench = job.session.bench
    plan = joint_plan(job, "joint_tucker", 0.5)
    losses = [
        bench.select(reconstruct(bench.original, bench.original, plan, lambda: bench.calibration, sequential=s)).loss
        for s in (False, True)
    ]
    assert losses[1] < losses[0]


def test_the_allocator_takes_the_group_only_where_that_is_better(job: Job) -> None:
    """By brute force: the best plan with the group forbidden, and with it forced at each of its points."""
    profile, group = job.profile, job.profile.groups[0]
    fixed = profile.costs.parameters - sum(s.dense_parameters for s in profile.sites)
    for share in (0.2, 0.35, 0.6):
        best = predicted(allocate(profile.sites, share, fixed_parameters=fixed), profile.sites)[2]
        others = [site for site in profile.sites if site.site not in group.members]
        for curve in group.curves.values():
            for point in curve:
                left = share * profile.costs.parameters - fixed - point.parameters
                total = sum(s.dense_parameters for s in others)
                plan = allocate(others, min(max(left / total, 1e-9), 1.0))
                parameters, _, loss = predicted(plan, others)
                if parameters <= left and point.macs < group.dense_macs and point.rise is not None:
                    best = min(best, loss + point.rise)
        plan = allocate(profile.sites, share, groups=profile.groups, fixed_parameters=fixed)
        parameters, _, loss = predicted(plan, profile.sites, profile.groups)
        assert parameters + fixed <= share * profile.costs.parameters
        assert loss <= 1.05 * best + 1e-6
        assert GROUP not in plan or not plan.keys() & group.members.keys()


@pytest.mark.parametrize("method", ["joint_tucker", "joint_mps"])
def test_files_hold_shared_factors_once_and_load_without_the_server(
    job: Job, uploads: Uploads, method: str, tmp_path: Path
) -> None:
    plan = joint_plan(job, method, 0.6)
    result = job.session.trial(work(plan, Rung.CHEAP), job.profile, None, None, None, tmp_path / "trial")
    done = TrialRecord(
        number=3, stage=0, parent=None, params={}, plan=plan, state=TrialState.DONE, rung=Rung.CHEAP,
        results={Rung.CHEAP: result},
    )  # fmt: skip
    weights = tmp_path / "trial" / "weights.safetensors"
    job.session.export(done, weights, job.profile, tmp_path)
    network, _ = read_weights(job.session.bench.original, weights)
    once = shared_bytes(network)
    stored = cost.stored_bytes(network)
    assert once > 0.3 * stored

    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == stored
    model = onnx.load(tmp_path / "model.onnx")
    *_, low, high = plan[GROUP].ranks
    held = [list(i.dims) for i in model.graph.initializer]
    member = next(layer for _, layer in named_sites(network) if isinstance(layer, JointLayer))
    assert held.count(list(member.shared.core.shape)) == 1
    assert held.count([low, 16, 1, 1]) == (1 if method == "joint_tucker" else 4)
    # The exporter folds each member's batch norm into its output factor: four of those, all else once.
    initializers = sum(len(onnx.numpy_helper.to_array(i).tobytes()) for i in model.graph.initializer)
    assert initializers <= stored + 4 * 3 * 16 * (high + 1)
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        held = [i for i in archive.infolist() if "/data/weights/" in i.filename and not i.filename.endswith(".json")]
    assert sum(i.file_size for i in held) == stored

    recipe = json.loads((tmp_path / "plan.json").read_text())
    assert recipe[GROUP]["members"]["stage.1.conv1"] == [1, 0]
    mine = tenfold.apply(uploads.network, recipe, tensors).eval()
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(mine(x), network.eval()(x), rtol=1e-4, atol=1e-4)
    assert mine.get_submodule("stage.0.conv1").shared is mine.get_submodule("stage.1.conv2").shared
    layers = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text())["layers"]}
    rows = [layers[name] for name in plan[GROUP].members]
    assert {row["together"] for row in rows} == {4}
    group = job.profile.groups[0]
    point = next(p for p in group.curves[method] if p.ranks == plan[GROUP].ranks)
    assert sum(row["parameters"] for row in rows) == point.parameters
    assert "with 3 others" in (tmp_path / "report.html").read_text()


def test_a_later_stage_keeps_the_group_and_shrinks_it(job: Job, uploads: Uploads, tmp_path: Path) -> None:
    plan = joint_plan(job, "joint_tucker", 0.6)
    job.session.trial(work(plan, Rung.CHEAP), job.profile, None, None, None, tmp_path / "first")
    parent = tmp_path / "first" / "weights.safetensors"
    profile = job.session.profile(1, parent)
    ground = ground_of(job.session.bench.spec, profile, plan)
    assert GROUP in {site.site for site in ground.sites}
    assert ground.groups == ()
    assert not {site.site for site in ground.sites} & plan[GROUP].members.keys()
    site = next(site for site in ground.sites if site.site == GROUP)
    assert site.dense_parameters == next(
        p.parameters for p in job.profile.groups[0].curves["joint_tucker"] if p.ranks == plan[GROUP].ranks
    )
    smaller = min(site.curves["joint_tucker"], key=lambda p: p.parameters)
    onward = ground.complete({GROUP: SitePlan(method="joint_tucker", ranks=smaller.ranks, members=site.members)})
    result = job.session.trial(work(onward, Rung.CHEAP, 1, 3), profile, parent, None, None, tmp_path / "second")
    assert result.costs.parameters == ground.costs(onward)[0]


def test_members_that_were_replaced_on_their_own_are_not_grouped_later(job: Job) -> None:
    parent = {"stage.0.conv1": SitePlan(method="svd", ranks=(4,))}
    ground = ground_of(job.session.bench.spec, job.profile, parent)
    assert ground.groups == ()
    excluded = job.session.bench.spec.model_copy(update={"layers": Layers(exclude=("stage.1.conv2",))})
    assert ground_of(excluded, job.profile, None).groups == ()
    assert len(ground_of(job.session.bench.spec, job.profile, None).groups) == 1


def test_joint_methods_alone_compress_what_can_be_grouped(uploads: Uploads, tmp_path: Path) -> None:
    session = opened(uploads, tmp_path, methods=("joint_mps",))
    profile = session.profile(0, None)
    assert {site.site for site in profile.sites} == set(profile.groups[0].members)
    assert all(not site.curves and site.rises for site in profile.sites)
    ground = ground_of(session.bench.spec, profile, None)
    assert ground.least_share < 0.8
    assert ground.methods == ("joint_mps",)


def test_groups_and_their_plans_may_be_given(uploads: Uploads, tmp_path: Path) -> None:
    members = {"stage.0.conv1": (0,), "stage.0.conv2": (1,)}
    fixed = {"first": SitePlan(method="joint_tucker", ranks=(2, 6, 6), members=members)}
    layers = Layers(include=("stage.*",), groups={"second": ("stage.1.*",)}, fixed=fixed)
    session = opened(uploads, tmp_path, methods=("joint_tucker", "svd"), layers=layers)
    profile = session.profile(0, None)
    assert [group.site for group in profile.groups] == ["first", "second"]
    ground = ground_of(session.bench.spec, profile, None)
    assert [group.site for group in ground.groups] == ["second"]
    assert ground.base == fixed
    assert {site.site for site in ground.sites} == {"stage.1.conv1", "stage.1.conv2"}
    point = next(p for p in profile.groups[0].curves["joint_tucker"] if p.ranks == (2, 6, 6))
    assert point.error == pytest.approx(sum(point.errors) / 2)
    assert min(point.errors) > 0.01
    assert predicted(fixed, profile.sites, profile.groups)[2] == point.rise > 0


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        (SitePlan(method="qr", ranks=(2,), members={"stage.0.conv1": (0,), "stage.0.conv2": (1,)}), "unknown_method"),
        (
            SitePlan(method="svd", ranks=(2,), members={"stage.0.conv1": (0,), "stage.0.conv2": (1,)}),
            "method_does_not_apply",
        ),
        (
            SitePlan(method="joint_mps", ranks=(2, 3, 3), members={"stage.0.conv1": (0,), "stage.7": (1,)}),
            "unknown_site",
        ),
        (
            SitePlan(method="joint_mps", ranks=(2, 3, 3), members={"stage.0.conv1": (0,), "head": (1,)}),
            "method_does_not_apply",
        ),
        (
            SitePlan(method="joint_tucker", ranks=(2, 16, 16), members={"stage.0.conv1": (0,), "stage.0.conv2": (1,)}),
            "bad_rank",
        ),
        (
            SitePlan(method="joint_tucker", ranks=(3, 2, 2), members={"stage.0.conv1": (0,), "stage.0.conv2": (1,)}),
            "bad_rank",
        ),
    ],
)
def test_a_given_plan_of_a_group_that_cannot_be_says_why(
    uploads: Uploads, tmp_path: Path, entry: SitePlan, code: str
) -> None:
    session = opened(uploads, tmp_path, layers=Layers(fixed={"pair": entry}), methods=("svd",))
    with pytest.raises(BadRequest) as refused:
        session.profile(0, None)
    assert refused.value.code == code


def test_a_layer_at_two_sites_is_refused(job: Job) -> None:
    plan = joint_plan(job, "joint_mps", 0.3) | {"stage.0.conv1": SitePlan(method="svd", ranks=(2,))}
    with pytest.raises(BadRequest, match=r"stage\.0\.conv1.*more than one site"):
        reconstruct(job.session.bench.original, job.session.bench.original, plan, None)


@pytest.mark.parametrize(("groups", "offered"), [("auto", False), ({}, False), ({"pair": ("a", "b")}, True)])
def test_auto_takes_joint_methods_where_groups_are_named(groups: Any, offered: bool) -> None:
    spec = JobSpec(budget=Budget(max_drop=0.1), layers=Layers(groups=groups))
    assert ("joint_tucker" in methods_of(SimpleNamespace(spec=spec))) is offered
