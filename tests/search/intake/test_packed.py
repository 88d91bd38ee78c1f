"""Weights cut out of a larger tensor: the projections of attention, and what others do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from search.intake import LiftedModel, load_model
from search.layers import layer_table

Load = Callable[..., LiftedModel]
LENGTH, WIDTH = 5, 8


class Calls(nn.Module):
    """One attention, called with each of ``calls``: which of x, y and z are its queries, keys and values."""

    def __init__(self, *calls: str, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, **options)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        known = {"x": x, "y": x.flip(1), "z": x.tanh()}
        if not self.attention.batch_first:
            known = {name: t.transpose(0, 1) for name, t in known.items()}
        return sum(self.attention(*(known[name] for name in call))[0] for call in self.calls)


def linears(lifted: LiftedModel) -> set[str]:
    return {row.name for row in layer_table(lifted) if row.kind == "Linear" and row.compressible}


def lifted_exactly(model: nn.Module, load: Load, width: int = WIDTH) -> LiftedModel:
    """The same answers and gradients' places, and no tensor more than the user's."""
    lifted = load(model.eval(), (torch.randn(2, LENGTH, width),))
    x = torch.randn(3, LENGTH, width)
    assert torch.equal(lifted.module(x), model(x))
    assert sum(p.numel() for p in lifted.module.parameters()) == sum(p.numel() for p in model.parameters())
    lifted.module(x).square().sum().backward()
    assert all(p.grad is not None for p in lifted.module.parameters())
    return lifted


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("calls", [("xyy",), ("xyy", "zxx")])
def test_queries_and_what_they_attend_to_are_layers(
    calls: tuple[str, ...], bias: bool, batch_first: bool, load: Load
) -> None:
    lifted = lifted_exactly(Calls(*calls, bias=bias, batch_first=batch_first), load)
    assert linears(lifted) == {"attention.in_proj_q", "attention.in_proj_kv", "attention.out_proj"}
    assert not lifted.skipped
    assert lifted.given("attention.in_proj_kv") == "attention.in_proj_kv"
    assert (lifted.module.get_submodule("attention.in_proj_kv").bias is not None) is bias


def test_three_inputs_have_three_layers(load: Load) -> None:
    lifted = lifted_exactly(Calls("xyz"), load)
    assert linears(lifted) == {f"attention.{name}" for name in ("in_proj_q", "in_proj_k", "in_proj_v", "out_proj")}


@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_their_own_take_their_part_of_the_bias(bias: bool, load: Load) -> None:
    class Sizes(Calls):
        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x[..., :6], x[..., :3])[0]

    model = Sizes(bias=bias, batch_first=True, kdim=6, vdim=3)
    if bias:
        nn.init.normal_(model.attention.in_proj_bias)
    lifted = lifted_exactly(model, load)
    assert linears(lifted) == {f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert lifted.given("attention.k_proj") == "attention.k_proj"
    if bias:
        expected = model.attention.in_proj_bias.chunk(3)[1]
        assert torch.equal(lifted.module.get_submodule("attention.k_proj").bias, expected)


def test_self_attention_keeps_one_layer(load: Load) -> None:
    lifted = lifted_exactly(Calls("xxx", "yyy"), load)
    assert linears(lifted) == {"attention.in_proj", "attention.out_proj"}
    assert not lifted.skipped


@pytest.mark.parametrize("calls", [("xxx", "xyy"), ("xyy", "xyz")])
def test_a_weight_that_is_also_read_otherwise_is_left_alone_and_says_so(calls: tuple[str, ...], load: Load) -> None:
    lifted = lifted_exactly(Calls(*calls), load)
    assert linears(lifted) == {"attention.out_proj"}
    (note,) = lifted.skipped
    assert "its weight is a part of attention.in_proj_weight" in note
    if "xxx" in calls:
        assert "outside the layer" in lifted.locked["attention.in_proj"]


class Own(nn.Module):
    """A user's own tensors, of 8 x 8 and 8."""

    def __init__(self, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w, self.b)


PARTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "slices": lambda x, w, b: linear(x, w[:3], b[:3]).sum(-1) + linear(x, w[3:], b[3:]).sum(-1),
    "narrow": lambda x, w, b: linear(x, w.narrow(0, 0, 3), b[:3]).sum(-1) + linear(x, w.narrow(0, 3, 5), b[3:]).sum(-1),
    "cut twice": lambda x, w, b: linear(x, w[:3], b[:5][:3]).sum(-1) + linear(x, w[-7:][2:], b[-5:]).sum(-1),
    "turned round": lambda x, w, b: (x @ w[:3].T + 0 * b.sum()).sum(-1) + (x @ w[3:].T).sum(-1),
}


@pytest.mark.parametrize("parts", PARTS)
def test_parts_of_a_users_own_tensor_are_layers(parts: str, load: Load) -> None:
    lifted = lifted_exactly(Own(PARTS[parts]), load)
    assert linears(lifted) == {"w_op_0_3", "w_op_3_8"}
    assert lifted.given("w_op_3_8") == lifted.given("w_op_3_8.weight") == "w[3:8]"


ODD: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rows left out": lambda x, w, b: linear(x, w[:3], b[:3]).sum(-1) + linear(x, w[4:], b[4:]).sum(-1),
    "overlap": lambda x, w, b: linear(x, w[:5], b[:5]).sum(-1) + linear(x, w[3:], b[3:]).sum(-1),
    "every other row": lambda x, w, b: linear(x, w[::2], b[::2]).sum(-1) + linear(x, w[1::2], b[1::2]).sum(-1),
    "columns": lambda x, w, b: linear(x[..., :4], w[:, :4], b) + linear(x[..., 4:], w[:, 4:], b),
    "used otherwise": lambda x, w, b: linear(x, w[:3], b[:3]).sum(-1) + linear(x, w[3:], b[3:]).sum(-1) * w[:3].mean(),
    "an input": lambda x, w, b: linear(x, w[:4], b[:4]).sum(-1) + linear(w[:4], w[4:], b[4:]).sum(),
    "multiplied as it is": lambda x, w, b: x[..., :3] @ w[:3] + x[..., 3:] @ w[3:] + b,
    "a bias that overlaps": lambda x, w, b: linear(x, w[:4], b[:4]).sum(-1) + linear(x, w[4:], b[2:6]).sum(-1),
    "a bias used whole": lambda x, w, b: linear(x, w[:4], b[:4]).sum(-1) + linear(x, w[4:], b[4:]).sum(-1) + b.sum(),
}


@pytest.mark.parametrize("odd", ODD)
def test_parts_that_are_not_a_layers_own_stay_as_they_are(odd: str, load: Load) -> None:
    lifted = lifted_exactly(Own(ODD[odd]), load)
    assert not linears(lifted)
    if odd != "multiplied as it is":
        assert lifted.skipped
    assert {name for name, _ in lifted.module.named_parameters()} == {"w", "b"}


def test_a_bias_that_is_computed_is_told(load: Load) -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, self.fc.weight, 2 * self.fc.bias)

    assert "its bias is computed from others" in lifted_exactly(Doubled(), load).skipped[0]


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # torch of itself
def test_decomposed_files_find_the_parts_again(tmp_path: Path) -> None:
    model, x = Own(PARTS["slices"]).eval(), torch.randn(3, LENGTH, WIDTH)
    program = torch.export.export(model, (x,)).run_decompositions()
    torch.export.save(program, tmp_path / "m.pt2")
    lifted = load_model(tmp_path / "m.pt2", scratch=tmp_path)
    assert linears(lifted) == {"w_op_0_3", "w_op_3_8"}
    assert set(lifted.module.state_dict()) == {
        f"w_op_{rows}.{t}" for rows in ("0_3", "3_8") for t in ("weight", "bias")
    }
    torch.testing.assert_close(lifted.module(x), model(x), rtol=1e-5, atol=1e-6)
