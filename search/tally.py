"""Metrics that are ratios of sums over a whole split: mean IoU, pixel accuracy, PCK.

Images differ in how many pixels or joints count, so these are no means of a figure of each image. The delta method
makes them such: with w_i of o_i found in image i, the ratio r = Σw/Σo responds to image i by (w_i − r·o_i)/Σo, and

    score_i = r + n (w_i − r·o_i) / Σo

has the mean r exactly, while the spread of paired differences of scores gives the interval of a difference of two such
ratios (the infinitesimal jackknife; Efron 1982, chapter 6). Several ratios, one for each class, are averaged.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from search.errors import BadData
from search.heatmaps import distances
from search.spec import IGNORED_CLASS, Metric

__all__ = ["TALLIED", "Tally", "joined", "scores", "tally"]

TALLIED = (Metric.MIOU, Metric.PIXEL_ACCURACY, Metric.PCK)


@dataclass(frozen=True)
class Tally:
    """Counts of n images for each of k classes (one for joints), (n, k) in float64, and the loss behind them."""

    hits: Tensor
    """Pixels or joints that count and were answered rightly."""
    truth: Tensor
    """… that count."""
    answered: Tensor
    """… that count and were answered so, rightly or not."""
    loss: Tensor
    """(n,): summed over what counts."""


def tally(metric: Metric, y: Tensor, targets: Tensor) -> Tally:
    """Of one batch: logits ``(n, classes, h, w)`` and class maps ``(n, h, w)``, or heatmaps ``(n, joints, h, w)`` and
    joints ``(n, joints, 4)`` (``search.heatmaps``). Raises BadData when their shapes do not go together."""
    if metric is Metric.PCK:
        return _joints(y, targets)
    if y.ndim != 4 or (len(y), *y.shape[2:]) != tuple(targets.shape):
        raise BadData(
            "wrong_target",
            f"the network gives {tuple(y.shape)} for class maps of {tuple(targets.shape)}: it must give logits (batch, "
            "classes, height, width) of the maps' size; resize the maps, or upsample in the network",
        )
    n, classes = y.shape[:2]
    answer = y.argmax(1)
    counts = targets != IGNORED_CLASS
    image = torch.arange(n).view(-1, 1, 1).expand_as(targets) * classes

    def per_class(what: Tensor, where: Tensor) -> Tensor:
        return (image + what)[where].bincount(minlength=n * classes).view(n, classes).double()

    loss = F.cross_entropy(y, targets, ignore_index=IGNORED_CLASS, reduction="none").flatten(1).double().sum(1)
    return Tally(
        hits=per_class(answer, counts & (answer == targets)),
        truth=per_class(targets, counts),
        answered=per_class(answer, counts),
        loss=loss,
    )


def _joints(y: Tensor, joints: Tensor) -> Tally:
    """The loss is the distance in units of what still counts as found."""
    if y.ndim != 4 or y.shape[:2] != joints.shape[:2]:
        raise BadData(
            "wrong_target",
            f"the network gives {tuple(y.shape)} for {joints.shape[1]} joints: it must give a heatmap for each, "
            f"(batch, {joints.shape[1]}, height, width)",
        )
    far = distances(y, joints) / joints[..., 3]
    counts = joints[..., 2].double()
    hits, truth = ((far <= 1) * counts).sum(1, keepdim=True), counts.sum(1, keepdim=True)
    return Tally(hits, truth, truth, (far * counts).sum(1))


def joined(parts: list[Tally]) -> Tally:
    fields = ("hits", "truth", "answered", "loss")
    return Tally(*(torch.cat([getattr(part, field) for part in parts]) for field in fields))


def scores(metric: Metric, seen: Tally) -> tuple[float, float, Tensor]:
    """The metric, the mean loss, and the images' scores (n,).

    The mean IoU is over the classes that the split's truth holds, whatever the network answers: else one stray pixel of
    a further class would cost a whole share. Raises BadData when nothing counts.
    """
    total = seen.truth.sum()
    if total == 0:
        raise BadData(
            "nothing_counts",
            "no joint of this split counts (none is labelled and inside its image)"
            if metric is Metric.PCK
            else f"no pixel of this split counts (all are {IGNORED_CLASS})",
        )
    if metric is Metric.MIOU:
        there = seen.truth.sum(0) > 0
        found, of = seen.hits[:, there], (seen.truth + seen.answered - seen.hits)[:, there]
    else:
        found, of = seen.hits.sum(1, keepdim=True), seen.truth.sum(1, keepdim=True)
    ratio = found.sum(0) / of.sum(0)
    value = ratio.mean()
    return float(value), float(seen.loss.sum() / total), value + len(of) * ((found - ratio * of) / of.sum(0)).mean(1)
