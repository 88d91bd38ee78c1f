"""The facade that a compute process works through: one job's model and data, opened once, and what is asked of them."""

import hashlib
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from search import baseline, cost, export, profiling, reload, trial
from search.bench import Bench, Report, read_weights
from search.data import fitted, read_data
from search.errors import BadRequest
from search.intake import first_output, last_output, load_model
from search.layers import describe, layer_table
from search.spec import (
    Costs,
    DataInfo,
    DataSpec,
    ExportFormat,
    JobSpec,
    LayerInfo,
    ModelInfo,
    Plan,
    Profile,
    Rung,
    SitePlan,
    Storage,
    Task,
    TrialRecord,
    TrialResult,
    TrialWork,
    entry_of,
)
from search.surgery import dense_of
from search.tune import Runtime, epoch_seconds
from tenfold.layers import JointLayer

__all__ = ["Session", "inspect_data", "inspect_model"]

VERSIONS = ("tenfold-server", "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "optuna")


def inspect_model(path: Path, format: str, architecture: dict[str, Any] | None, scratch: Path) -> ModelInfo:
    """What an uploaded model is. Raises BadModel or Refused."""
    return describe(load_model(path, format=format, architecture=architecture, scratch=_made(scratch)))


def inspect_data(path: Path, spec: DataSpec, scratch: Path) -> DataInfo:
    """What an uploaded data set is. Raises BadData."""
    return read_data(path, spec, scratch=_made(scratch)).info


class Session:
    """A job as seen by one process.

    Raises on opening: BadModel, BadData (also when the data does not fit the model), BadRequest (a metric that the
    task does not allow, an unknown method). ``report(message, done, of)`` is told of progress; ``latency_lock`` is
    a descriptor of the host's lock file; ``save`` is told of each checkpoint file of a fine-tuning.
    """

    def __init__(
        self,
        model_path: Path,
        data_path: Path,
        *,
        model_format: str = "auto",
        architecture: dict[str, Any] | None = None,
        data_spec: DataSpec,
        spec: JobSpec,
        scratch: Path,
        report: Report | None = None,
        latency_lock: int | None = None,
        save: Callable[[Path], None] | None = None,
        device: str | None = None,
    ) -> None:
        lifted = load_model(
            model_path, format=model_format, architecture=architecture, scratch=_made(scratch / "model")
        )
        lifted.module.eval()
        data = fitted(read_data(data_path, data_spec, scratch=_made(scratch / "data")), describe(lifted))
        self._inputs = {"model sha256": _sha256(model_path), "data sha256": _sha256(data_path)}
        self._data_spec, self._save = data_spec, save
        self._layers: tuple[LayerInfo, ...] | None = None
        runtime = Runtime(
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            fixed_batch=lifted.batch if isinstance(lifted.batch, int) else None,
            answer=last_output if data.task is Task.KEYPOINTS else first_output,
            latency_lock=latency_lock,
        )
        metric = baseline.metric_of(spec.budget, data.task)
        self.bench = Bench(lifted, data, spec, metric, runtime, report or _silent, scratch)
        profiling.methods_of(self.bench)

    def profile(self, stage: int, parent: Path | None) -> Profile:
        """Measure the network that a stage starts from. ``parent``: its weights; None: the original.

        Raises BadBaseline when the original does not behave as promised, BadRequest when nothing may change.
        """
        began = time.monotonic()
        bench, budget = self.bench, self.bench.spec.budget
        if stage > 0 and parent is None:
            raise BadRequest("lost_reference", f"stage {stage} needs the weights of the network that it starts from")
        bench.report("measuring the original", 0, 1)
        original = bench.on_select
        blind = baseline.blind_value(bench.metric, bench.data.select.targets())
        baseline.check_baseline(budget, bench.metric, original, bench.on_verify, blind)
        start: nn.Module = bench.original
        held: Plan = {}
        value = original.value
        if parent is not None:
            compressed, held = read_weights(bench.original, parent)
            value = bench.select(compressed).value
            start = dense_of(compressed)
        sites, groups = profiling.measure_sites(bench, self._layer_table(), start, held)
        parameters, macs, stored = bench.original_costs
        dense_ms = trial.measure_latency(bench, bench.original).dense_ms
        return Profile(
            stage=stage,
            metric=bench.metric,
            value=value,
            verify_value=bench.on_verify.value,
            max_drop=max(0.0, baseline.allowed_drop(budget, bench.metric, original.value)),
            costs=Costs(parameters=parameters, macs=macs, bytes=stored, latency_ms=dense_ms, dense_latency_ms=dense_ms),
            sites=sites,
            groups=groups,
            seconds=time.monotonic() - began,
            notes=tuple(n for n in (bench.seen_before,) if n),
            epoch_seconds=self._epoch_seconds(),
        )

    def trial(
        self,
        work: TrialWork,
        profile: Profile,
        parent: Path | None,
        weights: Path | None,
        checkpoint: Path | None,
        out: Path,
    ) -> TrialResult:
        """Carry out one rung of one candidate; see ``search.trial.run``."""
        return trial.run(
            self.bench, work, parent=parent, weights=weights, checkpoint=checkpoint, out=out, save=self._save
        )

    def refine(
        self,
        record: TrialRecord,
        epochs: float,
        profile: Profile,
        parent: Path | None,
        weights: Path | None,
        checkpoint: Path | None,
        out: Path,
    ) -> TrialResult:
        """The full recipe for a candidate, and its check on the verify split."""
        work = TrialWork(
            number=record.number,
            stage=record.stage,
            parent=record.parent,
            params=record.params,
            plan=record.plan,
            rung=Rung.FULL,
            epochs=epochs,
        )
        return self.trial(work, profile, parent, weights, checkpoint, out)

    def export(
        self,
        record: TrialRecord,
        weights: Path | None,
        profile: Profile,
        out: Path,
        *,
        parent: Path | None = None,
        front: Sequence[TrialRecord] = (),
    ) -> list[dict[str, Any]]:
        """Write the job's formats of one candidate into ``out``: ``[{"format", "filename", "facts"}]``.

        ``weights``: the candidate's; None builds it anew (from ``parent`` at a later stage). ``front``: what the
        report draws around it. Beside loadable files lie ``check.npz`` and ``reload.py``, which measure them again.
        """
        bench, formats = self.bench, self.bench.spec.export
        out.mkdir(parents=True, exist_ok=True)
        if weights is None:
            network, plan = trial.build(bench, record.plan, parent), record.plan
        else:
            network, plan = read_weights(bench.original, weights)
        network = trial.as_shipped(bench, network)
        checked = trial.verified(bench, network)
        facts = self._facts(record, network, checked, plan, front)
        rounded = export.round_weights(network, bench.lifted, bench.spec.storage)
        if rounded:
            stored = [_stored(storage, trial.verified(bench, module)) for storage, module in rounded.items()]
            facts["storage"] = [_stored("float32", checked), *stored]
        bench.report("writing files", 0, 1)
        files = export.export_all(network, bench.original, plan, bench.lifted, out, formats, facts, rounded)
        if ExportFormat.PT2 in formats or ExportFormat.ONNX in formats:
            files.append(self._write_check(network, rounded, out / "check.npz"))
            files.append(Path(shutil.copyfile(reload.__file__, out / "reload.py")))
        measured = {key: facts["after"][key] for key in ("verify_value", "latency_ms")}
        return [
            {
                "format": _format(file).value,
                "filename": file.name,
                "facts": {} if file.stem.startswith("model-") else measured,
            }
            for file in files
        ]

    # ------------------------------------------------------------------------------------------------ pieces

    def _epoch_seconds(self) -> float:
        bench = self.bench
        if not bench.spec.fine_tune.trains:
            return 0.0
        bench.report("timing a step of training", 0, 1)
        return epoch_seconds(bench.original, bench.data, bench.spec.fine_tune, bench.runtime)

    def _layer_table(self) -> tuple[LayerInfo, ...]:
        if self._layers is None:
            self._layers = layer_table(self.bench.lifted)
        return self._layers

    def _write_check(self, network: nn.Module, rounded: Mapping[Storage, nn.Module], path: Path) -> Path:
        bench = self.bench
        return export.write_check(
            network,
            bench.data.verify,
            bench.metric,
            path,
            reference=bench.original if bench.relative else None,
            rounded=rounded,
            fixed_batch=bench.runtime.fixed_batch,
            answer=bench.runtime.answer,
        )

    def _facts(
        self,
        record: TrialRecord,
        network: nn.Module,
        checked: Mapping[str, object],
        plan: Plan,
        front: Sequence[TrialRecord],
    ) -> dict[str, Any]:
        """Everything that the report says. ``checked``: the network, as ``trial.verified`` tells."""
        bench = self.bench
        parameters, macs, stored = bench.original_costs
        now = cost.count(network, bench.example)
        took = trial.measure_latency(bench, network)
        full = record.results.get(Rung.FULL)
        last = full or record.results.get(record.rung)
        return {
            "before": {
                "value": bench.on_select.value,
                "verify_value": bench.on_verify.value,
                "parameters": parameters,
                "macs": macs,
                "bytes": stored,
                "latency_ms": took.dense_ms,
            },
            "after": {
                "value": bench.select(network).value,
                "verify_value": checked.get("verify_value"),
                "parameters": now.parameters,
                "macs": now.macs,
                "bytes": now.bytes,
                "latency_ms": took.compressed_ms,
            },
            "latency_batch": bench.latency_batch,
            "budget": {
                "metric": bench.metric.value,
                "max_drop": baseline.allowed_drop(bench.spec.budget, bench.metric, bench.on_verify.value),
                "verify_drop": checked.get("verify_drop") if full else None,
                "verify_interval": full.verify_interval.model_dump() if full and full.verify_interval else None,
                "keeps_budget": full.keeps_budget if full else None,
            },
            "trial": record.model_dump(mode="json", include={"number", "stage", "parent", "params", "rung"}),
            "layers": self._layer_facts(network, plan),
            "front": [_point(r) for r in front if r.results.get(r.rung) is not None],
            "curve": [r.model_dump() for r in last.curve] if last else [],
            "notes": [*(last.notes if last else ()), *bench.data.info.notes, *bench.lifted.skipped],
            "inputs": self._inputs,
            "seeds": {"search": bench.spec.search.seed, "data": self._data_spec.seed},
            "versions": _versions(),
            "request": {
                "job": bench.spec.model_dump(mode="json"),
                "data": self._data_spec.model_dump(mode="json"),
            },
        }

    def _layer_facts(self, network: nn.Module, plan: Plan) -> list[dict[str, Any]]:
        facts, counted = [], set[int]()
        for layer in self._layer_table():
            module = network.get_submodule(layer.name)
            changed = entry_of(plan, layer.name)
            facts.append(
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "method": changed.method if changed else None,
                    "ranks": list(changed.ranks) if changed else [],
                    "together": len(changed.members) if changed else 0,
                    "dense_parameters": layer.parameters,
                    "parameters": _own_parameters(module, changed, counted),
                }
            )
        return facts


def _stored(storage: str, checked: Mapping[str, object]) -> dict[str, Any]:
    return {"weights": storage, **{k: checked.get(k) for k in ("verify_value", "verify_drop", "keeps_budget")}}


def _format(file: Path) -> ExportFormat:
    """Of a file of an export; the plan goes with the weights, whatever else there is with the report."""
    suffix = file.suffix.removeprefix(".")
    if suffix in ("pt2", "onnx", "safetensors"):
        return ExportFormat(suffix)
    return ExportFormat.SAFETENSORS if file.name == "plan.json" else ExportFormat.REPORT


def _own_parameters(module: nn.Module, entry: SitePlan | None, counted: set[int]) -> int:
    """Of a layer, without those of a weight or of factors that are ``counted``, to which it adds its own.

    Of one whose place in a grid mixes shared factors, its equal part of those (the first takes the remainder), and its
    bias.
    """
    if not isinstance(module, JointLayer) or entry is None:
        own = {id(p): p.numel() for p in module.parameters() if id(p) not in counted}
        counted.update(own)
        return sum(own.values())
    shared, count = cost.parameters(module.shared), len(entry.members)
    part = shared // count + (shared % count if not any(module.at) else 0)
    return part + cost.parameters(module) - shared


def _point(record: TrialRecord) -> Mapping[str, Any]:
    result = record.results[record.rung]
    return {
        "number": record.number,
        "rung": record.rung.value,
        "value": result.value,
        "parameters": result.costs.parameters,
        "macs": result.costs.macs,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _silent(message: str, done: float, of: float) -> None:
    return None
