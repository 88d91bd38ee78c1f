"""A network cut into blocks does what it did, and is cut where one tensor alone is alive."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from search.blocks import blocks, cuts
from search.decompose import METHODS
from search.intake.architectures import resnet_cifar
from search.surgery import replace
from tenfold.layers import FactorizedLayer

IMAGES = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


class Branching(nn.Module):
    """Two branches of one layer that meet before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(12, 8)
        self.left = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
        self.right = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.left(x) + self.right(x))


class Masked(nn.Module):
    """A float mask and a size are used all the way; they come from the input, no weight had a part in them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        mask = keep.float().unsqueeze(-1)
        rows = x.size(0)
        x = torch.relu(self.first(x)) * mask
        return {"logits": (self.second(x) * mask).reshape(rows, -1)}


class Recurring(nn.Module):
    """One layer used before and after another."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.once, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.again(x))
        x = torch.relu(self.once(x))
        return self.head(torch.relu(self.again(x)))


def compressed(network: nn.Module, *sites: str) -> fx.GraphModule:
    """Its graph with some layers (all that can be, without names) cut to rank 2."""
    torch.manual_seed(0)
    traced = copy.deepcopy(network) if isinstance(network, fx.GraphModule) else fx.symbolic_trace(network)
    svd = METHODS["svd"]
    named = sites or tuple(n for n, m in traced.named_modules() if type(m) in (nn.Linear, nn.Conv2d))
    for name in named:
        layer = traced.get_submodule(name)
        replace(traced, name, svd.factorize(layer, (2,)).module)
    return traced.eval()


def walked(network: fx.GraphModule, ends: tuple[str, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    names = [n.name for n in network.graph.nodes if n.op == "placeholder"]
    values = dict(zip(names, inputs, strict=True))
    return [block(values) for block in blocks(network, ends)]


def test_a_residual_network_is_cut_behind_its_residual_blocks() -> None:
    network = compressed(resnet_cifar(20))
    ends = cuts(network, IMAGES, 30)
    relus = [n.name for n in network.graph.nodes if n.target is F.relu]
    assert len(relus) == 19  # the stem's, and two in each of nine blocks
    # Behind the ReLUs that end the stem and each residual block; the last one's pooling is its own too.
    assert list(ends) == [*relus[:-1:2], "mean"]


def test_blocks_one_after_another_are_the_network() -> None:
    for network, inputs in (
        (resnet_cifar(14), IMAGES),
        (Branching(), (torch.randn(3, 6),)),
        (Masked(), (torch.randn(3, 4, 12), torch.rand(3, 4) > 0.5)),
        (Recurring(), (torch.randn(3, 12),)),
    ):
        student = compressed(network)
        ends = cuts(student, inputs, 8)
        for each in (student, fx.symbolic_trace(network).eval()):
            wanted = each(*inputs)
            wanted = wanted["logits"] if isinstance(wanted, dict) else wanted
            torch.testing.assert_close(walked(each, ends, inputs)[-1], wanted, rtol=0, atol=0)


def test_there_are_no_more_blocks_than_asked_for_and_all_hold_factorized_layers() -> None:
    network = compressed(resnet_cifar(20), *(f"layer{i}.{j}.conv2" for i in (1, 2, 3) for j in (0, 1, 2)))
    for most, count in ((1, 1), (3, 3), (4, 3), (5, 5), (9, 9), (100, 9)):
        made = blocks(network, cuts(network, IMAGES, most))
        assert len(made) == count
        held = [sum(isinstance(m, FactorizedLayer) for m in b.module.modules()) for b in made]
        assert min(held) >= 1
        assert sum(held) == 9


def test_what_follows_a_layer_is_in_its_block() -> None:
    network = compressed(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)))
    x = torch.randn(4, 6)
    ends = cuts(network, (x,), 8)
    assert [network.get_submodule(e.strip("_")).__class__ for e in ends] == [nn.ReLU, nn.Tanh]
    first, second, _ = walked(network, ends, (x,))
    assert first.min() == 0
    assert second.abs().max() < 1


def test_branches_that_meet_are_one_block() -> None:
    network = compressed(Branching())
    inputs = (torch.randn(3, 6),)
    assert cuts(network, inputs, 8) == ("stem", "add")
    both = blocks(network, ("stem", "add"))[1].module
    assert both.get_submodule("left.0") is network.get_submodule("left.0")
    assert both.get_submodule("right.2") is network.get_submodule("right.2")
    assert cuts(compressed(Branching(), "left.0", "right.2"), inputs, 8) == ()


def test_masks_and_sizes_cross_a_cut_freely() -> None:
    network = compressed(Masked())
    inputs = (torch.randn(3, 4, 12), torch.rand(3, 4) > 0.5)
    ends = cuts(network, inputs, 8)
    assert ends == ("mul",)
    second = blocks(network, ends)[1]
    assert set(second.takes) == {"mul", "unsqueeze", "size"}


def test_no_weight_is_on_both_sides_of_a_cut() -> None:
    network = compressed(Recurring())
    parts = blocks(network, cuts(network, (torch.randn(2, 12),), 8))
    assert len(parts) == 2
    weights = [{id(p) for p in part.module.parameters()} for part in parts]
    assert not weights[0] & weights[1]
    assert weights[0] | weights[1] == {id(p) for p in network.parameters()}


def test_weights_that_layers_share_keep_them_in_one_block() -> None:
    network = compressed(nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)))
    assert len(cuts(network, (torch.randn(2, 12),), 8)) == 2
    first, second = network.get_submodule("0"), network.get_submodule("2")
    second.load_state_dict(first.state_dict())
    name = next(n for n, p in second.named_parameters() if p.ndim > 1)
    owner, _, leaf = name.rpartition(".")
    setattr(second.get_submodule(owner), leaf, first.get_parameter(name))
    assert len(cuts(network, (torch.randn(2, 12),), 8)) == 1


def test_cutting_changes_nothing() -> None:
    network = compressed(resnet_cifar(8))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    blocks(network, cuts(network, IMAGES, 4))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
