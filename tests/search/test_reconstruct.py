import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from search.calibrate import collect
from search.chains import follow
from search.decompose import METHODS
from search.errors import BadRequest
from search.norms import recalibrate_batch_norm
from search.reconstruct import Options, reconstruct
from search.spec import Plan, SitePlan
from tenfold.layers import FactorizedLayer


class Block(nn.Module):
    """A residual block whose shortcut comes after the convolutions, as in most code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.short = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.short(x)
        return F.relu(y)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.one = Block(12)
        self.two = Block(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(self.act(self.stem(x))))
        return self.head(x.mean((2, 3)))


def batches() -> Iterator[tuple[Tensor]]:
    g = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(24, 3, 10, 10, generator=g)
        yield (x + x.roll(1, -1) + x.roll(1, -2) + 0.3,)


@pytest.fixture(scope="module")
def net() -> fx.GraphModule:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.3, 1.5)
            norm.bias.normal_(0, 0.3)
    model.train()
    for _ in range(30):
        for batch in batches():
            model(*batch)
    return fx.symbolic_trace(model.eval())


PLAN: Plan = {
    "one.conv1": SitePlan(method="spatial_svd", ranks=(8,)),
    "one.conv2": SitePlan(method="tucker2", ranks=(6, 7)),
    "one.short": SitePlan(method="svd", ranks=(5,)),
    "two.conv1": SitePlan(method="svd", ranks=(5,)),
    "two.conv2": SitePlan(method="svd_input", ranks=(5,)),
    "two.short": SitePlan(method="svd", ranks=(5,)),
}


@torch.no_grad()
def gap(net: nn.Module, other: nn.Module) -> float:
    """Relative error of the outputs on inputs like the calibration's."""
    total = energy = 0.0
    for batch in batches():
        y, z = net(*batch), other(*batch)
        total += float((y - z).square().sum())
        energy += float((y - y.mean(0)).square().sum())
    return total / energy


def test_each_step_of_knowledge_brings_the_outputs_closer(net: fx.GraphModule) -> None:
    plain = gap(net, reconstruct(net, net, PLAN, None))
    aware = gap(net, reconstruct(net, net, PLAN, batches, sequential=False))
    sequential = gap(net, reconstruct(net, net, PLAN, batches))
    assert sequential < aware < plain


def test_the_plan_is_what_the_network_has_and_the_original_is_untouched(net: fx.GraphModule) -> None:
    before = copy.deepcopy(net.state_dict())
    errors: dict[str, float] = {}
    made = reconstruct(net, net, PLAN, batches, errors=errors)
    for site, entry in PLAN.items():
        layer = made.get_submodule(site)
        assert isinstance(layer, FactorizedLayer)
        assert layer.plan() == (entry.method, entry.ranks, entry.options)
        assert 0 <= errors[site] < 1
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_no_parameter_is_added_beyond_the_factors(net: fx.GraphModule) -> None:
    made = reconstruct(net, net, PLAN, batches)
    for site in PLAN:
        old, new = net.get_submodule(site), made.get_submodule(site)
        assert isinstance(new.last, nn.Module)
        assert (old.bias is None) == (new.last.bias is None)


def test_it_repeats_exactly(net: fx.GraphModule) -> None:
    a, b = (reconstruct(net, net, PLAN, batches) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_full_ranks_keep_the_outputs(net: fx.GraphModule) -> None:
    full: Plan = {
        "one.conv1": SitePlan(method="svd", ranks=(12,)),
        "two.conv2": SitePlan(method="tucker2", ranks=(12, 12)),
    }
    assert gap(net, reconstruct(net, net, full, batches)) < 1e-4


def test_before_an_addition_a_layer_makes_up_for_its_sibling(net: fx.GraphModule) -> None:
    plan: Plan = {
        "two.short": SitePlan(method="svd", ranks=(3,)),
        "two.conv2": SitePlan(method="tucker2", ranks=(10, 10)),
    }
    with_it = reconstruct(net, net, plan, batches, options=Options(relu_sweeps=0))
    without = reconstruct(net, net, plan, batches, options=Options(relu_sweeps=0, residual=False))
    assert gap(net, with_it) < gap(net, without)


def test_looking_through_a_relu_brings_what_passes_it_closer(net: fx.GraphModule) -> None:
    plan: Plan = {"stem": SitePlan(method="svd", ranks=(4,))}

    @torch.no_grad()
    def behind(made: nn.Module) -> float:
        return sum(
            float((F.relu(net.stem(*b)) - F.relu(made.get_submodule("stem")(*b))).square().sum()) for b in batches()
        )

    through = reconstruct(net, net, plan, batches, options=Options(relu_sweeps=4))
    plain = reconstruct(net, net, plan, batches, options=Options(relu_sweeps=0))
    assert behind(through) < behind(plain)


def test_a_dense_layer_may_be_refitted_to_what_reaches_it(net: fx.GraphModule) -> None:
    refitted = reconstruct(net, net, PLAN, batches, options=Options(refit=("head",)))
    left = reconstruct(net, net, PLAN, batches)
    assert torch.equal(left.get_submodule("head").weight, net.get_submodule("head").weight)
    assert gap(net, refitted) < gap(net, left)


def test_a_later_stage_starts_from_another_network_and_still_wants_the_originals_outputs(net: fx.GraphModule) -> None:
    start = copy.deepcopy(net)
    with torch.no_grad():
        start.get_submodule("one.conv1").weight.mul_(1.1)
    plan: Plan = {
        "one.conv2": SitePlan(method="tucker2", ranks=(11, 11)),
        "two.conv1": SitePlan(method="svd", ranks=(11,)),
    }
    assert gap(net, reconstruct(net, start, plan, batches)) < gap(net, start)


def test_a_chain_ends_where_others_look_on(net: fx.GraphModule) -> None:
    modules = dict(net.named_modules())
    nodes = {str(n.target): n for n in net.graph.nodes if n.op == "call_module"}
    inner, outer = follow(nodes["one.conv1"], modules), follow(nodes["one.conv2"], modules)
    assert (inner.norm, inner.other, inner.relu) == ("one.bn1", None, True)
    assert outer.norm == "one.bn2"
    assert outer.other is nodes["one.short"]
    assert outer.relu
    assert follow(nodes["head"], modules).norm is None


@pytest.mark.parametrize(
    ("site", "entry", "code"),
    [
        ("nine", SitePlan(method="svd", ranks=(2,)), "unknown_site"),
        ("stem", SitePlan(method="magic", ranks=(2,)), "unknown_method"),
        ("head", SitePlan(method="tucker2", ranks=(2, 2)), "method_does_not_apply"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(
    net: fx.GraphModule, site: str, entry: SitePlan, code: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        reconstruct(net, net, {site: entry}, batches)
    assert caught.value.code == code


def test_recalibration_takes_the_batches_own_statistics(net: fx.GraphModule) -> None:
    moved = copy.deepcopy(net)
    norm = moved.get_submodule("one.bn1")
    norm.running_mean.add_(3.0)
    again = recalibrate_batch_norm(moved, batches()).get_submodule("one.bn1")
    torch.testing.assert_close(again.running_mean, net.get_submodule("one.bn1").running_mean, rtol=0.1, atol=0.1)
    kept = recalibrate_batch_norm(moved, batches(), mixture=0.0).get_submodule("one.bn1")
    torch.testing.assert_close(kept.running_mean, norm.running_mean)


def test_a_value_changed_in_place_is_seen_by_its_other_users() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.b(self.act(x))
            return x + y

    torch.manual_seed(0)
    model = fx.symbolic_trace(InPlace().eval())
    data = [(torch.randn(200, 6),)]
    made = reconstruct(model, model, {"b": SitePlan(method="svd", ranks=(6,))}, lambda: [(x.clone(),) for (x,) in data])
    torch.testing.assert_close(made(data[0][0].clone()), model(data[0][0].clone()), rtol=1e-3, atol=1e-3)


def test_operands_that_broadcast_and_norms_over_tokens_are_left_alone() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
            self.norm = nn.BatchNorm1d(8)  # of 8 tokens, as many as the layer has outputs
            self.place = nn.Parameter(torch.randn(1, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(F.relu(self.a(x) + self.place)) + self.norm(self.b(F.relu(self.a(x))))

    torch.manual_seed(0)
    model = fx.symbolic_trace(Tokens().eval())
    with torch.no_grad():
        model.get_submodule("norm").running_mean.uniform_(-1, 1)
        model.get_submodule("norm").running_var.uniform_(0.5, 2)
    x = torch.randn(64, 8, 6)
    plan: Plan = {"a": SitePlan(method="svd", ranks=(6,)), "b": SitePlan(method="svd", ranks=(8,))}
    for sequential in (True, False):
        made = reconstruct(model, model, plan, lambda: [(x,)], sequential=sequential)
        torch.testing.assert_close(made(x), model(x), rtol=1e-3, atol=1e-3)


def test_only_as_many_batches_are_kept_as_memory_holds(net: fx.GraphModule) -> None:
    one_batch = reconstruct(net, net, PLAN, lambda: list(batches())[:1])
    small = reconstruct(net, net, PLAN, batches, options=Options(memory_bytes=1))
    assert all(
        torch.equal(a, b) for a, b in zip(one_batch.state_dict().values(), small.state_dict().values(), strict=True)
    )


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.place = nn.Parameter(torch.randn(6, 16))
        self.lstm = nn.LSTM(16, 20, batch_first=True)
        self.head = nn.Linear(20, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.lstm(self.embed(tokens) + self.place)
        return self.head(y[:, -1])


def test_tokens_stay_integers_and_a_recurrent_layer_is_fitted_to_the_input_it_will_really_get() -> None:
    torch.manual_seed(0)
    reader = fx.symbolic_trace(Reader().eval())
    tokens = [(torch.randint(0, 30, (40, 6)),) for _ in range(3)]
    plan = {"embed": SitePlan(method="svd", ranks=(5,)), "lstm": SitePlan(method="svd", ranks=(4, 5))}
    errors: dict[str, float] = {}
    found = reconstruct(reader, reader, plan, lambda: tokens, errors=errors)
    embedded = METHODS["svd"].factorize(reader.embed, (5,), collect(reader, ["embed"], tokens)["embed"])
    torch.testing.assert_close(found.embed.dense_weight(), embedded.module.dense_weight())
    half = copy.deepcopy(reader)
    half.embed = embedded.module
    statistics = collect(half, ["lstm"], tokens)["lstm"]
    expected = METHODS["svd"].factorize(reader.lstm, (4, 5), statistics)
    assert errors["lstm"] == pytest.approx(expected.error, rel=1e-4)
    half.lstm = expected.module
    torch.testing.assert_close(found(*tokens[0]), half(*tokens[0]), rtol=1e-3, atol=1e-4)
    assert set(errors) == set(plan)
