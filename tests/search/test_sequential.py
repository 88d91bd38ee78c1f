"""Training block by block: each learns to hand on what the original does, alone, and resumes to the same weights."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from search import checkpoints, sequential
from search.blocks import blocks, cuts
from search.decompose import METHODS
from search.metrics import evaluate
from search.precision import Precision
from search.sequential import train_blocks
from search.spec import FineTune, Metric, Outcome, Task
from search.surgery import replace
from search.tune import Clock, Runtime, Tuned, fine_tune

RECIPE = FineTune(batch_size=32, sequential=1, sequential_learning_rate=3e-3)
SITES = ("0", "4", "9")


@dataclass
class Rows:
    x: Tensor
    y: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def batches(
        self, batch_size: int, *, shuffle: int | None = None, augment: bool = False, limit: int | None = None
    ) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        order = torch.arange(len(self.x))
        if shuffle is not None:
            order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(shuffle))
        for start in range(0, len(order[:limit]), batch_size):
            rows = order[:limit][start : start + batch_size]
            yield (self.x[rows],), None if self.y is None else self.y[rows]


@dataclass
class Images:
    train: Rows
    select: Rows
    task: Task = Task.FIDELITY


@pytest.fixture(scope="module")
def images() -> Images:
    x = torch.randn(288, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    return Images(Rows(x[:192]), Rows(x[192:]))


@pytest.fixture(scope="module")
def teacher() -> fx.GraphModule:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten()),
        *(nn.Linear(32, 16), nn.Tanh()),
    )
    for _ in range(20):
        network(torch.randn(64, 2, 6, 6))  # its batch norms see data
    return fx.symbolic_trace(network.eval())


@pytest.fixture
def student(teacher: fx.GraphModule) -> fx.GraphModule:
    return compressed(teacher)


def compressed(teacher: fx.GraphModule) -> fx.GraphModule:
    network = copy.deepcopy(teacher)
    for site in SITES:
        replace(network, site, METHODS["svd"].factorize(network.get_submodule(site), (4,)).module)
    return network


def train(
    student: nn.Module, teacher: fx.GraphModule, data: Images, recipe: FineTune = RECIPE, **more: object
) -> Tuned:
    arguments: dict[str, object] = {"epochs": 6.0, "seed": 0, "metric": Metric.OUTPUT_ERROR, **more}
    tuned = train_blocks(student, teacher, data, recipe, **arguments)
    assert tuned is not None
    return tuned


def weights(network: nn.Module) -> Tensor:
    return torch.cat([t.double().flatten() for t in network.state_dict().values()])


def errors(student: fx.GraphModule, teacher: fx.GraphModule, x: Tensor) -> list[float]:
    """Squared error where each block ends, over the variance of the original's values there."""
    ends = cuts(student, (x,), 8)
    values, wanted = {"input_1": x}, {"input_1": x}
    found = []
    with torch.no_grad():
        for mine, theirs in zip(blocks(student, ends), blocks(teacher, ends), strict=True):
            y, t = mine(values), theirs(wanted)
            found.append(float((y - t).square().mean() / t.var()))
    return found


def test_every_block_comes_closer_to_what_the_original_hands_on(
    images: Images, teacher: fx.GraphModule, student: fx.GraphModule
) -> None:
    before = errors(student, teacher, images.select.x)
    tuned = train(student, teacher, images)
    after = errors(student, teacher, images.select.x)
    assert len(before) == 3
    assert all(a < b for a, b in zip(after, before, strict=True))
    assert after[-1] < 0.7 * before[-1]
    assert tuned.outcome is Outcome.OK
    assert tuned.epochs == 6
    assert [r.epoch for r in tuned.curve] == [1, 2, 3, 4, 5, 6]
    assert tuned.curve[-1].value == evaluate(student, images.select, Metric.OUTPUT_ERROR, original=teacher).value
    assert all(r.value is None for r in tuned.curve[:-1])
    assert tuned.notes[0] == "6 epochs block by block (3 of them) in float32"


def test_while_one_block_trains_the_others_stay(
    images: Images, teacher: fx.GraphModule, student: fx.GraphModule, tmp_path: Path
) -> None:
    kept: list[dict[str, Tensor]] = []

    def keep(path: Path) -> None:
        kept.append(checkpoints.read(path)[0]["model"])

    train(student, teacher, images, save=tmp_path / "c", saved=keep, save_every_s=0.0)
    of_block = {name: sum(int(name.split(".")[0]) >= int(site) for site in SITES) - 1 for name in kept[0]}
    assert len(kept) == 36
    for step in range(1, 36):
        changed = {of_block[n] for n in kept[step] if not torch.equal(kept[step][n], kept[step - 1][n])}
        assert changed <= {step // 12}
    assert {of_block[n] for n in kept[0] if not torch.equal(kept[0][n], kept[-1][n])} == {0, 1, 2}
    statistics = [n for n in kept[0] if "running" in n]
    assert len(statistics) == 4
    assert all(torch.equal(kept[0][n], kept[-1][n]) for n in statistics)


def test_a_later_block_makes_up_for_what_an_earlier_one_spoils(images: Images, teacher: fx.GraphModule) -> None:
    spoilt = compressed(teacher)
    norm = spoilt.get_submodule("1")
    with torch.no_grad():
        norm.weight.mul_(0.5)
        norm.bias.add_(0.3)
    for p in (*spoilt.get_submodule("0").parameters(), *norm.parameters()):
        p.requires_grad_(False)
    before = errors(spoilt, teacher, images.select.x)
    train(spoilt, teacher, images, epochs=8.0)
    after = errors(spoilt, teacher, images.select.x)
    # With its first layer frozen there is one block less, and the second is trained on the spoilt values.
    assert len(before) == len(after)
    assert after[-1] < 0.5 * before[-1]


def test_a_resumed_run_ends_in_the_same_weights(
    images: Images, teacher: fx.GraphModule, student: fx.GraphModule, tmp_path: Path
) -> None:
    whole, untouched = copy.deepcopy(student), copy.deepcopy(student)
    full = train(whole, teacher, images, epochs=2.0)
    kept: list[Path] = []

    def keep(path: Path) -> None:
        kept.append(path.rename(tmp_path / f"{len(kept)}.safetensors"))

    train(student, teacher, images, epochs=2.0, save=tmp_path / "c", saved=keep, save_every_s=0.0)
    assert len(kept) == 12
    for step in (1, 4, 6, 12):  # within the first block, at an end, within the second, at the very end
        resumed = copy.deepcopy(untouched)
        torch.manual_seed(99)
        tuned = train(resumed, teacher, images, epochs=2.0, checkpoint=kept[step - 1])
        assert torch.equal(weights(whole), weights(resumed))
        assert tuned == full


def test_a_checkpoint_of_another_run_is_not_used(
    images: Images, teacher: fx.GraphModule, student: fx.GraphModule, tmp_path: Path
) -> None:
    other = copy.deepcopy(student)
    path = tmp_path / "checkpoint.safetensors"
    train(copy.deepcopy(student), teacher, images, epochs=1.0, seed=1, save=path, save_every_s=0.0)
    tuned = train(student, teacher, images, epochs=1.0, checkpoint=path)
    train(other, teacher, images, epochs=1.0)
    assert "began anew" in tuned.notes[0]
    assert torch.equal(weights(student), weights(other))


def test_a_checkpoint_of_the_training_that_followed_is_left_to_it(
    images: Images, teacher: fx.GraphModule, student: fx.GraphModule, tmp_path: Path
) -> None:
    path, again = tmp_path / "checkpoint.safetensors", copy.deepcopy(student)
    how = {"seed": 0, "metric": Metric.OUTPUT_ERROR}
    before = train(student, teacher, images, epochs=1.0)
    end = fine_tune(student, teacher, images, RECIPE, epochs=1.0, before=before, save=path, save_every_s=0.0, **how)
    assert end.epochs == 2
    assert [r.epoch for r in end.curve] == [*(r.epoch for r in before.curve), 2]
    assert end.notes == (*before.notes, "trained in float32")

    untouched = weights(again)
    assert train_blocks(again, teacher, images, RECIPE, epochs=1.0, checkpoint=path, **how) is None
    assert torch.equal(weights(again), untouched)
    resumed = fine_tune(again, teacher, images, RECIPE, epochs=1.0, checkpoint=path, **how)
    assert resumed == end
    assert torch.equal(weights(again), weights(student))
    # Of another seed it is not this one's sequel.
    assert train_blocks(again, teacher, images, RECIPE, epochs=1.0, checkpoint=path, **{**how, "seed": 1}) is not None


def test_a_network_that_became_worse_by_the_metric_goes_back(
    images: Images, teacher: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.get_parameter("9.weight").mul_(1.01)
    before = weights(student)
    # Whatever comes last is the block's best.
    monkeypatch.setattr(sequential._Sequential, "_measure", lambda run: (-float(run.state.step), 1.0))
    tuned = train(student, teacher, images, RECIPE.model_copy(update={"sequential_learning_rate": 0.1}), epochs=1.0)
    assert tuned.outcome is Outcome.OK
    assert "became worse" in tuned.notes[-1]
    assert torch.equal(weights(student), before)


def test_divergence_keeps_the_best_weights_and_says_so(
    images: Images, teacher: fx.GraphModule, student: fx.GraphModule
) -> None:
    before = weights(student)
    poisoned = Images(Rows(torch.full_like(images.train.x, math.nan)), images.select)
    tuned = train(student, teacher, poisoned)
    assert tuned.outcome is Outcome.DIVERGED
    assert torch.equal(weights(student), before)


def test_one_bad_batch_lowers_the_rate_of_its_block_only(
    images: Images, teacher: fx.GraphModule, student: fx.GraphModule
) -> None:
    x = images.train.x.clone()
    x[17] = math.nan
    tuned = train(student, teacher, Images(Rows(x), images.select), epochs=1.0)
    whole = train(compressed(teacher), teacher, images, epochs=1.0)
    rates = [a.learning_rate / b.learning_rate for a, b in zip(tuned.curve, whole.curve, strict=True)]
    assert tuned.outcome is Outcome.OK
    assert sorted(rates) == pytest.approx([0.25, 1, 1])
    assert bool(weights(student).isfinite().all())


@pytest.mark.parametrize("precision", list(Precision))
def test_every_number_format_trains_and_leaves_plain_tensors(
    images: Images, teacher: fx.GraphModule, student: fx.GraphModule, precision: Precision
) -> None:
    before = errors(student, teacher, images.select.x)
    tuned = train(student, teacher, images, runtime=Runtime(precision=precision))
    assert tuned.precision is precision
    assert errors(student, teacher, images.select.x)[-1] < before[-1]
    assert all(t.is_contiguous() for t in (*student.state_dict().values(), *teacher.state_dict().values()))
    assert all(p.dtype == torch.float32 and p.grad is None for p in student.parameters())


def test_a_fixed_batch_size_is_kept_to_by_data_that_is_shorter(
    images: Images, teacher: fx.GraphModule, student: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: set[int] = set()
    inner = sequential.blocks

    def watched(network: fx.GraphModule, *arguments: object) -> object:
        found = inner(network, *arguments)
        found[0].module.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
        return found

    monkeypatch.setattr(sequential, "blocks", watched)
    few = Images(Rows(images.train.x[:20]), Rows(images.select.x[:50]))
    tuned = train(student, teacher, few, runtime=Runtime(fixed_batch=32))
    assert tuned.epochs == 6
    assert sizes == {32}


def test_fewer_steps_than_blocks_train_fewer_blocks(
    images: Images, teacher: fx.GraphModule, student: fx.GraphModule
) -> None:
    tuned = train(student, teacher, images, epochs=0.3)
    assert tuned.epochs == pytest.approx(2 / 6)
    assert "(2 of them)" in tuned.notes[0]


def test_progress_tells_the_block_and_the_epochs(
    images: Images, teacher: fx.GraphModule, student: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "due", lambda self: True)
    seen: list[tuple[str, float, float]] = []
    train(student, teacher, images, epochs=1.0, report=lambda *a: seen.append(a))
    assert len(seen) == 6
    assert seen[2][1:] == (0.5, 1)
    assert seen[2][0].startswith("training block 2 of 3, epoch 0.5 of 1, ")


def test_a_module_without_a_graph_is_refused(images: Images, teacher: fx.GraphModule) -> None:
    with pytest.raises(TypeError, match="not Linear"):
        train(nn.Linear(2, 2), teacher, images)
