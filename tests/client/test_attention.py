"""Torch's own attention, opened so that its projections can be replaced."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tenfold
from search.export import plan_json, save_weights
from search.intake import load_model
from search.layers import layer_table
from search.reconstruct import reconstruct
from search.spec import SitePlan
from tenfold.exporting import export
from tenfold.layers import LowRankLinear
from tenfold.layers.attention import PACKED, SEPARATE, Attention

LENGTH, WIDTH = 5, 16
SHUT = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False, False, False, True, True], [False] * 5])
CALLS = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "boolean mask": {"attn_mask": SHUT},
    "causal": {"attn_mask": SHUT, "is_causal": True, "need_weights": False},
    "masks to add": {
        "attn_mask": torch.randn(2 * 4, LENGTH, LENGTH),
        "key_padding_mask": torch.zeros(2, LENGTH).masked_fill(PADDING, float("-inf")),
    },
}


SIZES = {"kdim": 8, "vdim": 12}
PROJECTIONS = ["", "in_proj", "in_proj_q in_proj_kv", "in_proj_q in_proj_k in_proj_v"]


def opened(projections: str, **options: Any) -> tuple[nn.MultiheadAttention, Attention]:
    torch.manual_seed(0)
    torchs = nn.MultiheadAttention(WIDTH, 4, **options).eval()
    for p in torchs.parameters():
        nn.init.normal_(p, std=0.3)
    return torchs, Attention(torchs, projections.split())


def assert_same(torchs: nn.Module, ours: nn.Module, *inputs: Tensor, **call: Any) -> None:
    for expected, found in zip(torchs(*inputs, **call), ours(*inputs, **call), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("projections", PROJECTIONS)
@pytest.mark.parametrize("inputs", ["x x x", "x y y", "x y z"])
@pytest.mark.parametrize("call", CALLS)
def test_it_computes_what_torchs_does(call: str, inputs: str, projections: str) -> None:
    torchs, ours = opened(projections, batch_first=True)
    given = {name: torch.randn(2, LENGTH, WIDTH) for name in "xyz"}
    assert_same(torchs, ours, *(given[name] for name in inputs.split()), **CALLS[call])


@pytest.mark.parametrize("projections", ["", "q_proj k_proj v_proj"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_keys_and_values_may_have_sizes_of_their_own(batch_first: bool, bias: bool, projections: str) -> None:
    torchs, ours = opened(projections, batch_first=batch_first, bias=bias, **SIZES)
    assert_same(torchs, ours, *(torch.randn(3, 3, size) for size in (WIDTH, *SIZES.values())))


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True, "add_bias_kv": True}])
@pytest.mark.parametrize("call", CALLS)
def test_it_may_have_keys_and_values_itself(call: str, options: dict[str, bool]) -> None:
    torchs, ours = opened("in_proj", batch_first=True, **options)
    x = torch.randn(2, LENGTH, WIDTH)
    assert_same(torchs, ours, x, x, x, **CALLS[call])


@pytest.mark.parametrize("projections", PROJECTIONS)
@pytest.mark.parametrize("shape", [(LENGTH, 3, WIDTH), (LENGTH, WIDTH)])
def test_sequences_may_come_first_or_without_a_batch(shape: tuple[int, ...], projections: str) -> None:
    torchs, ours = opened(projections, bias=False)
    x, y = torch.randn(*shape), torch.randn(*shape)
    assert_same(torchs, ours, x, y, y)


@pytest.mark.parametrize("projections", ["in_proj_q", "in_proj in_proj_q", "q_proj k_proj v_proj"])
def test_projections_of_another_attention_are_refused(projections: str) -> None:
    with pytest.raises(ValueError, match=r"of this network"):
        Attention(nn.MultiheadAttention(WIDTH, 4), projections.split())


class Own(nn.Module):
    """A user's own: self-attention, then attention to what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.out = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        return self.out(self.cross(x, y, y)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).mean(1)


class Decoder(nn.Module):
    def __init__(self, batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, 4, 32, batch_first=batch_first, dropout=0.0, bias=bias)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.batch_first = batch_first
        self.register_buffer("shut", SHUT)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.decoder(x.tanh(), x, tgt_mask=self.shut, tgt_is_causal=True)
        return y.mean(1 if self.batch_first else 0)


class Sizes(nn.Module):
    """Queries, keys and values of three sizes."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True, **SIZES, **options)

    def forward(self, x: Tensor) -> Tensor:
        key, value = (x[..., :size] for size in SIZES.values())
        return self.attention(x, key, value)[0].mean(1)


KINDS = {
    "own": Own,
    "encoder": Encoder,
    "decoder": Decoder,
    "decoder, sequences first": lambda: Decoder(batch_first=False),
    "decoder without biases": lambda: Decoder(bias=False),
    "sizes": Sizes,
    "sizes without biases": lambda: Sizes(bias=False),
    "keys of its own": lambda: Sizes(add_bias_kv=True, add_zero_attn=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_own_attention_takes_the_compressed_weights(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = KINDS[kind]().eval(), torch.randn(2, LENGTH, WIDTH)
    lifted = load_model(export(network, (x,), tmp_path / "net.pt2"), scratch=tmp_path)
    names = [row.name for row in layer_table(lifted) if row.kind == "Linear"]
    assert not lifted.skipped
    into = [n for n in names if n.rpartition(".")[2] in PACKED | SEPARATE]
    assert len(into) >= sum(isinstance(m, nn.MultiheadAttention) for m in network.modules())
    for chosen in (into, into[1:2], [n for n in names if "out" in n], names, []):
        plan = {name: SitePlan(method="svd", ranks=(2,)) for name in chosen}
        compressed = reconstruct(lifted.module, lifted.module, plan, None)
        weights = save_weights(compressed, plan, tmp_path / "weights.safetensors")
        mine = tenfold.apply(network, json.loads(json.dumps(plan_json(plan))), load_file(weights))
        for training in (False, True):
            expected = compressed.train(training)(x)
            torch.testing.assert_close(mine.train(training)(x), expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(mine.eval()(x), compressed.eval()(x), rtol=1e-4, atol=1e-5)
        assert sum(isinstance(m, LowRankLinear) for m in mine.modules()) == len(chosen)
        mine(x).square().sum().backward()
        assert all(p.grad is not None for p in mine.parameters())


def test_a_network_may_be_an_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.MultiheadAttention(WIDTH, 4, batch_first=True).eval()
    inputs = tuple(torch.randn(2, LENGTH, WIDTH) for _ in range(3))
    lifted = load_model(export(network, inputs, tmp_path / "net.pt2"), scratch=tmp_path)
    plan = {name: SitePlan(method="svd", ranks=(2,)) for name in ("in_proj_k", "out_proj")}
    compressed = reconstruct(lifted.module, lifted.module, plan, None)
    weights = save_weights(compressed, plan, tmp_path / "weights.safetensors", lifted.given)
    mine = tenfold.apply(network, plan_json(plan, lifted.given), load_file(weights))
    assert_same(compressed, mine, *inputs)


def test_parts_of_a_users_own_tensor_are_put_together(tmp_path: Path) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Parameter(torch.randn(20, WIDTH))
            self.out = nn.Linear(20, 3)

        def forward(self, x: Tensor) -> Tensor:
            parts = [nn.functional.linear(x, w) for w in self.both.split([12, 8])]
            return self.out(torch.cat([parts[0], parts[1].tanh()], -1))

    torch.manual_seed(0)
    network, x = Packed().eval(), torch.randn(2, WIDTH)
    lifted = load_model(export(network, (x,), tmp_path / "net.pt2"), scratch=tmp_path)
    plan = {"out": SitePlan(method="svd", ranks=(2,))}
    compressed = reconstruct(lifted.module, lifted.module, plan, None)
    tensors = load_file(save_weights(compressed, plan, tmp_path / "weights.safetensors", lifted.given))
    assert {"both[0:12]", "both[12:20]"} <= tensors.keys()
    tensors["both[12:20]"] *= 2
    mine = tenfold.apply(network, plan_json(plan, lifted.given), tensors)
    torch.testing.assert_close(mine.both, torch.cat([network.both[:12], 2 * network.both[12:]]))
    first = next(row.name for row in layer_table(lifted) if row.weight == (12, WIDTH))
    with pytest.raises(KeyError, match=r"make that an nn\.Linear"):
        tenfold.apply(network, plan_json({first: plan["out"]}, lifted.given), tensors)
