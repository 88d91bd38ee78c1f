"""What spares a look at the whole select split."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from search import bench as benches
from search.bench import Bench
from search.session import Session
from search.spec import Budget, DataSpec, JobSpec
from tenfold import exporting

SIGNS = 60


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Two classes told by the sign of the first input; the exported network knows that."""
    monkeypatch.setattr(benches, "GLANCE_ROWS", SIGNS)
    chance = np.random.default_rng(0)
    arrays = {}
    for part, rows in (("train", 40), ("val", 400), ("test", 40)):
        x = chance.normal(size=(rows, 4)).astype(np.float32)
        arrays |= {f"x_{part}": x, f"y_{part}": (x[:, 0] > 0).astype(np.int64)}
    np.savez(tmp_path / "data.npz", **arrays)
    network = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].bias.zero_()
        network[0].weight[1, 0] = 1.0
    model = exporting.export(network.eval(), torch.zeros(2, 4), tmp_path / "net.pt2")
    spec = JobSpec(budget=Budget(max_drop=0.1))
    return Session(model, tmp_path / "data.npz", data_spec=DataSpec(), spec=spec, scratch=tmp_path / "s").bench


class Wrong(nn.Module):
    """Right for all but a share of the rows, which it tells by their second input; counts what it looks at."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold, self.rows = threshold, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows += len(x)
        right = torch.where(x[:, 1] > self.threshold, -x[:, 0], x[:, 0])
        return torch.stack([torch.zeros_like(right), right], 1)


def test_a_much_worse_network_is_told_by_some_of_the_rows(bench: Bench) -> None:
    network = Wrong(threshold=0.0)
    assert bench.clearly_worse(network, bench.on_select)
    assert network.rows == SIGNS


def test_one_that_may_be_as_good_is_left_to_the_whole_split(bench: Bench) -> None:
    assert not bench.clearly_worse(Wrong(threshold=1e9), bench.on_select)
    assert not bench.clearly_worse(Wrong(threshold=2.5), bench.on_select)


def test_a_better_network_is_never_clearly_worse(bench: Bench) -> None:
    seen = bench.select(Wrong(threshold=0.0))
    assert not bench.clearly_worse(Wrong(threshold=1e9), seen)
