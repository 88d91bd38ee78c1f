import copy

import pytest
import torch
from torch import nn

from search.decompose import METHODS
from search.surgery import replace
from tenfold.applying import apply


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 6)
    )


PLAN = {
    "0": {"method": "svd", "ranks": [2], "options": {}},
    "3": {"method": "tucker2", "ranks": [4, 3], "options": {}},
    "5": {"method": "svd", "ranks": [3], "options": {}},
}


def test_a_plan_and_its_tensors_give_the_compressed_network_back() -> None:
    original = network()
    compressed = copy.deepcopy(original)
    for name, entry in PLAN.items():
        layer = compressed.get_submodule(name)
        replace(compressed, name, METHODS[str(entry["method"])].factorize(layer, entry["ranks"]).module)
    before = copy.deepcopy(original.state_dict())
    again = apply(original, PLAN, compressed.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(again.eval()(x), compressed.eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in original.state_dict().items())


def test_a_plan_for_another_network_is_refused_by_name() -> None:
    with pytest.raises(KeyError, match="layer9"):
        apply(network(), {"layer9": {"method": "svd", "ranks": [2]}}, {})


def test_tensors_of_another_plan_are_refused_with_their_names() -> None:
    with pytest.raises(ValueError, match=r"missing \['0\.first\.weight'"):
        apply(network(), PLAN, network().state_dict())


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="tucker2"):
        apply(network(), {"3": {"method": "magic", "ranks": [2]}}, {})
