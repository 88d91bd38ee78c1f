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


def test_what_the_forward_never_uses_stays_as_it_is_and_is_named() -> None:
    class Headed(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(8, 8, bias=False), nn.Linear(8, 4))
            self.auxiliary = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](self[0](x))

    torch.manual_seed(0)
    model = Headed()
    plan = {"0": {"method": "svd", "ranks": [2]}}
    made = METHODS["svd"].factorize(model[0], [2]).module
    file = {f"0.{k}": v for k, v in made.state_dict().items()} | {f"1.{k}": v for k, v in model[1].state_dict().items()}
    with pytest.warns(UserWarning, match=r"2 tensors are in no file.*auxiliary\.weight, auxiliary\.bias"):
        again = apply(model, plan, file)
    assert torch.equal(again.auxiliary.weight, model.auxiliary.weight)
    x = torch.randn(2, 8)
    assert torch.equal(again(x), model[1](made(x)))
    with pytest.raises(ValueError, match=r"missing \['0\.first\.weight'"):
        apply(model, plan, {k: v for k, v in file.items() if k != "0.first.weight"})


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="tucker2"):
        apply(network(), {"3": {"method": "magic", "ranks": [2]}}, {})


def test_modes_that_a_plan_gives_are_the_layers() -> None:
    from tenfold.layers import TTLinear

    torch.manual_seed(0)
    original, layer = nn.Sequential(nn.Linear(24, 30)), TTLinear((4, 3, 2), (2, 5, 3), (3, 4))
    method, ranks, options = layer.plan()
    plan = {"0": {"method": method, "ranks": list(ranks), "options": options}}
    tensors = {f"0.{k}": v for k, v in layer.state_dict().items()}
    x = torch.randn(5, 24)
    assert torch.equal(apply(original, plan, tensors)(x), layer(x))
    plan["0"]["options"] = {"in_modes": "4x3x2", "out_modes": "2x5x4"}
    with pytest.raises(ValueError, match="24 inputs and 30 outputs; got '4x3x2' and '2x5x4'"):
        apply(original, plan, tensors)
    with pytest.raises(ValueError, match="svd takes no options, got in_modes"):
        apply(original, {"0": {"method": "svd", "ranks": [2], "options": {"in_modes": "24"}}}, tensors)


def twins() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3))


JOINT = {"twins": {"method": "joint_tucker", "ranks": [2, 3, 4], "members": {"1": [0], "3": [1]}}}


def test_layers_that_share_factors_come_back_from_tensors_that_hold_them_once() -> None:
    from tenfold.layers import joint_like

    compressed = twins()
    new = joint_like(
        {n: compressed.get_submodule(n) for n in ("1", "3")}, "joint_tucker", (2, 3, 4), {"1": (0,), "3": (1,)}
    )
    for name, layer in new.items():
        replace(compressed, name, layer)
    once = {name: t for name, t in compressed.state_dict().items() if not name.startswith("3.shared.")}
    again = apply(twins(), JOINT, once)
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(again(x), compressed(x))
    again(x).sum().backward()
    assert again[1].shared.first is again[3].shared.first
    assert len(list(again.parameters())) == len(once)
    with pytest.raises(ValueError, match=r"missing \['1\.shared\.core', '3\.shared\.core'"):
        apply(twins(), JOINT, {name: t for name, t in once.items() if not name.endswith("core")})


def test_a_layer_with_several_names_is_replaced_under_each() -> None:
    """One module in two places, and another with all its parameters: a file knows them as one layer."""
    dense = nn.Linear(8, 8)
    other = nn.Linear(8, 8)
    other.weight, other.bias = dense.weight, dense.bias
    original = nn.ModuleDict({"one": dense, "inside": nn.Sequential(dense), "other": other, "alone": nn.Linear(8, 8)})
    factors = METHODS["svd"].factorize(dense, (2,)).module
    tensors = {f"one.{k}": v for k, v in factors.state_dict().items()}
    tensors |= {f"alone.{k}": v for k, v in original["alone"].state_dict().items()}
    again = apply(original, {"one": {"method": "svd", "ranks": [2]}}, tensors)
    x = torch.randn(3, 8)
    for name in ("one", "inside.0", "other"):
        assert torch.equal(again.get_submodule(name)(x), factors(x))
    assert isinstance(again["alone"], nn.Linear)


def test_a_plan_whose_member_is_missing_is_refused_by_its_name() -> None:
    plan = {"twins": JOINT["twins"] | {"members": {"1": [0], "7": [1]}}}
    with pytest.raises(KeyError, match="'7'"):
        apply(twins(), plan, {})
