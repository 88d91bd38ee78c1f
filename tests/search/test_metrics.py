"""Metrics, drops and their paired intervals."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from search.errors import BadData
from search.metrics import drop, evaluate, forward, outputs, paired_interval
from search.spec import Metric


class Rows:
    """A split held in two tensors."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def batches(
        self, batch_size: int, *, shuffle: int | None = None, augment: bool = False, limit: int | None = None
    ) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor | None]]:
        for start in range(0, len(self.x), batch_size):
            rows = slice(start, start + batch_size)
            yield (self.x[rows],), None if self.y is None else self.y[rows]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(50, 7, generator=torch.Generator().manual_seed(0))


def test_accuracy_is_the_share_of_right_answers(logits: torch.Tensor) -> None:
    labels = logits.argmax(1)
    labels[:10] = (labels[:10] + 1) % 7
    seen = evaluate(nn.Identity(), Rows(logits, labels), Metric.ACCURACY, batch_size=16)
    assert seen.value == pytest.approx(0.8)
    assert seen.scores.tolist() == [0.0] * 10 + [1.0] * 40
    assert seen.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-6)


def test_top5_counts_a_label_among_the_five_largest(logits: torch.Tensor) -> None:
    order = logits.argsort(1, descending=True)
    fifth, sixth = evaluate_top5(logits, order[:, 4]), evaluate_top5(logits, order[:, 5])
    assert (fifth, sixth) == (1.0, 0.0)


def evaluate_top5(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return evaluate(nn.Identity(), Rows(logits, labels), Metric.TOP5).value


def test_accuracy_of_maps_is_over_all_positions() -> None:
    maps = torch.randn(4, 3, 5, 6)
    labels = maps.argmax(1)
    labels[0] = (labels[0] + 1) % 3
    seen = evaluate(nn.Identity(), Rows(maps, labels), Metric.ACCURACY)
    assert seen.value == pytest.approx(0.75)
    assert len(seen.scores) == 4


def test_mse_is_the_mean_over_all_elements(logits: torch.Tensor) -> None:
    targets = torch.zeros_like(logits)
    seen = evaluate(nn.Identity(), Rows(logits, targets), Metric.MSE)
    assert seen.value == pytest.approx(float(logits.square().mean()), rel=1e-6)


def test_output_error_is_relative_to_the_originals_spread(logits: torch.Tensor) -> None:
    double = nn.Linear(7, 7, bias=False)
    nn.init.eye_(double.weight).data.mul_(1.5)
    seen = evaluate(double, Rows(logits, None), Metric.OUTPUT_ERROR, original=nn.Identity())
    expected = (0.5 * logits).square().sum() / (logits - logits.mean(0)).square().sum()
    assert seen.value == pytest.approx(float(expected), rel=1e-5)


def test_agreement_of_a_network_with_itself_is_one(logits: torch.Tensor) -> None:
    reference = outputs(nn.Identity(), Rows(logits, None))
    seen = evaluate(nn.Identity(), Rows(logits, None), Metric.AGREEMENT, original=reference)
    assert (seen.value, seen.loss) == (1.0, pytest.approx(0.0, abs=1e-6))


def test_non_finite_outputs_are_seen_as_such(logits: torch.Tensor) -> None:
    logits[3, 2] = math.inf
    seen = evaluate(nn.Identity(), Rows(logits, torch.zeros(50, dtype=torch.int64)), Metric.ACCURACY)
    assert not seen.finite


def test_a_metric_that_needs_labels_refuses_data_without(logits: torch.Tensor) -> None:
    with pytest.raises(BadData) as raised:
        evaluate(nn.Identity(), Rows(logits, None), Metric.ACCURACY)
    assert raised.value.code == "labels_missing"


def test_evaluation_leaves_the_mode_as_it_was(logits: torch.Tensor) -> None:
    module = nn.Dropout(0.5).train()
    evaluate(module, Rows(logits, logits.argmax(1)), Metric.ACCURACY)
    assert module.training


class Viewing(nn.Module):
    """Its code flattens by a view, which a tensor with channels last does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.seen: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        self.seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return y.view(len(x), -1)


def test_a_network_that_cannot_take_channels_last_is_evaluated_all_the_same() -> None:
    x = torch.randn(10, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    network = Viewing()
    with torch.no_grad():
        wanted = torch.cat([network.conv(part).flatten(1) for part in x.split(4)])
    found = outputs(network, Rows(x, None), batch_size=4)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert network.seen == [True, False, False, False]


class OnlyThree(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[0] == 3
        return 2 * x


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_network_of_fixed_batch_takes_any_number_of_samples(size: int) -> None:
    x = torch.randn(size, 4)
    assert torch.equal(forward(OnlyThree(), (x,), fixed_batch=3), 2 * x)


@pytest.mark.parametrize(
    ("metric", "original", "value", "expected"),
    [
        (Metric.ACCURACY, 0.92, 0.90, 0.02),
        (Metric.AGREEMENT, 1.0, 0.97, 0.03),
        (Metric.MSE, 0.5, 0.6, 0.2),
        (Metric.OUTPUT_ERROR, 0.0, 0.04, 0.04),
    ],
)
def test_a_drop_is_positive_when_worse(metric: Metric, original: float, value: float, expected: float) -> None:
    assert drop(metric, original, value) == pytest.approx(expected)


def test_the_interval_covers_the_true_drop_at_its_level() -> None:
    """Simulated: 4 % of samples lost, 2 % won, so the true drop is 2 points."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        draw = generator.random(500)
        original = np.where(draw < 0.02, 0.0, 1.0)
        scores = np.where((draw >= 0.02) & (draw < 0.06), 0.0, 1.0)
        interval = paired_interval(Metric.ACCURACY, original, scores)
        covered += interval.low <= 0.02 <= interval.high
    assert 0.92 <= covered / 400 <= 0.99


def test_the_interval_does_not_shrink_to_a_point_when_nothing_changed() -> None:
    same = np.ones(100)
    interval = paired_interval(Metric.ACCURACY, same, same)
    assert interval.low < 0 < interval.high < 0.03


def test_the_interval_of_a_relative_increase_agrees_with_the_bootstrap() -> None:
    generator = np.random.default_rng(1)
    original = generator.exponential(1.0, 800)
    scores = original * generator.normal(1.1, 0.2, 800)
    interval = paired_interval(Metric.MSE, original, scores)
    picks = generator.integers(0, 800, (2000, 800))
    ratios = scores[picks].mean(1) / original[picks].mean(1) - 1
    low, high = np.quantile(ratios, [0.025, 0.975])
    assert interval.low == pytest.approx(low, abs=0.005)
    assert interval.high == pytest.approx(high, abs=0.005)


def test_an_interval_of_unpaired_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="10 and 9"):
        paired_interval(Metric.ACCURACY, np.ones(10), np.ones(9))
