import pytest
import torch

from benchmarks.figures import JOINTS, hits, render
from benchmarks.tnet.hourglass import StackedHourglass, compact
from benchmarks.tnet.kernels import Dense, JointMPS, JointTucker, LayerwiseTucker, Shape
from benchmarks.tnet.training import find, steps_of, train

SHAPE: Shape = (2, 2, 3, 2, 8, 8, 3, 3)


def network(form: type, *arguments: object) -> StackedHourglass:
    """Its heads random: those of a new network are zero, and would hide what is behind them."""
    torch.manual_seed(0)
    made = StackedHourglass(form(SHAPE, *arguments), 3)
    for head in made.heads:
        torch.nn.init.normal_(head.weight)
    return made


def test_each_stack_gives_heatmaps_of_a_quarter_of_the_image() -> None:
    maps = network(Dense)(torch.randn(2, 3, 32, 48))
    assert [m.shape for m in maps] == [(2, 3, 8, 12)] * 2


def test_every_kernel_of_the_tensor_is_used() -> None:
    made = network(Dense)
    torch.stack([m.square().mean() for m in made(torch.randn(4, 3, 32, 32))]).sum().backward()
    gradient = made.kernels.weight.grad.flatten(0, 3)
    assert gradient.shape[0] == 24
    assert (gradient.flatten(1).abs().amax(1) > 0).all()


def test_a_network_of_slices_is_the_dense_network_of_the_same_tensor() -> None:
    made, dense = network(JointTucker, (2, 2, 3, 2, 4, 5, 3, 3)), network(Dense)
    others = {name: value for name, value in made.state_dict().items() if not name.startswith("kernels.")}
    dense.load_state_dict({**others, "kernels.weight": made.kernels.tensor().detach()})
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(made(x), dense(x))


@pytest.mark.parametrize(
    ("form", "ranks"),
    [(JointTucker, (2, 2, 3, 2, 4, 5, 3, 3)), (JointMPS, (2, 4, 8, 8, 10, 9, 3)), (LayerwiseTucker, (4, 5))],
)
def test_the_compact_network_is_the_trained_one(form: type, ranks: tuple[int, ...]) -> None:
    made = network(form, ranks)
    x = torch.randn(4, 3, 32, 32)
    made(x)  # so that the batch norms are not those of a new network
    small = compact(made)
    torch.testing.assert_close(small(x), made.eval()(x), atol=1e-4, rtol=1e-4)
    assert not small.training
    with pytest.raises(ValueError, match="Links"):
        compact(small)


def test_the_papers_network_is_one_tensor_of_14_million() -> None:
    with torch.device("meta"):
        made = StackedHourglass(Dense((4, 4, 3, 2, 128, 128, 3, 3)), 16)
    assert sum(p.numel() for p in made.kernels.parameters()) == 14_155_776
    assert (len(made.norms), len(made.heads)) == (96, 4)


def test_what_the_network_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 16, got \(1, 3, 32, 40\)"):
        network(Dense)(torch.zeros(1, 3, 32, 40))
    with pytest.raises(ValueError, match="3 pathways"):
        StackedHourglass(Dense((2, 2, 2, 2, 8, 8, 3, 3)), 3)
    with pytest.raises(ValueError, match="as many inputs as outputs"):
        StackedHourglass(Dense((2, 2, 3, 2, 8, 4, 3, 3)), 3)


def test_training_finds_joints_and_says_its_loss_at_each_step() -> None:
    figures, losses = render(32, side=32), list[float]()
    torch.manual_seed(0)
    made = StackedHourglass(JointTucker((1, 1, 3, 2, 16, 16, 3, 3), (1, 1, 3, 2, 8, 8, 3, 3)), len(JOINTS))
    before = hits(find(made, figures), figures).mean()
    train(made, figures, epochs=60, step=losses.append)
    assert len(losses) == steps_of(32, 60) == 60
    assert losses[-1] < 0.7 * losses[0]
    assert hits(find(made, figures), figures).mean() > before + 0.2
    assert not made.training


def test_the_same_seed_trains_the_same_network() -> None:
    figures = render(8, side=32)

    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        made = StackedHourglass(Dense((1, 1, 3, 2, 4, 4, 3, 3)), len(JOINTS))
        return train(made, figures, epochs=3, batch=4, seed=seed).kernels.weight.detach()

    torch.testing.assert_close(weights(1), weights(1), rtol=0, atol=0)
    assert (weights(1) != weights(2)).any()


def test_training_of_no_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0"):
        train(network(Dense), render(2, side=32), epochs=0)


def test_a_step_is_a_whole_batch() -> None:
    assert steps_of(3000, 2.5) == 234
    assert steps_of(10, 0.01) == 1
