import numpy as np
import pytest
import torch
from torch import nn

from search.decompose import METHODS
from search.vbmf import evbmf_rank, weakened


@pytest.mark.parametrize("shape", [(40, 200), (200, 40), (64, 64)])
@pytest.mark.parametrize("rank", [3, 8])
def test_a_planted_rank_is_found_in_noise(shape: tuple[int, int], rank: int) -> None:
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    assert evbmf_rank(signal + rng.normal(size=shape)) == rank


def test_pure_noise_has_no_rank() -> None:
    assert evbmf_rank(np.random.default_rng(1).normal(size=(50, 300))) == 0


def test_singular_values_with_a_shape_say_the_same_and_scale_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    matrix = rng.normal(size=(30, 4)) @ rng.normal(size=(4, 90)) + 0.5 * rng.normal(size=(30, 90))
    values = np.linalg.svd(matrix, compute_uv=False)
    assert evbmf_rank(matrix) == evbmf_rank(values, (30, 90)) == evbmf_rank(1e-4 * matrix) == 4


def test_zero_and_exactly_low_rank_matrices_do_not_break_it() -> None:
    assert evbmf_rank(np.zeros((5, 9))) == 0
    assert evbmf_rank(np.outer(np.arange(1, 6), np.arange(1, 10))) == 1


def test_what_is_neither_a_matrix_nor_a_spectrum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\)"):
        evbmf_rank(np.ones(3))


def test_weakening_goes_from_full_to_the_chosen_rank() -> None:
    assert weakened(10, 64, 0.0) == 64
    assert weakened(10, 64, 1.0) == 10
    assert weakened(10, 64, 0.8) == 20
    assert weakened(0, 64, 1.0) == 1


@pytest.mark.parametrize("method", ["svd", "svd_input", "tucker2", "cp3"])
def test_a_kernel_compressed_before_is_judged_by_its_core(method: str) -> None:
    """Four directions stand out of noise; cutting the noise to twelve must not make the other eight a signal."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def orthonormal(rows: int, columns: int) -> torch.Tensor:
        return torch.linalg.qr(normal(rows, columns))[0]

    core = 0.02 * normal(12, 12, 3, 3)
    core[:4, :4] += normal(4, 4, 3, 3)
    layer = nn.Conv2d(24, 32, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("oa,ib,abhw->oihw", orthonormal(32, 12), orthonormal(24, 12), core))
    assert set(METHODS[method].variational_ranks(layer)) == {4}
