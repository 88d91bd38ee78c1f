"""Images channels last, inside a network's graph."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

from search.export import write_onnx
from search.layout import arranged, channels_last
from tenfold import exporting


class TwoInputs(nn.Module):
    """An image and a vector that scales its features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.each = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, image: Tensor, weight: Tensor) -> Tensor:
        x = self.each(torch.relu(self.conv(image)))
        return self.head(x.mean((2, 3)) * self.scale * weight)


class Flat(nn.Module):
    """A view that an image channels last cannot give."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image).view(image.shape[0], -1)


@pytest.fixture
def network() -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(TwoInputs()).eval()


def test_it_answers_alike_with_the_same_parameters(network: fx.GraphModule) -> None:
    arranged = channels_last(network, (torch.randn(2, 3, 8, 8), torch.randn(2, 8)))
    assert arranged is not None
    assert {n: id(p) for n, p in arranged.named_parameters()} == {n: id(p) for n, p in network.named_parameters()}
    seen: list[bool] = []
    arranged.each.register_forward_pre_hook(
        lambda _, xs: seen.append(xs[0].is_contiguous(memory_format=torch.channels_last))
    )
    inputs = torch.randn(5, 3, 8, 8), torch.randn(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(arranged(*inputs), network(*inputs), rtol=1e-5, atol=1e-6)
    assert seen == [True, False]  # the second is of the network itself, whose module it is


def test_files_of_it_take_any_batch_in_any_layout(network: fx.GraphModule, tmp_path: Path) -> None:
    example = torch.randn(2, 3, 8, 8), torch.randn(2, 8)
    arranged = channels_last(network, example)
    assert arranged is not None
    file = exporting.export(arranged, example, tmp_path / "model.pt2")
    graph = write_onnx(file, ["image", "weight"], tmp_path / "model.onnx")
    image, weight = torch.randn(7, 3, 8, 8), torch.randn(7, 8)
    with torch.no_grad():
        expected = network(image, weight)
        for x in (image, image.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(torch.export.load(file).module()(x, weight), expected, rtol=1e-4, atol=1e-5)
    (answer,) = onnxruntime.InferenceSession(str(graph)).run(None, {"image": image.numpy(), "weight": weight.numpy()})
    np.testing.assert_allclose(answer, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(Flat, (torch.randn(2, 3, 8, 8),)), (lambda: nn.Linear(4, 2), (torch.randn(2, 4),))],
    ids=["view", "no image"],
)
def test_what_cannot_be_arranged_is_left_alone(make: type[nn.Module], inputs: tuple[Tensor, ...]) -> None:
    assert channels_last(fx.symbolic_trace(make()).eval(), inputs) is None


def test_batches_are_arranged_where_the_network_gains_and_its_code_allows_it(network: fx.GraphModule) -> None:
    batch = torch.randn(2, 3, 8, 8), torch.randn(2, 8)
    image, vector = arranged(network, [batch])[0]
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(image, batch[0])
    assert vector is batch[1]
    for other, inputs in ((Flat(), batch[:1]), (nn.Flatten(), batch[:1])):
        assert arranged(other, [inputs])[0][0] is inputs[0]
