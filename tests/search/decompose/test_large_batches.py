"""Layers that take large batches in pieces."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenfold.layers import factorized_like

BATCH = 100

of_each = pytest.mark.parametrize(
    ("method", "ranks", "part"),
    [("cp3", (16,), "_chain"), ("cp4", (16,), "_chain"), ("r_tucker", (1, 2, 1, 2), "_quickest")],
)


@of_each
def test_pieces_give_the_same_and_are_taken_where_nothing_is_trained_or_traced(
    method: str, ranks: tuple[int, ...], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer: Any = factorized_like(nn.Conv2d(8, 12, 3, padding=1, stride=2, groups=2), method, ranks).eval()
    x = torch.randn(BATCH, 8, 64, 64).contiguous(memory_format=torch.channels_last)
    seen: list[int] = []
    run = getattr(layer, part)

    def counted(piece: Tensor) -> Tensor:
        seen.append(len(piece))
        found: Tensor = run(piece)
        return found

    monkeypatch.setattr(layer, part, counted)
    with torch.no_grad():
        found = layer(x)
    assert len(seen) > 1
    assert sum(seen) == BATCH
    seen.clear()
    torch.testing.assert_close(layer(x).detach(), found)
    assert seen == [BATCH]  # with gradients, whole


@of_each
def test_a_file_is_not_cut(method: str, ranks: tuple[int, ...], part: str) -> None:
    layer = factorized_like(nn.Conv2d(8, 12, 3, padding=1, stride=2, groups=2), method, ranks).eval()
    x = torch.randn(BATCH, 8, 64, 64)
    with torch.no_grad():
        found = layer(x)
        traced = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert not any("split" in str(node.target) or "cat" in str(node.target) for node in traced.graph.nodes)
    torch.testing.assert_close(traced.module()(x[:5]), found[:5])


@pytest.mark.parametrize("method", ["cp3", "cp4"])
def test_a_traced_module_is_not_cut(method: str) -> None:
    layer = factorized_like(nn.Conv2d(8, 12, 3), method, (16,)).eval()
    x = torch.randn(BATCH, 8, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(layer, x)(x[:5]), layer(x[:5]))


@pytest.mark.parametrize("method", ["cp3", "cp4"])
def test_an_image_by_itself_is_no_batch(method: str) -> None:
    layer = factorized_like(nn.Conv2d(200, 8, 3, padding=1), method, (16,)).eval()
    x = torch.randn(200, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer(x[None])[0])
