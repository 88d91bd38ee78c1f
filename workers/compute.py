"""The compute process: torch lives here, in a jail, and nowhere else. Run as ``python -m workers.compute``.

It never sees the database, the broker or the network: what it needs lies in its scratch folder, what it makes it
leaves there, and the worker that supervises it moves both. It is kept for a job, so that the model, the data and the
statistics are read once. Each operation is a thin shell around ``search.session``: arguments and results are JSON,
files are named relative to the scratch folder.
"""

from collections.abc import Callable, Mapping
from typing import Any

from search.spec import DataSpec, JobSpec, Profile, RefineWork, TrialRecord, TrialResult, TrialWork
from workers.serve import Context, Operation, serve

__all__ = ["OPERATIONS"]

Arguments = Mapping[str, Any]


def prepare() -> None:
    import search.session  # noqa: F401


def inspect_model(arguments: Arguments, context: Context) -> Any:
    from search import session

    path, folder = context.there(arguments["model"]), context.folder("inspect")
    return session.inspect_model(path, arguments["format"], arguments["architecture"], folder).model_dump(mode="json")


def inspect_data(arguments: Arguments, context: Context) -> Any:
    from search import session

    path, spec = context.there(arguments["data"]), DataSpec.model_validate(arguments["spec"])
    return session.inspect_data(path, spec, context.folder("inspect")).model_dump(mode="json")


def open_job(arguments: Arguments, context: Context) -> Any:
    """Read the job's model and data; every later operation of this process is about that job."""
    from search import session

    context.session = session.Session(
        context.there(arguments["model"]),
        context.there(arguments["data"]),
        model_format=arguments["format"],
        architecture=arguments["architecture"],
        data_spec=DataSpec.model_validate(arguments["data_spec"]),
        spec=JobSpec.model_validate(arguments["spec"]),
        scratch=context.folder("session"),
        report=context.report,
        latency_lock=context.latency_lock,
        save=context.checkpoint,
    )
    return {}


def profile(arguments: Arguments, context: Context) -> Any:
    found: Profile = context.session.profile(arguments["stage"], context.perhaps(arguments["parent"]))
    return found.model_dump(mode="json")


def trial(arguments: Arguments, context: Context) -> Any:
    work = TrialWork.model_validate(arguments["work"])
    return _measured(lambda *given: context.session.trial(work, *given), arguments, context)


def refine(arguments: Arguments, context: Context) -> Any:
    record, work = TrialRecord.model_validate(arguments["record"]), RefineWork.model_validate(arguments["work"])
    return _measured(lambda *given: context.session.refine(record, work.epochs, *given), arguments, context)


def export(arguments: Arguments, context: Context) -> Any:
    return context.session.export(
        TrialRecord.model_validate(arguments["record"]),
        context.perhaps(arguments["weights"]),
        Profile.model_validate(arguments["profile"]),
        context.folder(arguments["out"]),
        parent=context.perhaps(arguments["parent"]),
        front=[TrialRecord.model_validate(record) for record in arguments["front"]],
    )


def _measured(run: Callable[..., TrialResult], arguments: Arguments, context: Context) -> Any:
    out = context.folder(arguments["out"])
    result = run(
        Profile.model_validate(arguments["profile"]),
        context.perhaps(arguments["parent"]),
        context.perhaps(arguments["weights"]),
        context.perhaps(arguments["checkpoint"]),
        out,
    )
    weights = out / "weights.safetensors"
    name = str(weights.relative_to(context.scratch)) if weights.exists() else None
    return {"result": result.model_dump(mode="json"), "weights": name}


OPERATIONS: dict[str, Operation] = {
    "inspect_model": inspect_model,
    "inspect_data": inspect_data,
    "open": open_job,
    "profile": profile,
    "trial": trial,
    "refine": refine,
    "export": export,
}

if __name__ == "__main__":
    serve(OPERATIONS, prepare)
