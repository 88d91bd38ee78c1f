"""One candidate at one rung: decompose → reconstruct → recalibrate → fine-tune → evaluate → count.

Where latency is minimised, a new candidate's layers are timed before that, and those that are slower factorized stay
dense (docs/decisions/0020).
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, fx, nn

from search import cost, latency
from search.baseline import allowed_drop
from search.bench import Bench, read_weights, sketched
from search.export import save_weights
from search.latency import Latency
from search.layout import channels_last
from search.metrics import Evaluation, drop, higher_is_better, paired_interval
from search.reconstruct import Options, recalibrate_batch_norm, reconstruct
from search.schedule import train
from search.spec import (
    LEARNING_RATE_SCALE,
    Cost,
    Costs,
    EpochRecord,
    Interval,
    Outcome,
    Plan,
    Rung,
    TrialResult,
    TrialWork,
)
from search.surgery import dense_of

__all__ = ["as_shipped", "build", "measure_latency", "run", "slower", "verified"]

Save = Callable[[Path], None]

KEPT_BYTES = 8 << 20
"""Weights of a cheap trial are kept if they are no more than this: building them again is cheap too."""
SEED_RANGE = 2**31
CLEARLY = 0.95
"""Channels last must take less than this share of the time, or the network is left as it is."""


@dataclass
class _Findings:
    """What is known of a trial, filled as it goes on."""

    costs: Costs
    outcome: Outcome = Outcome.OK
    seen: Evaluation | None = None
    curve: tuple[EpochRecord, ...] = ()
    epochs: float = 0.0
    epoch_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    left_dense: Plan = field(default_factory=dict)


def run(
    bench: Bench,
    work: TrialWork,
    *,
    parent: Path | None,
    weights: Path | None,
    checkpoint: Path | None,
    out: Path,
    save: Save | None = None,
) -> TrialResult:
    """Carry out ``work`` and write ``out/weights.safetensors`` (a large network's only once it was trained).

    ``parent``: the weights that the stage starts from; ``weights``: this candidate's own from an earlier rung, to go
    on from; ``checkpoint``: of this very fine-tuning, when an earlier attempt was cut off; ``save`` is told whenever
    a new one lies in ``out``. A failure of the run is an outcome, not an exception.
    """
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    parameters, macs, stored = bench.original_costs
    found = _Findings(Costs(parameters=parameters, macs=macs, bytes=stored))
    if work.stage > 0 and parent is None and weights is None:
        found.outcome = Outcome.LOST_REFERENCE
        return _result(bench, work, found, began, None)
    network: nn.Module | None = None
    try:
        if work.rung is Rung.CHEAP and Cost.LATENCY in bench.spec.minimize:
            work = _without_slower(bench, work, found)
        network = _network(bench, work, parent, weights, found)
        _train(bench, work, network, checkpoint, out, save, found)
        _measure(bench, work, network, found)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        found.outcome = Outcome.NON_FINITE
        found.notes.append(f"no factors could be found: {error}")
        return _result(bench, work, found, began, None)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return _out_of_memory(bench, work, found, began, error)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return _out_of_memory(bench, work, found, began, error)
    if work.rung is not Rung.CHEAP or found.costs.bytes <= KEPT_BYTES:
        save_weights(network, work.plan, out / "weights.safetensors")
    return _result(bench, work, found, began, network)


def build(bench: Bench, plan: Plan, parent: Path | None) -> nn.Module:
    """The network of ``plan`` without any training: from the original, or from a stage's start made dense.

    A later stage's layers are fitted to the outputs of its start, which was trained: fitted to the original's, they
    would forget it.
    """
    start = bench.original
    if parent is not None:
        start = cast(fx.GraphModule, dense_of(read_weights(bench.original, parent)[0]))
    options = Options(curvature=bench.curvature)
    return reconstruct(start, start, plan, lambda: bench.calibration, options=options).eval()


def as_shipped(bench: Bench, network: nn.Module) -> nn.Module:
    """``network`` as its files hold it: with images channels last where that is quicker on this CPU.

    Grouped convolutions, of which CP forms are full, take a slow path otherwise (docs/decisions/0018).
    """
    example = bench.lifted.example(bench.latency_batch)
    if bench.runtime.device != "cpu" or not isinstance(network, fx.GraphModule):
        return network
    arranged = channels_last(network, example)
    if arranged is None:
        return network
    found = latency.measure(network, arranged, example, lock=bench.runtime.latency_lock)
    return arranged if found.ratio < CLEARLY else network


def measure_latency(bench: Bench, network: nn.Module) -> Latency:
    """Of ``network`` beside the original, on the CPU or the device and under the host's lock."""
    bench.report("measuring latency", 0, 1)
    with _on_device(bench, network) as example:
        return latency.measure(bench.original, network, example, lock=bench.runtime.latency_lock)


def slower(bench: Bench, plan: Plan) -> dict[str, Latency]:
    """The sites of ``plan`` that take clearly longer factorized than dense, where and as latency is measured.

    All are timed within runs of the whole network, laid out as its files would be; a site of several layers by the
    sum of them.
    """
    bench.report("timing layers", 0, 1)
    dense, sketch = bench.original, sketched(bench.original, plan)
    network = as_shipped(bench, sketch)
    if network is not sketch:
        dense = channels_last(dense, bench.lifted.example(bench.latency_batch)) or dense
    layers = {site: tuple(entry.members or (site,)) for site, entry in plan.items()}
    with _on_device(bench, network) as example:
        times = latency.measure_parts(dense, network, example, layers, lock=bench.runtime.latency_lock)
    return {site: time for site, time in times.items() if time.is_slower}


@contextmanager
def _on_device(bench: Bench, network: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """A batch to measure with; the original and ``network`` are where it is."""
    device = bench.runtime.device
    try:
        bench.original.to(device)
        network.to(device)
        yield tuple(x.to(device) for x in bench.lifted.example(bench.latency_batch))
    finally:
        bench.original.to("cpu")
        network.to("cpu")


def _without_slower(bench: Bench, work: TrialWork, found: _Findings) -> TrialWork:
    """``work`` without the sites that would be quicker dense, before anything is spent on them."""
    given = bench.spec.layers.fixed
    times = {site: time for site, time in slower(bench, work.plan).items() if site not in given}
    if not times:
        return work
    found.left_dense = {site: work.plan[site] for site in times}
    told = ", ".join(f"{site} ({time.ratio:.2f})" for site, time in times.items())
    found.notes.append(f"left dense, for they took longer factorized (times their dense layers): {told}")
    return work.model_copy(update={"plan": {s: entry for s, entry in work.plan.items() if s not in times}})


def _network(bench: Bench, work: TrialWork, parent: Path | None, weights: Path | None, found: _Findings) -> nn.Module:
    if weights is not None:
        bench.report("loading the candidate", 0, 1)
        network, _ = read_weights(bench.original, weights)
        found.seen = bench.select(network)
    else:
        bench.report(f"decomposing {len(work.plan)} layers", 0, 1)
        network = build(bench, work.plan, parent)
        bench.report("evaluating", 0, 1)
        found.seen = bench.select(network)
        network = _recalibrated(bench, network, found)
    found.costs = cost.count(network, bench.example)
    return network


def _recalibrated(bench: Bench, network: nn.Module, found: _Findings) -> nn.Module:
    """With batch norms' statistics taken anew, if that is better on the select split."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not any(isinstance(m, norms) for m in network.modules()):
        return network
    assert found.seen is not None  # noqa: S101 - evaluated just before
    other = recalibrate_batch_norm(network, bench.calibration)
    if found.seen.finite and bench.clearly_worse(other, found.seen):
        return network
    seen = bench.select(other)
    if seen.finite and (not found.seen.finite or _rank(bench, seen) > _rank(bench, found.seen)):
        found.seen = seen
        found.notes.append("batch norm statistics were taken anew")
        return other
    return network


def _rank(bench: Bench, seen: Evaluation) -> tuple[float, float]:
    return (seen.value if higher_is_better(bench.metric) else -seen.value, -seen.loss)


def _train(
    bench: Bench,
    work: TrialWork,
    network: nn.Module,
    checkpoint: Path | None,
    out: Path,
    save: Save | None,
    found: _Findings,
) -> None:
    epochs = work.epochs
    if epochs == 0:
        return
    data = bench.data
    if bench.keep == "last" and work.rung is Rung.FULL:
        data = data.learning_select()
        found.notes.append(
            "the select split, which the original has seen and which chooses nothing, is learnt from too"
        )
    tuned = train(
        network,
        bench.original,
        data,
        bench.spec.fine_tune,
        epochs=epochs,
        seed=_seed(bench.spec.search.seed, work.number, work.rung),
        metric=bench.metric,
        runtime=bench.runtime,
        checkpoint=checkpoint,
        rate_scale=float(work.params.get(LEARNING_RATE_SCALE, 1.0)),
        save=out / "checkpoint.safetensors" if save else None,
        saved=save,
        report=lambda message, done, _: bench.report(message, done, epochs),
        reference=bench.reference if bench.relative else None,
        keep=bench.keep,
    )
    found.curve, found.epochs, found.outcome = tuned.curve, tuned.epochs, tuned.outcome
    found.epoch_seconds = tuned.epoch_seconds
    found.notes += tuned.notes
    found.seen = bench.select(network)


def _measure(bench: Bench, work: TrialWork, network: nn.Module, found: _Findings) -> None:
    if Cost.LATENCY in bench.spec.minimize or work.rung is Rung.FULL:
        took = measure_latency(bench, as_shipped(bench, network))
        update = {"latency_ms": took.compressed_ms, "dense_latency_ms": took.dense_ms, "latency_noise": took.noise}
        found.costs = found.costs.model_copy(update=update)


def _result(bench: Bench, work: TrialWork, found: _Findings, began: float, network: nn.Module | None) -> TrialResult:
    value: float | None = None
    if found.seen is not None and found.outcome in (Outcome.OK, Outcome.DIVERGED):
        if found.seen.finite:
            value = found.seen.value
        else:
            found.outcome = Outcome.NON_FINITE
    checked: dict[str, object] = {}
    if work.rung is Rung.FULL and value is not None and network is not None:
        bench.report("checking on the verify split", 0, 1)
        checked = verified(bench, network)
    return TrialResult(
        rung=work.rung,
        outcome=found.outcome,
        value=value,
        drop=None if value is None else drop(bench.metric, bench.on_select.value, value),
        loss=None if value is None or found.seen is None else found.seen.loss,
        costs=found.costs,
        seconds=time.monotonic() - began,
        epochs=found.epochs,
        epoch_seconds=found.epoch_seconds,
        curve=found.curve,
        notes=tuple(found.notes),
        left_dense=found.left_dense,
        **checked,  # type: ignore[arg-type]
    )


def verified(bench: Bench, network: nn.Module) -> dict[str, object]:
    """The check on data that nothing was chosen on."""
    original, seen = bench.on_verify, bench.verify(network)
    if not seen.finite:
        return {"keeps_budget": False}
    lost = drop(bench.metric, original.value, seen.value)
    interval: Interval | None = None
    decisive = lost
    if len(seen.scores) > 1:
        interval = paired_interval(bench.metric, original.scores, seen.scores)
        if bench.spec.budget.confidence is not None:
            level = bench.spec.budget.confidence
            decisive = paired_interval(bench.metric, original.scores, seen.scores, level).high
    allowed = allowed_drop(bench.spec.budget, bench.metric, original.value)
    return {
        "verify_value": seen.value,
        "verify_drop": lost,
        "verify_interval": interval,
        "keeps_budget": decisive <= allowed + 1e-9,  # a drop of exactly the budget keeps it, whatever the rounding
    }


def _out_of_memory(bench: Bench, work: TrialWork, found: _Findings, began: float, error: BaseException) -> TrialResult:
    found.outcome = Outcome.OUT_OF_MEMORY
    found.notes.append(str(error).split("\n")[0][:300])
    return _result(bench, work, found, began, None)


def _seed(seed: int, number: int, rung: Rung) -> int:
    digest = hashlib.sha256(f"{seed}/{number}/{rung}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % SEED_RANGE
