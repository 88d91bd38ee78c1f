"""Ranks at multiples: raised, priced anew, never dearer than the layer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from search.decompose import METHODS
from search.session import Session
from search.snapping import snapped
from search.spec import Budget, CurvePoint, DataSpec, FineTune, JobSpec, Layers, SearchSpec, Task
from tenfold import exporting


@pytest.mark.parametrize("method", ["svd", "tucker2", "cp3", "tt", "r_tucker"])
def test_every_rank_is_a_multiple_with_its_own_cost_and_an_error_that_the_fit_keeps(method: str) -> None:
    torch.manual_seed(0)
    layer, m = nn.Conv2d(24, 32, 3, padding=1), METHODS[method]
    dense = (sum(p.numel() for p in layer.parameters()), layer.weight.numel() * 64)
    curve = snapped(m.curve(layer, None, 64), 4, lambda ranks: m.cost(layer, ranks, 64), dense)
    assert curve
    for point in curve:
        assert all(rank % 4 == 0 for rank in point.ranks)
        assert (point.parameters, point.macs) == m.cost(layer, point.ranks, 64)
        assert point.parameters < dense[0]
        assert point.macs <= dense[1]
    point = curve[len(curve) // 2]
    assert m.factorize(layer, point.ranks).error <= point.error * 1.001


def test_a_layer_without_such_ranks_has_no_points() -> None:
    points = [CurvePoint(ranks=(r,), parameters=10 * r, macs=10 * r, error=1 / r) for r in range(1, 6)]
    assert snapped(points, 8, lambda ranks: (10 * ranks[0], 10 * ranks[0]), (60, 60)) == ()
    assert [p.ranks for p in snapped(points, 4, lambda ranks: (10 * ranks[0], 10 * ranks[0]), (60, 60))] == [(4,)]
    (kept,) = snapped(points, 4, lambda ranks: (10 * ranks[0], 10 * ranks[0]), (60, 60))
    assert kept.error == 1 / 4  # of the best point that was raised to it


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(60, 32), nn.GRU(32, 32, batch_first=True)
        self.one, self.two, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, words: Tensor) -> Tensor:
        x = self.gru(self.embed(words))[0].mean(1)
        answer: Tensor = self.head(torch.relu(self.two(torch.relu(self.one(x)))))
        return answer


def test_layers_of_every_kind_are_offered_at_multiples_and_grids_of_layers_stay_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, words = Words().eval(), torch.randint(60, (200, 5))
    with torch.no_grad():  # every class is answered somewhere
        network.head.weight /= network(words).std(0)[:, None]
        network.head.bias -= network(words).mean(0)
    exporting.export(network, words[:2], tmp_path / "net.pt2")
    np.savez(tmp_path / "data.npz", x=words.numpy(), y=network(words).argmax(1).numpy())
    spec = JobSpec(
        budget=Budget(max_drop=0.2),
        methods=("svd", "joint_tucker", "joint_mps"),
        layers=Layers(rank_multiple=8),
        fine_tune=FineTune(epochs=0),
        search=SearchSpec(calibration_samples=64),
    )
    data = DataSpec(task=Task.CLASSIFICATION, validation=0.4)
    session = Session(tmp_path / "net.pt2", tmp_path / "data.npz", data_spec=data, spec=spec, scratch=tmp_path / "s")
    profile = session.profile(0, None)
    ranks = {s.site: [p.ranks for p in s.curves["svd"]] for s in profile.sites if "svd" in s.curves}
    assert {"embed", "gru", "one", "two"} <= ranks.keys()
    assert {r % 8 for each in ranks.values() for point in each for r in point} == {0}
    assert {8, 16, 32} <= {point[1] for point in ranks["gru"]}  # not the least and the whole alone
    (group,) = profile.groups
    assert set(group.curves) == {"joint_tucker", "joint_mps"}
    for curve in group.curves.values():
        assert {r % 8 for p in curve for r in p.ranks[1:]} == {0}
        assert {p.ranks[0] for p in curve} == {1, 2}
