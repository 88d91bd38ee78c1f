"""What every step of a job works with, read or measured once for each process: model, data, the original's answers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, fx, nn

from search import checkpoints, cost
from search.baseline import seen_before
from search.curvature import output_curvature
from search.data import Data
from search.data.split import evenly
from search.intake import LiftedModel
from search.layout import arranged
from search.metrics import Evaluation, Samples, evaluate, forward, higher_is_better, outputs
from search.spec import JobSpec, Metric, Plan, SitePlan, Task
from search.tally import TALLIED
from search.tune import Runtime
from tenfold.applying import apply, untrained
from tenfold.layers.base import CONVS, TRANSPOSED

__all__ = ["Bench", "Report", "read_weights", "sketched"]

Report = Callable[[str, float, float], None]

LATENCY_BATCH = 32
"""Samples in the batch whose latency is measured, where the network takes any."""
CALIBRATION_BATCH = 128
WEIGHED = (nn.Linear, nn.Embedding, *CONVS, *TRANSPOSED)
"""Layers whose outputs' errors are weighed by what they do to the answer."""
GRADIENT_BATCH = 32
"""Samples whose gradients are taken together: all values inside are kept until then."""
GLANCE_ROWS = 1000
"""Of the select split, to see whether a variant is worth the whole of it."""


@dataclass(frozen=True)
class Bench:
    lifted: LiftedModel
    data: Data
    spec: JobSpec
    metric: Metric
    runtime: Runtime
    report: Report
    scratch: Path

    @property
    def original(self) -> fx.GraphModule:
        return self.lifted.module

    @cached_property
    def calibration(self) -> list[tuple[Tensor, ...]]:
        """The inputs that statistics are taken on, as whole batches."""
        size = self.runtime.fixed_batch or CALIBRATION_BATCH
        rows = self.spec.search.calibration_samples
        batches = [
            inputs
            for inputs, _ in self.data.train.batches(size, shuffle=self.spec.search.seed, limit=rows)
            if self.runtime.fixed_batch is None or len(inputs[0]) == size
        ]
        if not batches:  # fewer rows than the network's only batch size: repeat the last one
            inputs = next(iter(self.data.train.batches(size)))[0]
            batches = [tuple(torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])]) for x in inputs)]
        return arranged(self.original, batches)

    @cached_property
    def curvature(self) -> dict[str, Tensor]:
        """What errors at the outputs of the original's layers do to its answer."""
        self.report("measuring what errors cost", 0, 1)
        runtime = self.runtime
        step = runtime.fixed_batch or GRADIENT_BATCH
        return output_curvature(
            self.original.eval(),
            (
                parts
                for inputs in self.calibration
                for parts in zip(*(torch.split(x, step) for x in inputs), strict=True)
            ),
            lambda network, inputs: forward(network, inputs, runtime.fixed_batch, runtime.answer),
            [name for name, module in self.original.named_modules() if isinstance(module, WEIGHED)],
            classes=self.classes,
            seed=self.spec.search.seed,
        )

    @cached_property
    def example(self) -> tuple[Tensor, ...]:
        """The inputs that costs are counted on."""
        return self.lifted.example(self.runtime.fixed_batch or 1)

    @cached_property
    def latency_batch(self) -> int:
        return self.runtime.fixed_batch or LATENCY_BATCH

    @cached_property
    def original_costs(self) -> tuple[int, int, int]:
        """Parameters, MACs and bytes of the original."""
        counted = cost.count(self.original, self.example)
        return counted.parameters, counted.macs, counted.bytes

    @cached_property
    def reference(self) -> Tensor:
        """The original's outputs on the select split."""
        return self._outputs(self.data.select)

    @cached_property
    def _verify_reference(self) -> Tensor:
        return self._outputs(self.data.verify)

    @cached_property
    def on_select(self) -> Evaluation:
        """The original on the select split."""
        return self.select(self.original)

    @cached_property
    def on_verify(self) -> Evaluation:
        return self.verify(self.original)

    @cached_property
    def seen_before(self) -> str | None:
        """Advice, when the original must have been trained on the select split."""
        return seen_before(self.metric, self.on_select, self.on_verify)

    @property
    def keep(self) -> Literal["best", "last"]:
        """Which weights a training ends with: rows that the original has seen choose none."""
        return "best" if self.seen_before is None else "last"

    def select(self, network: nn.Module) -> Evaluation:
        return self._evaluate(network, self.data.select, self.reference if self.relative else None)

    def clearly_worse(self, network: nn.Module, seen: Evaluation) -> bool:
        """Whether some of the select split are enough to tell that ``network`` is worse than what was ``seen`` on all
        of it: by more than three standard errors. A look at a fifth of the rows spares most of those at all."""
        total = len(self.data.select)
        if self.relative or self.metric in TALLIED or total <= 2 * GLANCE_ROWS:
            return False
        glance = evaluate(
            network,
            self.data.select,
            self.metric,
            device=self.runtime.device,
            fixed_batch=self.runtime.fixed_batch,
            answer=self.runtime.answer,
            limit=GLANCE_ROWS,
        )
        if not glance.finite:
            return True
        lost = glance.scores - seen.scores[evenly(total, GLANCE_ROWS)]
        if higher_is_better(self.metric):
            lost = -lost
        return float(lost.mean()) > 3 * float(lost.std(ddof=1)) / math.sqrt(len(lost))

    def verify(self, network: nn.Module) -> Evaluation:
        return self._evaluate(network, self.data.verify, self._verify_reference if self.relative else None)

    @property
    def relative(self) -> bool:
        """Whether the metric compares with the original's own outputs."""
        return self.metric in (Metric.AGREEMENT, Metric.OUTPUT_ERROR)

    @property
    def classes(self) -> bool:
        """Whether outputs are logits."""
        return self.data.task in (Task.CLASSIFICATION, Task.SEGMENTATION) or self.metric is Metric.AGREEMENT

    def _evaluate(self, network: nn.Module, split: Samples, reference: Tensor | None) -> Evaluation:
        return evaluate(
            network,
            split,
            self.metric,
            original=reference,
            device=self.runtime.device,
            fixed_batch=self.runtime.fixed_batch,
            answer=self.runtime.answer,
        )

    def _outputs(self, split: Samples) -> Tensor:
        runtime = self.runtime
        return outputs(
            self.original, split, device=runtime.device, fixed_batch=runtime.fixed_batch, answer=runtime.answer
        )


def sketched(original: nn.Module, plan: Plan) -> nn.Module:
    """``original`` with the plan's layers factorized but fitted to nothing: enough to see how long each takes."""
    return untrained(original, {site: entry.model_dump() for site, entry in plan.items()}).eval()


def read_weights(original: nn.Module, path: Path) -> tuple[nn.Module, Plan]:
    """The network that ``export.save_weights`` stored, and its plan."""
    tensors, plan = checkpoints.read_planned(path)
    network = apply(original, plan, tensors).eval()
    return network, {site: SitePlan.model_validate(entry) for site, entry in plan.items()}
