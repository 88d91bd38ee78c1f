"""``Client``: the whole service from Python. No torch is needed to submit, watch and download."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ._transport import Transport, chunks_of
from .resources import Artifact, Dataset, Job, Model, pages

if TYPE_CHECKING:
    import torch

__all__ = ["Client"]

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class Client:
    """One service, one key.

    Args:
        base_url: address of the service; None reads ``TENFOLD_URL``, then ``http://127.0.0.1:8000``.
        api_key: None reads ``TENFOLD_API_KEY``.
        retries: how often a lost connection or a busy service is tried again.

    Example::

        with Client() as client:
            job = client.submit("model.pt2", "data.npz", max_drop=0.005)
            job.wait()
            job.download("out")
    """

    def __init__(self, base_url: str | None = None, api_key: str | None = None, *, retries: int = 5) -> None:
        self._transport = Transport(base_url, api_key, retries=retries)

    @property
    def base_url(self) -> str:
        return self._transport.base_url

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    # ---------------------------------------------------------------------------------------------- upload

    def upload(self, path: str | Path, *, progress: Progress | None = None) -> str:
        """Stream a file to the service; returns the upload's id."""
        path = Path(path)
        size = path.stat().st_size

        def counted() -> Iterator[bytes]:
            done = 0
            for chunk in chunks_of(path):
                yield chunk
                done += len(chunk)
                if progress:
                    progress(done, size)

        return str(self._transport.upload("/v1/uploads", counted(), size, path.name)["id"])

    def upload_model(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        format: str = "auto",
        architecture: dict[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Model:
        """Upload a ``.pt2`` (or weights with a named ``architecture``); ``wait()`` for its inspection."""
        path = Path(path)
        body: dict[str, Any] = {"upload": self.upload(path, progress=progress), "name": name or path.stem}
        body["format"] = format
        if architecture:
            body["architecture"] = architecture
        return Model(self._transport, self._post("/v1/models", body))

    def upload_dataset(
        self, path: str | Path, *, name: str | None = None, progress: Progress | None = None, **spec: Any
    ) -> Dataset:
        """Upload data; ``spec`` is a ``DataSpec``: ``task``, ``columns``, ``transform``, ``validation``, ``test``, …"""
        path = Path(path)
        body = {"upload": self.upload(path, progress=progress), "name": name or path.stem, **spec}
        return Dataset(self._transport, self._post("/v1/datasets", body))

    # ---------------------------------------------------------------------------------------------- jobs

    def submit(
        self,
        model: "Model | str | Path",
        data: "Dataset | str | Path",
        *,
        max_drop: float | None = None,
        min_value: float | None = None,
        metric: str | None = None,
        minimize: tuple[str, ...] | list[str] = ("parameters",),
        name: str | None = None,
        data_spec: dict[str, Any] | None = None,
        **spec: Any,
    ) -> Job:
        """Start a search.

        Args:
            model: a ``Model``, or a file that is uploaded first.
            data: a ``Dataset``, or a file that is uploaded first with ``data_spec``.
            max_drop: how much of the metric may be lost, in its units (0.005 = half a point of accuracy).
            min_value: instead of ``max_drop``, the value that must be kept.
            minimize: any of ``parameters``, ``macs``, ``bytes``, ``latency``; the first counts most.
            spec: other fields of the job: ``methods``, ``layers``, ``fine_tune``, ``search``, ``export``.

        Raises:
            Rejected: the model or the data was read and refused; the text says why and what to do.
        """
        model = model if isinstance(model, Model) else self.upload_model(model)
        data = data if isinstance(data, Dataset) else self.upload_dataset(data, **(data_spec or {}))
        model.wait()
        data.wait()
        given = {"metric": metric, "max_drop": max_drop, "min_value": min_value, **spec.pop("budget", {})}
        body = {
            "model": model.id,
            "dataset": data.id,
            "name": name or str(model["name"]),
            "budget": {k: v for k, v in given.items() if v is not None},
            "minimize": list(minimize),
            **spec,
        }
        return Job(self._transport, self._post("/v1/jobs", body))

    def compress(
        self,
        module: "torch.nn.Module",
        example: "torch.Tensor | tuple[torch.Tensor, ...]",
        *,
        data: str | Path | Dataset,
        max_drop: float,
        **options: Any,
    ) -> Job:
        """Export ``module``, upload, search and wait with a progress bar. Needs torch. Returns the finished job."""
        import tempfile

        from .exporting import export
        from .progress import watch

        with tempfile.TemporaryDirectory() as folder:
            path = export(module, example, Path(folder) / f"{type(module).__name__}.pt2")
            job = self.submit(path, data, max_drop=max_drop, **options)
        watch(job)
        return job.wait()

    def job(self, id: str) -> Job:
        return Job(self._transport, self._get(f"/v1/jobs/{id}"))

    def model(self, id: str) -> Model:
        return Model(self._transport, self._get(f"/v1/models/{id}"))

    def dataset(self, id: str) -> Dataset:
        return Dataset(self._transport, self._get(f"/v1/datasets/{id}"))

    def artifact(self, id: str) -> Artifact:
        return Artifact(self._transport, self._get(f"/v1/artifacts/{id}"))

    def jobs(self) -> Iterator[Job]:
        """All your jobs, newest first."""
        return (Job(self._transport, item) for item in pages(self._transport, "/v1/jobs"))

    def models(self) -> Iterator[Model]:
        return (Model(self._transport, item) for item in pages(self._transport, "/v1/models"))

    def datasets(self) -> Iterator[Dataset]:
        return (Dataset(self._transport, item) for item in pages(self._transport, "/v1/datasets"))

    # ---------------------------------------------------------------------------------------------- keys

    def keys(self) -> list[dict[str, Any]]:
        return list(pages(self._transport, "/v1/keys"))

    def create_key(self, name: str, *, scopes: list[str], owner: str | None = None) -> dict[str, Any]:
        """A new key; its ``secret`` is in this answer and never shown again. Needs the ``admin`` scope."""
        body: dict[str, Any] = {"name": name, "scopes": scopes}
        if owner:
            body["owner"] = owner
        return self._post("/v1/keys", body)

    def revoke_key(self, id: str) -> None:
        self._transport.request("DELETE", f"/v1/keys/{id}")

    def _get(self, path: str) -> dict[str, Any]:
        return dict(self._transport.request("GET", path).json())

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return dict(self._transport.request("POST", path, json=body).json())
