"""The ``tenfold`` command. ``--json`` prints what the API answered; exit codes are documented in ``--help``."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .client import Client
from .command_line import in_range, job_fields, json_object, read_spec
from .errors import (
    APIError,
    ConnectionFailed,
    JobFailed,
    NotAllowed,
    NotAuthenticated,
    Rejected,
    TenfoldError,
    WaitTimeout,
)
from .progress import before_and_after, figures, watch
from .resources import Job

__all__ = ["main"]

EXIT_CODES = """
Exit codes: 0 done · 1 the job failed or was cancelled · 2 wrong use · 3 the model or data was refused · \
4 no or a wrong key · 5 no answer from the service · 6 the service said no · 7 time-out (the job goes on)
"""

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Make trained networks small.", epilog=EXIT_CODES)
keys_app = typer.Typer(no_args_is_help=True, help="API keys (needs an admin key).")
app.add_typer(keys_app, name="keys")

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
out = Console()
err = Console(stderr=True)


@contextmanager
def _client() -> Iterator[Client]:
    with Client() as client:
        yield client


def _print(as_json: bool, data: Any, human: Callable[[], None]) -> None:
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
    else:
        human()


def _submit(model: Path, data: Path, options: dict[str, Any], client: Client) -> Job:
    err.print(f"uploading {model.name} and {data.name} to {client.base_url}")
    return client.submit(model, data, **options)


@contextmanager
def _usage(option: str | None = None) -> Iterator[None]:
    """What is wrong with an option ends the command as wrong use."""
    try:
        yield
    except ValueError as e:
        raise typer.BadParameter(str(e), param_hint=option) from e


def _number(**bounds: float) -> Callable[[float | None], float | None]:
    def check(value: float | None) -> float | None:
        with _usage():
            return None if value is None else in_range(value, **bounds)

    return check


Model = Annotated[
    Path,
    typer.Argument(
        exists=True, dir_okay=False, help="A .pt2 file (see `tenfold.export`), or weights with --architecture."
    ),
]
Data = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help=".npz, .safetensors, .parquet, .zip or .tar")]
MaxDrop = Annotated[
    float | None,
    typer.Option(callback=_number(least=0), help="What may be lost, in the metric's units: 0.005 = half a point."),
]
MinValue = Annotated[
    float | None, typer.Option(callback=_number(), help="Instead of --max-drop: the value that must be kept.")
]
Metric = Annotated[
    str | None, typer.Option(help="accuracy, top5, mse, output_error, agreement, miou, pixel_accuracy or pck.")
]
Minimize = Annotated[list[str] | None, typer.Option(help="parameters, macs, bytes, latency; may be repeated.")]
Trials = Annotated[int | None, typer.Option(min=1, help="Candidates to try.")]
Storage = Annotated[
    list[str] | None, typer.Option(help="float16, int8: also files with weights in fewer bits; may be repeated.")
]
Epochs = Annotated[
    float | None,
    typer.Option(
        callback=_number(least=0),
        help="Epochs of the final fine-tuning (default: what --hours leave time for, else 10); 0 trains nothing.",
    ),
]
Hours = Annotated[
    float | None, typer.Option(callback=_number(above=0), help="Wall-clock time for search and fine-tuning.")
]
Spec = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="JSON with fields of the job's spec, such as methods, layers and fine_tune; options win over it.",
    ),
]
Architecture = Annotated[
    str | None, typer.Option(help='Of weights alone: resnet20_cifar10, …, or JSON: {"name": …, "options": {…}}')
]
DataSpec = Annotated[
    str, typer.Option(help='JSON: {"task": "segmentation", "transform": {"scale": …, "mean": …, "std": …}}')
]


def _options(
    max_drop: float | None,
    min_value: float | None,
    metric: str | None,
    minimize: list[str] | None,
    trials: int | None,
    epochs: float | None,
    hours: float | None,
    storage: list[str] | None,
    spec: Path | None,
    architecture: str | None,
    data_spec: str,
) -> dict[str, Any]:
    with _usage("--spec"):
        given = read_spec(spec) if spec else {}
    with _usage():
        fields = job_fields(
            given,
            budget={"max_drop": max_drop, "min_value": min_value, "metric": metric},
            minimize=minimize,
            storage=storage,
            search={"trials": trials, "hours": hours},
            fine_tune={"epochs": epochs},
        )
    with _usage("--data-spec"):
        data = json_object(data_spec)
    return {**fields, "architecture": _architecture(architecture), "data_spec": data}


def _architecture(text: str | None) -> dict[str, Any] | None:
    if text is None or not text.startswith("{"):
        return None if text is None else {"name": text}
    with _usage("--architecture"):
        return json_object(text)


@app.command()
def submit(
    model: Model,
    data: Data,
    max_drop: MaxDrop = None,
    min_value: MinValue = None,
    metric: Metric = None,
    minimize: Minimize = None,
    trials: Trials = None,
    epochs: Epochs = None,
    hours: Hours = None,
    storage: Storage = None,
    spec: Spec = None,
    architecture: Architecture = None,
    data_spec: DataSpec = "{}",
    as_json: Json = False,
) -> None:
    """Upload and start a search; returns at once."""
    options = _options(
        max_drop, min_value, metric, minimize, trials, epochs, hours, storage, spec, architecture, data_spec
    )
    with _client() as client:
        job = _submit(model, data, options, client)
        _print(as_json, job.data, lambda: out.print(f"{job.id}\nfollow it: tenfold watch {job.id}", highlight=False))


@app.command()
def compress(
    model: Model,
    data: Data,
    to: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")],
    max_drop: MaxDrop = None,
    min_value: MinValue = None,
    metric: Metric = None,
    minimize: Minimize = None,
    trials: Trials = None,
    epochs: Epochs = None,
    hours: Hours = None,
    storage: Storage = None,
    spec: Spec = None,
    architecture: Architecture = None,
    data_spec: DataSpec = "{}",
    as_json: Json = False,
) -> None:
    """Upload, search, watch and download, in one go."""
    options = _options(
        max_drop, min_value, metric, minimize, trials, epochs, hours, storage, spec, architecture, data_spec
    )
    with _client() as client:
        job = watch(_submit(model, data, options, client), console=err)
        _finish(job, to, as_json)


def _finish(job: Job, to: Path, as_json: bool, trial: int | None = None) -> None:
    """Download a finished job's files and say what came of it; raises ``JobFailed``."""
    job.wait()
    files = job.download(to, trial=trial)
    best = job.data.get("best")

    def human() -> None:
        if trial is None and best and job.data.get("baseline"):
            out.print(before_and_after(job["baseline"], best))
        out.print(f"{len(files)} files in {to}", highlight=False)

    _print(as_json, {**job.data, "files": [str(f) for f in files]}, human)


@app.command(name="watch")
def watch_command(
    job: str,
    timeout: Annotated[float | None, typer.Option(callback=_number(least=0), help="Seconds.")] = None,
    as_json: Json = False,
) -> None:
    """Follow a job until it ends."""
    with _client() as client:
        found = watch(client.job(job), console=err, timeout=timeout)
        _print(as_json, found.data, lambda: None)
        found.wait()


@app.command()
def jobs(as_json: Json = False) -> None:
    """Your jobs, newest first."""
    with _client() as client:
        found = [j.data for j in client.jobs()]

    def human() -> None:
        table = Table("job", "name", "state", "best", show_edge=False)
        for j in found:
            best = figures(j["best"], j.get("baseline")) if j.get("best") else "–"
            table.add_row(str(j["id"]), str(j["name"]), str(j["state"]), best)
        out.print(table if found else "no jobs yet: tenfold submit MODEL DATA --max-drop 0.005")

    _print(as_json, found, human)


@app.command()
def trials(job: str, as_json: Json = False) -> None:
    """Every candidate of a job."""
    with _client() as client:
        found = client.job(job).trials()

    def human() -> None:
        table = Table("#", "stage", "rung", "state", "value", "drop", "parameters", "MACs", show_edge=False)
        for t in found:
            r = t.get("result") or {}
            costs = r.get("costs") or {}
            table.add_row(
                str(t["number"]),
                str(t["stage"]),
                str(t["rung"]),
                str(t["state"]),
                *(f"{r[k]:.4f}" if r.get(k) is not None else "–" for k in ("value", "drop")),
                *(f"{costs[k]:,}" if costs.get(k) else "–" for k in ("parameters", "macs")),
            )
        out.print(table)

    _print(as_json, found, human)


@app.command()
def front(
    job: str,
    plot: Annotated[Path | None, typer.Option(help="Save a picture too: front.png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """The trade-off front of a job."""
    with _client() as client:
        found = client.job(job)
        points = found.front
        if plot:
            found.plot(plot)

    def human() -> None:
        table = Table("trial", "rung", "value", "drop", "parameters", "MACs", show_edge=False)
        for p in points:
            table.add_row(
                str(p["trial"]),
                str(p["rung"]),
                *(f"{p[k]:.4f}" if p.get(k) is not None else "–" for k in ("value", "drop")),
                f"{p['costs']['parameters']:,}",
                f"{p['costs']['macs']:,}",
            )
        out.print(table)

    _print(as_json, points, human)


@app.command()
def download(
    job: str,
    to: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")],
    trial: Annotated[int | None, typer.Option(min=0, help="Another point than the best: see `tenfold export`.")] = None,
    as_json: Json = False,
) -> None:
    """Download the best network's files, checked against their SHA-256; waits for a job that still runs."""
    with _client() as client:
        _finish(client.job(job), to, as_json, trial)


@app.command()
def cancel(job: str, as_json: Json = False) -> None:
    """Stop a job; what it found stays."""
    _steer(job, as_json, lambda found: found.cancel())


@app.command()
def pause(job: str, as_json: Json = False) -> None:
    """Let running trials finish and start no new one."""
    _steer(job, as_json, lambda found: found.pause())


@app.command()
def resume(job: str, as_json: Json = False) -> None:
    """Go on where it was paused."""
    _steer(job, as_json, lambda found: found.resume())


@app.command()
def extend(
    job: str,
    more: Annotated[int, typer.Option("--trials", min=1, help="Candidates to add.")],
    hours: Annotated[
        float | None, typer.Option(callback=_number(above=0), help="Hours to add, where the job has a limit of them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """More candidates for a job that is done or has failed."""
    _steer(job, as_json, lambda found: found.extend(more, hours=hours))


@app.command()
def export(job: str, trial: Annotated[int, typer.Argument(min=0)], as_json: Json = False) -> None:
    """Make files of one more trial; `tenfold download JOB --trial N` fetches them."""
    _steer(job, as_json, lambda found: found.export(trial))


def _steer(id: str, as_json: bool, action: Callable[[Job], Job]) -> None:
    with _client() as client:
        job = action(client.job(id))
        _print(as_json, job.data, lambda: out.print(f"{job.state}: tenfold watch {id}", highlight=False))


@keys_app.command("list")
def keys_list(as_json: Json = False) -> None:
    """All keys (never their secrets)."""
    with _client() as client:
        found = client.keys()

    def human() -> None:
        table = Table("id", "owner", "name", "scopes", show_edge=False)
        for k in found:
            table.add_row(str(k["id"]), str(k["owner"]), str(k["name"]), " ".join(k["scopes"]))
        out.print(table)

    _print(as_json, found, human)


@keys_app.command("create")
def keys_create(
    name: str,
    scope: Annotated[list[str] | None, typer.Option(help="read, submit, admin; may be repeated.")] = None,
    owner: Annotated[str | None, typer.Option(help="Whose things the key sees.")] = None,
    as_json: Json = False,
) -> None:
    """A new key; the secret is printed once."""
    with _client() as client:
        key = client.create_key(name, scopes=scope or ["read", "submit"], owner=owner)
        _print(as_json, key, lambda: out.print(str(key["secret"]), highlight=False))


@keys_app.command("revoke")
def keys_revoke(key: str) -> None:
    """A revoked key stops working at once."""
    with _client() as client:
        client.revoke_key(key)


_EXITS: tuple[tuple[type[TenfoldError], int], ...] = (
    (JobFailed, 1),
    (Rejected, 3),
    (NotAuthenticated, 4),
    (NotAllowed, 4),
    (ConnectionFailed, 5),
    (APIError, 6),
    (WaitTimeout, 7),
)


def main() -> None:
    """Entry point: errors become one line on stderr and an exit code."""
    try:
        app()
    except TenfoldError as e:
        err.print(f"[bold red]tenfold:[/] {e}", highlight=False, soft_wrap=True)
        sys.exit(next((code for kind, code in _EXITS if isinstance(e, kind)), 6))
