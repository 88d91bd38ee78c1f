import math

import numpy as np
import pytest
import tensorly as tl
import torch
from tensorly.tt_tensor import tt_to_tensor
from torch import Tensor
from torch.nn.functional import conv2d

from benchmarks.tnet.kernels import Dense, Factored, JointMPS, JointTucker, LayerwiseTucker, Shape

SHAPE: Shape = (2, 2, 3, 2, 6, 5, 3, 3)
PAPER: Shape = (4, 4, 3, 2, 128, 128, 3, 3)

FORMS = [
    (Dense, ()),
    (JointTucker, (2, 1, 2, 2, 4, 3, 3, 2)),
    (JointMPS, (2, 3, 4, 5, 7, 6, 3)),
    (LayerwiseTucker, (4, 3)),
]


def made(form: type[Factored], ranks: tuple[int, ...], shape: Shape = SHAPE) -> Factored:
    torch.manual_seed(0)
    return form(shape, ranks)


def arrays(tensors: object) -> list[np.ndarray]:
    return [t.detach().numpy() for t in tensors]  # type: ignore[attr-defined]


def test_the_papers_network_has_its_parameters() -> None:
    assert Dense.parameters_of(PAPER) == 14_155_776
    for rank, ratio in ((110, 1.35), (96, 1.77), (64, 3.98)):
        ranks = JointTucker.ranks_of(PAPER, rank)
        assert ranks == (4, 4, 3, 2, rank, rank, 3, 3)
        assert JointTucker.parameters_of(PAPER, ranks) == 864 * rank**2 + 256 * rank + 63
        assert round(14_155_776 / JointTucker.parameters_of(PAPER, ranks), 2) == ratio


def test_the_count_of_a_train_is_that_of_its_chain() -> None:
    chain = 1 * 2 * 2 + 2 * 2 * 3 + 3 * 3 * 4 + 4 * 2 * 5 + 5 * 6 * 7 + 7 * 5 * 6 + 6 * 3 * 3 + 3 * 3 * 1
    assert JointMPS.parameters_of(SHAPE, (2, 3, 4, 5, 7, 6, 3)) == chain


@pytest.mark.parametrize(("form", "ranks"), FORMS)
def test_predicted_parameters_are_those_that_train(form: type[Factored], ranks: tuple[int, ...]) -> None:
    assert sum(p.numel() for p in made(form, ranks).parameters()) == form.parameters_of(SHAPE, ranks)


def test_joint_tucker_is_tensorlys() -> None:
    kernels = made(JointTucker, (2, 1, 2, 2, 4, 3, 3, 2))
    assert isinstance(kernels, JointTucker)
    expected = tl.tucker_to_tensor((kernels.core.detach().numpy(), arrays(kernels.factors)))
    np.testing.assert_allclose(kernels.tensor().detach().numpy(), expected, atol=1e-5)


def test_joint_mps_is_tensorlys() -> None:
    kernels = made(JointMPS, (2, 3, 4, 5, 7, 6, 3))
    assert isinstance(kernels, JointMPS)
    np.testing.assert_allclose(kernels.tensor().detach().numpy(), tt_to_tensor(arrays(kernels.cores)), atol=1e-5)


def test_layerwise_tucker_is_tensorlys_layer_by_layer() -> None:
    kernels = made(LayerwiseTucker, (4, 3))
    assert isinstance(kernels, LayerwiseTucker)
    layers = kernels.tensor().flatten(0, 3).detach().numpy()
    for layer, core, outs, ins in zip(layers, *map(arrays, (kernels.cores, kernels.outs, kernels.ins)), strict=True):
        np.testing.assert_allclose(layer, tl.tucker_to_tensor((core, [outs, ins, np.eye(3), np.eye(3)])), atol=1e-5)


@pytest.mark.parametrize(("form", "ranks"), FORMS)
def test_a_layers_chain_at_inference_is_the_convolution_with_its_slice(
    form: type[Factored], ranks: tuple[int, ...]
) -> None:
    kernels = made(form, ranks)
    x = torch.randn(2, 5, 7, 6)
    chains = kernels.links().chains()
    assert len(chains) == 24
    for chain, kernel in zip(chains, kernels.tensor().flatten(0, 3), strict=True):
        torch.testing.assert_close(through(chain, x), conv2d(x, kernel, padding=1), atol=1e-4, rtol=1e-4)


def through(chain: tuple[Tensor, ...], x: Tensor) -> Tensor:
    for link in chain:
        x = conv2d(x, link, padding=(link.shape[-2] // 2, link.shape[-1] // 2))
    return x


def test_what_layers_share_is_stored_once() -> None:
    tucker = made(JointTucker, (2, 1, 2, 2, 4, 3, 3, 2)).links()
    # Two shared 1×1s and 24 cores of 4 × 3 × 3 × 3.
    assert sum(p.numel() for p in tucker.parameters()) == 5 * 3 + 6 * 4 + 24 * 4 * 3 * 9
    assert all(chain[0] is tucker.chains()[0][0] for chain in tucker.chains())
    mps = made(JointMPS, (2, 3, 4, 5, 7, 6, 3)).links()
    # One shared 3×3 convolution from 5 to 7 channels and 24 1×1s from 7 to 6.
    assert sum(p.numel() for p in mps.parameters()) == 7 * 5 * 9 + 24 * 6 * 7


@pytest.mark.parametrize(("form", "ranks"), FORMS)
def test_gradients_reach_every_factor(form: type[Factored], ranks: tuple[int, ...]) -> None:
    kernels = made(form, ranks)
    sum(chain[0].square().sum() for chain in kernels.chains()).backward()  # type: ignore[union-attr]
    for name, parameter in kernels.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("form", "ranks"),
    [*FORMS, (JointTucker, (1, 1, 1, 1, 2, 2, 1, 1)), (JointMPS, (1, 1, 2, 2, 2, 2, 1)), (LayerwiseTucker, (1, 2))],
)
def test_kernels_start_with_the_variance_of_he(form: type[Factored], ranks: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = torch.stack([form(SHAPE, ranks).tensor().square().mean() for _ in range(300)])
    # At the lowest ranks one draw strays far, so that the tolerance is of the mean: four standard errors.
    assert float(drawn.mean()) == pytest.approx(2 / (5 * 9), abs=4 * float(drawn.std()) / math.sqrt(300))
    assert float(drawn.std()) / math.sqrt(300) < 0.06 * 2 / (5 * 9)


@pytest.mark.parametrize("form", [JointTucker, JointMPS, LayerwiseTucker])
@pytest.mark.parametrize("ratio", [1.8, 4.0, 10.0])
def test_a_ratio_is_met_as_nearly_as_ranks_allow(form: type[Factored], ratio: float) -> None:
    shape: Shape = (2, 2, 3, 2, 16, 16, 3, 3)
    kernels = form.at(shape, ratio)
    target = math.prod(shape) / ratio
    asked = abs(form.parameters_of(shape, kernels.ranks) - target)
    rank = max(r for r in range(1, 300) if form.ranks_of(shape, r) == kernels.ranks)
    for other in (rank - 1, rank + 1):
        assert abs(form.parameters_of(shape, form.ranks_of(shape, other)) - target) >= asked
    assert sum(p.numel() for p in kernels.parameters()) == pytest.approx(target, rel=0.2)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at most .*\(2, 2, 3, 2, 6, 5, 3, 3\), got \(2, 2, 3, 2, 7, 5, 3, 3\)"):
        JointTucker(SHAPE, (2, 2, 3, 2, 7, 5, 3, 3))
    with pytest.raises(ValueError, match="takes 2 ranks"):
        LayerwiseTucker(SHAPE, (3,))
    with pytest.raises(ValueError, match="mode 1 of size 2 lies between the ranks 1 and 4"):
        JointMPS(SHAPE, (1, 4, 4, 5, 7, 6, 3))
    with pytest.raises(ValueError, match="got 0"):
        JointTucker.at(SHAPE, 0)
    with pytest.raises(ValueError, match="got 2"):
        Dense.at(SHAPE, 2)
