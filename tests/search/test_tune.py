"""Fine-tuning: it learns, keeps the best, survives divergence, and resumes to the same weights."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from search import checkpoints, tune
from search.metrics import evaluate
from search.precision import Precision
from search.spec import FineTune, Metric, Outcome, Task
from search.tune import Runtime, fine_tune, learning_rate

FAST = FineTune(batch_size=32, learning_rate=0.1)


@dataclass
class Rows:
    x: Tensor
    y: Tensor | None

    def __len__(self) -> int:
        return len(self.x)

    def batches(
        self, batch_size: int, *, shuffle: int | None = None, augment: bool = False, limit: int | None = None
    ) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        order = torch.arange(len(self.x))
        if shuffle is not None:
            order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(shuffle))
        for start in range(0, len(self.x), batch_size):
            rows = order[start : start + batch_size]
            yield (self.x[rows],), None if self.y is None else self.y[rows]


@dataclass
class Blobs:
    train: Rows
    select: Rows
    task: Task = Task.CLASSIFICATION


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(128, 4)
    )


@pytest.fixture(scope="module")
def blobs() -> Blobs:
    """Four classes of 4×4 images, far enough apart to be learnt."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(4, 1, 4, 4, generator=generator)
    y = torch.arange(480) % 4
    x = centres[y] + 0.7 * torch.randn(480, 1, 4, 4, generator=generator)
    return Blobs(Rows(x[:320], y[:320]), Rows(x[320:], y[320:]))


@pytest.fixture(scope="module")
def teacher(blobs: Blobs) -> nn.Module:
    module = network()
    fine_tune(module, module, blobs, FAST.model_copy(update={"distill": 0.0}), epochs=6, seed=0, metric=Metric.ACCURACY)
    assert evaluate(module, blobs.select, Metric.ACCURACY).value > 0.9
    return module


def weights(module: nn.Module) -> Tensor:
    return torch.cat([t.double().flatten() for t in module.state_dict().values()])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_damaged_network_recovers_by_distillation_without_labels(
    blobs: Blobs, teacher: nn.Module, optimizer: str
) -> None:
    student = network(seed=9)
    unlabelled = Blobs(Rows(blobs.train.x, None), blobs.select)
    before = evaluate(student, blobs.select, Metric.ACCURACY).value
    recipe = FAST.model_copy(update={"optimizer": optimizer, "learning_rate": 0.1 if optimizer == "sgd" else 0.01})
    tuned = fine_tune(student, teacher, unlabelled, recipe, epochs=5, seed=0, metric=Metric.ACCURACY)
    after = evaluate(student, blobs.select, Metric.ACCURACY).value
    assert tuned.outcome is Outcome.OK
    assert before < 0.6
    assert after > 0.85
    assert [r.epoch for r in tuned.curve] == [1, 2, 3, 4, 5]
    assert after == max(r.value for r in tuned.curve if r.value is not None)


def test_a_regression_follows_the_targets() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    y = x @ torch.randn(6, 2)
    data = Blobs(Rows(x[:200], y[:200]), Rows(x[200:], y[200:]), Task.REGRESSION)
    student = nn.Linear(6, 2)
    exact = nn.Linear(6, 2)
    fine_tune(exact, student, data, FineTune(distill=0, batch_size=20), epochs=20, seed=0, metric=Metric.MSE)
    assert evaluate(exact, data.select, Metric.MSE).value < 0.05 * float(y.var())


def test_the_result_is_never_worse_than_the_start_on_the_select_split(blobs: Blobs, teacher: nn.Module) -> None:
    student = copy.deepcopy(teacher)
    start = evaluate(student, blobs.select, Metric.ACCURACY).value
    noise = Blobs(Rows(torch.randn(64, 1, 4, 4) * 30, torch.randint(4, (64,))), blobs.select)
    harmful = FAST.model_copy(update={"distill": 0.0, "learning_rate": 1.0})
    fine_tune(student, teacher, noise, harmful, epochs=2, seed=0, metric=Metric.ACCURACY)
    assert evaluate(student, blobs.select, Metric.ACCURACY).value >= start


def test_the_last_weights_are_kept_where_the_select_split_cannot_tell(blobs: Blobs, teacher: nn.Module) -> None:
    """The teacher itself is the best start there is: training at this rate can only make it worse."""
    runs = {}
    for keep in ("best", "last"):
        runs[keep] = copy.deepcopy(teacher)
        recipe = FAST.model_copy(update={"learning_rate": 1.0})
        arguments = {"epochs": 1, "seed": 1, "metric": Metric.ACCURACY, "keep": keep}
        tuned = fine_tune(runs[keep], teacher, blobs, recipe, **arguments)
        assert tuned.outcome is Outcome.OK
    assert torch.equal(weights(runs["best"]), weights(teacher))
    assert not torch.equal(weights(runs["last"]), weights(teacher))


def test_a_fraction_of_an_epoch_runs_that_many_steps(blobs: Blobs, teacher: nn.Module) -> None:
    tuned = fine_tune(network(), teacher, blobs, FAST, epochs=0.5, seed=0, metric=Metric.ACCURACY)
    assert tuned.epochs == 0.5
    assert len(tuned.curve) == 1


def test_no_epochs_change_nothing(blobs: Blobs, teacher: nn.Module) -> None:
    student = network(seed=4)
    before = weights(student)
    assert fine_tune(student, teacher, blobs, FAST, epochs=0, seed=0, metric=Metric.ACCURACY).epochs == 0
    assert torch.equal(weights(student), before)


@pytest.mark.parametrize("update", [{}, {"optimizer": "adamw", "learning_rate": 0.01}, {"ema": 0.9}], ids=str)
def test_a_resumed_run_ends_in_the_same_weights(
    blobs: Blobs, teacher: nn.Module, tmp_path: Path, update: dict[str, object]
) -> None:
    recipe = FAST.model_copy(update=update)
    arguments = {"epochs": 3.0, "seed": 5, "metric": Metric.ACCURACY}
    whole = network(seed=2)
    full = fine_tune(whole, teacher, blobs, recipe, **arguments)

    kept: list[Path] = []

    def keep(path: Path) -> None:
        kept.append(path.rename(tmp_path / f"{len(kept)}.safetensors"))

    fine_tune(network(seed=2), teacher, blobs, recipe, save=tmp_path / "c", saved=keep, save_every_s=0.0, **arguments)
    resumed = network(seed=8)  # whatever it held is replaced
    torch.manual_seed(99)
    tuned = fine_tune(resumed, teacher, blobs, recipe, checkpoint=kept[16], **arguments)
    assert len(kept) == 29  # after each of 30 steps but the last
    assert torch.equal(weights(whole), weights(resumed))
    assert tuned.curve == full.curve


def test_a_run_that_goes_on_on_another_device_finds_its_pace_anew(
    blobs: Blobs, teacher: nn.Module, tmp_path: Path
) -> None:
    path, arguments = tmp_path / "checkpoint.safetensors", {"epochs": 3.0, "seed": 5, "metric": Metric.ACCURACY}
    fine_tune(network(seed=2), teacher, blobs, FAST, save=path, save_every_s=0.0, **arguments)
    groups, facts = checkpoints.read(path)
    groups["random"]["cuda"] = groups["random"]["cpu"]
    checkpoints.write(path, groups, {**facts, "device": "cuda", "precision": "bfloat16"})
    tuned = fine_tune(network(), teacher, blobs, FAST, checkpoint=path, **arguments)
    assert tuned.precision is Precision.FLOAT32, "what a run of seconds takes on this device"
    assert tuned.epochs == 3


def test_a_checkpoint_of_another_run_is_not_used(blobs: Blobs, teacher: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    fine_tune(network(), teacher, blobs, FAST, epochs=1, seed=1, metric=Metric.ACCURACY, save=path, save_every_s=0.0)
    fresh, other = network(seed=2), network(seed=2)
    tuned = fine_tune(fresh, teacher, blobs, FAST, epochs=1, seed=2, metric=Metric.ACCURACY, checkpoint=path)
    fine_tune(other, teacher, blobs, FAST, epochs=1, seed=2, metric=Metric.ACCURACY)
    assert "began anew" in tuned.notes[-1]
    assert torch.equal(weights(fresh), weights(other))


def test_divergence_keeps_the_best_weights_and_says_so(blobs: Blobs, teacher: nn.Module) -> None:
    student = copy.deepcopy(teacher)
    start = evaluate(student, blobs.select, Metric.ACCURACY).value
    poisoned = Blobs(Rows(torch.full((320, 1, 4, 4), math.nan), blobs.train.y), blobs.select)
    tuned = fine_tune(student, teacher, poisoned, FAST, epochs=1, seed=0, metric=Metric.ACCURACY)
    assert tuned.outcome is Outcome.DIVERGED
    assert evaluate(student, blobs.select, Metric.ACCURACY).value == start


def test_one_bad_batch_lowers_the_rate_once_and_training_goes_on(blobs: Blobs, teacher: nn.Module) -> None:
    x = blobs.train.x.clone()
    x[17] = math.nan
    student = network(seed=9)
    spoiled = Blobs(Rows(x, blobs.train.y), blobs.select)
    tuned = fine_tune(student, teacher, spoiled, FAST, epochs=1, seed=0, metric=Metric.ACCURACY)
    assert tuned.outcome is Outcome.OK
    assert tuned.curve[-1].learning_rate == pytest.approx(0.25 * learning_rate(9, 10, 0.1))
    assert math.isfinite(float(weights(student).sum()))


def test_a_loss_far_above_a_trivial_answers_counts_as_divergence(
    blobs: Blobs, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "CLIP", 1e9)
    wild = FAST.model_copy(update={"learning_rate": 10.0})
    tuned = fine_tune(network(seed=7), teacher, blobs, wild, epochs=4, seed=0, metric=Metric.ACCURACY)
    assert tuned.outcome is Outcome.DIVERGED


def test_a_plateau_ends_the_run_when_patience_is_set(blobs: Blobs, teacher: nn.Module) -> None:
    student = copy.deepcopy(teacher)
    still = FAST.model_copy(update={"learning_rate": 1e-9})
    tuned = fine_tune(student, teacher, blobs, still, epochs=20, seed=0, metric=Metric.ACCURACY, patience=3)
    assert tuned.epochs < 20


@pytest.mark.parametrize("precision", list(Precision))
def test_every_number_format_trains_and_leaves_plain_tensors(
    blobs: Blobs, teacher: nn.Module, precision: Precision
) -> None:
    student = network(seed=9)
    runtime = Runtime(precision=precision)
    fine_tune(student, teacher, blobs, FAST, epochs=3, seed=0, metric=Metric.ACCURACY, runtime=runtime)
    assert evaluate(student, blobs.select, Metric.ACCURACY).value > 0.8
    assert all(t.is_contiguous() for t in (*student.state_dict().values(), *teacher.state_dict().values()))
    assert all(p.dtype == torch.float32 for p in student.parameters())


def test_progress_tells_epochs_and_seconds_left(
    blobs: Blobs, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune.Clock, "due", lambda self: True)
    seen: list[tuple[str, float, float]] = []
    fine_tune(
        network(), teacher, blobs, FAST, epochs=1, seed=0, metric=Metric.ACCURACY, report=lambda *a: seen.append(a)
    )
    assert len(seen) == 10
    assert seen[4][1:] == (0.5, 1)
    assert "epoch 0.5 of 1" in seen[4][0]
    assert "s left" in seen[4][0]


def test_the_rate_rises_then_falls_to_a_hundredth() -> None:
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    top = rates.index(max(rates))
    assert max(rates) == 1.0
    assert 13 <= top <= 16
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.02


def test_a_checkpoint_is_never_pickled(blobs: Blobs, teacher: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    fine_tune(network(), teacher, blobs, FAST, epochs=1, seed=1, metric=Metric.ACCURACY, save=path, save_every_s=0.0)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.read_bytes()[8 : 8 + header].lstrip().startswith(b"{")
    groups, facts = checkpoints.read(path)
    assert set(groups) == {"model", "best", "optimizer", "random"}
    assert facts["state"]["step"] == 9
