import numpy as np
import pytest
import torch
from torch import nn

from search.calibrate import Moments, Rows, collect


def by_unfold(layer: nn.Conv2d, x: torch.Tensor) -> np.ndarray:
    """im2col rows as torch's own unfold makes them: (rows, in * taps)."""
    columns = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1]).double().numpy()


def test_moments_of_a_convolution_are_those_of_its_unfolded_input() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2)
    x = torch.randn(6, 3, 11, 9) + 100  # a large mean must not cost digits
    found = collect(nn.Sequential(layer), ["0"], [(x[:4],), (x[4:],)], samples=1)["0"]
    rows = by_unfold(layer, x)
    y = rows @ layer.weight.detach().double().numpy().reshape(5, -1).T + layer.bias.detach().double().numpy()
    a, b = rows - rows.mean(0), y - y.mean(0)
    np.testing.assert_allclose(found.second[0], a.T @ a / len(a), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(found.cross[0], b.T @ a / len(a), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(found.energy[0], (b**2).mean(0), rtol=1e-3)
    np.testing.assert_allclose(found.mean_input[0], rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.mean_output, y.mean(0), rtol=1e-4, atol=1e-3)
    assert found.count == len(rows)
    assert found.input_sizes == (11, 9)


def test_each_group_has_its_own_moments() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, 3, padding=1, groups=2)
    x = torch.randn(8, 6, 5, 5)
    found = collect(nn.Sequential(layer), ["0"], [(x,)], samples=1)["0"]
    for g in range(2):
        rows = by_unfold(layer, x[:, 3 * g : 3 * g + 3])
        rows = rows - rows.mean(0)
        np.testing.assert_allclose(found.second[g], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_a_layer_called_twice_counts_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    assert collect(Twice(), ["layer"], [(torch.randn(10, 4),)], samples=1)["layer"].count == 20


def test_a_layer_that_is_never_called_is_named_as_such() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ValueError, match="no calibration batch reached"):
        collect(Unused(), ["layer"], [(torch.randn(10, 4),)])


def test_drawn_rows_are_the_same_for_input_and_output_and_repeat() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(5, 3, 16, 16)
    rows = Rows(layer, samples=100, rows=20)
    y = layer(x).detach()
    index = rows.draw(y, seed=7)
    assert index is not None
    drawn = rows.inputs(x, index)
    expected = drawn[0] @ layer.weight.detach().flatten(1).T + layer.bias.detach()
    torch.testing.assert_close(rows.outputs(y, index), expected, rtol=1e-4, atol=1e-5)
    assert drawn.shape[1] == 5 * rows.per_sample < 5 * 256
    again = rows.draw(y, seed=7)
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(index, again, strict=True))


def test_new_targets_keep_the_inputs_moments() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    x, y = torch.randn(1, 50, 6), torch.randn(50, 3)
    once, twice = Moments(layer), Moments(layer)
    once.add(x, y)
    twice.add(x, torch.randn(50, 3))
    twice.retarget()
    twice.add(x, y, target_only=True)
    a, b = once.finish(), twice.finish()
    torch.testing.assert_close(a.second, b.second)
    torch.testing.assert_close(a.cross, b.cross, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(a.energy, b.energy, rtol=1e-4, atol=1e-6)
