"""Networks of other layers than Linear and Conv2d, end to end: profile, a trial that trains, exported files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from search import reload
from search.allocate import allocate
from search.session import Session, inspect_model
from search.spec import (
    Budget,
    DataSpec,
    FineTune,
    JobSpec,
    Profile,
    Rung,
    SearchSpec,
    SitePlan,
    Task,
    TrialRecord,
    TrialState,
    TrialWork,
)
from tenfold import apply, exporting
from tenfold.layers import LowRankLSTM

pytestmark = pytest.mark.usefixtures("short_measurements")

JOB = JobSpec(
    budget=Budget(max_drop=0.2),
    fine_tune=FineTune(epochs=2, short_epochs=1, batch_size=64, learning_rate=0.01),
    search=SearchSpec(calibration_samples=128),
)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.deeper = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(24, 16, 3, stride=2, padding=1, output_padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.out = nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        code = torch.relu(self.deeper(torch.relu(self.down(x))))
        return self.out(torch.relu(self.norm(self.up(code))))


def trained(network: nn.Module, x: Tensor, y: Tensor, loss: nn.Module, steps: int = 150) -> nn.Module:
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=g)
        optimizer.zero_grad()
        loss(network(x[rows]), y[rows]).backward()
        optimizer.step()
    return network.eval()


def session_of(network: nn.Module, x: Tensor, y: Tensor | None, task: Task, folder: Path, job: JobSpec) -> Session:
    model = exporting.export(network, x[:2], folder / "net.pt2")
    arrays = {"x": x.numpy()} | ({} if y is None else {"y": y.numpy()})
    np.savez(folder / "data.npz", **arrays)
    data = DataSpec(task=task, validation=0.4)
    return Session(model, folder / "data.npz", data_spec=data, spec=job, scratch=folder / "scratch")


def smaller(session: Session, folder: Path, fraction: float, sites: set[str]) -> Profile:
    """Compress to about ``fraction`` of the parameters, every one of ``sites``, train, export, hold to the files."""
    profile = session.profile(0, None)
    assert sites <= {s.site for s in profile.sites}
    fixed = profile.costs.parameters - sum(s.dense_parameters for s in profile.sites)
    plan = allocate(profile.sites, fraction, fixed_parameters=fixed)
    for choice in profile.sites:
        if choice.site in sites and choice.site not in plan:
            method, curve = max(choice.curves.items(), key=lambda entry: entry[0] == "svd")
            plan[choice.site] = SitePlan(method=method, ranks=curve[len(curve) // 2].ranks)
    work = TrialWork(number=0, stage=0, parent=None, params={}, plan=plan, rung=Rung.SHORT, epochs=1)
    result = session.trial(work, profile, None, None, None, folder / "trial")
    predicted = [profile.costs.parameters, profile.costs.macs]
    for site in profile.sites:
        if site.site in plan:
            chosen = plan[site.site]
            point = next(p for p in site.curves[chosen.method] if p.ranks == chosen.ranks)
            predicted[0] += point.parameters - site.dense_parameters
            predicted[1] += point.macs - site.dense_macs
    assert [result.costs.parameters, result.costs.macs] == predicted
    assert result.value is not None
    done = TrialRecord(
        number=0,
        stage=0,
        parent=None,
        params={},
        plan=plan,
        state=TrialState.DONE,
        rung=result.rung,
        results={result.rung: result},
    )
    session.export(done, folder / "trial" / "weights.safetensors", profile, folder / "out", front=[done])
    for name in ("model.pt2", "model.onnx"):
        assert reload.check(folder / "out" / name, folder / "out" / "check.npz")["max_difference"] < 1e-4
    return profile


def test_an_autoencoder_with_transposed_convolutions_gets_smaller(tmp_path: Path) -> None:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.randn(400, 1, 3, 3, generator=g), size=(12, 12), mode="bilinear")
    network = trained(Autoencoder(), x, x, nn.MSELoss())
    session = session_of(network, x, None, Task.FIDELITY, tmp_path, JOB)
    rows = {r.name: r for r in inspect_model(tmp_path / "net.pt2", "auto", None, tmp_path / "m").layers}
    assert rows["up"].compressible
    assert rows["up"].kind == "ConvTranspose2d"
    profile = smaller(session, tmp_path, 0.5, {"up"})
    up = next(s for s in profile.sites if s.site == "up")
    assert set(up.curves) == {"svd", "svd_input", "spatial_svd", "tucker2"}


class Stacked(nn.Module):
    """Two LSTMs that share every weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = nn.LSTM(24, 24, batch_first=True), nn.LSTM(24, 24, batch_first=True)
        for name, parameter in self.lower.named_parameters():
            setattr(self.upper, name, parameter)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.upper(self.lower(x)[0])[0][:, -1])


def test_recurrent_layers_that_share_all_they_hold_are_one_that_is_called_twice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 5, 4) @ torch.randn(4, 24)
    y = x[:, -1, :3].argmax(1)
    network = trained(Stacked(), x, y, nn.CrossEntropyLoss())
    session = session_of(network, x, y, Task.CLASSIFICATION, tmp_path, JOB)
    smaller(session, tmp_path, 0.6, {"lower"})
    plan, tensors = json.loads((tmp_path / "out/plan.json").read_text()), load_file(tmp_path / "out/model.safetensors")
    mine = apply(network, plan, tensors).eval()
    assert isinstance(mine.lower, LowRankLSTM)
    assert mine.upper is mine.lower
    exported = torch.export.load(tmp_path / "out/model.pt2").module()
    torch.testing.assert_close(mine(x[:8]), exported(x[:8]), rtol=1e-4, atol=1e-4)


class Reader(nn.Module):
    """Looks its tokens up in two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24, padding_idx=0)
        self.lstm = nn.LSTM(24, 32, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.embed(tokens[:, :3]), self.embed(tokens[:, 3:])], 1)
        return self.head(self.lstm(x)[0][:, -1])


def test_a_reader_of_tokens_gets_smaller(tmp_path: Path) -> None:
    """Which third of the vocabulary most of the last tokens are of."""
    torch.manual_seed(0)
    tokens = torch.randint(1, 40, (600, 8), generator=torch.Generator().manual_seed(0))
    tokens[:, :2] = 0
    classes = (tokens[:, -3:].float().mean(1) / 13.5).long().clamp(max=2)
    network = trained(Reader(), tokens, classes, nn.CrossEntropyLoss())
    session = session_of(network, tokens, classes, Task.CLASSIFICATION, tmp_path, JOB)
    rows = {r.name: r for r in inspect_model(tmp_path / "net.pt2", "auto", None, tmp_path / "m").layers}
    assert {name for name, row in rows.items() if row.compressible} == {"embed", "lstm", "head"}
    profile = smaller(session, tmp_path, 0.4, {"embed", "lstm"})
    again = next(s for s in profile.sites if s.site == "lstm")
    assert {len(p.ranks) for p in again.curves["svd"]} == {2}


class Mobile(nn.Module):
    """A block as in MobileNetV2, and a depthwise convolution of one axis behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm1 = nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depthwise, self.norm2 = nn.Conv2d(24, 24, 3, 2, 1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.narrow, self.norm3 = nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.line = nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.norm1(self.wide(x)))
        x = nn.functional.relu6(self.norm2(self.depthwise(x)))
        return self.head(torch.relu(self.line(self.norm3(self.narrow(x)).mean(3))).mean(2))


def test_a_block_with_a_depthwise_convolution_gets_smaller(tmp_path: Path) -> None:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.randn(600, 8, 4, 4, generator=g), size=(8, 8), mode="bilinear")
    classes = x[:, :3].mean((2, 3)).argmax(1)
    network = trained(Mobile(), x, classes, nn.CrossEntropyLoss())
    session = session_of(network, x, classes, Task.CLASSIFICATION, tmp_path, JOB)
    rows = {r.name: r for r in inspect_model(tmp_path / "net.pt2", "auto", None, tmp_path / "m").layers}
    assert rows["depthwise"].compressible
    assert "depthwise" in rows["line"].reason
    profile = smaller(session, tmp_path, 0.6, {"wide", "depthwise", "narrow"})
    assert "line" not in {s.site for s in profile.sites}
    (point,) = next(s for s in profile.sites if s.site == "depthwise").curves["spatial_svd"]
    assert (point.ranks, point.parameters) == ((1,), 24 * 6)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def test_the_packed_projections_of_attention_get_smaller(tmp_path: Path) -> None:
    """In one matrix, so that queries, keys and values share their input factor."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, 24, generator=g) @ torch.randn(24, 24, generator=g) / 5
    classes = x[:, :, :3].amax(1).argmax(1)
    network = trained(Attending(), x, classes, nn.CrossEntropyLoss())
    session = session_of(network, x, classes, Task.CLASSIFICATION, tmp_path, JOB)
    profile = smaller(session, tmp_path, 0.6, {"attention.in_proj", "attention.out_proj"})
    packed = next(s for s in profile.sites if s.site == "attention.in_proj")
    assert packed.dense_parameters == 3 * 24 * 24 + 3 * 24


class Decoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoderLayer(24, 3, 24, dropout=0.0, batch_first=True)
        self.sizes = nn.MultiheadAttention(24, 3, kdim=12, vdim=12, batch_first=True)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.decoder(x[:, :2], x)
        return self.head((y + self.sizes(y, x[..., :12], x[..., 12:], need_weights=False)[0]).mean(1))


def test_the_projections_of_attention_to_something_else_get_smaller(tmp_path: Path) -> None:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, 24, generator=g) @ torch.randn(24, 24, generator=g) / 5
    classes = x[:, :, :3].amax(1).argmax(1)
    network = trained(Decoding(), x, classes, nn.CrossEntropyLoss(), steps=80)
    session = session_of(network, x, classes, Task.CLASSIFICATION, tmp_path, JOB)
    across = {"decoder.multihead_attn.in_proj_q", "decoder.multihead_attn.in_proj_kv"}
    smaller(session, tmp_path, 0.6, across | {"sizes.q_proj", "sizes.k_proj", "sizes.v_proj"})
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    mine = apply(network, plan, load_file(tmp_path / "out" / "model.safetensors"))
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    torch.testing.assert_close(mine(x[:2]), program(x[:2]), rtol=1e-4, atol=1e-5)
