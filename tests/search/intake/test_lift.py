"""The lifted network is the user's network: exactly, in eval and in training, and it can be exported again."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from intake_zoo import ZOO, MobileLike, SmallViT, TiedLM, Twice, VGGLike, settle
from torch import Tensor, nn
from torch.export import Dim

from search.intake import LiftedModel, first_output, load_model
from search.intake.lifted import all_outputs
from tenfold.layers import LowRankConv, LowRankLinear, TurnedLinear

Load = Callable[..., LiftedModel]


def same(a: Any, b: Any) -> bool:
    left, right = all_outputs(a), all_outputs(b)
    return len(left) == len(right) and all(torch.equal(x, y) for (_, x), (_, y) in zip(left, right, strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_the_lift_is_bit_exact_at_any_batch(name: str, load: Load) -> None:
    make, inputs = ZOO[name]
    model = settle(make(), inputs)
    lifted = load(model, inputs(3))
    assert lifted.batch == "any"
    for n in (1, 2, 5):
        x = inputs(n)
        if name == "twice":  # on one thread its weight norm adds up in another order
            torch.testing.assert_close(lifted.module(*x), model(*x), rtol=1e-6, atol=1e-7)
        else:
            assert same(lifted.module(*x), model(*x))


def without_dropout(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if hasattr(m, "p") and "Dropout" in type(m).__name__:
            m.p = 0.0
    return model


@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("twice",)])
def test_training_steps_equal_the_original(name: str, load: Load) -> None:
    make, inputs = ZOO[name]
    model = without_dropout(settle(make(), inputs))
    lifted = load(model, inputs(3)).module
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, lifted)]
    for _ in range(3):
        x = inputs(4)
        for m, optimizer in zip((model, lifted), optimizers, strict=True):
            m.train()
            optimizer.zero_grad()
            first_output(m(*x)).square().mean().backward()
            optimizer.step()
    x = inputs(4)
    # Training steps may add up in another order where the original updates a tied or in-place tensor.
    for (_, a), (_, b) in zip(all_outputs(lifted.eval()(*x)), all_outputs(model.eval()(*x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet20", "vgg", "mobile", "vit", "lstm"])
def test_dropout_and_batch_norm_follow_train_and_eval(name: str, load: Load) -> None:
    make, inputs = ZOO[name]
    model = settle(make(), inputs)
    lifted = load(model, inputs(3)).module
    x = inputs(4)
    torch.manual_seed(1)
    expected = model.train()(*x)
    torch.manual_seed(1)
    assert same(lifted.train()(*x), expected)
    assert same(lifted.eval()(*x), model.eval()(*x))


@pytest.mark.parametrize("name", ZOO)
def test_a_lifted_network_exports_again(name: str, load: Load) -> None:
    make, inputs = ZOO[name]
    model = settle(make(), inputs)
    lifted = load(model, inputs(3)).module
    shapes = tuple({0: Dim.DYNAMIC} for _ in inputs(1))
    saved = io.BytesIO()
    torch.export.save(torch.export.export(lifted, inputs(3), dynamic_shapes=shapes), saved)
    saved.seek(0)
    again = torch.export.load(saved).module()
    x = inputs(6)
    assert same(again(*x), model(*x))


def test_names_are_the_users_own(load: Load) -> None:
    lifted = load(MobileLike(), (torch.randn(2, 3, 8, 8),)).module
    conv = lifted.get_submodule("blocks.1.conv.3")
    assert isinstance(conv, nn.Conv2d)
    assert conv.groups == 24
    assert isinstance(load(SmallViT(), (torch.randn(2, 3, 8, 8),)).module.get_submodule("attention.in_proj"), nn.Linear)


def test_a_replaced_layer_trains_and_exports(load: Load) -> None:
    lifted = load(VGGLike(), (torch.randn(2, 3, 8, 8),)).module
    conv, linear = lifted.get_submodule("features.4"), lifted.get_submodule("classifier.0")
    lifted.get_submodule("features").add_module("4", LowRankConv.like(conv, (3,)))
    lifted.get_submodule("classifier").add_module("0", LowRankLinear.like(linear, (4,)))
    x = torch.randn(4, 3, 8, 8)
    lifted.train()(x).sum().backward()
    assert all(p.grad is not None for p in lifted.parameters())
    program = torch.export.export(lifted.eval(), (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
    y = torch.randn(7, 3, 8, 8)
    assert torch.equal(program.module()(y), lifted(y))


def test_hooks_see_what_a_layer_gave_not_what_became_of_it(load: Load) -> None:
    lifted = load(VGGLike(), (torch.randn(2, 3, 8, 8),)).module
    seen: list[Tensor] = []
    lifted.get_submodule("features.1").register_forward_hook(lambda m, a, out: seen.append(out))
    lifted(torch.randn(4, 3, 8, 8))
    assert bool((seen[0] < 0).any())  # the activation after it is in place in the user's code


def test_a_residual_added_in_place_does_not_overwrite_the_layer(load: Load) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y += x
            return torch.relu_(y)

    model = Residual().eval()
    lifted = load(model, (torch.randn(2, 3, 8, 8),)).module
    kept: list[Tensor] = []
    lifted.get_submodule("conv").register_forward_hook(lambda m, a, out: kept.append(out))
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(lifted(x), model(x))
    assert torch.equal(kept[0], model.conv(x))


def test_writes_that_others_read_stay_in_place(load: Load) -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            half = y[:, :3]  # a view: it sees what is written below
            y.relu_()
            return half + 1

    model = Read().eval()
    lifted = load(model, (torch.randn(2, 6),)).module
    x = torch.randn(5, 6)
    assert torch.equal(lifted(x), model(x))


def test_tied_weights_stay_one_parameter(load: Load) -> None:
    lifted = load(TiedLM(), (torch.randint(0, 30, (2, 7)),))
    embed, out = lifted.module.get_submodule("embed"), lifted.module.get_submodule("out")
    assert embed.weight is out.weight
    assert not lifted.locked


class Autoencoder(nn.Module):
    """``decode``: of the code, the encoder's weight and a bias. ``first``: it is called before the encoder, too."""

    def __init__(self, decode: Callable[[Tensor, Tensor, Tensor], Tensor], first: bool = False) -> None:
        super().__init__()
        self.encode, self.shift = nn.Linear(12, 5), nn.Parameter(torch.randn(12))
        self.decode, self.first = decode, first

    def forward(self, x: Tensor) -> Tensor:
        x = self.decode(x[:, :5], self.encode.weight, self.shift) if self.first else x
        return self.decode(torch.relu(self.encode(x)), self.encode.weight, self.shift)


DECODERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda h, w, b: torch.nn.functional.linear(h, w.t(), b),
    "matmul": lambda h, w, b: h @ w + b,
    "addmm": lambda h, w, b: torch.addmm(b, h, w),
    "turned twice": lambda h, w, b: torch.matmul(h, w.mT.transpose(0, 1)) + b,
}


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("first", [False, True])
def test_a_product_with_a_layers_weight_turned_round_is_a_layer_that_shares_it(
    decode: Callable[[Tensor, Tensor, Tensor], Tensor], first: bool, load: Load
) -> None:
    model, x = Autoencoder(decode, first).eval(), torch.randn(2, 12)
    lifted = load(model, (x,))
    encoder, decoder = lifted.module.get_submodule("encode"), lifted.module.get_submodule("encode_2")
    assert type(encoder) is nn.Linear
    assert isinstance(decoder, TurnedLinear)
    assert decoder.weight is encoder.weight
    assert not lifted.locked
    assert not lifted.skipped
    assert lifted.given("encode") == "encode"
    assert lifted.given("encode_2") == "encode.weight"
    assert sum(p.numel() for p in lifted.module.parameters()) == 12 * 5 + 5 + 12
    torch.testing.assert_close(lifted.module(x), model(x))


def test_a_weight_that_is_turned_round_and_computed_with_is_locked(load: Load) -> None:
    model, x = Autoencoder(lambda h, w, b: h @ w + b * w.norm()).eval(), torch.randn(2, 12)
    lifted = load(model, (x,))
    assert all("outside the layer" in lifted.locked[name] for name in ("encode", "encode_2"))
    torch.testing.assert_close(lifted.module(x), model(x))


def test_a_module_that_holds_its_weight_turned_round_may_be_called_twice(load: Load) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = Turned()

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(torch.relu(self.mix(x)))

    model, x = Again().eval(), torch.randn(2, 6)
    lifted = load(model, (x,))
    assert [n.target for n in lifted.module.graph.nodes if n.op == "call_module"] == ["mix", "mix"]
    assert type(lifted.module.get_submodule("mix")) is nn.Linear
    torch.testing.assert_close(lifted.module(x), model(x))


def test_a_weight_that_linear_gets_turned_round_alone_stays_in_its_call(load: Load) -> None:
    """Held as a layer's own it would be stored turned round, and not fit the user's network."""

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(5, 12))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.matrix.t())

    lifted = load(Alone(), (torch.randn(2, 5),))
    assert lifted.module.matrix.shape == (5, 12)
    assert "computed from others" in lifted.skipped[0]


HEADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": torch.nn.functional.linear,
    "T": lambda x, w: x @ w.T,
    "mT": lambda x, w: x @ w.mT,
    "t": lambda x, w: x.matmul(w.t()),
    "transpose": lambda x, w: torch.matmul(x, w.transpose(0, 1)),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_product_with_the_embeddings_weight_is_a_layer_that_shares_it(
    head: Callable[[Tensor, Tensor], Tensor], load: Load
) -> None:
    class OwnHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 12)

        def forward(self, tokens: Tensor) -> Tensor:
            return head(self.embed(tokens).tanh(), self.embed.weight)

    model, tokens = OwnHead().eval(), torch.randint(0, 30, (2, 7))
    lifted = load(model, (tokens,))
    out = lifted.module.get_submodule("embed_2")
    assert isinstance(out, nn.Linear)
    assert out.weight is lifted.module.get_submodule("embed").weight
    assert not lifted.locked
    assert lifted.given("embed_2") == lifted.given("embed_2.weight") == "embed.weight"
    torch.testing.assert_close(lifted.module(tokens), model(tokens))


def test_an_embedding_whose_weight_is_computed_with_stays_and_says_why(load: Load) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 12)

        def forward(self, tokens: Tensor) -> Tensor:
            return torch.nn.functional.linear(self.embed(tokens), self.embed.weight / 2)

    model, tokens = Scaled().eval(), torch.randint(0, 30, (2, 7))
    lifted = load(model, (tokens,))
    assert "outside the layer" in lifted.locked["embed"]
    assert "computed from others" in lifted.skipped[0]
    torch.testing.assert_close(lifted.module(tokens), model(tokens))


def test_recurrent_layers_of_one_weight_are_locked(load: Load) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.GRU(6, 6, batch_first=True), nn.GRU(6, 6, batch_first=True)
            self.other.weight_ih_l0 = self.one.weight_ih_l0

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(x)[0])[0]

    lifted = load(Two(), (torch.randn(2, 4, 6),))
    assert len(lifted.locked) == 2
    assert all("shared with" in reason and "all weights" in reason for reason in lifted.locked.values())


def test_a_recurrent_layer_of_one_weight_in_two_places_is_locked(load: Load) -> None:
    model = nn.GRU(6, 6, 2, batch_first=True)
    model.weight_hh_l1 = model.weight_hh_l0
    lifted = load(model, (torch.randn(2, 4, 6),))
    assert ["several times" in reason for reason in lifted.locked.values()] == [True]


def test_layers_that_cannot_be_lifted_are_reported(load: Load) -> None:
    lifted = load(Twice(), (torch.randn(2, 6),))
    text = " ".join(lifted.skipped)
    assert "frozen" in text
    assert "no_grad" in text
    assert "normed" in text


def test_a_deep_copy_is_independent(load: Load) -> None:
    lifted = load(VGGLike(), (torch.randn(2, 3, 8, 8),)).module
    x = torch.randn(2, 3, 8, 8)
    before = lifted(x)
    other = copy.deepcopy(lifted)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(lifted(x), before)
    assert not torch.equal(other(x), before)


def test_a_half_precision_file_is_lifted_to_float32(load: Load) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + torch.ones(4, dtype=torch.bfloat16)

    model = Scaled().to(torch.bfloat16)
    lifted = load(model, (torch.randn(2, 6).to(torch.bfloat16),))
    assert lifted.inputs[0].dtype == "float32"
    x = torch.randn(5, 6)
    torch.testing.assert_close(lifted.module(x), model.float()(x), rtol=1e-2, atol=1e-2)
    assert lifted.module(x).dtype is torch.float32


def test_a_wholly_frozen_file_learns_again_a_partly_frozen_one_stays_so(load: Load) -> None:
    frozen = VGGLike().requires_grad_(False)
    assert all(p.requires_grad for p in load(frozen, (torch.randn(2, 3, 8, 8),)).module.parameters())
    partly = VGGLike()
    partly.features.requires_grad_(False)
    lifted = load(partly, (torch.randn(2, 3, 8, 8),)).module
    assert {n.split(".")[0] for n, p in lifted.named_parameters() if p.requires_grad} == {"classifier"}


def test_a_train_mode_export_evaluates_like_the_original(tmp_path: Path) -> None:
    make, inputs = ZOO["vgg"]
    model = settle(make(), inputs).train()
    program = torch.export.export(model, inputs(4), dynamic_shapes=({0: Dim.DYNAMIC},))
    model.eval()
    torch.export.save(program, tmp_path / "m.pt2")
    lifted = load_model(tmp_path / "m.pt2", scratch=tmp_path)
    x = inputs(3)
    assert same(lifted.module(*x), model(*x))


def test_example_gives_valid_inputs(load: Load) -> None:
    lifted = load(TiedLM(), (torch.randint(0, 30, (2, 7)),))
    (tokens,) = lifted.example(5)
    assert tokens.shape == (5, 7)
    assert int(tokens.max()) < 30
    assert lifted.inputs[0].shape == (None, 7)
    assert lifted.outputs[0].name == "logits"
    assert lifted.outputs[0].shape == (None, 7, 30)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # torch of itself
@pytest.mark.parametrize("name", ["resnet20", "vgg", "mobile", "vit", "tied"])
def test_decomposed_files_find_their_layers_again(name: str, tmp_path: Path) -> None:
    """``run_decompositions`` leaves convolutions, norms and matrix products, which become layers; dropout is gone."""
    make, inputs = ZOO[name]
    model = settle(make(), inputs)
    program = torch.export.export(model, inputs(4), dynamic_shapes=({0: Dim.DYNAMIC},))
    torch.export.save(program.run_decompositions(), tmp_path / "m.pt2")
    lifted = load_model(tmp_path / "m.pt2", scratch=tmp_path)
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm)
    expected = {n for n, m in model.named_modules() if isinstance(m, kinds) and not n.startswith("attention")}
    assert expected <= {n for n, m in lifted.module.named_modules() if isinstance(m, kinds)}
    x = inputs(3)
    torch.testing.assert_close(first_output(lifted.module(*x)), first_output(model(*x)), rtol=1e-5, atol=1e-6)
