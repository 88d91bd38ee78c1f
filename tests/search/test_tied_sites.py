"""Layers of one weight through a whole job: the layer table, the profile, trials, a second stage, and the files."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tenfold
from search import cost, reload
from search.allocate import allocate
from search.bench import read_weights
from search.errors import BadRequest
from search.ground import ground_of
from search.reconstruct import reconstruct
from search.session import Session, inspect_model
from search.spec import (
    Budget,
    DataSpec,
    FineTune,
    JobSpec,
    Layers,
    Profile,
    Rung,
    SearchSpec,
    SitePlan,
    Task,
    TrialRecord,
    TrialState,
    TrialWork,
)
from search.surgery import dense_of
from tenfold import exporting

pytestmark = pytest.mark.usefixtures("short_measurements")

TIE = "embed+head"
WORDS = 60


class LanguageModel(nn.Module):
    """Tells what words are about; its output layer holds the embedding's weight, and two mixing layers hold another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 24)
        self.mix, self.again = nn.Linear(24, 24), nn.Linear(24, 24)
        self.again.weight = self.mix.weight
        self.head = nn.Linear(24, WORDS)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        x = (x + torch.relu(self.mix(x))).mean(1)
        return self.head(x + torch.relu(self.again(x)))


class OwnHead(LanguageModel):
    """The same, whose output layer is no module: its code multiplies with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        del self.head
        self.shift = nn.Parameter(torch.zeros(WORDS))

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        x = (x + torch.relu(self.mix(x))).mean(1)
        return nn.functional.linear(x + torch.relu(self.again(x)), self.embed.weight, self.shift)


class TiedAutoencoder(nn.Module):
    """Both halves hold one matrix a layer: the decoder multiplies with the encoder's, turned round."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(48, 32), nn.Linear(32, 16)
        self.between, self.last = nn.Parameter(torch.zeros(32)), nn.Parameter(torch.zeros(48))

    def forward(self, x: Tensor) -> Tensor:
        code = self.inner(torch.relu(self.outer(x)))
        x = torch.relu(nn.functional.linear(code, self.inner.weight.t(), self.between))
        return x @ self.outer.weight + self.last


@dataclass
class Job:
    session: Session
    profile: Profile
    network: nn.Module
    folder: Path


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return opened_on(LanguageModel, tmp_path_factory.mktemp("tied"))


def opened_on(kind: type[nn.Module], folder: Path) -> Job:
    """A job on a trained network of that kind."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    answers = 2 * torch.randint(WORDS // 2, (600,), generator=g)
    words = answers[:, None] + torch.randint(2, (600, 3), generator=g)
    network = kind()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(200):
        rows = torch.randint(600, (64,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(words[rows]), answers[rows]).backward()
        optimizer.step()
    network.eval()
    exporting.export(network, words[:2], folder / "net.pt2")
    np.savez(folder / "data.npz", x=words.numpy(), y=answers.numpy())
    session = opened(folder, "scratch")
    return Job(session, session.profile(0, None), network, folder)


def opened(folder: Path, scratch: str, *, task: Task = Task.CLASSIFICATION, **changes: object) -> Session:
    spec = JobSpec(
        budget=Budget(max_drop=0.2),
        methods=("svd",),
        fine_tune=FineTune(epochs=2, short_epochs=1, batch_size=64, learning_rate=0.01),
        search=SearchSpec(calibration_samples=128),
    ).model_copy(update=changes)
    data = DataSpec(task=task, validation=0.4)
    return Session(folder / "net.pt2", folder / "data.npz", data_spec=data, spec=spec, scratch=folder / scratch)


def plan_of(job: Job) -> dict[str, SitePlan]:
    """Both ties at the middle of their curves."""
    plan = {}
    for group in job.profile.groups:
        point = group.curves["svd"][len(group.curves["svd"]) // 2]
        plan[group.site] = SitePlan(method="svd", ranks=point.ranks, members=group.members)
    return plan


def test_a_profile_offers_ties_as_sites_of_several_layers(job: Job) -> None:
    rows = {r.name: r for r in inspect_model(job.folder / "net.pt2", "auto", None, job.folder / "m").layers}
    assert all(row.compressible for row in rows.values())
    assert [rows[n].parameters for n in ("embed", "mix", "again", "head")] == [24 * WORDS, 24 * 24 + 24, 24, WORDS]
    assert {g.site: list(g.members) for g in job.profile.groups} == {
        TIE: ["embed", "head"],
        "mix+again": ["mix", "again"],
    }
    group = next(g for g in job.profile.groups if g.site == TIE)
    assert group.dense_parameters == 24 * WORDS + WORDS
    assert all(p.rise is not None and p.rise >= 0 for p in group.curves["svd"])
    members = {s.site: s for s in job.profile.sites}
    assert all(not members[name].curves and members[name].rises for name in ("embed", "head", "mix", "again"))
    assert sum(s.dense_parameters for s in job.profile.sites) == job.profile.costs.parameters


def test_a_trial_costs_what_was_predicted_and_stays_tied_through_training(job: Job, tmp_path: Path) -> None:
    plan = plan_of(job)
    ground = ground_of(job.session.bench.spec, job.profile, None)
    work = TrialWork(number=0, stage=0, parent=None, params={}, plan=plan, rung=Rung.SHORT, epochs=1)
    result = job.session.trial(work, job.profile, None, None, None, tmp_path)
    assert (result.costs.parameters, result.costs.macs) == ground.costs(plan)
    assert result.value is not None
    assert result.value > 0.5
    network, again = read_weights(job.session.bench.original, tmp_path / "weights.safetensors")
    assert again == plan
    for one, other in (("embed", "head"), ("mix", "again")):
        mine, theirs = ({id(p) for p in network.get_submodule(n).parameters() if p.dim() > 1} for n in (one, other))
        assert mine == theirs
    dense = dense_of(network)
    assert dense.get_submodule("embed").weight is dense.get_submodule("head").weight
    assert dense.get_submodule("mix").weight is dense.get_submodule("again").weight

    parent = tmp_path / "weights.safetensors"
    later = job.session.profile(1, parent)
    onward = ground_of(job.session.bench.spec, later, plan)
    assert {site.site for site in onward.sites} <= {TIE, "mix+again"}
    assert onward.parameters == result.costs.parameters

    done = TrialRecord(
        number=0, stage=0, parent=None, params={}, plan=plan, state=TrialState.DONE, rung=Rung.SHORT,
        results={Rung.SHORT: result},
    )  # fmt: skip
    out = tmp_path / "out"
    job.session.export(done, parent, job.profile, out, front=[done])
    mine = check_files(job, network, out, torch.randint(WORDS, (4, 3)))
    assert mine.head.tokens is mine.embed.first.weight


def test_an_autoencoders_halves_share_factors_through_a_job_and_in_its_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(600, 6) @ torch.randn(6, 48) + 0.05 * torch.randn(600, 48)
    network = TiedAutoencoder()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.mse_loss(network(x), x).backward()
        optimizer.step()
    exporting.export(network.eval(), x[:2], tmp_path / "net.pt2")
    np.savez(tmp_path / "data.npz", x=x.numpy())
    session = opened(tmp_path, "scratch", task=Task.FIDELITY)
    profile = session.profile(0, None)
    job = Job(session, profile, network, tmp_path)
    assert {g.site: list(g.members) for g in profile.groups} == {
        "outer+outer_2": ["outer", "outer_2"],
        "inner+inner_2": ["inner", "inner_2"],
    }
    assert profile.groups[0].dense_parameters == 48 * 32 + 32
    plan = plan_of(job)
    work = TrialWork(number=0, stage=0, parent=None, params={}, plan=plan, rung=Rung.SHORT, epochs=1)
    result = session.trial(work, profile, None, None, None, tmp_path)
    ground = ground_of(session.bench.spec, profile, None)
    assert (result.costs.parameters, result.costs.macs) == ground.costs(plan)
    ranks = {name: entry.ranks[0] for entry in plan.values() for name in entry.members}
    assert result.costs.parameters == ranks["outer"] * (48 + 32) + ranks["inner"] * (32 + 16) + 2 * 32 + 48 + 16
    assert result.costs.macs == 2 * (ranks["outer"] * (48 + 32) + ranks["inner"] * (32 + 16))
    assert result.drop is not None
    assert result.drop < 0.3

    compressed, again = read_weights(session.bench.original, tmp_path / "weights.safetensors")
    assert again == plan
    dense = dense_of(compressed)
    assert dense.get_submodule("outer").weight is dense.get_submodule("outer_2").weight
    torch.testing.assert_close(dense(x[:4]), compressed.eval()(x[:4]), rtol=1e-4, atol=1e-4)
    later = session.profile(1, tmp_path / "weights.safetensors")
    assert ground_of(session.bench.spec, later, plan).parameters == result.costs.parameters

    done = TrialRecord(
        number=0, stage=0, parent=None, params={}, plan=plan, state=TrialState.DONE, rung=Rung.SHORT,
        results={Rung.SHORT: result},
    )  # fmt: skip
    out = tmp_path / "out"
    session.export(done, tmp_path / "weights.safetensors", profile, out, front=[done])
    assert set(json.loads((out / "plan.json").read_text())["outer+outer_2"]["members"]) == {"outer", "outer.weight"}
    mine = check_files(job, compressed, out, x[:4])
    mine(x[:4]).sum().backward()
    assert all(p.grad is not None for p in mine.parameters())


def test_a_head_of_the_networks_own_code_is_a_member_of_the_tie_and_the_files_fit_back(tmp_path: Path) -> None:
    job = opened_on(OwnHead, tmp_path)
    assert {g.site for g in job.profile.groups} == {"embed+embed_2", "mix+again"}
    dense = SitePlan(method="svd", ranks=(8,), members={"mix": (0,), "again": (1,)})
    for place, plan in enumerate((plan_of(job), {"mix+again": dense})):
        out = tmp_path / f"out{place}"
        work = TrialWork(number=0, stage=0, parent=None, params={}, plan=plan, rung=Rung.SHORT, epochs=1)
        result = job.session.trial(work, job.profile, None, None, None, out)
        done = TrialRecord(
            number=0, stage=0, parent=None, params={}, plan=plan, state=TrialState.DONE, rung=Rung.SHORT,
            results={Rung.SHORT: result},
        )  # fmt: skip
        job.session.export(done, out / "weights.safetensors", job.profile, out, front=[done])
        network, _ = read_weights(job.session.bench.original, out / "weights.safetensors")
        words = torch.randint(WORDS, (4, 3))
        expected = network.eval()(words).detach()
        exported = torch.export.load(out / "model.pt2").module()
        torch.testing.assert_close(exported(words), expected, rtol=1e-4, atol=1e-4)
        assert reload.check(out / "model.onnx", out / "check.npz")["max_difference"] < 1e-4
        tensors = load_file(out / "model.safetensors")
        mine = tenfold.apply(job.network, json.loads((out / "plan.json").read_text()), tensors).eval()
        torch.testing.assert_close(mine(words).detach(), expected, rtol=1e-4, atol=1e-4)
        assert cost.parameters(mine) == cost.parameters(network) == result.costs.parameters
        mine(words).sum().backward()
        assert all(p.grad is not None for p in mine.parameters())


def check_files(job: Job, network: nn.Module, out: Path, x: Tensor) -> nn.Module:
    """Each holds what is shared once, and computes the same; the user's own network with the files' factors."""
    for name in ("model.pt2", "model.onnx"):
        assert reload.check(out / name, out / "check.npz")["max_difference"] < 1e-4
    stored = cost.stored_bytes(network)
    tensors = load_file(out / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == stored
    with zipfile.ZipFile(out / "model.pt2") as archive:
        held = [i for i in archive.infolist() if "/data/weights/" in i.filename and not i.filename.endswith(".json")]
    assert sum(i.file_size for i in held) == stored
    model = onnx.load(out / "model.onnx")
    floats = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    assert sum(onnx.numpy_helper.to_array(i).nbytes for i in floats) <= stored
    recipe = json.loads((out / "plan.json").read_text())
    mine = tenfold.apply(job.network, recipe, tensors).eval()
    torch.testing.assert_close(mine(x), network(x), rtol=1e-4, atol=1e-4)
    assert cost.parameters(mine) == cost.parameters(network)
    rows = json.loads((out / "report.json").read_text())["layers"]
    loose = sum(p.numel() for p in network.parameters(recurse=False))
    assert sum(row["parameters"] for row in rows) + loose == cost.parameters(network)
    return mine


def test_the_allocator_takes_a_tie_where_parameters_must_go(job: Job) -> None:
    plan = allocate(job.profile.sites, 0.5, groups=job.profile.groups)
    assert TIE in plan
    assert not {"embed", "head"} & plan.keys()


def test_a_tie_of_which_one_layer_must_stay_is_left_alone(job: Job) -> None:
    session = opened(job.folder, "kept", layers=Layers(exclude=("head",)))
    assert [g.site for g in session.profile(0, None).groups] == ["mix+again"]


def test_one_layer_of_a_tie_cannot_be_fixed_alone(job: Job) -> None:
    fixed = {"head": SitePlan(method="svd", ranks=(4,))}
    with pytest.raises(BadRequest, match=r"\['embed', 'head'\] hold one weight") as refused:
        opened(job.folder, "fixed", layers=Layers(fixed=fixed)).profile(0, None)
    assert refused.value.code == "shared_weight"


def test_ranks_of_a_tie_are_multiples_where_asked(job: Job) -> None:
    profile = opened(job.folder, "multiple", layers=Layers(rank_multiple=4, include=("embed", "head"))).profile(0, None)
    assert {r % 4 for p in profile.groups[0].curves["svd"] for r in p.ranks} == {0}


class Twice(nn.Module):
    """One layer that is called twice, on inputs that lie in different directions."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x[:, :12], x[:, 12:]
        return torch.cat([self.shared(first), self.shared(second)], 1)


def test_a_layer_that_is_called_twice_is_fitted_to_both_calls() -> None:
    torch.manual_seed(0)
    network = torch.fx.symbolic_trace(Twice().eval())
    x = torch.randn(256, 24)
    x[:, 6:12] *= 0.01
    x[:, 12:18] *= 0.01
    errors: dict[str, float] = {}
    plan = {"shared": SitePlan(method="svd", ranks=(5,))}
    new = reconstruct(network, network, plan, lambda: [(x,)], errors=errors)
    with torch.no_grad():
        lost = (new(x) - network(x)).square().sum() / (network(x) - network(x).mean(0)).square().sum()
    assert errors["shared"] == pytest.approx(float(lost), rel=0.1)
    assert float(lost) < 0.5  # fitted to the first call alone, the second loses all but a little of what it says
