"""A layer's matrices times the rows of its input are its outputs, whatever its geometry."""

import pytest
import torch
from torch import nn

from search.calibrate import Rows, collect
from search.matrices import matrices, weight_from, windows

from .contract import conv_layers, transposed_layers

LAYERS = conv_layers() | transposed_layers() | {"depthwise": lambda: nn.ConvTranspose2d(6, 6, 3, stride=2, groups=6)}


@pytest.mark.parametrize("name", list(LAYERS))
def test_rows_times_matrices_are_the_outputs(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    d = len(layer.kernel_size)
    x = torch.randn(3, layer.in_channels, *(9, 8, 5)[:d])
    with torch.no_grad():
        y = layer(x)
        rows = Rows(layer, 1)
        index = rows.draw(y, 0)
        found = (rows.inputs(x, index) @ matrices(layer).transpose(1, 2)).transpose(0, 1).flatten(1)
        if layer.bias is not None:
            found = found + layer.bias
    torch.testing.assert_close(found, rows.outputs(y, index), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Embedding(7, 3), *(make() for make in LAYERS.values())])
def test_a_weight_comes_back_from_its_matrices(layer: nn.Module) -> None:
    assert torch.equal(weight_from(layer, matrices(layer)), layer.weight)


def test_the_moments_of_a_transposed_convolution_hold_the_overlap_of_its_inputs() -> None:
    """Two neighbours that meet under the kernel are told apart from two that never do."""
    layer = nn.ConvTranspose1d(1, 1, 4, stride=2)
    x = torch.randn(400, 1, 6, generator=torch.Generator().manual_seed(0))
    second = collect(nn.Sequential(layer), ["0"], [(x + x.roll(1, -1),)], samples=1)["0"].second[0]
    assert second[0, 2].abs() > 0.1 * second[0, 0]
    assert second[0, 1].abs() < 0.02 * second[0, 0]


def test_a_layer_without_a_kernel_has_no_windows() -> None:
    with pytest.raises(TypeError, match="Linear has no windows"):
        windows(nn.Linear(3, 3), torch.randn(2, 3))


def test_tokens_are_counted_and_their_targets_averaged() -> None:
    layer = nn.Embedding(5, 3)
    found = collect(nn.Sequential(layer), ["0"], [(torch.tensor([[0, 1, 1], [4, 1, 0]]),)], samples=1)["0"]
    w = layer.weight.detach().double()
    torch.testing.assert_close(found.second, torch.tensor([[2, 3, 0, 0, 1]]).double() / 6)
    torch.testing.assert_close(found.cross[0].T, w * found.second[0][:, None])
    torch.testing.assert_close(found.energy[0], (w.square() * found.second[0][:, None]).sum(0))
    assert found.input_sizes == (3,)
