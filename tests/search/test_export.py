"""Exported files: they load without Tenfold, agree with the network, and tell nothing of the machine that made them."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from search import reload, report
from search.cost import count
from search.export import export_all, plan_json, save_weights, write_check
from search.spec import ExportFormat, Metric, SitePlan, TensorInfo
from tenfold.applying import apply
from tenfold.layers import factorized_like

PLAN = {"2": SitePlan(method="tucker2", ranks=(3, 4)), "7": SitePlan(method="svd", ranks=(2,))}


@dataclass(frozen=True)
class Called:
    batch: object = "any"
    inputs: tuple[TensorInfo, ...] = (TensorInfo(name="image", dtype="float32", shape=(None, 3, 8, 8)),)

    def example(self, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 3, 8, 8),)

    def given(self, name: str) -> str:
        return name


@dataclass
class Rows:
    x: Tensor
    y: Tensor | None

    def __len__(self) -> int:
        return len(self.x)

    def batches(
        self, batch_size: int, *, shuffle: int | None = None, augment: bool = False, limit: int | None = None
    ) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        for start in range(0, min(len(self.x), limit or len(self.x)), batch_size):
            rows = slice(start, min(start + batch_size, limit or len(self.x)))
            yield (self.x[rows],), None if self.y is None else self.y[rows]


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()


def factorized(original: nn.Sequential) -> nn.Module:
    network = dense()
    for site, chosen in PLAN.items():
        network[int(site)] = factorized_like(original.get_submodule(site), chosen.method, chosen.ranks)
    return torch.fx.symbolic_trace(network).eval()


def counted(network: nn.Module) -> dict[str, object]:
    return count(network, (torch.randn(1, 3, 8, 8),)).model_dump(include={"parameters", "macs", "bytes"})


def layer(name: str, method: str | None, ranks: list[int], dense: int, now: int) -> dict[str, object]:
    sizes = {"dense_parameters": dense, "parameters": now, "together": 0}
    return {"name": name, "kind": "Conv2d", "method": method, "ranks": ranks, **sizes}


def facts(before: nn.Module, after: nn.Module) -> dict[str, object]:
    return {
        "before": {"value": 0.9, "verify_value": 0.91, "latency_ms": 2.0, **counted(before)},
        "after": {"value": 0.89, "verify_value": 0.9, "latency_ms": 1.0, **counted(after)},
        "latency_batch": 32,
        "budget": {
            "metric": "accuracy",
            "max_drop": 0.02,
            "verify_drop": 0.01,
            "keeps_budget": True,
            "verify_interval": {"low": -0.01, "high": 0.03},
        },
        "trial": {"number": 3},
        "layers": [layer("2", "tucker2", [3, 4], 584, 172), layer("<script>", None, [], 165, 165)],
        "front": [
            {"number": n, "rung": "cheap", "value": 0.8 + n / 50, "parameters": 300 + 100 * n, "macs": 9000}
            for n in range(5)
        ],
        "curve": [{"epoch": e, "loss": 1 / e, "value": 0.8 + e / 50, "learning_rate": 0.1} for e in (1, 2, 3)],
        "inputs": {"model": "ab" * 32},
        "seeds": {"search": 0},
        "versions": {"torch": torch.__version__},
        "request": {},
    }


@dataclass
class Exported:
    out: Path
    files: list[Path]
    original: nn.Module
    network: nn.Module


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    out = tmp_path_factory.mktemp("out")
    original = dense()
    network = factorized(original)
    samples = Rows(torch.randn(70, 3, 8, 8), torch.randint(5, (70,)))
    files = export_all(network, original, PLAN, Called(), out, tuple(ExportFormat), facts(original, network))
    write_check(network, samples, Metric.ACCURACY, out / "check.npz")
    return Exported(out, files, original, network)


@pytest.fixture(scope="module")
def reloaded(exported: Exported) -> dict[str, dict[str, object]]:
    """What the standalone script prints, in a process of its own that cannot import Tenfold."""
    guard = "import sys; sys.modules['tenfold'] = sys.modules['search'] = None; sys.argv = sys.argv[1:]; "
    code = guard + "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(Path(reload.__file__)), str(exported.out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_format_is_written_and_reported(exported: Exported) -> None:
    names = [f.name for f in exported.files]
    assert names == ["model.pt2", "model.onnx", "model.safetensors", "plan.json", "report.json", "report.html"]
    listed = json.loads((exported.out / "report.json").read_text())["files"]
    assert [f["filename"] for f in listed] == names[:4]


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
def test_a_file_answers_alike_in_a_clean_process(reloaded: dict[str, dict[str, object]], name: str) -> None:
    found = reloaded[name]
    assert found["max_difference"] < 1e-5
    assert found["value"] == found["expected_value"]
    assert found["samples"] == 70
    assert found["latency_ms"] > 0


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx", "model.safetensors", "plan.json", "report.html"])
def test_no_file_tells_a_path_of_this_machine(exported: Exported, name: str) -> None:
    content = (exported.out / name).read_bytes()
    here = [str(Path(__file__).parent), str(Path(torch.__file__).parent), "site-packages", ".py", str(exported.out)]
    assert [p for p in here if p.encode() in content] == []


def test_the_pt2_holds_no_sample_inputs(exported: Exported) -> None:
    program = torch.export.load(exported.out / "model.pt2")
    assert program.example_inputs is None


def test_the_onnx_batch_is_free(exported: Exported) -> None:
    model = onnx.load(exported.out / "model.onnx")
    onnx.checker.check_model(model)
    assert model.graph.input[0].name == "image"
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert [p.name for p in exported.out.glob("*.data")] == []


def test_weights_and_plan_give_a_network_that_trains(exported: Exported) -> None:
    plan = json.loads((exported.out / "plan.json").read_text())
    network = apply(exported.original, plan, load_file(exported.out / "model.safetensors"))
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(network.eval()(x), exported.network(x))
    network.train()(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_a_network_of_fixed_batch_is_exported_and_checked_at_it(tmp_path: Path) -> None:
    original = dense()
    network = factorized(original)
    formats = (ExportFormat.PT2, ExportFormat.ONNX)
    export_all(network, original, PLAN, Called(batch=4), tmp_path, formats, {})
    samples = Rows(torch.randn(10, 3, 8, 8), torch.randint(5, (10,)))
    write_check(network, samples, Metric.ACCURACY, tmp_path / "check.npz", fixed_batch=4)
    for name in ("model.pt2", "model.onnx"):
        found = reload.check(tmp_path / name, tmp_path / "check.npz")
        assert (found["samples"], found["latency_batch"]) == (10, 4)
        assert found["max_difference"] < 1e-5


def test_tied_tensors_are_stored_under_each_name(tmp_path: Path) -> None:
    tied = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    tied["b"].weight = tied["a"].weight
    path = save_weights(tied, PLAN, tmp_path / "w.safetensors")
    assert set(load_file(path)) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["plan"]) == plan_json(PLAN)


def test_weights_that_are_not_of_the_plan_are_refused(tmp_path: Path) -> None:
    original = dense()
    other = {"2": SitePlan(method="tucker2", ranks=(2, 2))}
    with pytest.raises((ValueError, RuntimeError), match=r"2\.core\.weight"):
        export_all(factorized(original), original, other, Called(), tmp_path, (ExportFormat.SAFETENSORS,), {})


@pytest.mark.parametrize(
    ("metric", "answers", "truth", "expected"),
    [
        ("accuracy", [[1, 2], [3, 0], [0, 1]], [1, 0, 0], 2 / 3),
        ("top5", [[9, 8, 7, 6, 5, 4]], [4], 1.0),
        ("top5", [[9, 8, 7, 6, 5, 4]], [5], 0.0),
        ("mse", [[1.0], [3.0]], [[0.0], [1.0]], 2.5),
        ("agreement", [[1, 2], [3, 0]], [[5, 6], [0, 1]], 0.5),
        ("output_error", [[1.0], [4.0]], [[1.0], [3.0]], 0.5),
    ],
)
def test_the_standalone_metrics_agree_with_hand_counts(
    metric: str, answers: list[list[float]], truth: list[object], expected: float
) -> None:
    assert reload.measure(metric, np.array(answers), np.array(truth)) == pytest.approx(expected)


def test_a_folder_without_models_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reload.main([str(tmp_path)]) == 2
    assert "holds no model*.pt2" in capsys.readouterr().err


def test_the_report_holds_every_figure_and_no_script(exported: Exported) -> None:
    page = (exported.out / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="', page)
    for figure in ("0.9000", "0.9100", "÷ 2.00", "3 × 4", "tucker2", "+0.0100", "keeps", "<svg", "ab" * 32):
        assert figure in page


def test_a_reload_is_added_to_the_report(exported: Exported, reloaded: dict[str, dict[str, object]]) -> None:
    report.add_reloaded(exported.out, reloaded)
    assert json.loads((exported.out / "report.json").read_text())["reloaded"]["model.onnx"]["samples"] == 70
    assert "clean process without Tenfold" in (exported.out / "report.html").read_text()
