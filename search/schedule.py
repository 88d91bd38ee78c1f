"""A whole training: block by block for the recipe's share of the epochs, then end to end."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, Required, TypedDict, Unpack

from torch import Tensor, nn
from torch.fx import GraphModule

from search.sequential import train_blocks
from search.spec import FineTune, Metric, Outcome
from search.tune import Report, Runtime, TrainingData, Tuned, fine_tune

__all__ = ["train"]


class _How(TypedDict, total=False):
    """What both parts are told alike; ``tune.fine_tune`` says what each means."""

    seed: Required[int]
    metric: Required[Metric]
    save: Path | None
    saved: Callable[[Path], None] | None
    report: Report | None
    reference: Tensor | None
    keep: Literal["best", "last"]


def train(
    network: nn.Module,
    original: GraphModule,
    data: TrainingData,
    recipe: FineTune,
    *,
    epochs: float,
    runtime: Runtime,
    checkpoint: Path | None = None,
    rate_scale: float = 1.0,
    **how: Unpack[_How],
) -> Tuned:
    """Train ``network`` in place for ``epochs`` > 0 in all; see ``tune.fine_tune``.

    ``checkpoint`` may be of either part. ``rate_scale``: of all learning rates.
    """
    recipe = recipe.model_copy(update={"sequential_learning_rate": rate_scale * recipe.sequential_learning_rate})
    part = recipe.sequential * epochs
    blocks: Tuned | None = None
    if part > 0:
        blocks = train_blocks(
            network, original, data, recipe, epochs=part, checkpoint=checkpoint, runtime=runtime, **how
        )
    if blocks is not None:
        checkpoint, runtime = None, replace(runtime, precision=blocks.precision)
        if part >= epochs or blocks.outcome is not Outcome.OK:
            return blocks
    return fine_tune(
        network,
        original,
        data,
        recipe,
        epochs=epochs - part,
        checkpoint=checkpoint,
        runtime=runtime,
        before=blocks,
        rate_scale=rate_scale,
        **how,
    )
