"""Training block by block to reproduce the original's own values (Su et al. 2018, "sequential" training).

A block is given what the compressed network really computes up to it, and learns to hand on what the original hands on
there, in the least squares. What earlier blocks still get wrong, later ones thus learn to make up for. No labels are
needed, gradients cross one block only, and batch norms keep their statistics.

Like ``tune``, a run is a pure function of its inputs and seed, and a checkpoint holds all that changes.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from search import checkpoints
from search.blocks import blocks, cuts
from search.latency import pause_while_measuring
from search.metrics import Batch, evaluate, forward, higher_is_better
from search.precision import Precision, choose
from search.rebuilding import chained, quicker_rebuilt, rebuild
from search.spec import EpochRecord, FineTune, Metric, Outcome
from search.tune import (
    BLOW_UP,
    CLIP,
    REBUILDING_STEPS,
    SMOOTHING,
    Clock,
    Report,
    Runtime,
    TrainingData,
    Tuned,
    learning_rate,
    stream,
)

__all__ = ["train_blocks"]

BLOCKS = 8
"""At most so many: each adds passes through what lies before it, and takes its share of the epochs."""
LOOKS = 4
"""At most so many looks at the select split in a block (never more than one an epoch)."""
LOOK_ROWS = 512
"""At most so many samples of the select split in a look, and an eighth of those that the block trains on."""


@dataclass
class _State:
    """All that changes during a run, besides tensors."""

    start: tuple[float, float]
    """(signed value, −loss) of the network that was handed in."""
    step: int = 0
    rate_scale: float = 1.0
    recoveries: int = 0
    rebuilt: tuple[str, ...] = ()
    """Layers that train through their dense weight."""
    smoothed: float | None = None
    ceiling: float | None = None
    """Loss beyond which the block counts as diverged."""
    best: float = math.inf
    """The block's least error on the select split."""
    loss: float = 0.0
    steps: int = 0
    """That ``loss`` is the sum of."""
    curve: list[dict[str, Any]] = field(default_factory=list)


def train_blocks(
    module: nn.Module,
    original: fx.GraphModule,
    data: TrainingData,
    recipe: FineTune,
    *,
    epochs: float,
    seed: int,
    metric: Metric,
    checkpoint: Path | None = None,
    save: Path | None = None,
    saved: Callable[[Path], None] | None = None,
    save_every_s: float = 60.0,
    report: Report | None = None,
    runtime: Runtime | None = None,
    reference: Tensor | None = None,
    keep: Literal["best", "last"] = "best",
) -> Tuned | None:
    """Train ``module`` in place, one block after the other, for ``epochs`` in all, shared out evenly.

    The arguments are those of ``tune.fine_tune``. A block's loss is its mean squared error over the variance of the
    original's values there; Adam trains it at ``recipe.sequential_learning_rate``. It ends with the weights of its
    least error on ``data.select``, where it began if nothing was better; the network as a whole likewise goes back to
    where it began if that was better by the metric, unless the last is to be kept. A network without places to cut is
    one block.

    Divergence is treated as there: back to the best weights and a quarter of the rate once in a block, then
    ``Outcome.DIVERGED``.

    None: ``checkpoint`` is of the training that came after this very run (``fine_tune(before=…)``), which goes on from
    it.

    Raises:
        TypeError: ``module`` is no graph, as those are that came in by ``search.intake``.
    """
    if not isinstance(module, fx.GraphModule):
        raise TypeError(f"only an fx.GraphModule can be cut into blocks, not {type(module).__name__}: lift it first")
    run = _Sequential(module, original, data, recipe, epochs, seed, metric, runtime or Runtime(), reference, keep)
    groups, facts = checkpoints.read(checkpoint) if checkpoint is not None else ({}, {})
    if facts.get("state", {}).get("after") == run.fingerprint:
        return None
    try:
        ours = facts.get("fingerprint") == run.fingerprint
        run.prepare(groups if ours else {}, facts if ours else {})
        outcome = run.loop(report, save, saved, save_every_s)
        notes = run.finish()
    finally:
        run.tidy()
    if checkpoint is not None and not ours:
        notes = ("the checkpoint belonged to another run: training began anew", *notes)
    curve = tuple(EpochRecord(**record) for record in run.state.curve)
    return Tuned(curve, outcome, run.done, run.precision, notes, fingerprint=run.fingerprint)


class _Sequential:
    def __init__(
        self,
        module: fx.GraphModule,
        original: fx.GraphModule,
        data: TrainingData,
        recipe: FineTune,
        epochs: float,
        seed: int,
        metric: Metric,
        runtime: Runtime,
        reference: Tensor | None,
        keep: Literal["best", "last"],
    ) -> None:
        self.keep = keep
        self.module, self.original, self.data, self.recipe = module, original, data, recipe
        self.epochs, self.seed, self.metric, self.runtime, self.reference = epochs, seed, metric, runtime, reference
        size = len(data.train)
        self.batch = runtime.fixed_batch or min(recipe.batch_size, size)
        self.per_epoch = max(1, size // self.batch)
        self.total = max(1, round(epochs * self.per_epoch))
        self.precision = Precision.FLOAT32
        self.inputs = [n.name for n in module.graph.nodes if n.op == "placeholder"]
        self.fingerprint = self._fingerprint()

    @property
    def done(self) -> float:
        """Epochs so far."""
        return self.state.step / self.per_epoch

    # ------------------------------------------------------------------------------------------------ beginning

    def prepare(self, groups: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        """Cut the networks, and begin, or go on from a checkpoint's tensors and facts."""
        torch.manual_seed(self.seed)
        self.module.to(self.runtime.device).eval()
        self.original.to(self.runtime.device).eval()
        first = self._inputs(next(stream(self.data.train, self.batch, self.seed, 0)))
        if facts:
            self.precision = Precision(facts["precision"])
            state = facts["state"]
            self.state = _State(**{**state, "start": tuple(state["start"]), "rebuilt": tuple(state["rebuilt"])})
            self.module.load_state_dict(groups["model"])
            self.start = groups["start"]
        else:
            answer = self.runtime.answer
            self.precision = (
                self.runtime.precision
                or (
                    choose(lambda m, xs: forward(m, xs, answer=answer), self.module, self.original, first, self.total)[
                        0
                    ]
                )
            )
            self.state = _State(self._evaluate()[1])
            if self.total >= REBUILDING_STEPS:
                self.state.rebuilt = quicker_rebuilt(self.module, lambda m: self._whole(m, first), self.precision)
            self.start = {name: t.detach().cpu().clone() for name, t in self.module.state_dict().items()}
        self.stored = groups
        self.precision.prepare(self.module)
        self.precision.prepare(self.original)
        rebuild(self.module, self.state.rebuilt)
        places = cuts(self.module, first, min(BLOCKS, self.total))
        self.blocks, self.targets = (
            blocks(network, places, self.runtime.answer) for network in (self.module, self.original)
        )
        self.ends = [round(self.total * (i + 1) / len(self.blocks)) for i in range(len(self.blocks))]

    def _whole(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        inputs = tuple(self.precision.arrange(x) for x in inputs)
        with self.precision.autocast(inputs):
            return forward(network, inputs, answer=self.runtime.answer)

    def _enter(self, at: int) -> None:
        """Make ready to train block ``at``: from its first step on, or from where the checkpoint was saved."""
        state, self.at = self.state, at
        self.weights = {n: p for n, p in self.blocks[at].module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.Adam(self.weights.values())
        error, variance = self._measure()
        self.scale = max(variance, 1e-12)
        if state.step > self._begin:
            checkpoints.restore_optimizer(self.optimizer, self.stored["optimizer"])
            self.best = {name: t.to(self.runtime.device) for name, t in self.stored["best"].items()}
            return
        self.state = _State(state.start, state.step, rebuilt=state.rebuilt, best=error, curve=state.curve)
        self.best = self._copy()

    @property
    def _begin(self) -> int:
        return self.ends[self.at - 1] if self.at else 0

    def _fingerprint(self) -> str:
        """Of what must be equal for a checkpoint to be this run's own, or of what came after it."""
        shapes = [(name, list(t.shape)) for name, t in self.module.state_dict().items()]
        recipe = self.recipe.model_dump(mode="json")
        what = ["block by block", shapes, recipe, self.seed, self.total, self.batch, self.metric]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    # ------------------------------------------------------------------------------------------------ the loop

    def loop(
        self, report: Report | None, save: Path | None, saved: Callable[[Path], None] | None, save_every_s: float
    ) -> Outcome:
        clock = Clock(self.total, self.state.step)
        last_save = time.monotonic()
        batches = stream(self.data.train, self.batch, self.seed, self.state.step)
        for at in range(sum(end <= self.state.step for end in self.ends), len(self.blocks)):
            self._enter(at)
            every = max(self.per_epoch, math.ceil((self.ends[at] - self._begin) / LOOKS))
            while self.state.step < self.ends[at]:
                pause_while_measuring(self.runtime.latency_lock)
                if not self._step(self._inputs(next(batches))):
                    if self.state.recoveries > 0:
                        self._restore()
                        return Outcome.DIVERGED
                    self._recover()
                self.state.step += 1
                if self.state.step == self.ends[at] or (self.state.step - self._begin) % every == 0:
                    self._look()
                if self.state.step == self.ends[at]:
                    self._restore()
                if report is not None and clock.due():
                    where = f"block {at + 1} of {len(self.blocks)}, epoch {self.done:.1f} of {self.epochs:g}"
                    report(f"training {where}, {clock.left(self.state.step)}", self.done, self.epochs)
                if save is not None and time.monotonic() - last_save >= save_every_s:
                    self._save(save)
                    last_save = time.monotonic()
                    if saved is not None:
                        saved(save)
        return Outcome.OK

    def _step(self, inputs: tuple[Tensor, ...]) -> bool:
        """One update of the block; False when it showed divergence (the weights are then not changed)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        loss = F.mse_loss(self._answer(inputs), self._target(inputs)) / self.scale
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.weights.values(), CLIP)
        value = float(loss.detach())
        if not (math.isfinite(value) and bool(torch.isfinite(norm))) or self._blown_up(value):
            return False
        self.optimizer.step()
        self.state.loss += value
        self.state.steps += 1
        return True

    def _rate(self) -> float:
        step, total = self.state.step - self._begin, self.ends[self.at] - self._begin
        return self.state.rate_scale * learning_rate(step, total, self.recipe.sequential_learning_rate)

    def _blown_up(self, loss: float) -> bool:
        """As in ``tune``; who answers with the mean has a loss of 1."""
        state = self.state
        state.smoothed = loss if state.smoothed is None else SMOOTHING * state.smoothed + (1 - SMOOTHING) * loss
        if state.ceiling is None:
            state.ceiling = BLOW_UP * max(loss, 1.0)
        return state.smoothed > state.ceiling

    def _recover(self) -> None:
        self._restore()
        self.optimizer = torch.optim.Adam(self.weights.values())
        self.state.recoveries += 1
        self.state.rate_scale *= 0.25
        self.state.smoothed = None

    def _answer(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """What the block makes of the compressed network's own values; gradients reach no further back."""
        values: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        with self.precision.autocast(inputs):
            with torch.no_grad():
                for block in self.blocks[: self.at]:
                    block(values)
            return self.blocks[self.at](values).float()

    @torch.no_grad()
    def _target(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """What the original hands on where the block ends."""
        values: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        with self.precision.autocast(inputs):
            for block in self.targets[: self.at]:
                block(values)
            return self.targets[self.at](values).float()

    def _look(self) -> None:
        """Note the block's error on the select split, and keep its weights if they are the best yet."""
        state = self.state
        error, _ = self._measure()
        if error < state.best:
            state.best, self.best = error, self._copy()
        record = EpochRecord(
            epoch=self.done,
            loss=state.loss / max(state.steps, 1),
            value=None,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
        )
        state.curve.append(record.model_dump())
        state.loss, state.steps = 0.0, 0

    @torch.no_grad()
    def _measure(self) -> tuple[float, float]:
        """The block's mean squared error on the select split (infinite: not finite), and the variance of its target."""
        error, mean, square, count = 0.0, 0.0, 0.0, 0
        rows = max(self.batch, min(LOOK_ROWS, (self.ends[self.at] - self._begin) * self.batch // 8))
        for batch in self.data.select.batches(self.batch, limit=rows):
            inputs = self._inputs(batch)
            answer, target = self._answer(inputs).double(), self._target(inputs).double()
            error += float((answer - target).square().sum())
            mean, square = mean + float(target.sum()), square + float(target.square().sum())
            count += target.numel()
        return error / count if math.isfinite(error) else math.inf, square / count - (mean / count) ** 2

    def _copy(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def _restore(self) -> None:
        for name, weight in self.weights.items():
            weight.copy_(self.best[name])

    # ------------------------------------------------------------------------------------------------ ending

    def finish(self) -> tuple[str, ...]:
        """Look at the network as a whole, and go back to where it began if that was better."""
        value, rank = self._evaluate()
        if self.state.curve:
            self.state.curve[-1]["value"] = value
        notes = (f"{self.done:g} epochs block by block ({len(self.blocks)} of them) in {self.precision}",)
        if self.keep == "last" or rank >= self.state.start:
            return notes
        self.module.load_state_dict(self.start)
        return (*notes, "block by block it became worse: the weights before were kept")

    def _evaluate(self) -> tuple[float | None, tuple[float, float]]:
        """The metric on the select split (None: not finite), and (signed value, −loss)."""
        seen = evaluate(
            self.module,
            self.data.select,
            self.metric,
            original=self.reference if self.reference is not None else self.original,
            device=self.runtime.device,
            fixed_batch=self.runtime.fixed_batch,
            answer=self.runtime.answer,
        )
        if not seen.finite:
            return None, (-math.inf, -math.inf)
        return seen.value, (seen.value if higher_is_better(self.metric) else -seen.value, -seen.loss)

    def tidy(self) -> None:
        chained(self.module)
        for network in (self.module, self.original):
            network.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            network.zero_grad(set_to_none=True)

    # ------------------------------------------------------------------------------------------------ in and out

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """On the device, and as many as the network takes: a batch that is too short repeats its last sample."""
        inputs = tuple(self.precision.arrange(x.to(self.runtime.device)) for x in batch[0])
        missing = (self.runtime.fixed_batch or 0) - len(inputs[0])
        if missing <= 0:
            return inputs
        return tuple(torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) for x in inputs)

    def _save(self, path: Path) -> None:
        groups = {
            "model": self.module.state_dict(),
            "start": self.start,
            "best": self.best,
            "optimizer": checkpoints.optimizer_state(self.optimizer),
        }
        facts = {"fingerprint": self.fingerprint, "precision": self.precision, "state": vars(self.state)}
        checkpoints.write(path, groups, facts)
