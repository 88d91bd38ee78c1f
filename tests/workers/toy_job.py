"""A real compute process that plays a whole job in no time: no torch, a network of three layers that exists on paper.

A trial's drop grows with what its plan removes, so the search has something to find. ``control.json`` beside the
scratch folders tells it to last (``steps``), to fail, or to find the disk full (``full_disk``: in which operation).
"""

import json
import sys
import time
from pathlib import Path

from search.errors import BadModel
from search.spec import (
    Costs,
    CurvePoint,
    DataInfo,
    LayerInfo,
    Metric,
    ModelInfo,
    Profile,
    Rung,
    SiteChoice,
    SplitSizes,
    Task,
    TensorInfo,
    TrialRecord,
    TrialResult,
    TrialWork,
)
from workers import jail
from workers.serve import serve

SITES = {"a": (64, 64), "b": (128, 64), "c": (64, 32)}
CONTROL = Path(sys.argv[sys.argv.index("--scratch") + 1]).parent / "control.json"


def control():
    return json.loads(CONTROL.read_text()) if CONTROL.exists() else {}


def dense(site):
    rows, columns = SITES[site]
    return rows * columns


def tensor(name, shape, dtype="float32"):
    return TensorInfo(name=name, dtype=dtype, shape=shape)


def inspect_model(arguments, context):
    content = context.there(arguments["model"]).read_bytes()
    if not content.startswith(b"toy"):
        raise BadModel("not_a_model", f"got {content[:10]!r}: send a toy")
    layers = tuple(
        LayerInfo(
            name=s,
            kind="Linear",
            weight=SITES[s],
            output=(SITES[s][0],),
            parameters=dense(s),
            macs=dense(s),
            compressible=True,
        )
        for s in SITES
    )
    total = sum(map(dense, SITES))
    return ModelInfo(
        format="pt2",
        inputs=(tensor("x", (None, 64)),),
        outputs=(tensor("y", (None, 10)),),
        layers=layers,
        parameters=total,
        macs=total,
        bytes=4 * total,
    ).model_dump(mode="json")


def inspect_data(arguments, context):
    return DataInfo(
        format="npz",
        task=Task.CLASSIFICATION,
        inputs=(tensor("x", (None, 64)),),
        target=tensor("y", (None,), "int64"),
        classes=10,
        splits=SplitSizes(train=100, select=50, verify=50),
    ).model_dump(mode="json")


def open_job(arguments, context):
    context.session = arguments
    return {}


def write(operation, path, content):
    """Half of it, where the disk is full; the error is the kernel's own."""
    full = control().get("full_disk") == operation
    path.write_bytes(content[: len(content) // 2] if full else content)
    if full:
        Path("/dev/full").write_bytes(content)


def points(site):
    rows, columns = SITES[site]
    full = min(rows, columns)
    ranks = [r for r in range(1, full) if r * (rows + columns) < dense(site)]
    return tuple(
        CurvePoint(
            ranks=(r,), parameters=r * (rows + columns), macs=r * (rows + columns), error=((full - r) / full) ** 3
        )
        for r in ranks
    )


def costs_of(parameters):
    return Costs(parameters=parameters, macs=parameters, bytes=4 * parameters)


def profile(arguments, context):
    if control().get("refuse_profile"):
        raise BadModel("toy_profile", "this toy cannot be profiled: send another")
    write("profile", context.there("statistics"), b"moments")
    sites = tuple(
        SiteChoice(site=s, dense_parameters=dense(s), dense_macs=dense(s), curves={"svd": points(s)}) for s in SITES
    )
    total = sum(map(dense, SITES))
    return Profile(
        stage=arguments["stage"],
        metric=Metric.ACCURACY,
        value=0.9,
        verify_value=0.9,
        max_drop=context.session["spec"]["budget"]["max_drop"],
        costs=costs_of(total),
        sites=sites,
        seconds=0.01,
    ).model_dump(mode="json")


def measured(plan, rung, out):
    left, error = 0, 0.0
    for site in SITES:
        if site in plan:
            point = next(p for p in points(site) if p.ranks == tuple(plan[site]["ranks"]))
            left, error = left + point.parameters, error + point.error
        else:
            left += dense(site)
    drop = 0.02 * error * (1.0 if rung is Rung.CHEAP else 0.3)
    weights = out / "weights.safetensors"
    write("trial", weights, json.dumps(plan).encode())
    return TrialResult(
        rung=rung,
        value=0.9 - drop,
        drop=drop,
        costs=costs_of(left),
        seconds=0.01,
        verify_value=0.9 - drop if rung is Rung.FULL else None,
        verify_drop=drop if rung is Rung.FULL else None,
        keeps_budget=drop <= 0.01 if rung is Rung.FULL else None,
    )


def wait_and_checkpoint(context, checkpoint, out):
    """As long as the test wants, a checkpoint at each step; goes on where the checkpoint was."""
    at = int(checkpoint.read_text()) if checkpoint else 0
    for step in range(at, control().get("steps", 0)):
        context.report(f"step {step}", step, control().get("steps", 0))
        saved = out / "checkpoint"
        saved.write_text(str(step + 1))
        context.checkpoint(saved)
        time.sleep(0.1)
    with (CONTROL.parent / "log.txt").open("a") as log:
        log.write(f"resumed at {at}\n")


def trial(arguments, context):
    work = TrialWork.model_validate(arguments["work"])
    out = context.folder(arguments["out"])
    wait_and_checkpoint(context, context.perhaps(arguments["checkpoint"]), out)
    result = measured({k: v.model_dump(mode="json") for k, v in work.plan.items()}, work.rung, out)
    name = str((out / "weights.safetensors").relative_to(context.scratch))
    return {"result": result.model_dump(mode="json"), "weights": name}


def refine(arguments, context):
    record = TrialRecord.model_validate(arguments["record"])
    out = context.folder(arguments["out"])
    result = measured({k: v.model_dump(mode="json") for k, v in record.plan.items()}, Rung.FULL, out)
    return {
        "result": result.model_dump(mode="json"),
        "weights": str((out / "weights.safetensors").relative_to(context.scratch)),
    }


def export(arguments, context):
    out = context.folder(arguments["out"])
    (out / "report.json").write_text(json.dumps({"number": arguments["record"]["number"]}))
    return [{"format": "report", "filename": "report.json"}]


OPERATIONS = {
    "inspect_model": inspect_model,
    "inspect_data": inspect_data,
    "open": open_job,
    "profile": profile,
    "trial": trial,
    "refine": refine,
    "export": export,
}

if __name__ == "__main__":
    if control().get("no_jail"):  # a kernel without Landlock, as far as this process can tell
        jail.available = lambda: {"landlock": False, "seccomp": True, "rlimits": True}
    serve(OPERATIONS, prepare=lambda: None)
