"""``shuffled_tt``, ``shuffled_tucker`` and ``shuffled_cp``: low-rank tensors whose entries are shuffled."""

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorly
import torch
from tensorly.decomposition import parafac, tensor_train, tucker
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from search import cost
from search.allocate import allocate
from search.decompose import AUTO, METHODS
from search.export import write_onnx
from search.spec import Cost, SiteChoice
from tenfold import exporting
from tenfold.layers import FactorizedLayer, factorized_like
from tenfold.layers.shuffled import Shuffled, tensor_modes
from tenfold.layers.shuffling import rotations, shuffle, splitmix64, unshuffle

from .conftest import smooth_input
from .contract import Contract, StatisticsOf

NAMES = ["shuffled_tt", "shuffled_tucker", "shuffled_cp"]


def shuffled_layers() -> dict[str, Callable[[], nn.Module]]:
    """Every kind and geometry of layer, small: the error is checked in the norm of C at many ranks."""
    return {
        "plain": lambda: nn.Conv2d(8, 10, 3, padding=1),
        "strided": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
        "grouped": lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2),
        "same": lambda: nn.Conv2d(5, 6, (2, 3), padding="same", dilation=(2, 1)),
        "circular": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
        "conv1d": lambda: nn.Conv1d(8, 10, 5, padding=2, stride=2),
        "conv3d": lambda: nn.Conv3d(4, 6, 3, padding=1),
        "linear": lambda: nn.Linear(20, 14),
        "prime": lambda: nn.Linear(13, 11, bias=False),
    }


class TestShuffledTT(Contract):
    method = "shuffled_tt"
    layers = shuffled_layers()

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        modes = tensor_modes(layer.weight.numel())
        return tuple(min(math.prod(modes[:k]), math.prod(modes[k:])) for k in range(1, len(modes)))


class TestShuffledTucker(Contract):
    method = "shuffled_tucker"
    layers = shuffled_layers()

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        return tensor_modes(layer.weight.numel())


class TestShuffledCP(Contract):
    method = "shuffled_cp"
    layers = shuffled_layers()

    @staticmethod
    def full(layer: nn.Module) -> tuple[int, ...]:
        return (2,)

    def test_it_is_exact_at_full_rank(self, name: str, statistics_of: StatisticsOf) -> None:
        """CP has no full rank that is cheap to know: a planted one is recovered."""
        layer = self.layers[name]()
        with torch.no_grad():
            planted = factorized_like(layer, self.method, self.full(layer)).dense_weight()
            layer.weight.copy_(planted / planted.std() * layer.weight.std())
        x = smooth_input(layer)
        for statistics in (None, statistics_of(layer, x)):
            fit = self.m.factorize(layer, self.full(layer), statistics)
            assert fit.error < 1e-4
            torch.testing.assert_close(fit.module(x), layer(x), rtol=2e-2, atol=2e-2)


# -------------------------------------------------------------------------------------------------------- permutation


def test_the_amounts_come_from_the_published_generator() -> None:
    """The first outputs of SplitMix64 for this seed, as its reference implementation gives them."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert list(itertools.islice(splitmix64(1234567), 5)) == known


def written_out(vector: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Two rounds of rotated rows, then rotated columns."""
    grid, numbers = vector.reshape(rows, -1), splitmix64(seed)
    columns = grid.shape[1]
    for _ in range(2):
        by_row, by_column = [[next(numbers) % n for _ in range(m)] for m, n in ((rows, columns), (columns, rows))]
        grid = np.stack([np.roll(row, -a) for row, a in zip(grid, by_row, strict=True)])
        grid = np.stack([np.roll(column, -a) for column, a in zip(grid.T, by_column, strict=True)]).T
    return grid.reshape(-1)


@pytest.mark.parametrize(("size", "rows"), [(36, 6), (77, 7), (1728, 36)])
def test_a_shuffle_is_rotated_rows_and_columns(size: int, rows: int) -> None:
    vector, amounts = torch.arange(size), rotations(7, size)
    found = shuffle(vector, amounts)
    assert found.tolist() == written_out(np.arange(size), rows, 7).tolist()
    assert torch.equal(unshuffle(found, amounts), vector)
    assert found.tolist() != shuffle(vector, rotations(8, size)).tolist()


def test_a_shuffle_leaves_no_more_low_rank_than_a_random_permutation() -> None:
    g = torch.Generator().manual_seed(0)
    low = torch.outer(torch.randn(48, generator=g), torch.randn(48, generator=g)).flatten()

    def largest(vector: torch.Tensor) -> float:
        energies = torch.linalg.svdvals(vector.reshape(48, 48)).square()
        return float(energies[0] / energies.sum())

    random = max(largest(low[torch.randperm(len(low), generator=g)]) for _ in range(20))
    assert largest(low) > 0.999
    assert max(largest(shuffle(low, rotations(seed, len(low)))) for seed in range(20)) < 1.2 * random


def test_a_seed_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 2\^63\), got -1"):
        rotations(-1, 36)


# -------------------------------------------------------------------------------------------------------------- forms


def scattered(layer: Shuffled, tensor: np.ndarray) -> np.ndarray:
    """The kernel whose entries are those of ``tensor``, moved as the layer's permutation moves them."""
    where = shuffle(torch.arange(tensor.size), layer.amounts).numpy()
    return tensor.reshape(-1)[where].reshape(layer.dense_weight().shape)


@pytest.mark.filterwarnings("ignore")  # tensorly's own, about its settings
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_tensorlys_tensor_with_its_entries_moved(name: str) -> None:
    torch.manual_seed(0)
    for dense in (nn.Conv2d(6, 8, 3), nn.Linear(13, 11), nn.Conv1d(4, 9, 3)):
        layer = factorized_like(dense, name, METHODS[name].ranks(dense)[:4][-1])
        assert isinstance(layer, Shuffled)
        build = {
            "shuffled_tt": tensorly.tt_to_tensor,
            "shuffled_tucker": lambda parts: tensorly.tucker_to_tensor((parts[0], parts[1:])),
            "shuffled_cp": lambda parts: tensorly.cp_to_tensor((None, parts)),
        }[name]
        tensor = build([core.detach().numpy() for core in layer.cores])
        np.testing.assert_allclose(layer.dense_weight().detach().numpy(), scattered(layer, tensor), atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # tensorly's own, about its settings
def test_without_statistics_a_fit_is_as_good_as_tensorlys() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3)
    modes = tensor_modes(layer.weight.numel())
    vector = unshuffle(layer.weight.detach().double().flatten(), rotations(0, layer.weight.numel()))
    tensor = vector.reshape(modes).numpy()
    theirs = {
        ("shuffled_tt", (3, 6, 3)): lambda: tensorly.tt_to_tensor(tensor_train(tensor, [1, 3, 6, 3, 1])),
        ("shuffled_tucker", (3, 3, 3, 3)): lambda: tensorly.tucker_to_tensor(tucker(tensor, [3, 3, 3, 3])),
        ("shuffled_cp", (8,)): lambda: tensorly.cp_to_tensor(parafac(tensor, 8, n_iter_max=25, init="svd")),
    }
    for (name, ranks), build in theirs.items():
        fit = METHODS[name].factorize(layer, ranks)
        assert fit.error <= 1.05 * np.square(build() - tensor).sum() / np.square(tensor).sum()


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_price_is_what_building_it_takes(name: str) -> None:
    for dense in (nn.Conv2d(12, 16, 3), nn.Linear(13, 11)):
        layer = factorized_like(dense, name, METHODS[name].ranks(dense)[:6][-1])
        assert isinstance(layer, Shuffled)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer.dense_weight()
        assert layer.build_macs == counter.get_total_flops() // 2


def test_a_wrong_number_of_ranks_and_a_kernel_without_modes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes 3 ranks, got \(2,\)"):
        factorized_like(nn.Conv2d(6, 8, 3), "shuffled_tt", (2,))
    with pytest.raises(ValueError, match="7 weights has no two modes"):
        factorized_like(nn.Linear(7, 1), "shuffled_tt", (2, 2, 2))
    assert "one input or output" in str(METHODS["shuffled_tt"].applies_to(nn.Linear(7, 1)))
    assert "depthwise" in str(METHODS["shuffled_cp"].applies_to(nn.Conv2d(8, 8, 3, groups=8)))


@pytest.mark.parametrize("name", NAMES)
def test_a_start_is_never_made_worse_and_must_be_of_the_same_ranks(name: str, statistics_of: StatisticsOf) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, padding=1)
    statistics = statistics_of(layer, smooth_input(layer))
    method = METHODS[name]
    low, ranks = method.ranks(layer)[2], method.ranks(layer)[6]
    fit = method.factorize(layer, ranks, statistics)
    assert method.factorize(layer, ranks, statistics, start=fit.module).error <= fit.error * (1 + 1e-5)
    with pytest.raises(ValueError, match="cannot start from"):
        method.factorize(layer, low, statistics, start=fit.module)


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_moves_the_error_away_from_the_outputs_that_count(name: str, statistics_of: StatisticsOf) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20, 14)
    x = smooth_input(layer)
    weights = torch.tensor([100.0] * 3 + [1.0] * 11)
    ranks = METHODS[name].ranks(layer)[5]
    plain, aimed = (
        METHODS[name].factorize(layer, ranks, statistics_of(layer, x), metric=m).module for m in (None, weights)
    )
    gap = lambda m: (m(x) - layer(x)).detach()[:, :3].std(0).sum()  # noqa: E731
    assert gap(aimed) < gap(plain)


# ---------------------------------------------------------------------------------------------------- the kept kernel


def kept() -> tuple[Shuffled, torch.Tensor]:
    torch.manual_seed(0)
    layer = factorized_like(nn.Conv2d(6, 8, 3, padding=1), "shuffled_tt", (3, 5, 3)).eval()
    assert isinstance(layer, Shuffled)
    return layer, torch.randn(2, 6, 5, 5)


def builds(layer: Shuffled, x: torch.Tensor) -> bool:
    """Whether a call multiplies more than the convolution does."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    return counter.get_total_flops() // 2 > 8 * 6 * 9 * 25 * len(x)


def agrees(layer: Shuffled, x: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(layer(x), layer.dense()(x), atol=1e-5)


def test_evaluation_builds_the_kernel_once_and_training_each_time() -> None:
    layer, x = kept()
    assert not builds(layer, x)
    assert cost.macs(layer, (x,)) == 8 * 6 * 9 * 25
    layer.train()
    assert builds(layer, x)
    assert builds(layer, x)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.cores[1].mul_(2),
        lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
        lambda layer: layer.reseed(9),
        lambda layer: layer.double().float().cores[0].add_(1),
        lambda layer: setattr(layer.cores[2], "data", layer.cores[2].data * 3),
    ],
    ids=["in place", "state dict", "seed", "to", "swapped data"],
)
def test_a_changed_layer_computes_with_its_new_kernel(change: Callable[[Shuffled], None]) -> None:
    layer, x = kept()
    with torch.no_grad():
        before = layer(x)
        change(layer)
        assert not torch.allclose(layer(x), before)
    assert agrees(layer, x)


def test_an_optimizers_step_between_evaluations_is_seen() -> None:
    layer, x = kept()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(x).square().sum().backward()  # gradients flow in evaluation too
    optimizer.step()
    assert agrees(layer, x)


def test_copies_and_other_precisions_have_kernels_of_their_own() -> None:
    layer, x = kept()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.cores[0].zero_()
    assert agrees(layer, x)
    assert float(twin(x).detach().std(0).abs().max()) < 1e-6
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_a_kernel_kept_under_autocast_is_in_full_precision() -> None:
    layer, x = kept()
    layer.reseed(3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert torch.equal(layer.kernel(), layer.dense_weight())


def test_a_state_dict_brings_its_seed_and_no_kernel() -> None:
    layer, x = kept()
    layer.reseed(2**40 + 5)
    state = layer.state_dict()
    assert sum(v.numel() for v in state.values()) == sum(p.numel() for p in layer.parameters()) + 1
    again = factorized_like(nn.Conv2d(6, 8, 3, padding=1), "shuffled_tt", (3, 5, 3)).eval()
    again.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(again(x), layer(x))


# ------------------------------------------------------------------------------------------------ files and allocation


def largest_tensors(path: Path) -> list[int]:
    return sorted(math.prod(t.dims) for t in onnx.load(path).graph.initializer)


@pytest.mark.parametrize("name", NAMES)
def test_files_hold_the_cores_and_no_kernel(name: str, tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    dense = nn.Conv2d(32, 32, 3, padding=1)
    layer: FactorizedLayer = factorized_like(dense, name, METHODS[name].ranks(dense)[4]).eval()
    assert isinstance(layer, Shuffled)
    layer.reseed(5)
    x = torch.randn(3, 32, 6, 6)
    graph = exporting.export(layer, x, tmp_path / "model.pt2")
    other = write_onnx(graph, ["x"], tmp_path / "model.onnx")
    program = torch.export.load(graph)
    stored = [*program.state_dict.values(), *program.constants.values()]
    most = 2 * max(p.numel() for p in layer.parameters()) + len(layer.amounts)
    assert max(t.numel() for t in stored) <= most < dense.weight.numel()
    assert largest_tensors(other)[-1] <= most
    with torch.no_grad():
        wanted = layer(x)
        torch.testing.assert_close(program.module()(x), wanted)
    found = onnxruntime.InferenceSession(other, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_it_may_be_chosen_for_its_parameters_and_never_for_its_macs() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 16, 3, padding=1, bias=False)
    size = layer.weight.numel()
    curves = {"shuffled_tt": METHODS["shuffled_tt"].curve(layer, None, 64)}
    sites = [SiteChoice(site="a", dense_parameters=size, dense_macs=64 * size, curves=curves)]
    assert {p.macs for p in curves["shuffled_tt"]} == {64 * size}
    assert allocate(sites, 0.5, cost={Cost.MACS: 1.0}) == {}
    plan = allocate(sites, 0.5, cost={Cost.PARAMETERS: 1.0})
    assert plan["a"].method == "shuffled_tt"


def test_it_is_used_by_name_only() -> None:
    assert set(METHODS) - set(AUTO) == set(NAMES)
