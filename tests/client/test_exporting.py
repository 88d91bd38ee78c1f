"""The upload file: complete, dynamic in its batch, and silent about the machine it was written on."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.exporting import export
from tenfold.layers import factorized_like


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(x).mean(1))


def test_one_sample_is_enough_for_a_file_of_any_batch_size(tmp_path: Path) -> None:
    model = Net().eval()
    path = tenfold.export(model, torch.randn(1, 4, 8), tmp_path / "model.pt2")
    again = torch.export.load(path).module()
    x = torch.randn(7, 4, 8)
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize(
    ("method", "ranks"),
    [("svd", (2,)), ("r_cp", (2,)), ("r_tucker", (2, 2, 2, 2)), ("tt_matrix", (2,))],
)
def test_the_batch_of_a_factorized_layer_may_come_second(method: str, ranks: tuple[int, ...], tmp_path: Path) -> None:
    class SequencesFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = factorized_like(nn.Linear(8, 16), method, ranks)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.transpose(0, 1)).transpose(0, 1)

    model = SequencesFirst().eval()
    again = torch.export.load(export(model, torch.randn(2, 4, 8), tmp_path / "model.pt2")).module()
    x = torch.randn(7, 4, 8)
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_file_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    example = torch.full((2, 4, 8), 1234.5)
    raw = export(Net(), example, tmp_path / "model.pt2").read_bytes()
    assert b"site-packages" not in raw
    assert str(Path(__file__).parent).encode() not in raw
    assert b"stack_trace" not in raw
    assert example.numpy().tobytes() not in raw


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = Net().train()
    model.fc.eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export(model, (torch.randn(2, 4, 8),), tmp_path / "model.pt2")
    assert model.training
    assert model.encoder.training
    assert not model.fc.training
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_suffix_is_added_and_folders_are_made(tmp_path: Path) -> None:
    path = export(nn.Linear(2, 2), torch.randn(2, 2), str(tmp_path / "new" / "model"))
    assert path == tmp_path / "new" / "model.pt2"
    assert [p.name for p in path.parent.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((), "a tensor or a tuple"),
        (("x",), r"got \['str'\]"),
        (torch.tensor(1.0), r"got shapes \[\(\)\]"),
        ((torch.randn(2, 3), torch.randn(3, 3)), "different batch sizes"),
    ],
)
def test_unusable_examples_say_what_arrived(example: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(nn.Linear(3, 2), example, tmp_path / "m.pt2")  # type: ignore[arg-type]


def test_only_modules_are_exported(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got function"):
        export(lambda x: x, torch.randn(2, 2), tmp_path / "m.pt2")  # type: ignore[arg-type, return-value]
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_exported_leaves_no_file(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(Exception, match=r"data-dependent|guard|branch"):
        export(Branching(), torch.randn(2, 2), tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
