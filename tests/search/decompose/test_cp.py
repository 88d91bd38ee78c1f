import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import parafac
from torch import nn

from search.decompose import METHODS
from search.decompose.polyadic import PENALTY
from tenfold.layers import FactorizedLayer, factorized_like

from .conftest import smooth_input
from .contract import Contract, StatisticsOf, conv_layers

BOTH = pytest.mark.parametrize("method", ["cp3", "cp4"])


def planted(layer: nn.Module, method: str, rank: int) -> nn.Module:
    """``layer`` with a kernel that is exactly a sum of ``rank`` random terms in each group."""
    with torch.no_grad():
        layer.weight.copy_(factorized_like(layer, method, (rank,)).dense_weight())
    return layer


class CPContract(Contract):
    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        # One matrix of channels for each tap, each a sum of its singular values' terms.
        return (min(layer.in_channels, layer.out_channels) // layer.groups * layer.weight[0, 0].numel(),)

    def test_a_planted_rank_is_recovered(self, name: str, statistics_of: StatisticsOf) -> None:
        layer = planted(self.layers[name](), self.method, 4)
        x = smooth_input(layer)
        for statistics in (None, statistics_of(layer, x)):
            fit = self.m.factorize(layer, (4,), statistics)
            assert fit.error < PENALTY**2
            torch.testing.assert_close(fit.module(x), layer(x), rtol=5e-2, atol=5e-2)


class TestCP3(CPContract):
    method = "cp3"
    layers = conv_layers() | {
        "conv1d": lambda: nn.Conv1d(12, 10, 5, padding=2, stride=2),
        "conv3d": lambda: nn.Conv3d(8, 10, 3, padding=1),
    }


class TestCP4(CPContract):
    method = "cp4"
    layers = conv_layers() | {"tall": lambda: nn.Conv2d(8, 8, (5, 3), padding=(2, 1), stride=2)}


def kernels() -> dict[str, np.ndarray]:
    """(out, in, k, k): random, and of rank 5 with noise."""
    rng = np.random.default_rng(0)
    o, i, h, w = (rng.standard_normal((size, 5)) for size in (12, 10, 3, 3))
    low = np.einsum("or,ir,hr,wr->oihw", o, i, h, w)
    return {
        "random": rng.standard_normal((12, 10, 3, 3)),
        "low rank and noise": low + 0.1 * low.std() * rng.standard_normal(low.shape),
    }


def conv_with(kernel: np.ndarray) -> nn.Conv2d:
    layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2:])
    layer.weight.data = torch.from_numpy(kernel).float()
    return layer


def term_norms(module: FactorizedLayer) -> torch.Tensor:
    """||u_r|| ||p_r|| ||k_r|| of every term, from the links' weights."""
    first, *spatial, last = [p.detach().double() for p in module.parameters() if p.dim() > 1]
    norms = first.flatten(1).norm(dim=1) * last.flatten(1).norm(dim=0)
    for link in spatial:
        norms = norms * link.flatten(1).norm(dim=1)
    return norms


@pytest.mark.filterwarnings("ignore")  # tensorly's own, about its settings
@pytest.mark.parametrize("kernel", list(kernels()))
@pytest.mark.parametrize("rank", [3, 5, 12])
@BOTH
def test_without_statistics_it_is_as_exact_as_tensorlys_parafac(method: str, rank: int, kernel: str) -> None:
    w = kernels()[kernel]
    tensor = w.reshape(12, 10, 9) if method == "cp3" else w
    theirs = min(
        np.linalg.norm(tensorly.cp_to_tensor(parafac(tensor, rank, n_iter_max=200, init=init, random_state=0)) - tensor)
        for init in ("svd", "random")
    )
    fit = METHODS[method].factorize(conv_with(w), (rank,))
    ours = np.linalg.norm(fit.module.dense_weight().detach().double().numpy() - w)
    assert ours <= 1.02 * theirs
    assert fit.error == pytest.approx((ours / np.linalg.norm(w)) ** 2, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@BOTH
def test_terms_do_not_grow_and_cancel_where_those_of_plain_least_squares_do(method: str) -> None:
    # The derivative of a rank-one tensor along a line has border rank 2: two terms come as near to it as one likes, but
    # only by growing without bound (de Silva and Lim 2008).
    rng = np.random.default_rng(0)
    pairs = [rng.standard_normal((2, size)) for size in (8, 8, 3, 3)]
    w = sum(np.einsum("o,i,h,w->oihw", *(p[int(j == m)] for j, p in enumerate(pairs))) for m in range(4))
    tensor = w.reshape(8, 8, 9) if method == "cp3" else w
    plain = parafac(tensor, 2, n_iter_max=5000, init="random", random_state=0, tol=0)
    grown = np.prod([np.linalg.norm(f, axis=0) for f in plain.factors], axis=0) * plain.weights
    assert np.linalg.norm(grown) > 9 * np.linalg.norm(w)

    layer = conv_with(w)
    fit = METHODS[method].factorize(layer, (2,))
    for _ in range(100):
        fit = METHODS[method].factorize(layer, (2,), start=fit.module)
    assert float(term_norms(fit.module).norm()) < 3 * np.linalg.norm(w)
    assert fit.error < 5e-3


@BOTH
def test_a_terms_norm_is_spread_evenly_over_its_links(method: str, statistics_of: StatisticsOf) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 16, 3, padding=1)
    module = METHODS[method].factorize(layer, (9,), statistics_of(layer, smooth_input(layer))).module
    norms = [link.weight.detach().flatten(1).norm(dim=1) for name, link in module.named_children() if name != "last"]
    norms.append(module.last.weight.detach().flatten(1).norm(dim=0))
    for other in norms[1:]:
        torch.testing.assert_close(other, norms[0], rtol=1e-4, atol=1e-5)


@BOTH
def test_a_fitted_start_is_taken_up(method: str, statistics_of: StatisticsOf) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 24, 3, padding=1, groups=2)
    statistics = statistics_of(layer, smooth_input(layer))
    fit = METHODS[method].factorize(layer, (9,), statistics)
    again = METHODS[method].factorize(layer, (9,), statistics, start=fit.module)
    assert again.error <= fit.error + 1e-6


@BOTH
def test_a_kernel_of_fewer_terms_than_asked_for_is_no_trouble(method: str, statistics_of: StatisticsOf) -> None:
    for rank in (0, 2):
        layer = nn.Conv2d(8, 8, 3)
        with torch.no_grad():
            layer.weight.zero_()
        if rank:
            planted(layer, method, rank)
        x = smooth_input(layer)
        for statistics in (None, statistics_of(layer, x)):
            module = METHODS[method].factorize(layer, (9,), statistics).module
            torch.testing.assert_close(module(x), layer(x), rtol=1e-2, atol=1e-2)


@BOTH
def test_the_lattice_is_small_and_begins_with_the_cheapest(method: str) -> None:
    for layer in (nn.Conv2d(4, 4, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(512, 512, 3)):
        lattice = METHODS[method].ranks(layer)
        assert lattice[0] == (1,)
        assert len(lattice) <= 24


def test_parameters_are_those_of_the_papers() -> None:
    layer = nn.Conv2d(64, 128, 3, bias=False)
    # Su et al. 2018 and MUSCO: R (S + k^2 + T); with separate axes R (S + k + k + T).
    assert METHODS["cp3"].cost(layer, (50,), 1)[0] == 50 * (64 + 9 + 128)
    assert METHODS["cp4"].cost(layer, (50,), 1)[0] == 50 * (64 + 3 + 3 + 128)


def test_kernels_without_taps_are_refused() -> None:
    assert "1 x 1" in str(METHODS["cp3"].applies_to(nn.Conv2d(8, 8, 1)))
    assert "nothing to separate" in str(METHODS["cp4"].applies_to(nn.Conv2d(8, 8, (3, 1))))
