"""Torch's own attention, opened so that its projections can be replaced."""

import json
from pathlib import Path

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
from tenfold.layers.attention import Attention

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


def opened(packed: bool, **options: bool) -> tuple[nn.MultiheadAttention, Attention]:
    torch.manual_seed(0)
    torchs = nn.MultiheadAttention(WIDTH, 4, **options).eval()
    for p in torchs.parameters():
        nn.init.normal_(p, std=0.3)
    return torchs, Attention(torchs, packed=packed)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_it_computes_what_torchs_does(call: str, cross: bool, packed: bool) -> None:
    torchs, ours = opened(packed, batch_first=True)
    x = torch.randn(2, LENGTH, WIDTH)
    y, z = (torch.randn_like(x), torch.randn_like(x)) if cross else (x, x)
    for expected, found in zip(torchs(x, y, z, **CALLS[call]), ours(x, y, z, **CALLS[call]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(LENGTH, 3, WIDTH), (LENGTH, WIDTH)])
def test_sequences_may_come_first_or_without_a_batch(shape: tuple[int, ...]) -> None:
    torchs, ours = opened(False, bias=False)
    x = torch.randn(*shape)
    for expected, found in zip(torchs(x, x, x), ours(x, x, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"kdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_it_cannot_open_says_what_to_do(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"run the exported model\.pt2"):
        Attention(nn.MultiheadAttention(WIDTH, 4, **options), packed=False)


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


@pytest.mark.parametrize("kind", [Own, Encoder])
def test_a_users_own_attention_takes_the_compressed_weights(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = kind().eval(), torch.randn(2, LENGTH, WIDTH)
    lifted = load_model(export(network, (x,), tmp_path / "net.pt2"), scratch=tmp_path)
    names = [row.name for row in layer_table(lifted) if row.kind == "Linear"]
    assert any(name.endswith("in_proj") for name in names)
    assert any(name.endswith("out_proj") for name in names)
    for chosen in ([n for n in names if n.endswith("in_proj")], [n for n in names if "out" in n], names, []):
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
