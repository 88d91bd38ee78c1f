"""A layer may have any name that torch lets a user give; its files load, and fit the user's own network."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from search.errors import Refused
from search.export import export_all
from search.intake import LiftedModel
from search.intake.names import Names
from search.spec import ExportFormat, SitePlan
from search.surgery import replace
from tenfold.applying import apply
from tenfold.layers import factorized_like

Load = Callable[..., LiftedModel]
X = (torch.randn(2, 6),)


class Odd(nn.Module):
    """A layer of the given name at the top, and another one inside."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(6, 6))
        self.block = nn.ModuleDict({name: nn.Linear(6, 6)})
        self.called = name
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block[self.called](self._modules[self.called](x).relu()).relu())


@pytest.mark.parametrize(
    ("name", "top", "inside"),
    [
        ("code", "code_", "code"),
        ("graph", "graph_", "graph"),
        ("meta", "meta_", "meta"),
        ("_guards_fn", "_guards_fn_", "_guards_fn"),
        ("self", "self_", "self"),
        ("class", "class_", "class_"),
        ("None", "None_", "None_"),
        ("torch", "torch", "torch"),
        ("0", "0", "0"),
        ("été", "été", "été"),
        ("ﬁ", "fi", "fi"),  # the one letter; Python reads it as two
        ("conv-1/a b", "conv_1_a_b", "conv_1_a_b"),
        ('x")\nimport os', "x___import_os", "x___import_os"),
    ],
)
def test_a_layer_of_any_name_is_taken_in_and_exported_again(name: str, top: str, inside: str, load: Load) -> None:
    model = Odd(name).eval()
    lifted = load(model, X)
    assert [n for n, m in lifted.module.named_modules() if isinstance(m, nn.Linear)] == [top, f"block.{inside}", "last"]
    assert lifted.given(f"{top}.weight") == f"{name}.weight"
    assert lifted.given(f"block.{inside}") == f"block.{name}"
    x = torch.randn(5, 6)
    torch.testing.assert_close(lifted.module(x), model(x))
    saved = io.BytesIO()
    torch.export.save(torch.export.export(lifted.module, (x,)), saved)
    saved.seek(0)
    torch.testing.assert_close(torch.export.load(saved).module()(x), model(x))


def test_every_attribute_of_torchs_graph_modules_may_be_a_layers_name() -> None:
    program = torch.export.export(nn.Linear(6, 3), X).module()
    names = Names()
    for taken in {*dir(program), *dir(fx.GraphModule(nn.Module(), fx.Graph()))} - {"weight", "bias"}:
        assert not hasattr(program, names(taken))
    for taken in dir(nn.Module()):
        assert not hasattr(nn.Module(), names(f"block.{taken}").removeprefix("block."))


def test_names_that_become_alike_stay_apart(load: Load) -> None:
    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("a-b", "a b", "a_b")})

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks.values():
                x = block(x).tanh()
            return x

    model = Alike().eval()
    lifted = load(model, X)
    linears = [n for n, m in lifted.module.named_modules() if isinstance(m, nn.Linear)]
    assert [lifted.given(n) for n in linears] == ["blocks.a-b", "blocks.a b", "blocks.a_b"]
    assert torch.equal(lifted.module(*X), model(*X))


def test_tied_layers_of_odd_names_keep_both_names(load: Load) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("def", nn.Embedding(30, 6))
            self.add_module("class", nn.Linear(6, 30))
            self._modules["class"].weight = self._modules["def"].weight

        def forward(self, x: Tensor) -> Tensor:
            return self._modules["class"](self._modules["def"](x))

    lifted = load(Tied().eval(), (torch.randint(0, 30, (2, 7)),))
    assert lifted.module.get_submodule("class_").weight is lifted.module.get_submodule("def_").weight


def test_weights_and_plan_have_the_users_names(load: Load, tmp_path: Path) -> None:
    model = Odd("code").eval()
    lifted = load(model, X)
    original, plan = load(model, X).module, {"code_": SitePlan(method="svd", ranks=(2,))}
    replace(lifted.module, "code_", factorized_like(original.get_submodule("code_"), "svd", (2,)))
    export_all(lifted.module, original, plan, lifted, tmp_path, (ExportFormat.PT2, ExportFormat.SAFETENSORS), {})
    mine = json.loads((tmp_path / "plan.json").read_text())
    assert list(mine) == ["code"]
    expected = lifted.module(*X)
    torch.testing.assert_close(apply(model, mine, load_file(tmp_path / "model.safetensors"))(*X), expected)
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(*X), expected)


@pytest.mark.parametrize("name", ["", "a..b", ".a", "\ud800", "a" * 501])
def test_what_no_module_can_be_called_is_refused(name: str) -> None:
    with pytest.raises(Refused, match="dotted name"):
        Names()(name)
