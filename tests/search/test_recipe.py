"""The automatic parts of the recipe."""

import numpy as np
import pytest
import torch
from torch import nn

from search.recipe import optimizer_of, peak_rate, temperature_of
from search.spec import FineTune

CONVOLUTIONAL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
ATTENTION = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


def test_the_optimizer_follows_from_the_layers_unless_it_is_asked_for() -> None:
    assert optimizer_of(FineTune(), CONVOLUTIONAL) == "sgd"
    for network in (ATTENTION, nn.LSTM(2, 2), nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3))):
        assert optimizer_of(FineTune(), network) == "adamw"
    assert optimizer_of(FineTune(optimizer="sgd"), ATTENTION) == "sgd"


@pytest.mark.parametrize(("epochs", "rate"), [(0.1, 0.02), (10, 0.02), (60, 0.04), (1000, 0.04)])
def test_a_longer_training_has_a_higher_peak(epochs: float, rate: float) -> None:
    assert peak_rate(FineTune(), CONVOLUTIONAL, epochs, distance=1.0) == pytest.approx(rate, rel=0.03)
    assert peak_rate(FineTune(), ATTENTION, epochs, distance=1.0) == pytest.approx(rate / 20, rel=0.03)
    assert peak_rate(FineTune(learning_rate=0.3), CONVOLUTIONAL, epochs, distance=0.0) == 0.3


def test_a_short_training_is_the_cooler_the_better_its_start_is() -> None:
    def peaks(epochs: float) -> list[float]:
        return [peak_rate(FineTune(), CONVOLUTIONAL, epochs, q) for q in (0.0, 0.01, 0.04, 0.3, 2.0)]

    assert peaks(0.5) == pytest.approx([0.002, 0.00365, 0.0073, 0.02, 0.02], rel=0.01)
    assert peaks(0.5) == peaks(1.0)
    assert all(short <= longer for short, longer in zip(peaks(1), peaks(3), strict=True))
    assert len(set(peaks(10))) == 1, "a long training brings back what a high rate costs"


@pytest.mark.parametrize(
    ("margin", "classes", "low", "high"),
    [(0.0, 10, 1, 1), (1.0, 143, 1, 1), (6.0, 10, 1.05, 1.8), (60.0, 10, 4, 4)],
)
def test_the_surer_the_original_the_more_its_answers_are_softened(
    margin: float, classes: int, low: float, high: float
) -> None:
    logits = torch.zeros(8, 5, classes)
    logits[..., 0] = margin
    t = temperature_of(FineTune(), logits)
    assert low - 1e-3 <= t <= high + 1e-3
    if 1.01 < t < 3.99:
        p = np.exp(logits.double().numpy() / t)
        p /= p.sum(-1, keepdims=True)
        assert -(p * np.log(p)).sum(-1).mean() == pytest.approx(0.2 * np.log(classes), rel=1e-3)
    assert temperature_of(FineTune(temperature=9), logits) == 9
