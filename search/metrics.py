"""How good a network is on a split: one number, and one score for each sample so that differences can be paired.

Every metric is the mean of its per-sample scores, the relative ones too (their scores are divided by the split's own
scale) and those of a whole split (``search.tally``), so that a drop, its interval and the metric itself never disagree.
"""

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search.errors import BadData
from search.intake import Answer, first_output
from search.layout import Quick
from search.spec import FRACTIONS, Interval, Metric
from search.tally import TALLIED, joined, scores, tally

__all__ = [
    "Evaluation",
    "Samples",
    "class_last",
    "drop",
    "evaluate",
    "forward",
    "higher_is_better",
    "outputs",
    "paired_interval",
]

Scores = np.ndarray[tuple[int], np.dtype[np.float64]]
Batch = tuple[tuple[Tensor, ...], Tensor | None]
Answers = Generator[tuple[Tensor, Tensor | None]]

TINY = 1e-12
BATCH, MAPS_BATCH = 256, 32
"""Samples evaluated at a time; those that are answered by a map are large."""


class Samples(Protocol):
    """What is asked of a split of the data."""

    def __len__(self) -> int: ...

    def batches(
        self, batch_size: int, *, shuffle: int | None = None, augment: bool = False, limit: int | None = None
    ) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Evaluation:
    """``value`` is the mean of ``scores`` (n,), ``loss`` the mean loss behind it; nan where outputs were not finite."""

    value: float
    loss: float
    scores: Scores

    @property
    def finite(self) -> bool:
        return math.isfinite(self.value) and math.isfinite(self.loss)


def higher_is_better(metric: Metric) -> bool:
    return metric in FRACTIONS


def drop(metric: Metric, original: float, value: float) -> float:
    """How much worse ``value`` is than ``original``, in the budget's units; positive is worse.

    A difference for shares (accuracies, agreement, mIoU, PCK), a relative increase for the MSE, the value itself for
    the output error (the original's own is 0).
    """
    if higher_is_better(metric):
        return original - value
    if metric is Metric.OUTPUT_ERROR:
        return value - original
    return (value - original) / max(original, TINY)


def forward(
    module: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    fixed_batch: int | None = None,
    answer: Answer = first_output,
) -> Tensor:
    """The output that counts for ``inputs`` of any length; a network with a fixed batch gets chunks, the last one
    padded."""
    if fixed_batch is None:
        return answer(module(*inputs))
    size = inputs[0].shape[0]
    parts = []
    for start in range(0, size, fixed_batch):
        chunk = [x[start : start + fixed_batch] for x in inputs]
        missing = fixed_batch - chunk[0].shape[0]
        if missing:
            chunk = [torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) for x in chunk]
        parts.append(answer(module(*chunk)))
    return torch.cat(parts)[:size]


def outputs(
    module: nn.Module,
    split: Samples,
    *,
    batch_size: int = BATCH,
    device: torch.device | str = "cpu",
    fixed_batch: int | None = None,
    answer: Answer = first_output,
) -> Tensor:
    """The output that counts of every sample, (n, …) in float32 on the CPU, in evaluation mode."""
    return torch.cat([y for y, _ in _answers(module, split, batch_size, device, fixed_batch, answer)])


def evaluate(
    module: nn.Module,
    split: Samples,
    metric: Metric,
    *,
    original: nn.Module | Tensor | None = None,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    fixed_batch: int | None = None,
    answer: Answer = first_output,
    limit: int | None = None,
) -> Evaluation:
    """Measure ``module`` on a split, in evaluation mode, without gradients.

    ``limit``: only so many of its rows, evenly spaced. ``original``: the uncompressed network, or its ``outputs`` on
    this very split; only AGREEMENT and OUTPUT_ERROR need it, and they take no ``limit``. ``answer``: picks the output
    that counts. Raises BadData when the metric needs labels that the split does not have, or maps of another size.
    """
    size = batch_size or (MAPS_BATCH if metric in TALLIED else BATCH)
    answers = _answers(module, split, size, device, fixed_batch, answer, limit)
    if metric in TALLIED:
        return _tallied(metric, answers, min(len(split), limit or len(split)))
    seen = list(answers)
    y = torch.cat([y for y, _ in seen])
    if metric in (Metric.AGREEMENT, Metric.OUTPUT_ERROR):
        if original is None:
            raise ValueError(f"{metric} compares with the original network: pass original=")
        if isinstance(original, nn.Module):
            original = outputs(original, split, batch_size=size, device=device, fixed_batch=fixed_batch, answer=answer)
        return _against_original(metric, y, original)
    return _against_targets(metric, y, torch.cat([_labels(metric, target) for _, target in seen]))


def paired_interval(metric: Metric, original: Scores, scores: Scores, level: float = 0.95) -> Interval:
    """Two-sided interval of the drop from per-sample scores of the same samples, (n,) each.

    Right-or-wrong scores: the matched-pairs interval of Agresti and Min (2005), which adds half a pair to each cell
    of the 2×2 table, so that it does not shrink to a point when no sample changed. Others: normal approximation of
    the mean difference; the MSE's relative increase by the delta method for a ratio of means.
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    n = len(scores)
    if n != len(original):
        raise ValueError(f"paired scores must be of the same samples, got {len(original)} and {n}")
    if n < 2:
        raise ValueError(f"an interval needs at least two samples, got {n}")
    if metric is Metric.MSE:
        base = max(float(original.mean()), TINY)
        ratio = float(scores.mean()) / base
        spread = float(np.std((scores - ratio * original) / base, ddof=1)) / math.sqrt(n)
        return Interval(low=ratio - 1 - z * spread, high=ratio - 1 + z * spread)
    worse = original - scores if higher_is_better(metric) else scores - original
    if _binary(original) and _binary(scores):
        lost, won = float((worse > 0).sum()) + 0.5, float((worse < 0).sum()) + 0.5
        total = n + 2.0
        centre = (lost - won) / total
        spread = math.sqrt(max(lost + won - (lost - won) ** 2 / total, 0.0)) / total
    else:
        centre, spread = float(worse.mean()), float(np.std(worse, ddof=1)) / math.sqrt(n)
    return Interval(low=centre - z * spread, high=centre + z * spread)


def class_last(logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """Logits as (…, classes). Maps (n, classes, h, w) have the classes at axis 1, as targets (n, h, w) tell."""
    last = logits.ndim != 4 if targets is None else logits.shape[:-1] == targets.shape
    return logits if last else logits.movedim(1, -1)


def _answers(
    module: nn.Module,
    split: Samples,
    batch_size: int,
    device: torch.device | str,
    fixed_batch: int | None,
    answer: Answer,
    limit: int | None = None,
) -> Answers:
    """Batch by batch: the answers in float32 on the CPU, and the targets."""
    training = module.training
    home = next((t.device for t in module.state_dict().values()), torch.device("cpu"))
    module.to(device).eval()
    quick = Quick(module)
    try:
        for inputs, target in split.batches(batch_size, limit=limit):
            with torch.no_grad():
                y = forward(quick, tuple(x.to(device) for x in inputs), fixed_batch, answer)
            yield y.float().cpu(), target
    finally:
        module.to(home).train(training)


def _labels(metric: Metric, targets: Tensor | None) -> Tensor:
    if targets is None:
        raise BadData("labels_missing", f"the metric {metric} needs labels, but this data has none: use output_error")
    return targets


def _tallied(metric: Metric, answers: Answers, n: int) -> Evaluation:
    """Counted batch by batch: the maps of a whole split would not fit in memory."""
    parts = []
    with closing(answers):
        for y, targets in answers:
            if not torch.isfinite(y).all():
                return _not_finite(n)
            parts.append(tally(metric, y, _labels(metric, targets)))
    value, loss, each = scores(metric, joined(parts))
    return Evaluation(value, loss, each.numpy())


def _against_targets(metric: Metric, y: Tensor, targets: Tensor) -> Evaluation:
    if not torch.isfinite(y).all():
        return _not_finite(len(y))
    if metric is Metric.MSE:
        errors = (y - targets.reshape(y.shape).float()).square().flatten(1).double().mean(1)
        return _evaluation(errors, float(errors.mean()))
    logits = class_last(y, targets)
    if metric is Metric.ACCURACY:
        hits = logits.argmax(-1) == targets
    else:
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
        hits = (best == targets.unsqueeze(-1)).any(-1)
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    return _evaluation(hits.double().reshape(len(y), -1).mean(1), float(loss))


def _against_original(metric: Metric, y: Tensor, reference: Tensor) -> Evaluation:
    if y.shape != reference.shape:
        raise ValueError(f"outputs {tuple(y.shape)} and the original's {tuple(reference.shape)} differ in shape")
    if not torch.isfinite(y).all():
        return _not_finite(len(y))
    if metric is Metric.OUTPUT_ERROR:
        energy = (reference - reference.mean(0)).square().flatten(1).double().sum(1).mean().clamp_min(TINY)
        errors = (y - reference).square().flatten(1).double().sum(1) / energy
        return _evaluation(errors, float(errors.mean()))
    y, reference = class_last(y), class_last(reference)
    same = (y.argmax(-1) == reference.argmax(-1)).double().reshape(len(y), -1).mean(1)
    loss = F.kl_div(y.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    return _evaluation(same, float(loss))


def _evaluation(scores: Tensor, loss: float) -> Evaluation:
    return Evaluation(float(scores.mean()), loss, scores.numpy())


def _not_finite(n: int) -> Evaluation:
    return Evaluation(math.nan, math.nan, np.full(n, np.nan))


def _binary(scores: Scores) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())
