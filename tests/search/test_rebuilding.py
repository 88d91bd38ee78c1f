"""Training through the dense weight: the same function and gradients, the same run when resumed, no trace left."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from search import rebuilding, tune
from search.decompose import METHODS
from search.metrics import evaluate
from search.precision import Precision
from search.rebuilding import chained, quicker_rebuilt, rebuild
from search.spec import FineTune, Metric
from search.tune import fine_tune
from tenfold.layers import FactorizedLayer, factorized_like

from .test_tune import Blobs, blobs, network, teacher, weights

__all__ = ["blobs", "teacher"]

KINDS = {
    "Linear": (nn.Linear(12, 10), (5, 12)),
    "Conv1d": (nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 11)),
    "Conv2d": (nn.Conv2d(8, 12, 3, padding="same", dilation=2, groups=2, bias=False), (2, 8, 9, 9)),
    "ConvTranspose2d": (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 6, 5, 5)),
    "Conv3d": (nn.Conv3d(4, 6, 3, padding=1), (1, 4, 5, 5, 5)),
}
PAIRS = [(k, m) for k, (layer, _) in KINDS.items() for m in METHODS if METHODS[m].applies_to(layer) is None]


def factorized(kind: str, method: str) -> FactorizedLayer:
    layer = KINDS[kind][0]
    ranks = METHODS[method].ranks(layer)
    return METHODS[method].factorize(layer, ranks[len(ranks) // 2]).module


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_a_rebuilt_layer_is_the_same_function_with_the_same_gradients(kind: str, method: str) -> None:
    torch.manual_seed(1)
    chain = factorized(kind, method)
    rebuilt = copy.deepcopy(chain)
    rebuild(rebuilt, ("",))
    assert "forward" in rebuilt.__dict__
    x = torch.randn(KINDS[kind][1])
    results = []
    for layer in (chain, rebuilt):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.square().sum().backward()
        results.append([y.detach(), inputs.grad, *(p.grad for p in layer.parameters())])
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4 * float(mine.abs().max()))


def test_a_layer_that_pads_with_its_border_keeps_its_chain() -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
    module = nn.Sequential(METHODS["svd"].factorize(layer, (2,)).module)
    rebuild(module, ("0",))
    assert "forward" not in module[0].__dict__
    assert quicker_rebuilt(module, lambda m: m(torch.randn(1, 8, 5, 5)), Precision.FLOAT32) == ()


def test_a_copy_of_a_rebuilt_layer_computes_with_its_own_factors() -> None:
    layer = factorized("Conv1d", "svd")
    rebuild(layer, ("",))
    other = copy.deepcopy(layer)
    x = torch.randn(KINDS["Conv1d"][1])
    before = layer(x)
    with torch.no_grad():
        other.get_submodule("last").weight.zero_()
        other.get_submodule("last").bias.zero_()
    assert not other(x).any()
    assert torch.equal(layer(x), before)


def test_layers_are_chosen_by_their_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(layer: nn.Module, x: torch.Tensor, precision: Precision) -> float:
        quick = "forward" in layer.__dict__ and x.shape[-1] == 12
        return 1.0 if quick else 2.0

    monkeypatch.setattr(rebuilding, "_seconds", seconds)
    first = METHODS["svd"].factorize(nn.Linear(12, 10), (2,)).module
    second = METHODS["svd"].factorize(nn.Linear(10, 12), (2,)).module
    module = nn.Sequential(first, nn.BatchNorm1d(10), second)
    state = copy.deepcopy(module.state_dict())
    assert quicker_rebuilt(module, lambda m: m(torch.randn(4, 12)), Precision.FLOAT32) == ("0",)
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())  # a copy was run, not the network


def test_real_times_are_taken_for_every_layer() -> None:
    """A chain of sixteen times the channels: no machine is in doubt."""
    layer = factorized_like(nn.Conv2d(16, 16, 3, padding=1), "cp3", (256,))
    module = nn.Sequential(layer)
    assert quicker_rebuilt(module, lambda m: m(torch.randn(16, 16, 24, 24)), Precision.BFLOAT16_CHANNELS_LAST) == ("0",)


def test_a_run_with_rebuilt_layers_resumes_to_the_same_weights(
    blobs: Blobs, teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "REBUILDING_STEPS", 1)
    monkeypatch.setattr(tune, "quicker_rebuilt", lambda module, run, precision: ("0",))

    def start(seed: int) -> nn.Module:
        module = network(seed=seed)
        module[0] = METHODS["svd"].factorize(module[0], (3,)).module
        return module

    kept: list[Path] = []

    def keep(path: Path) -> None:
        kept.append(path.rename(tmp_path / f"{len(kept)}.safetensors"))

    recipe = FineTune(batch_size=32, learning_rate=0.1)
    whole, resumed = start(2), start(3)
    tuned = fine_tune(
        *(whole, teacher, blobs, recipe),
        **{"epochs": 2, "seed": 5, "metric": Metric.ACCURACY, "save": tmp_path / "c", "saved": keep, "save_every_s": 0},
    )
    assert "1 layers were quicker to train through their dense weight" in tuned.notes
    monkeypatch.setattr(tune, "quicker_rebuilt", lambda module, run, precision: ())  # the checkpoint knows
    fine_tune(resumed, teacher, blobs, recipe, epochs=2, seed=5, metric=Metric.ACCURACY, checkpoint=kept[7])
    assert torch.equal(weights(whole), weights(resumed))
    assert "forward" not in whole[0].__dict__
    chain = evaluate(whole, blobs.select, Metric.ACCURACY)
    assert chain.value > 0.9


def test_chained_undoes_rebuild() -> None:
    module = nn.Sequential(factorized("Linear", "svd"))
    rebuild(module, ("0",))
    chained(module)
    assert "forward" not in module[0].__dict__
