"""Fine-tuning of a compressed network by distillation from the original.

A run is a pure function of its inputs and seed: the schedule and the order of the batches follow from the step's
number, everything else is in the checkpoint, so that a run that was killed and resumed ends in the same weights (to
within rounding where it goes on on another device).
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from search import checkpoints
from search.distill import Objective, objective, trivial_answer
from search.intake import Answer, first_output
from search.latency import pause_while_measuring
from search.metrics import Batch, Evaluation, Samples, evaluate, forward, higher_is_better
from search.precision import Precision, choose
from search.rebuilding import chained, quicker_rebuilt, rebuild
from search.recipe import optimizer_of, peak_rate
from search.spec import EpochRecord, FineTune, Metric, Outcome, Task

__all__ = ["Clock", "Runtime", "TrainingData", "Tuned", "epoch_seconds", "fine_tune", "learning_rate", "stream"]

Report = Callable[[str, float, float], None]

WARM_UP = 0.15
"""Share of the steps over which the rate rises."""
CLIP = 5.0
"""Largest gradient norm."""
SMOOTHING = 0.9
"""Of the loss that is watched for divergence."""
BLOW_UP = 2.0
"""Diverged: the smoothed loss exceeds this many times the larger of its start and the trivial answer's loss."""
REBUILDING_STEPS = 60
"""Shorter runs do not look for layers that train quicker through their dense weight: looking takes some ten steps."""
EVALUATIONS = 40
"""At most so many looks at the select split in a run (never more than one an epoch)."""


class TrainingData(Protocol):
    """What is asked of the data; ``search.data.Data`` is one."""

    @property
    def train(self) -> Samples: ...
    @property
    def select(self) -> Samples: ...
    @property
    def task(self) -> Task: ...


@dataclass(frozen=True)
class Runtime:
    """Where and how networks run in this process."""

    device: str = "cpu"
    fixed_batch: int | None = None
    """The only batch size the network accepts; None: any."""
    answer: Answer = first_output
    """Picks the output that counts, where the network has several."""
    precision: Precision | None = None
    """None: the quickest of those that this machine offers, by timing real steps."""
    latency_lock: int | None = None
    """Descriptor of the host-wide lock file, opened by this very process."""


@dataclass(frozen=True)
class Tuned:
    """How a run went. The module itself then holds the best weights by the select split, or the last."""

    curve: tuple[EpochRecord, ...]
    outcome: Outcome
    epochs: float
    precision: Precision
    notes: tuple[str, ...] = ()
    epoch_seconds: float = field(default=0.0, compare=False)
    """That an epoch took, in this process."""
    fingerprint: str = ""
    """Of the arguments, where another training goes on from here (``fine_tune(before=…)``)."""


@dataclass
class _State:
    """All that changes during a run, besides tensors."""

    step: int = 0
    peak: float = 0.0
    """Of the rate."""
    rate_scale: float = 1.0
    recoveries: int = 0
    rebuilt: tuple[str, ...] = ()
    """Layers that train through their dense weight."""
    smoothed: float | None = None
    ceiling: float | None = None
    """Loss beyond which the run counts as diverged."""
    best: tuple[float, float] = (-math.inf, -math.inf)
    """(signed value, −loss) of the best evaluation."""
    stale: int = 0
    epoch_loss: float = 0.0
    epoch_steps: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    before: float = 0.0
    """Epochs of the training that came before this one."""
    after: str = ""
    """The fingerprint of that training."""
    notes: list[str] = field(default_factory=list)
    """Of that training."""


def fine_tune(
    module: nn.Module,
    original: nn.Module,
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
    patience: int | None = None,
    keep: Literal["best", "last"] = "best",
    before: Tuned | None = None,
    rate_scale: float = 1.0,
) -> Tuned:
    """Train ``module`` in place towards ``original``; it ends with the best weights seen on ``data.select``.

    ``epochs`` may be a fraction. ``checkpoint``: a file that an earlier run of the same arguments saved; one of other
    arguments is not used. ``save``: where to keep this run's own, every ``save_every_s`` seconds; ``saved`` is
    told each time. ``reference``: the original's ``metrics.outputs`` on the select split, for the metrics that
    compare with it. ``patience``: stop after so many evaluations in a row without a better one. ``keep``: with
    ``"last"`` it ends with the last weights instead, for a select split that the original was trained on: what a
    network still remembers of those rows looks better there than anything that it learns. ``before``: what training
    made ``module`` what it is; its curve and epochs open this run's. ``rate_scale``: of all learning rates.

    Divergence (a non-finite loss or gradient, or a loss far above a trivial answer's) goes back to the best weights
    and a quarter of the rate, once; the second time the run ends as ``Outcome.DIVERGED``.
    """
    runtime = runtime or Runtime()
    run = _Training(module, original, data, recipe, epochs, seed, metric, runtime, reference, keep, rate_scale)
    if before is not None:
        run.state.curve = [record.model_dump() for record in before.curve]
        run.state.before, run.state.after, run.state.notes = before.epochs, before.fingerprint, [*before.notes]
    if run.total == 0:
        return Tuned((), Outcome.OK, 0.0, Precision.FLOAT32)
    notes = run.prepare(checkpoint)
    try:
        outcome = run.loop(report, save, saved, save_every_s, patience)
    finally:
        run.tidy()
    curve = tuple(EpochRecord(**record) for record in run.state.curve)
    notes = (*run.state.notes, *notes)
    return Tuned(curve, outcome, run.done, run.precision, notes, epoch_seconds=run.per_epoch * run.pace)


def epoch_seconds(original: nn.Module, data: TrainingData, recipe: FineTune, runtime: Runtime) -> float:
    """Of training a network of the original's size beside it, from a few timed steps.

    Factorized ones take about as long, for layers that would be slower train through their dense weight.
    """
    batch = runtime.fixed_batch or min(recipe.batch_size, len(data.train))
    steps = max(1, len(data.train) // batch)
    inputs = tuple(x.to(runtime.device) for x in next(stream(data.train, batch, 0, 0))[0])
    original.to(runtime.device)
    try:
        _, seconds = choose(
            lambda m, xs: forward(m, xs, runtime.fixed_batch, runtime.answer), original, original, inputs, steps
        )
    finally:
        original.to("cpu")
    return steps * seconds


def learning_rate(step: int, total: int, peak: float) -> float:
    """One cycle: linear from a tenth of the peak over the first 15 % of the steps, then a cosine to a hundredth."""
    warm = max(1, round(WARM_UP * total))
    if step < warm:
        return peak * (0.1 + 0.9 * (step + 1) / warm)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm + 1) / (total - warm + 1))))


def stream(train: Samples, batch: int, seed: int, start: int) -> Iterator[Batch]:
    """Augmented batches without end, from step ``start`` on; which ones follows from the seed and the step alone."""
    per_epoch = max(1, len(train) // batch)
    epoch, skip = divmod(start, per_epoch)
    while True:
        order = (seed * 1_000_003 + epoch) % 2**31
        for index, rows in enumerate(train.batches(batch, shuffle=order, augment=True)):
            if index >= per_epoch:
                break  # the incomplete last batch: its statistics would be another's
            if index >= skip:
                yield rows
        epoch, skip = epoch + 1, 0


class _Training:
    def __init__(
        self,
        module: nn.Module,
        original: nn.Module,
        data: TrainingData,
        recipe: FineTune,
        epochs: float,
        seed: int,
        metric: Metric,
        runtime: Runtime,
        reference: Tensor | None,
        keep: Literal["best", "last"],
        rate_scale: float,
    ) -> None:
        self.module, self.original, self.data, self.recipe, self.epochs = module, original, data, recipe, epochs
        self.seed, self.metric, self.runtime, self.reference, self.keep = seed, metric, runtime, reference, keep
        size = len(data.train)
        self.batch = runtime.fixed_batch or min(recipe.batch_size, size)
        self.per_epoch = max(1, size // self.batch)
        self.total = max(1, round(epochs * self.per_epoch)) if epochs > 0 else 0
        self.evaluate_every = max(self.per_epoch, math.ceil(self.total / EVALUATIONS))
        self.state = _State(rate_scale=rate_scale)
        self.precision = Precision.FLOAT32
        self.pace = 0.0
        """Seconds a step, looks at the select split included."""

    @property
    def done(self) -> float:
        """Epochs so far."""
        return self.state.before + self.state.step / self.per_epoch

    # ------------------------------------------------------------------------------------------------ beginning

    def prepare(self, checkpoint: Path | None) -> tuple[str, ...]:
        torch.manual_seed(self.seed)
        self.module.to(self.runtime.device)
        self.original.to(self.runtime.device).eval()
        self.optimizer = _optimizer(self.module, self.recipe, optimizer_of(self.recipe, self.original))
        inputs, labels = self._to_device(next(stream(self.data.train, self.batch, self.seed, 0)))
        with torch.no_grad():
            teacher = self._answer(self.original, inputs).float()
        self.loss_of: Objective = objective(self.data.task, self.metric, self.recipe, teacher, labels)
        stored = self._stored(checkpoint)
        if stored is None:
            self._begin(inputs, teacher)
        else:
            self._resume(*stored, inputs)
        self.precision.prepare(self.module)
        self.precision.prepare(self.original)
        rebuild(self.module, self.state.rebuilt)
        notes = [f"trained in {self.precision}"]
        if self.state.rebuilt:
            notes.append(f"{len(self.state.rebuilt)} layers were quicker to train through their dense weight")
        if checkpoint is not None and stored is None:
            notes.append("the checkpoint belonged to another run: training began anew")
        return tuple(notes)

    def _begin(self, inputs: tuple[Tensor, ...], teacher: Tensor) -> None:
        self.state.peak = peak_rate(self.recipe, self.original, self.epochs, self._distance(inputs, teacher))
        self._find_pace(inputs)
        torch.manual_seed(self.seed)
        self.average = _copy(self.module.state_dict()) if self.recipe.ema else {}
        self.best = _copy(self.module.state_dict())
        start = self._evaluate()
        if start.finite:
            self.state.best = self._rank(start)

    def _distance(self, inputs: tuple[Tensor, ...], teacher: Tensor) -> float:
        """How much there is to learn: the start's distillation loss over the trivial answer's."""
        self.module.eval()
        with torch.no_grad():
            answer = self._answer(self.module, inputs).float()
        trivial = trivial_answer(self.data.task, self.metric, teacher)
        mine, whole = (float(self.loss_of(y, teacher, None)) for y in (answer, trivial))
        return mine / whole if whole > 0 and math.isfinite(mine) else 1.0

    def _find_pace(self, inputs: tuple[Tensor, ...]) -> None:
        """Choose whatever makes steps quick on this device."""
        self.precision = (
            self.runtime.precision or choose(self._answer, self.module, self.original, inputs, self.total)[0]
        )
        if self.total >= REBUILDING_STEPS:
            self.state.rebuilt = quicker_rebuilt(self.module, lambda m: self._run(m, inputs), self.precision)

    def _stored(self, checkpoint: Path | None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        if checkpoint is None:
            return None
        groups, facts = checkpoints.read(checkpoint)
        return (groups, facts) if facts.get("fingerprint") == self._fingerprint() else None

    def _resume(self, groups: dict[str, dict[str, Tensor]], facts: dict[str, Any], inputs: tuple[Tensor, ...]) -> None:
        self.precision = Precision(facts["precision"])
        state = facts["state"]
        self.state = _State(**{**state, "best": tuple(state["best"]), "rebuilt": tuple(state["rebuilt"])})
        self.module.load_state_dict(groups["model"])
        checkpoints.restore_optimizer(self.optimizer, groups.get("optimizer", {}))
        self.best = {k: v.to(self.runtime.device) for k, v in groups["best"].items()}
        self.average = {k: v.to(self.runtime.device) for k, v in groups.get("average", {}).items()}
        if facts["device"] != self.runtime.device:
            self._find_pace(inputs)
        torch.set_rng_state(groups["random"]["cpu"])
        if "cuda" in groups["random"] and self.runtime.device.startswith("cuda"):
            torch.cuda.set_rng_state(groups["random"]["cuda"])

    def _fingerprint(self) -> str:
        """Of what must be equal for a checkpoint to be this run's own."""
        shapes = [(name, list(t.shape)) for name, t in self.module.state_dict().items()]
        what = [shapes, self.recipe.model_dump(mode="json"), self.seed, self.total, self.batch, self.metric]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    # ------------------------------------------------------------------------------------------------ the loop

    def loop(
        self,
        report: Report | None,
        save: Path | None,
        saved: Callable[[Path], None] | None,
        save_every_s: float,
        patience: int | None,
    ) -> Outcome:
        state = self.state
        clock = Clock(self.total, state.step)
        last_save = time.monotonic()
        batches = stream(self.data.train, self.batch, self.seed, state.step)
        while state.step < self.total:
            pause_while_measuring(self.runtime.latency_lock)
            if not self._step(self._to_device(next(batches))):
                if state.recoveries > 0:
                    self.module.load_state_dict(self.best)
                    return Outcome.DIVERGED
                self._recover()
            state.step += 1
            if state.step % self.evaluate_every == 0 or state.step == self.total:
                self._look()
                self.pace = clock.pace(state.step)
                if patience is not None and state.stale >= patience:
                    break
            if report is not None and clock.due():
                done, of = self.done, state.before + self.epochs
                report(f"fine-tuning, epoch {done:.1f} of {of:g}, {clock.left(state.step)}", done, of)
            if save is not None and state.step < self.total and time.monotonic() - last_save >= save_every_s:
                self._save(save)
                last_save = time.monotonic()
                if saved is not None:
                    saved(save)
        self.module.load_state_dict(self.best)
        return Outcome.OK

    def _step(self, batch: Batch) -> bool:
        """One update; False when it showed divergence (the weights are then not changed)."""
        inputs, labels = batch
        rate = self.state.rate_scale * learning_rate(self.state.step, self.total, self.state.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.module.train()
        with torch.no_grad():
            teacher = self._run(self.original, inputs)
        answer = self._run(self.module, inputs)
        loss = self.loss_of(answer, teacher, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        value = float(loss.detach())
        if not (math.isfinite(value) and bool(torch.isfinite(norm))) or self._blown_up(value, teacher, labels):
            return False
        self.optimizer.step()
        self._update_average()
        self.state.epoch_loss += value
        self.state.epoch_steps += 1
        return True

    def _run(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """The network's answer in the training's number format, as float32."""
        inputs = tuple(self.precision.arrange(x) for x in inputs)
        with self.precision.autocast(inputs):
            return self._answer(network, inputs).float()

    def _blown_up(self, loss: float, teacher: Tensor, labels: Tensor | None) -> bool:
        state = self.state
        state.smoothed = loss if state.smoothed is None else SMOOTHING * state.smoothed + (1 - SMOOTHING) * loss
        if state.ceiling is None:
            trivial = self.loss_of(trivial_answer(self.data.task, self.metric, teacher), teacher, labels)
            state.ceiling = BLOW_UP * max(loss, float(trivial))
        return state.smoothed > state.ceiling

    def _recover(self) -> None:
        self.module.load_state_dict(self.best)
        self.average = _copy(self.best) if self.recipe.ema else {}
        self.optimizer = _optimizer(self.module, self.recipe, optimizer_of(self.recipe, self.original))
        self.state.recoveries += 1
        self.state.rate_scale *= 0.25
        self.state.smoothed = None

    def _update_average(self) -> None:
        if not self.recipe.ema:
            return
        decay = min(self.recipe.ema, (1 + self.state.step) / (10 + self.state.step))
        for name, tensor in self.module.state_dict().items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor, 1 - decay)
            else:
                self.average[name].copy_(tensor)

    def _look(self) -> None:
        """Evaluate on the select split, note it, and keep the weights if they are the best yet, or the last."""
        state = self.state
        trained = _copy(self.module.state_dict()) if self.recipe.ema else None
        if trained is not None:
            self.module.load_state_dict(self.average)
        seen = self._evaluate()
        state.stale += 1
        if seen.finite and (self.keep == "last" or self._rank(seen) > state.best):
            state.best, state.stale = self._rank(seen), 0
            self.best = _copy(self.module.state_dict())
        if trained is not None:
            self.module.load_state_dict(trained)
        record = EpochRecord(
            epoch=self.done,
            loss=state.epoch_loss / max(state.epoch_steps, 1),
            value=seen.value if seen.finite else None,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
        )
        state.curve.append(record.model_dump())
        state.epoch_loss, state.epoch_steps = 0.0, 0

    def _evaluate(self) -> Evaluation:
        return evaluate(
            self.module,
            self.data.select,
            self.metric,
            original=self.reference if self.reference is not None else self.original,
            device=self.runtime.device,
            fixed_batch=self.runtime.fixed_batch,
            answer=self.runtime.answer,
        )

    def _answer(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return forward(network, inputs, self.runtime.fixed_batch, self.runtime.answer)

    def _rank(self, seen: Evaluation) -> tuple[float, float]:
        return (seen.value if higher_is_better(self.metric) else -seen.value, -seen.loss)

    # ------------------------------------------------------------------------------------------------ in and out

    def _to_device(self, batch: Batch) -> Batch:
        inputs, labels = batch
        device = self.runtime.device
        return tuple(x.to(device) for x in inputs), None if labels is None else labels.to(device)

    def _save(self, path: Path) -> None:
        random = {"cpu": torch.get_rng_state()}
        if self.runtime.device.startswith("cuda"):
            random["cuda"] = torch.cuda.get_rng_state()
        groups = {
            "model": self.module.state_dict(),
            "best": self.best,
            "average": self.average,
            "optimizer": checkpoints.optimizer_state(self.optimizer),
            "random": random,
        }
        facts = {
            "fingerprint": self._fingerprint(),
            "device": self.runtime.device,
            "precision": self.precision,
            "state": vars(self.state),
        }
        checkpoints.write(path, groups, facts)

    def tidy(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        chained(self.module)
        for network in (self.module, self.original):
            network.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            network.eval()


class Clock:
    """Decides when progress is worth telling, and how long the rest takes at the pace so far."""

    def __init__(self, total: int, start: int) -> None:
        self.total, self.start = total, start
        self.began = time.monotonic()
        self.told = self.began

    def due(self) -> bool:
        now = time.monotonic()
        if now - self.told < 0.25:
            return False
        self.told = now
        return True

    def pace(self, step: int) -> float:
        """Seconds a step, so far."""
        return (time.monotonic() - self.began) / (step - self.start)

    def left(self, step: int) -> str:
        return f"{self.pace(step) * (self.total - step):.0f} s left"


def _optimizer(module: nn.Module, recipe: FineTune, kind: Literal["sgd", "adamw"]) -> torch.optim.Optimizer:
    """Biases and norms (one axis) are not decayed. Each step sets the rate."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if kind == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
