"""The automatic parts of the recipe."""

import pytest
from torch import nn

from search.recipe import optimizer_of, peak_rate
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
    assert peak_rate(FineTune(), CONVOLUTIONAL, epochs) == pytest.approx(rate, rel=0.03)
    assert peak_rate(FineTune(), ATTENTION, epochs) == pytest.approx(rate / 20, rel=0.03)
    assert peak_rate(FineTune(learning_rate=0.3), CONVOLUTIONAL, epochs) == 0.3
