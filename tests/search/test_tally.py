"""Metrics over a whole split, against the same written out in numpy, and their intervals against the bootstrap."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from search import reload
from search.baseline import blind_value
from search.errors import BadData
from search.heatmaps import distances, gaussians, peaks
from search.metrics import evaluate, paired_interval
from search.spec import Metric

Array = np.ndarray[Any, Any]
MAP_METRICS = (Metric.MIOU, Metric.PIXEL_ACCURACY)


class Rows:
    """Answers with their targets: the network is the identity."""

    def __init__(self, answers: Tensor, targets: Tensor | None) -> None:
        self.answers, self.targets = answers, targets

    def __len__(self) -> int:
        return len(self.answers)

    def batches(
        self, batch_size: int, *, shuffle: int | None = None, augment: bool = False, limit: int | None = None
    ) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            yield (self.answers[rows],), None if self.targets is None else self.targets[rows]


def seen(metric: Metric, answers: Tensor, targets: Tensor | None, batch_size: int | None = 7) -> Any:
    return evaluate(nn.Identity(), Rows(answers, targets), metric, batch_size=batch_size)


def maps(n: int, seed: int, right: float = 0.7) -> tuple[Tensor, Tensor]:
    """Logits of five classes and class maps 8 × 8, in which class 4 never occurs and one tenth does not count."""
    random = torch.Generator().manual_seed(seed)
    truth = torch.randint(4, (n, 8, 8), generator=random)
    logits = torch.randn(n, 5, 8, 8, generator=random)
    hit = torch.rand(n, 8, 8, generator=random) < right * torch.rand(n, 1, 1, generator=random)
    logits.scatter_add_(1, truth[:, None], 6.0 * hit[:, None])
    return logits, torch.where(torch.rand(n, 8, 8, generator=random) < 0.1, 255, truth)


def miou(answer: Array, truth: Array) -> float:
    """By a confusion matrix over all pixels that count, the mean of the classes that occur."""
    confusion = np.zeros((5, 5))
    for a, t in zip(answer.ravel(), truth.ravel(), strict=True):
        if t != 255:
            confusion[t, a] += 1
    shares = [confusion[c, c] / (confusion[c].sum() + confusion[:, c].sum() - confusion[c, c]) for c in range(4)]
    return float(np.mean(shares))


def overlaps(metric: Metric, answer: Array, truth: Array) -> tuple[Array, Array]:
    """Numerators and denominators of each image, (n, classes) or (n, 1)."""
    counts = truth != 255
    if metric is Metric.PIXEL_ACCURACY:
        return (counts & (answer == truth)).sum((1, 2))[:, None], counts.sum((1, 2))[:, None]
    both = [(counts & (answer == c) & (truth == c)).sum((1, 2)) for c in range(4)]
    either = [(counts & ((answer == c) | (truth == c))).sum((1, 2)) for c in range(4)]
    return np.stack(both, 1), np.stack(either, 1)


def joints(n: int, seed: int, count: int = 3) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    out = torch.rand(n, count, 4, generator=random)
    out[..., 2] = (out[..., 2] > 0.2).float()
    out[..., 3] = 0.02 + 0.1 * torch.rand(n, 1, generator=random)
    return out


def test_the_mean_iou_is_that_of_the_splits_confusion_matrix() -> None:
    logits, truth = maps(30, 0)
    found = seen(Metric.MIOU, logits, truth)
    expected = miou(logits.argmax(1).numpy(), truth.numpy())
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert reload.measure("miou", logits.numpy(), truth.numpy()) == pytest.approx(expected, abs=1e-12)
    assert found.scores.mean() == pytest.approx(found.value, abs=1e-12)
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, truth, ignore_index=255)), rel=1e-6)


def test_the_pixel_accuracy_is_over_all_pixels_that_count() -> None:
    logits, truth = maps(30, 1)
    found = seen(Metric.PIXEL_ACCURACY, logits, truth)
    assert reload.measure("pixel_accuracy", logits.numpy(), truth.numpy()) == pytest.approx(found.value, abs=1e-12)
    counts = truth != 255
    assert found.value == pytest.approx(float((logits.argmax(1) == truth)[counts].float().mean()), abs=1e-6)
    assert found.scores.mean() == pytest.approx(found.value, abs=1e-12)


@pytest.mark.parametrize("metric", MAP_METRICS)
def test_the_size_of_the_batches_changes_nothing(metric: Metric) -> None:
    logits, truth = maps(30, 2)
    one, other = seen(metric, logits, truth, 1), seen(metric, logits, truth, 30)
    np.testing.assert_allclose(one.scores, other.scores, rtol=1e-12)


@pytest.mark.parametrize("metric", MAP_METRICS)
def test_a_perfect_answer_is_worth_one(metric: Metric) -> None:
    _, truth = maps(10, 3)
    perfect = nn.functional.one_hot(truth.clamp_max(4), 5).movedim(-1, 1).float()
    assert seen(metric, perfect, truth).value == 1


def test_answering_a_class_that_never_occurs_costs_no_share_of_its_own() -> None:
    """One stray pixel of a further class is one missed pixel, however many classes there are."""
    _, truth = maps(10, 4)
    perfect = nn.functional.one_hot(truth.clamp_max(3), 5).movedim(-1, 1).float()
    perfect[0, 4, 0, 0] = 9
    truth[0, 0, 0] = 0
    zeros = int((truth == 0).sum())
    assert seen(Metric.MIOU, perfect, truth).value == pytest.approx(1 - 1 / zeros / 4)


@pytest.mark.parametrize("metric", MAP_METRICS)
def test_the_paired_interval_of_maps_agrees_with_the_bootstrap_over_images(metric: Metric) -> None:
    before, truth = maps(300, 5, right=0.9)
    random = torch.Generator().manual_seed(6)
    worse = before + 1.5 * torch.randn(before.shape, generator=random)
    first, second = seen(metric, before, truth), seen(metric, worse, truth)
    interval = paired_interval(metric, first.scores, second.scores)
    assert (interval.low + interval.high) / 2 == pytest.approx(first.value - second.value, abs=1e-12)
    parts = [overlaps(metric, y.argmax(1).numpy(), truth.numpy()) for y in (before, worse)]
    drops = []
    for _ in range(1000):
        picks = torch.randint(300, (300,), generator=random).numpy()
        values = [(hits[picks].sum(0) / all_[picks].sum(0)).mean() for hits, all_ in parts]
        drops.append(values[0] - values[1])
    width = interval.high - interval.low
    low, high = np.quantile(drops, [0.025, 0.975])
    assert abs(interval.low - low) < 0.2 * width
    assert abs(interval.high - high) < 0.2 * width


@pytest.mark.parametrize(
    ("logits", "truth"), [((4, 5, 8, 8), (4, 8, 7)), ((4, 5), (4,)), ((4, 5, 8), (4, 8)), ((4, 5, 8, 8), (4, 4, 4))]
)
def test_maps_of_another_size_are_refused_with_both(logits: tuple[int, ...], truth: tuple[int, ...]) -> None:
    with pytest.raises(BadData, match="resize the maps") as caught:
        seen(Metric.MIOU, torch.zeros(logits), torch.zeros(truth, dtype=torch.int64))
    assert str(logits) in caught.value.message
    assert str(truth) in caught.value.message


def test_splits_in_which_nothing_counts_have_no_value() -> None:
    with pytest.raises(BadData, match="all are 255"):
        seen(Metric.MIOU, torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 255))
    with pytest.raises(BadData, match="no joint"):
        seen(Metric.PCK, torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4) * torch.tensor([1, 1, 0, 1]))
    with pytest.raises(BadData, match="needs labels"):
        seen(Metric.PCK, torch.zeros(2, 3, 4, 4), None)


def test_non_finite_maps_are_seen_as_such_and_the_network_is_left_as_it_was() -> None:
    logits, truth = maps(10, 7)
    logits[3, 1, 2, 2] = np.nan
    module = nn.Dropout(0.0).train()
    found = evaluate(module, Rows(logits, truth), Metric.MIOU, batch_size=2)
    assert not found.finite
    assert len(found.scores) == 10
    assert module.training


# ------------------------------------------------------------------------------------------------------- joints


def written_out(maps: Array, joints: Array) -> float:
    """Peaks moved a quarter towards the higher neighbour, distances in cells, one joint at a time."""
    height, width = maps.shape[2:]
    found = of = 0
    for heat, row in zip(maps, joints, strict=True):
        for heatmap, (x, y, counts, tolerance) in zip(heat, row, strict=True):
            if not counts:
                continue
            r, c = np.unravel_index(heatmap.argmax(), heatmap.shape)
            px, py = float(c), float(r)
            if 0 < c < width - 1:
                px += 0.25 * np.sign(heatmap[r, c + 1] - heatmap[r, c - 1])
            if 0 < r < height - 1:
                py += 0.25 * np.sign(heatmap[r + 1, c] - heatmap[r - 1, c])
            far = np.hypot(px - (x * width - 0.5), py - (y * height - 0.5))
            found += far <= tolerance * max(height, width)
            of += 1
    return found / of


def noisy(truth: Tensor, noise: float, seed: int = 1) -> Tensor:
    shown = gaussians(truth, 12, 16, 1.2)
    return shown + noise * torch.randn(shown.shape, generator=torch.Generator().manual_seed(seed))


def test_pck_is_the_share_of_joints_found_written_out() -> None:
    truth = joints(40, 0)
    heat = noisy(truth, 0.3)
    found = seen(Metric.PCK, heat, truth)
    expected = written_out(heat.numpy(), truth.numpy())
    assert 0.1 < expected < 0.95
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert found.scores.mean() == pytest.approx(found.value, abs=1e-12)
    assert reload.measure("pck", heat.numpy(), truth.numpy()) == pytest.approx(expected, abs=1e-12)


def test_the_paired_interval_of_pck_agrees_with_the_bootstrap_over_images() -> None:
    truth = joints(300, 1)
    before, worse = noisy(truth, 0.25), noisy(truth, 0.35, seed=2)
    first, second = seen(Metric.PCK, before, truth), seen(Metric.PCK, worse, truth)
    interval = paired_interval(Metric.PCK, first.scores, second.scores)
    counts = truth[..., 2]
    hits = [((distances(y, truth) <= truth[..., 3]) * counts).sum(1) for y in (before, worse)]
    picks = torch.randint(300, (2000, 300), generator=torch.Generator().manual_seed(3))
    drops = (hits[0] - hits[1])[picks].sum(1) / counts.sum(1)[picks].sum(1)
    low, high = np.quantile(drops.numpy(), [0.025, 0.975])
    assert interval.low == pytest.approx(low, abs=0.1 * (high - low))
    assert interval.high == pytest.approx(high, abs=0.1 * (high - low))


def test_a_drawn_gaussian_is_highest_at_its_joint_and_falls_as_it_should() -> None:
    joint = torch.tensor([[[5.5 / 16, 3.5 / 12, 1, 1]]])  # the centre of cell (5, 3)
    drawn = gaussians(joint, 12, 16, 2.0)
    assert drawn.shape == (1, 1, 12, 16)
    assert drawn[0, 0, 3, 5] == pytest.approx(1)
    assert drawn[0, 0, 3, 7] == pytest.approx(np.exp(-0.5), rel=1e-5)
    assert drawn[0, 0, 5, 5] == pytest.approx(np.exp(-0.5), rel=1e-5)


def test_peaks_lie_within_half_a_cell_of_what_was_drawn_and_stay_inside() -> None:
    truth = joints(200, 4)
    cells = truth[..., :2] * torch.tensor([16, 12]) - 0.5
    off = (peaks(gaussians(truth, 12, 16, 1.0)) - cells).abs()
    assert off.max() <= 0.5 + 1e-4
    assert off.mean() < 0.15  # 0.25 without the quarter
    corner = torch.zeros(1, 1, 5, 5)
    corner[0, 0, 4, 0] = 1
    assert peaks(corner).tolist() == [[[0, 4]]]


def test_heatmaps_that_are_not_one_for_each_joint_are_refused() -> None:
    with pytest.raises(BadData, match="a heatmap for each"):
        seen(Metric.PCK, torch.zeros(2, 5, 4, 4), joints(2, 0))


# ------------------------------------------------------------------------------------------- looking at nothing


def test_the_best_blind_map_is_the_commonest_class_everywhere() -> None:
    _, truth = maps(30, 8)
    truth[:, :5] = 2
    blind = torch.zeros(30, 5, 8, 8)
    blind[:, 2] = 1
    for metric in MAP_METRICS:
        assert blind_value(metric, truth.split(7)) == pytest.approx(seen(metric, blind, truth).value)


def test_the_best_blind_joints_are_their_mean_places() -> None:
    """Of rows that all agree, everything is found; of joints spread over the image, little."""
    same = joints(1, 9).expand(20, -1, -1).clone()
    same[..., 2] = 1
    assert blind_value(Metric.PCK, same.split(7)) == 1
    spread = joints(300, 10)
    assert blind_value(Metric.PCK, spread.split(64)) == pytest.approx(0.017, abs=0.02)


def test_losses_have_no_blind_answer() -> None:
    assert blind_value(Metric.MSE, iter([torch.zeros(3, 2)])) is None
    assert blind_value(Metric.ACCURACY, iter([])) is None
    assert blind_value(Metric.ACCURACY, torch.tensor([255, 255, 3, 0]).split(3)) == 0.5
