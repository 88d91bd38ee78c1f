"""``Client`` and ``AsyncClient``: the whole service from Python. No torch is needed to submit, watch and download."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ._drivers import AsyncDriver, Driver
from ._files import Progress, sent
from ._operations import Async, Pages, Sync, listing, operation
from ._wire import Connection, Steps, call, fetch, send
from .resources import (
    Artifact,
    ArtifactOperations,
    AsyncArtifact,
    AsyncDataset,
    AsyncJob,
    AsyncModel,
    Dataset,
    DatasetOperations,
    Job,
    JobOperations,
    Model,
    ModelOperations,
)

if TYPE_CHECKING:
    from typing import Self

    import torch

__all__ = ["AsyncClient", "Client"]

J = TypeVar("J", bound=JobOperations[Any])
M = TypeVar("M", bound=ModelOperations)
D = TypeVar("D", bound=DatasetOperations)
A = TypeVar("A", bound=ArtifactOperations)


class Operations(Generic[J, M, D, A]):
    """What can be asked of a service, written once for both clients."""

    job_type: type[J]
    model_type: type[M]
    dataset_type: type[D]
    artifact_type: type[A]
    _driver: Any

    @property
    def base_url(self) -> str:
        return str(self._driver.connection.base_url)

    # ---------------------------------------------------------------------------------------------- upload

    @operation
    def upload(self, path: str | Path, *, progress: Progress | None = None) -> Steps[str]:
        """Stream a file to the service; returns the upload's id. ``progress``: called with (bytes done, in all)."""
        return (yield from sent(Path(path), progress))

    @operation
    def upload_model(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        format: str = "auto",
        architecture: dict[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Steps[M]:
        """Upload a ``.pt2`` (or weights with a named ``architecture``); ``wait()`` for its inspection."""
        return (yield from self._upload_model(path, name, format, architecture, progress))

    @operation
    def upload_dataset(
        self, /, path: str | Path, *, name: str | None = None, progress: Progress | None = None, **spec: Any
    ) -> Steps[D]:
        """Upload data; ``spec`` is a ``DataSpec``: ``task``, ``columns``, ``transform``, ``validation``, ``test``, …"""
        return (yield from self._upload_dataset(path, name, progress, spec))

    # ---------------------------------------------------------------------------------------------- jobs

    @operation
    def submit(
        self,
        /,
        model: M | str | Path,
        data: D | str | Path,
        *,
        max_drop: float | None = None,
        min_value: float | None = None,
        metric: str | None = None,
        minimize: tuple[str, ...] | list[str] = ("parameters",),
        name: str | None = None,
        architecture: dict[str, Any] | None = None,
        data_spec: dict[str, Any] | None = None,
        **spec: Any,
    ) -> Steps[J]:
        """Start a search.

        Args:
            model: a ``Model``, or a file that is uploaded first; weights alone with their ``architecture``.
            data: a ``Dataset``, or a file that is uploaded first with ``data_spec``.
            max_drop: how much of the metric may be lost, in its units (0.005 = half a point of accuracy).
            min_value: instead of ``max_drop``, the value that must be kept.
            metric: one that the data's task allows (``accuracy``, ``top5``, ``mse``, ``output_error``, ``agreement``,
                ``miou``, ``pixel_accuracy``, ``pck``); None: the task's first.
            minimize: any of ``parameters``, ``macs``, ``bytes``, ``latency``; several count alike.
            architecture: ``{"name": …, "options": {…}}``, of those that the service knows.
            spec: other fields of the job: ``methods``, ``layers``, ``fine_tune``, ``search``, ``export``, ``storage``,
                and ``budget`` for its ``confidence`` and ``expect``.

        Raises:
            Rejected: the model or the data was read and refused; the text says why and what to do.
        """
        budget = {"metric": metric, "max_drop": max_drop, "min_value": min_value}
        return (yield from self._submit(model, data, budget, minimize, name, architecture, data_spec, spec))

    @operation
    def compress(
        self,
        /,
        module: torch.nn.Module,
        example: torch.Tensor | tuple[torch.Tensor, ...],
        *,
        data: str | Path | D,
        max_drop: float,
        minimize: tuple[str, ...] | list[str] = ("parameters",),
        name: str | None = None,
        data_spec: dict[str, Any] | None = None,
        **spec: Any,
    ) -> Steps[J]:
        """Export ``module``, upload, search and wait with a progress bar. Needs torch. Returns the finished job.

        ``example``: a batch of inputs; the other arguments are those of ``submit``.
        """
        from .exporting import export
        from .progress import shown

        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / f"{type(module).__name__}.pt2"
            path = yield from call(lambda: export(module, example, target))
            job = yield from self._submit(path, data, {"max_drop": max_drop}, minimize, name, None, data_spec, spec)
        with shown(job) as show:
            yield from JobOperations.wait.steps(job, on_change=show)
        return job

    @operation
    def job(self, id: str) -> Steps[J]:
        return self.job_type(self._driver, (yield from fetch("GET", f"/v1/jobs/{id}")))

    @operation
    def model(self, id: str) -> Steps[M]:
        return self.model_type(self._driver, (yield from fetch("GET", f"/v1/models/{id}")))

    @operation
    def dataset(self, id: str) -> Steps[D]:
        return self.dataset_type(self._driver, (yield from fetch("GET", f"/v1/datasets/{id}")))

    @operation
    def artifact(self, id: str) -> Steps[A]:
        return self.artifact_type(self._driver, (yield from fetch("GET", f"/v1/artifacts/{id}")))

    @listing
    def jobs(self) -> Pages[J]:
        """All your jobs, newest first."""
        return Pages("/v1/jobs", lambda item: self.job_type(self._driver, item))

    @listing
    def models(self) -> Pages[M]:
        """All your networks, newest first, without their layers."""
        return Pages("/v1/models", lambda item: self.model_type(self._driver, item))

    @listing
    def datasets(self) -> Pages[D]:
        """All your data sets, newest first."""
        return Pages("/v1/datasets", lambda item: self.dataset_type(self._driver, item))

    @listing
    def uploads(self) -> Pages[dict[str, Any]]:
        """All your uploads, newest first."""
        return Pages("/v1/uploads", dict)

    @operation
    def delete_upload(self, id: str) -> Steps[None]:
        """Forget an upload. Models and data sets made of it stay."""
        yield from send("DELETE", f"/v1/uploads/{id}")

    # ---------------------------------------------------------------------------------------------- keys, workers

    @operation
    def keys(self) -> Steps[list[dict[str, Any]]]:
        """Everyone's keys without their secrets. Needs the ``admin`` scope."""
        return (yield from Pages("/v1/keys", dict).all())

    @operation
    def current_key(self) -> Steps[dict[str, Any]]:
        """The key in use: its ``owner``, ``name`` and ``scopes``."""
        return (yield from fetch("GET", "/v1/keys/current"))

    @operation
    def create_key(self, name: str, *, scopes: list[str], owner: str | None = None) -> Steps[dict[str, Any]]:
        """A new key; its ``secret`` is in this answer and never shown again. Needs the ``admin`` scope.

        ``scopes``: of ``read``, ``submit``, ``admin``. ``owner``: whose things it sees; None: yours.
        """
        body: dict[str, Any] = {"name": name, "scopes": scopes}
        if owner:
            body["owner"] = owner
        return (yield from fetch("POST", "/v1/keys", json=body))

    @operation
    def revoke_key(self, id: str) -> Steps[None]:
        """It stops working at once. Needs the ``admin`` scope."""
        yield from send("DELETE", f"/v1/keys/{id}")

    @operation
    def workers(self) -> Steps[list[dict[str, Any]]]:
        """The workers seen in the last minute. Needs the ``admin`` scope."""
        return list((yield from fetch("GET", "/v1/workers"))["items"])

    # ---------------------------------------------------------------------------------------------- steps

    def _upload_model(
        self,
        path: str | Path,
        name: str | None,
        format: str,
        architecture: dict[str, Any] | None,
        progress: Progress | None,
    ) -> Steps[M]:
        path = Path(path)
        upload = yield from sent(path, progress)
        body: dict[str, Any] = {"upload": upload, "name": name or path.stem, "format": format}
        if architecture:
            body["architecture"] = architecture
        return self.model_type(self._driver, (yield from fetch("POST", "/v1/models", json=body)))

    def _upload_dataset(
        self, path: str | Path, name: str | None, progress: Progress | None, spec: dict[str, Any]
    ) -> Steps[D]:
        path = Path(path)
        upload = yield from sent(path, progress)
        body = {"upload": upload, "name": name or path.stem, **spec}
        return self.dataset_type(self._driver, (yield from fetch("POST", "/v1/datasets", json=body)))

    def _submit(
        self,
        model: M | str | Path,
        data: D | str | Path,
        budget: dict[str, Any],
        minimize: tuple[str, ...] | list[str],
        name: str | None,
        architecture: dict[str, Any] | None,
        data_spec: dict[str, Any] | None,
        spec: dict[str, Any],
    ) -> Steps[J]:
        if isinstance(model, str | Path):
            model = yield from self._upload_model(model, None, "auto", architecture, None)
        if isinstance(data, str | Path):
            data = yield from self._upload_dataset(data, None, None, data_spec or {})
        # Waited for here, so that a refusal is told where the mistake was made.
        yield from ModelOperations.wait.steps(model)
        yield from DatasetOperations.wait.steps(data)
        given = {**budget, **spec.pop("budget", {})}
        body = {
            "model": model.id,
            "dataset": data.id,
            "name": name or str(model["name"]),
            "budget": {k: v for k, v in given.items() if v is not None},
            "minimize": minimize,
            **spec,
        }
        return self.job_type(self._driver, (yield from fetch("POST", "/v1/jobs", json=body)))


class Client(Operations[Job, Model, Dataset, Artifact], Sync):
    """One service, one key.

    Args:
        base_url: address of the service; None reads ``TENFOLD_URL``, then ``http://127.0.0.1:8000``.
        api_key: None reads ``TENFOLD_API_KEY``.
        retries: how often a lost connection or a busy service is tried again, with growing pauses.

    Example::

        with Client() as client:
            job = client.submit("model.pt2", "data.npz", max_drop=0.005)
            job.wait()
            job.download("out")
    """

    job_type, model_type, dataset_type, artifact_type = Job, Model, Dataset, Artifact

    def __init__(self, base_url: str | None = None, api_key: str | None = None, *, retries: int = 5) -> None:
        self._driver = Driver(Connection.resolve(base_url, api_key, retries))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._driver.close()


class AsyncClient(Operations[AsyncJob, AsyncModel, AsyncDataset, AsyncArtifact], Async):
    """``Client`` with every operation awaited and listings read by ``async for``; on asyncio and trio.

    Example::

        async with AsyncClient() as client:
            job = await client.submit("model.pt2", "data.npz", max_drop=0.005)
            await job.wait()
            await job.download("out")
    """

    job_type, model_type, dataset_type, artifact_type = AsyncJob, AsyncModel, AsyncDataset, AsyncArtifact

    def __init__(self, base_url: str | None = None, api_key: str | None = None, *, retries: int = 5) -> None:
        self._driver = AsyncDriver(Connection.resolve(base_url, api_key, retries))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._driver.close()
