"""Gauss-Newton matrices against Jacobians written out."""

import pytest
import torch
from torch import Tensor, fx, nn

from search.curvature import output_curvature, tempered
from search.metrics import forward
from search.reconstruct import Options, reconstruct
from search.spec import SitePlan


def small(norm: bool = False) -> fx.GraphModule:
    torch.manual_seed(0)
    middle: list[nn.Module] = [nn.BatchNorm1d(5)] if norm else []
    return fx.symbolic_trace(nn.Sequential(nn.Linear(4, 5), *middle, nn.ReLU(inplace=True), nn.Linear(5, 3))).eval()


def curvature(net: fx.GraphModule, x: Tensor, classes: bool) -> dict[str, Tensor]:
    sites = [name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    return output_curvature(net, x.split(256), lambda m, xs: forward(m, (xs,)), sites, classes=classes, seed=0)


@pytest.mark.parametrize("classes", [True, False])
def test_it_is_the_mean_of_squared_jacobians_at_the_layers_outputs(classes: bool) -> None:
    net, x = small(), torch.randn(32, 4).repeat(256, 1)
    found = curvature(net, x, classes)
    exact = torch.zeros(5, 5)
    for y in net.get_submodule("0")(x[:32]).detach():
        jacobian = torch.autograd.functional.jacobian(lambda h: net.get_submodule("2")(h.relu()), y)
        p = net.get_submodule("2")(y.relu()).softmax(-1).detach()
        inner = torch.diag(p) - p[:, None] * p if classes else torch.eye(3)
        exact += jacobian.T @ inner @ jacobian
    wanted = tempered(exact.double())
    assert torch.allclose(found["0"], wanted, atol=0.05 * float(wanted.abs().max()))


def test_it_is_taken_behind_a_batch_norm_and_changes_nothing() -> None:
    net = small(norm=True)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = curvature(net, torch.randn(64, 4), True)
    assert {name: tuple(matrix.shape) for name, matrix in found.items()} == {"0": (5, 5), "3": (3, 3)}
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not net.get_submodule("1")._forward_hooks


def test_a_network_without_gradients_has_none() -> None:
    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).argmax(-1)

    assert curvature(fx.symbolic_trace(Rounds()).eval(), torch.randn(8, 4), False) == {}


def test_an_operation_without_a_derivative_leaves_none() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x).exp()
            z = self.head(y)
            y.mul_(2)
            return z + y.sum()

    net = fx.symbolic_trace(Overwrites()).eval()
    assert curvature(net, torch.randn(8, 4), False) == {}
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("alive", [0, 4])
def test_channels_that_a_batch_norm_scales_to_nothing_do_no_harm(alive: int) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    weight = layers.get_submodule("1").get_parameter("weight")
    weight.data = (torch.arange(8) < alive).float()
    net = fx.symbolic_trace(layers).eval()
    batches = [(torch.randn(64, 6),)]
    options = Options(curvature=curvature(net, batches[0][0], True))
    plan = {"0": SitePlan(method="svd", ranks=(3,))}
    made = reconstruct(net, net, plan, lambda: batches, options=options)
    assert all(bool(p.isfinite().all()) for p in made.parameters())
    assert bool(made(*batches[0]).isfinite().all())


def test_tokens_have_outputs_last() -> None:
    net = fx.symbolic_trace(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))).eval()
    found = curvature(net, torch.randint(0, 7, (64, 6)), True)
    assert {name: tuple(matrix.shape) for name, matrix in found.items()} == {"0": (4, 4), "1": (3, 3)}
