"""What fine-tuning minimises: to answer as the original does, and as the labels say where there are any."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from search.heatmaps import gaussians
from search.metrics import class_last
from search.recipe import temperature_of
from search.spec import IGNORED_CLASS, FineTune, Metric, Task

__all__ = ["Objective", "objective", "trivial_answer"]

Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(answer, the original's answer, labels or None) → scalar loss."""


def objective(task: Task, metric: Metric, recipe: FineTune, sample: Tensor, labels: Tensor | None = None) -> Objective:
    """The loss of a task; ``sample``: some of the original's answers (and their labels), which set its temperature or
    scale.

    Classification: (1 − d)·CE(labels) + d·T²·KL(original_T ‖ answer_T) (Hinton, Vinyals, Dean 2015), d =
    ``recipe.distill``, T = ``recipe.temperature``; without labels the second term alone. Segmentation: the same at
    each pixel, where those that do not count have no label. Regression and fidelity: squared errors over the
    variance of the original's answers, so that one learning rate fits any unit. Keypoints: likewise, with a
    Gaussian of ``recipe.heatmap_sigma`` at each joint for labels.
    """
    if task is Task.SEGMENTATION:
        t = temperature_of(recipe, sample.movedim(1, -1))
        return lambda y, teacher, labels: _segmentation(y, teacher, labels, recipe.distill, t)
    if task is Task.CLASSIFICATION or metric is Metric.AGREEMENT:
        t = temperature_of(recipe, class_last(sample, labels))
        return lambda y, teacher, labels: _classification(y, teacher, labels, recipe.distill, t)
    scale = max(float(sample.var(correction=0)), 1e-12)
    if task is Task.KEYPOINTS:
        return lambda y, teacher, labels: _keypoints(y, teacher, labels, recipe) / scale
    return lambda y, teacher, labels: _regression(y, teacher, labels, recipe.distill) / scale


def trivial_answer(task: Task, metric: Metric, teacher: Tensor) -> Tensor:
    """What a network that looks at nothing would answer: uniform classes, or the mean. Training that ends far above
    the loss of this has blown up."""
    if task in (Task.CLASSIFICATION, Task.SEGMENTATION) or metric is Metric.AGREEMENT:
        return torch.zeros_like(teacher)
    return teacher.mean(0, keepdim=True).expand_as(teacher)


def _classification(y: Tensor, teacher: Tensor, labels: Tensor | None, distill: float, t: float) -> Tensor:
    answer, wanted = class_last(y, labels), class_last(teacher, labels)
    soft = _softened(answer, wanted, t)
    if labels is None:
        return soft
    hard = F.cross_entropy(answer.flatten(0, -2), labels.flatten())
    return (1 - distill) * hard + distill * soft


def _softened(answer: Tensor, wanted: Tensor, t: float) -> Tensor:
    """T²·KL of logits (…, classes), the mean of all positions."""
    soft = F.kl_div(
        (answer / t).log_softmax(-1).flatten(0, -2),
        (wanted / t).log_softmax(-1).flatten(0, -2),
        log_target=True,
        reduction="batchmean",
    )
    return t * t * soft


def _segmentation(y: Tensor, teacher: Tensor, labels: Tensor | None, distill: float, t: float) -> Tensor:
    """``y``, ``teacher``: (n, classes, h, w); ``labels``: (n, h, w)."""
    soft = _softened(y.movedim(1, -1), teacher.movedim(1, -1), t)
    if labels is None:
        return soft
    # Not the mean that cross_entropy takes: of a batch without a single pixel that counts it is 0 / 0.
    summed = F.cross_entropy(y, labels, ignore_index=IGNORED_CLASS, reduction="sum")
    hard = summed / (labels != IGNORED_CLASS).sum().clamp_min(1)
    return (1 - distill) * hard + distill * soft


def _keypoints(y: Tensor, teacher: Tensor, labels: Tensor | None, recipe: FineTune) -> Tensor:
    """``y``, ``teacher``: (n, joints, h, w); ``labels``: (n, joints, 4), see ``search.heatmaps``.

    The drawn Gaussians are as high as the original's own, a = ⟨teacher, drawn⟩ / ⟨drawn, drawn⟩ over the joints that
    count, for networks are trained on heatmaps of any height, and labels of another would teach that and nothing else.
    """
    soft = F.mse_loss(y, teacher)
    if labels is None:
        return soft
    counts = labels[..., 2, None, None]
    drawn = gaussians(labels, y.shape[2], y.shape[3], recipe.heatmap_sigma) * counts
    height = ((teacher * drawn).sum() / drawn.square().sum().clamp_min(1e-12)).clamp_min(0)
    wrong = ((y - height * drawn).square() * counts).sum() / (counts.sum() * y[0, 0].numel()).clamp_min(1)
    return (1 - recipe.distill) * wrong + recipe.distill * soft


def _regression(y: Tensor, teacher: Tensor, labels: Tensor | None, distill: float) -> Tensor:
    soft = F.mse_loss(y, teacher)
    if labels is None:
        return soft
    return (1 - distill) * F.mse_loss(y, labels.reshape(y.shape).float()) + distill * soft
