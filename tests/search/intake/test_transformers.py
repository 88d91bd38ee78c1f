"""Networks of the transformers library (random weights, small configurations): exact through the file, and named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from search.intake import LiftedModel, first_output, load_model
from search.layers import layer_table

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # the library warns of its own plans

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def vit() -> tuple[Any, Callable[[int], Tensor]]:
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=5)
    return transformers.ViTForImageClassification(config), lambda n: torch.randn(n, 3, 16, 16)


def bert() -> tuple[Any, Callable[[int], Tensor]]:
    config = transformers.BertConfig(**SMALL, vocab_size=50, max_position_embeddings=16, num_labels=3)
    return transformers.BertForSequenceClassification(config), lambda n: torch.randint(0, 50, (n, 9))


def gpt2() -> tuple[Any, Callable[[int], Tensor]]:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16, use_cache=False)
    return transformers.GPT2LMHeadModel(config), lambda n: torch.randint(0, 50, (n, 9))


def llama() -> tuple[Any, Callable[[int], Tensor]]:
    config = transformers.LlamaConfig(
        **SMALL, num_key_value_heads=1, vocab_size=50, max_position_embeddings=16, use_cache=False
    )
    return transformers.LlamaForCausalLM(config), lambda n: torch.randint(0, 50, (n, 9))


@pytest.mark.parametrize("make", [vit, bert, gpt2, llama])
def test_a_lift_is_exact_and_named(make: Callable[[], Any], load: Callable[..., LiftedModel]) -> None:
    model, inputs = make()
    model.eval()
    lifted = load(model, (inputs(3),))
    assert lifted.batch == "any"
    assert lifted.outputs[0].name == "logits"
    for n in (1, 2, 5):
        x = inputs(n)
        # GPT-2 stores its weights transposed: the same sums, perhaps in another order.
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if make is gpt2 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(first_output(lifted.module(x)), model(x).logits, **tolerance)
    names = {m for m, k in model.named_modules() if isinstance(k, nn.Linear)}
    rows = [r for r in layer_table(lifted) if r.kind == "Linear"]
    assert rows
    assert names <= {r.name for r in rows}
    assert any(r.compressible for r in rows)


@pytest.mark.parametrize("make", [vit, gpt2])
def test_weights_and_a_config_json_are_enough(make: Callable[[], Any], tmp_path: Path) -> None:
    model, _ = make()
    model.eval()
    weights = {k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    lifted = load_model(tmp_path / "model.safetensors", architecture={"transformers": config}, scratch=tmp_path)
    x = lifted.example(3)
    torch.testing.assert_close(first_output(lifted.module(*x)), model(*x).logits, rtol=1e-5, atol=1e-6)
