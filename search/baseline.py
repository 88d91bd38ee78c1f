"""Does the original behave as promised, and what may be lost of it?"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from search.errors import BadBaseline, BadRequest
from search.metrics import Evaluation, drop, higher_is_better
from search.spec import IGNORED_CLASS, METRICS_OF_TASK, Budget, Metric, Task

__all__ = ["allowed_drop", "blind_value", "check_baseline", "metric_of", "seen_before"]

NORMALISATION = (
    "The commonest cause is another normalisation than in training: check transform.scale, mean, std and layout, and "
    "that the classes are numbered as they were then."
)


def metric_of(budget: Budget, task: Task) -> Metric:
    """The budget's metric, or the task's own. Raises BadRequest for one that the task does not allow."""
    allowed = METRICS_OF_TASK[task]
    if budget.metric is None:
        return allowed[0]
    if budget.metric not in allowed:
        raise BadRequest(
            "metric_not_of_task",
            f"the budget's metric is {budget.metric}, but the data's task is {task}, which is measured by "
            f"{' or '.join(allowed)}: change the metric or the data's task",
        )
    return budget.metric


def allowed_drop(budget: Budget, metric: Metric, original: float) -> float:
    """The budget as a drop from the ``original`` value on some split."""
    if budget.max_drop is not None:
        return budget.max_drop
    assert budget.min_value is not None  # noqa: S101 - the budget has exactly one
    return drop(metric, original, budget.min_value)


def check_baseline(budget: Budget, metric: Metric, select: Evaluation, verify: Evaluation, blind: float | None) -> None:
    """Raise BadBaseline when the original cannot be what its owner thinks it is.

    ``blind``: ``blind_value`` of the select split.
    """
    if not (select.finite and verify.finite):
        raise BadBaseline("baseline_not_finite", f"the original itself gives non-finite outputs here. {NORMALISATION}")
    value, n = select.value, len(select.scores)
    if blind is not None:
        error = math.sqrt(blind * (1 - blind) / n)
        if value <= blind + 2 * error:
            raise BadBaseline(
                "baseline_suspicious",
                f"the original's {metric} is {value:.4f} on the {n} samples of the select split, no better than always "
                f"answering {_BLIND_ANSWER[metric]} ({blind:.4f}). {NORMALISATION}",
            )
    if budget.expect is not None:
        # People know the test figure; on rows that it was trained on the original may stand far above it.
        nearest = min((select, verify), key=lambda seen: abs(seen.value - float(budget.expect or 0)))
        if abs(nearest.value - budget.expect) > _tolerance(metric, budget.expect, nearest):
            raise BadBaseline(
                "baseline_suspicious",
                f"the original's {metric} is {value:.4f} on the select split and {verify.value:.4f} on the verify "
                f"split, but {budget.expect:.4f} was expected. {NORMALISATION} Or correct budget.expect.",
            )
    if budget.min_value is not None:
        sign = 1 if higher_is_better(metric) else -1
        for name, seen in (("select", select), ("verify", verify)):
            if sign * seen.value < sign * budget.min_value:
                raise BadBaseline(
                    "budget_unreachable",
                    f"min_value asks for {metric} {budget.min_value:g}, but the original itself has {seen.value:.4f} "
                    f"on the {name} split: ask for less, or for a max_drop",
                )


_BLIND_ANSWER = {
    Metric.ACCURACY: "the commonest class",
    Metric.MIOU: "the commonest class",
    Metric.PIXEL_ACCURACY: "the commonest class",
    Metric.PCK: "each joint's mean place",
}


def blind_value(metric: Metric, targets: Iterable[Tensor]) -> float | None:
    """The metric of the best answer that looks at nothing, from a split's targets in batches; None where the metric has
    no such answer (a loss, top 5, no labels)."""
    if metric is Metric.PCK:
        return _mean_places(torch.cat(list(targets)))
    if metric not in _BLIND_ANSWER:
        return None
    counts = torch.zeros(0, dtype=torch.int64)
    for batch in targets:
        counted = batch if metric is Metric.ACCURACY else batch[batch != IGNORED_CLASS]
        more = counted.flatten().bincount(minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    if counts.sum() == 0:
        return None
    share = float(counts.max() / counts.sum())
    # Of the commonest class all is found, but everything else is answered so too; of the others nothing is found.
    return share / int((counts > 0).sum()) if metric is Metric.MIOU else share


def _mean_places(joints: Tensor) -> float | None:
    """``joints``: (n, joints, 4), see ``search.heatmaps``. Distances as in a square image."""
    counts = joints[..., 2]
    if counts.sum() == 0:
        return None
    place = (joints[..., :2] * counts[..., None]).sum(0) / counts.sum(0).clamp_min(1)[:, None]
    found = (joints[..., :2] - place).norm(dim=-1) <= joints[..., 3]
    return float((found * counts).sum() / counts.sum())


def seen_before(metric: Metric, select: Evaluation, verify: Evaluation) -> str | None:
    """Advice, when the original is so much better on the select split that it must have been trained on it."""
    if not higher_is_better(metric):
        return None
    noise = math.sqrt(sum(float(s.scores.var()) / len(s.scores) for s in (select, verify)))
    gap = select.value - verify.value
    if gap <= 0.02 + 4 * noise:
        return None
    return (
        f"the original scores {select.value:.4f} on the select split but {verify.value:.4f} on the verify split: it "
        "was probably trained on the select rows, so that every drop looks larger there than it is; give validation "
        "rows that it has never seen"
    )


def _tolerance(metric: Metric, expect: float, seen: Evaluation) -> float:
    """How far off still counts as the same: sampling noise (three standard errors), and a little on top."""
    noise = 3 * float(seen.scores.std()) / math.sqrt(len(seen.scores))
    return max(0.02 if higher_is_better(metric) else 0.1 * abs(expect), noise)
