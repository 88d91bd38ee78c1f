"""Members of a group fitted one after the other, each to the input that it gets: factors that float32 can hold."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from search.calibrate import collect
from search.decompose import JOINT_METHODS, group_of
from search.export import export_all
from search.intake import load_model
from search.intake.lifted import LiftedModel
from search.reconstruct import reconstruct
from search.spec import ExportFormat, Plan, SitePlan
from tenfold import exporting

MEMBERS = {f"blocks.{i}.{name}": (i, j) for i in range(2) for j, name in enumerate("ab")}


class Net(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        a, b, c, d = layers
        self.blocks = nn.ModuleList([nn.ModuleDict({"a": a, "b": b}), nn.ModuleDict({"a": c, "b": d})])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block["b"](torch.tanh(block["a"](x))))
        return x


@dataclass
class Case:
    lifted: LiftedModel
    x: Tensor

    def rebuilt(self, method: str, ranks: tuple[int, ...]) -> tuple[nn.Module, Plan]:
        plan = {"group": SitePlan(method=method, ranks=ranks, members=MEMBERS)}
        original = self.lifted.module
        return reconstruct(original, original, plan, lambda: [(self.x,)]).eval(), plan

    def offered(self, method: str) -> list[tuple[int, ...]]:
        """The ranks at both ends of the curve and two between."""
        group = group_of(self.lifted.module, MEMBERS)
        statistics = collect(self.lifted.module, list(group.names), [(self.x,)])
        positions = [self.x[0, 0].numel()] * 4
        curve = JOINT_METHODS[method].curve(group, [statistics[name] for name in group.names], positions)
        return [curve[i * (len(curve) - 1) // 3].ranks for i in range(4)]


@pytest.fixture(scope="module", params=["linear", "conv"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    if request.param == "linear":
        net, x = Net([nn.Linear(48, 48) for _ in range(4)]), torch.randn(1024, 48)
    else:
        net, x = Net([nn.Conv2d(12, 12, 3, padding=1) for _ in range(4)]), torch.randn(96, 12, 6, 6)
    folder = tmp_path_factory.mktemp("model")
    exporting.export(net.eval(), x[:2], folder / "net.pt2")
    return Case(load_model(folder / "net.pt2", format="auto", architecture=None, scratch=folder), x)


def check(network: nn.Module, x: Tensor) -> None:
    """Factors of moderate size, and outputs that hardly hang on the precision."""
    assert max(float(p.detach().abs().max()) for p in network.parameters()) < 200
    with torch.no_grad():
        single, double = network(x), copy.deepcopy(network).double()(x.double())
    assert float((single - double).abs().max()) < 1e-3 * float(double.std())


@pytest.mark.parametrize("method", JOINT_METHODS)
def test_every_offered_point_gives_factors_that_float32_can_hold(case: Case, method: str) -> None:
    for ranks in case.offered(method):
        check(case.rebuilt(method, ranks)[0], case.x)


@pytest.mark.parametrize(("low", "high"), [(11, 8), (12, 1)])
def test_a_plan_with_more_inputs_than_the_core_can_use_does_too(case: Case, low: int, high: int) -> None:
    check(case.rebuilt("joint_mps", (2, 4, low, high))[0], case.x)


def test_files_compute_what_the_network_does(case: Case, tmp_path: Path) -> None:
    network, plan = case.rebuilt("joint_mps", case.offered("joint_mps")[-1])
    export_all(network, case.lifted.module, plan, case.lifted, tmp_path, (ExportFormat.PT2, ExportFormat.ONNX), {})
    with torch.no_grad():
        wanted = network(case.x[:64])
        program = torch.export.load(tmp_path / "model.pt2").module()(case.x[:64])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: case.x[:64].numpy()})
    torch.testing.assert_close(program, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-4)
