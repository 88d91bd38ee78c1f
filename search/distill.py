"""What fine-tuning minimises: to answer as the original does, and as the labels say where there are any."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from search.metrics import class_last
from search.spec import FineTune, Metric, Task

__all__ = ["Objective", "objective", "trivial_answer"]

Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(answer, the original's answer, labels or None) → scalar loss."""


def objective(task: Task, metric: Metric, recipe: FineTune, scale: float) -> Objective:
    """The loss of a task.

    Classification: (1 − d)·CE(labels) + d·T²·KL(original_T ‖ answer_T) (Hinton, Vinyals, Dean 2015), d =
    ``recipe.distill``, T = ``recipe.temperature``; without labels the second term alone. Regression and fidelity:
    squared errors over ``scale`` (the variance of the original's answers), so that one learning rate fits any unit.
    """
    if task is Task.CLASSIFICATION or metric is Metric.AGREEMENT:
        return lambda y, teacher, labels: _classification(y, teacher, labels, recipe)
    return lambda y, teacher, labels: _regression(y, teacher, labels, recipe.distill) / scale


def trivial_answer(task: Task, metric: Metric, teacher: Tensor) -> Tensor:
    """What a network that looks at nothing would answer: uniform classes, or the mean. Training that ends far above
    the loss of this has blown up."""
    if task is Task.CLASSIFICATION or metric is Metric.AGREEMENT:
        return torch.zeros_like(teacher)
    return teacher.mean(0, keepdim=True).expand_as(teacher)


def _classification(y: Tensor, teacher: Tensor, labels: Tensor | None, recipe: FineTune) -> Tensor:
    answer, wanted = class_last(y, labels), class_last(teacher, labels)
    t = recipe.temperature
    soft = F.kl_div(
        (answer / t).log_softmax(-1).flatten(0, -2),
        (wanted / t).log_softmax(-1).flatten(0, -2),
        log_target=True,
        reduction="batchmean",
    )
    if labels is None:
        return t * t * soft
    hard = F.cross_entropy(answer.flatten(0, -2), labels.flatten())
    return (1 - recipe.distill) * hard + recipe.distill * t * t * soft


def _regression(y: Tensor, teacher: Tensor, labels: Tensor | None, distill: float) -> Tensor:
    soft = F.mse_loss(y, teacher)
    if labels is None:
        return soft
    return (1 - distill) * F.mse_loss(y, labels.reshape(y.shape).float()) + distill * soft
