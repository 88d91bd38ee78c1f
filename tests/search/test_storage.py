"""Weights in fewer bits, as the files hold them."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from search.export import write_onnx
from search.spec import Budget, ExportFormat, JobSpec, Storage
from search.storage import narrowed
from tenfold import exporting


class Tied(nn.Module):
    """Look-ups, recurrence, attention, and a head that shares the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.recurrent(self.table(x))
        y, _ = self.attention(y, y, y, need_weights=False)
        return self.head(y).mean(1)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 5)
    )


CASES = {
    "tied": (Tied, lambda n: torch.randint(0, 50, (n, 6))),
    "convolutional": (convolutional, lambda n: torch.randn(n, 3, 8, 8)),
}


def rounded(weight: Tensor, storage: Storage) -> Tensor:
    """Written out: what each weight becomes."""
    if storage is Storage.FLOAT16:
        return torch.from_numpy(weight.numpy().astype(np.float16).astype(np.float32))
    rows = weight.numpy().reshape(len(weight), -1)
    scale = np.abs(rows).max(1, keepdims=True) / 127
    return torch.from_numpy((np.rint(rows / scale) * scale).reshape(weight.shape).astype(np.float32))


@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.parametrize("case", list(CASES))
def test_it_answers_as_the_network_with_rounded_weights(case: str, storage: Storage, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, inputs = CASES[case]
    network = make().eval()
    module = narrowed(torch.export.load(exporting.export(network, inputs(2), tmp_path / "model.pt2")), storage)
    expected = {name: rounded(t, storage) if t.ndim > 1 else t for name, t in network.state_dict().items()}
    network.load_state_dict(expected)
    x = inputs(5)
    with torch.no_grad():
        torch.testing.assert_close(module(x), network(x), rtol=1e-4, atol=1e-5)
    file = exporting.export(module, x, tmp_path / "narrow.pt2")
    program = torch.export.load(file)
    kept = [t.dtype for t in program.state_dict.values() if t.ndim > 1 and t.shape[1:].numel() > 1]
    assert set(kept) == {torch.float16 if storage is Storage.FLOAT16 else torch.int8}
    assert len(kept) == sum(p.ndim > 1 for p in network.parameters()), "a shared weight is stored once"
    graph = write_onnx(file, ["x"], tmp_path / "narrow.onnx")
    (answer,) = onnxruntime.InferenceSession(str(graph)).run(None, {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(answer, program.module()(x).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("storage", "kind", "share"), [(Storage.FLOAT16, TensorProto.FLOAT16, 0.6), (Storage.INT8, TensorProto.INT8, 0.35)]
)
def test_weights_as_small_as_factors_are_narrow_in_onnx_too(
    storage: Storage, kind: int, share: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = [(64, 32), (32, 64), (64, 64)]
    network = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in sizes)).eval()
    x = torch.randn(2, 64)
    module = narrowed(torch.export.load(exporting.export(network, x, tmp_path / "model.pt2")), storage)
    graph = write_onnx(exporting.export(module, x, tmp_path / "narrow.pt2"), ["x"], tmp_path / "narrow.onnx")
    held = [t for t in onnx.load(graph).graph.initializer if len(t.dims) == 2 and 1 not in t.dims]
    assert [t.data_type for t in held] == [kind] * len(sizes)
    assert graph.stat().st_size < share * sum(4 * i * o for i, o in sizes)


def test_weights_beyond_float16_and_rows_of_zeros_stay_finite(tmp_path: Path) -> None:
    network = nn.Linear(4, 3).eval()
    with torch.no_grad():
        network.weight[0] = 1e6
        network.weight[1] = 0
    for storage in Storage:
        program = torch.export.load(exporting.export(network, torch.ones(2, 4), tmp_path / "model.pt2"))
        answer = narrowed(program, storage)(torch.ones(2, 4))
        assert torch.isfinite(answer).all()
        torch.testing.assert_close(answer[:, 1], network.bias[1].expand(2))


@pytest.mark.parametrize(
    ("export", "storage", "said"),
    [((ExportFormat.SAFETENSORS,), (Storage.INT8,), "add pt2 or onnx"), (None, (Storage.INT8,) * 2, "each once")],
)
def test_what_cannot_be_written_is_refused_at_once(
    export: tuple[ExportFormat, ...] | None, storage: tuple[Storage, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        JobSpec(budget=Budget(max_drop=0.01), export=export or tuple(ExportFormat), storage=storage)
