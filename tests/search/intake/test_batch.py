"""Files whose batch size was fixed when they were exported: freed where that checks, else run at their size."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from intake_zoo import ZOO, settle
from torch import Tensor, nn

from search.errors import BadModel
from search.intake import LiftedModel, first_output, load_model
from tenfold.exporting import export


def static(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> LiftedModel:
    torch.export.save(torch.export.export(model, inputs), folder / "static.pt2")
    return load_model(folder / "static.pt2", scratch=folder)


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch says so of LSTMs, whoever exports them
@pytest.mark.parametrize("name", ["resnet20", "vgg", "unet", "vit", "lstm", "tied"])
def test_a_static_export_works_at_other_sizes(name: str, tmp_path: Path) -> None:
    make, inputs = ZOO[name]
    model = settle(make(), inputs)
    lifted = static(model, inputs(3), tmp_path)
    assert lifted.batch == "any"
    assert lifted.inputs[0].shape[0] is None
    for n in (1, 2, 7):
        x = inputs(n)
        torch.testing.assert_close(first_output(lifted.module(*x)), first_output(model(*x)), rtol=1e-5, atol=1e-6)


def test_a_static_export_at_batch_one_is_freed_where_possible(tmp_path: Path) -> None:
    make, inputs = ZOO["resnet20"]
    model = settle(make(), inputs)
    lifted = static(model, inputs(1), tmp_path)
    x = inputs(5)
    assert lifted.batch == "any"
    assert torch.equal(lifted.module(*x), model(*x))


class Entangled(nn.Module):
    """Mixes the samples of a batch, so no other size can give the same answers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.mix = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.fc(x).t()).t()


def test_what_cannot_be_freed_runs_at_its_own_size(tmp_path: Path) -> None:
    model = Entangled().eval()
    lifted = static(model, (torch.randn(3, 4),), tmp_path)
    assert lifted.batch == 3
    assert lifted.inputs[0].shape == (3, 4)
    x = torch.randn(3, 4)
    assert torch.equal(lifted.module(x), model(x))
    assert lifted.example(3)[0].shape == (3, 4)
    with pytest.raises(BadModel, match="batch size 3 only, 4 was asked for"):
        lifted.example(4)


def test_the_client_says_when_the_batch_is_fixed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fixes the batch size"):
        path = export(Entangled(), torch.randn(3, 4), tmp_path / "fixed.pt2")
    assert load_model(path, scratch=tmp_path).batch == 3


def test_random_inputs_are_the_same_for_the_same_seed(tmp_path: Path, load: Callable[..., LiftedModel]) -> None:
    lifted = load(nn.Linear(4, 2), (torch.randn(2, 4),))
    assert torch.equal(lifted.example(5, seed=3)[0], lifted.example(5, seed=3)[0])
    assert not torch.equal(lifted.example(5, seed=3)[0], lifted.example(5, seed=4)[0])
