"""What the service holds: each is its last known JSON plus what can be done with it.

Every operation is written once, on a ``…Operations`` class; ``Job`` runs it at once and on ``AsyncJob`` it is awaited.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ._files import load_network, received
from ._operations import Async, Pages, Sync, operation, reading, steering
from ._wire import Sleep, Steps, call, fetch, send
from .errors import JobFailed, Rejected, WaitTimeout

if TYPE_CHECKING:
    import torch

    from ._drivers import AsyncDriver, Driver

__all__ = ["Artifact", "AsyncArtifact", "AsyncDataset", "AsyncJob", "AsyncModel", "Dataset", "Job", "Model"]

LONG_POLL_SECONDS = 20.0

ArtifactT = TypeVar("ArtifactT", bound="ArtifactOperations")
Progress = Callable[[int, int], None]


class Resource:
    """``resource["field"]`` reads the last known JSON, ``reload()`` fetches it anew."""

    collection = ""
    data: dict[str, Any]

    def __init__(self, driver: Driver | AsyncDriver, data: dict[str, Any]) -> None:
        self._driver: Any = driver
        self.data = data
        self._etag: str | None = None

    @property
    def id(self) -> str:
        return str(self.data["id"])

    @property
    def path(self) -> str:
        return f"/v1/{self.collection}/{self.id}"

    def __getitem__(self, field: str) -> Any:
        return self.data[field]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.data.get('state', '')}>".replace(" >", ">")

    @operation
    def reload(self, *, wait: float | None = None) -> Steps[bool]:
        """Fetch the newest state; with ``wait`` (seconds) the service answers once something changes. True: changed."""
        headers = {"If-None-Match": self._etag} if self._etag else {}
        reply = yield from send("GET", self.path, headers=headers, params={"wait": wait})
        if reply.status_code == 304:
            return False
        self._etag = reply.headers.get("ETag")
        self.data = dict(reply.json())
        return True

    @operation
    def delete(self) -> Steps[None]:
        """For good. Raises ``Conflict`` for what is in use: a job that has not ended, a model that a job refers to."""
        yield from send("DELETE", self.path)

    def _until(self, ready: Callable[[], bool], timeout: float | None, what: str) -> Steps[None]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not ready():
            left = LONG_POLL_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(f"{what} is still {self.data.get('state')} after {timeout:g} s; it goes on")
            began = time.monotonic()
            changed = yield from Resource.reload.steps(self, wait=min(LONG_POLL_SECONDS, left))
            if not changed and time.monotonic() - began < 0.2:  # something in between does not hold the request
                yield Sleep(0.2)


# ------------------------------------------------------------------------------------------------- models, data sets


class _Inspected(Resource):
    @property
    def state(self) -> str:
        """``inspecting``, ``ready`` or ``rejected``."""
        return str(self.data["state"])

    @operation
    def wait(self, timeout: float | None = 600.0) -> Steps[None]:
        """Until it is inspected.

        Raises:
            Rejected: it was read and refused.
            WaitTimeout: not inspected within ``timeout`` seconds; it goes on.
        """
        yield from self._until(lambda: self.state != "inspecting", timeout, f"{self.collection[:-1]} {self.id}")
        if self.state == "rejected":
            raise Rejected(str(self.data.get("reason_code")), str(self.data.get("reason")))


class ModelOperations(_Inspected):
    collection = "models"

    @property
    def layers(self) -> list[dict[str, Any]]:
        """What inspection found of each layer: name, kind, weight's shape, parameters, MACs, whether it can shrink."""
        return list((self.data.get("info") or {}).get("layers", []))


class DatasetOperations(_Inspected):
    collection = "datasets"


class Model(ModelOperations, Sync):
    """An uploaded network."""


class AsyncModel(ModelOperations, Async):
    """An uploaded network."""


class Dataset(DatasetOperations, Sync):
    """Uploaded data."""


class AsyncDataset(DatasetOperations, Async):
    """Uploaded data."""


# ---------------------------------------------------------------------------------------------------------- artifacts


class ArtifactOperations(Resource):
    collection = "artifacts"

    @operation
    def download(self, folder: str | Path, *, progress: Progress | None = None) -> Steps[Path]:
        """Into ``folder`` under its own name, checked against its SHA-256.

        A download that broke off is gone on from, and a file that is there already is not fetched again.

        Raises:
            Corrupted: what arrived does not have the promised SHA-256.
        """
        file = yield from received(f"{self.path}/content", Path(folder), self.data, progress)
        return file


class Artifact(ArtifactOperations, Sync):
    """A file of the result."""


class AsyncArtifact(ArtifactOperations, Async):
    """A file of the result."""


# --------------------------------------------------------------------------------------------------------------- jobs


class JobOperations(Resource, Generic[ArtifactT]):
    collection = "jobs"
    artifact_type: type[ArtifactT]

    TERMINAL = ("done", "failed", "cancelled")

    @property
    def state(self) -> str:
        return str(self.data["state"])

    @steering
    def wait(self, timeout: float | None = None, *, on_change: Callable[[Any], None] | None = None) -> Steps[None]:
        """Until it ends.

        Raises:
            JobFailed: it failed or was cancelled; ``reason`` says what to do.
            WaitTimeout: it did not end within ``timeout`` seconds; it goes on.
        """

        def ended() -> bool:
            if on_change:
                on_change(self)
            return self.state in self.TERMINAL

        yield from self._until(ended, timeout, f"job {self.id}")
        if self.state != "done":
            raise JobFailed(str(self.data.get("reason_code")), str(self.data.get("reason") or f"job {self.state}"))

    @steering
    def cancel(self) -> Steps[None]:
        """Stop it; what it found stays."""
        yield from self._do("cancel")

    @steering
    def pause(self) -> Steps[None]:
        """Let running trials finish and start no new one."""
        yield from self._do("pause")

    @steering
    def resume(self) -> Steps[None]:
        """Go on where it was paused."""
        yield from self._do("resume")

    @steering
    def extend(self, trials: int, *, hours: float | None = None) -> Steps[None]:
        """``trials`` more candidates for a job that is done or has failed, and hours where it has a limit of them.

        A job that has used its hours is refused without more of them.
        """
        more = {} if hours is None else {"hours": hours}
        yield from self._do("extend", {"trials": trials, **more})

    @steering
    def export(self, trial: int) -> Steps[None]:
        """Make files of one more point of the front; they appear among ``artifacts()``."""
        yield from self._do(f"trials/{trial}/export")

    @operation
    def trials(self) -> Steps[list[dict[str, Any]]]:
        """Every candidate with the result of the highest rung it reached."""
        return (yield from Pages(f"{self.path}/trials", dict).all())

    @operation
    def trial(self, number: int) -> Steps[dict[str, Any]]:
        """One candidate: its plan, the ``results`` of every rung, and their learning curves."""
        return (yield from fetch("GET", f"{self.path}/trials/{number}"))

    @operation
    def events(self) -> Steps[list[dict[str, Any]]]:
        """What happened, oldest first."""
        return (yield from Pages(f"{self.path}/events", dict).all())

    @reading
    def front(self) -> Steps[list[dict[str, Any]]]:
        """The trade-off front, cheapest first: the points that no other beats in both drop and cost."""
        return list((yield from fetch("GET", f"{self.path}/front"))["points"])

    @reading
    def layers(self) -> Steps[list[dict[str, Any]]]:
        """Every layer before and after, by the best network's plan."""
        return list((yield from fetch("GET", f"{self.path}/layers"))["layers"])

    @operation
    def artifacts(self, trial: int | None = None) -> Steps[list[ArtifactT]]:
        """The files there are, newest first; of one trial if you like."""
        return (yield from self._artifacts(trial))

    @operation
    def download(self, folder: str | Path, *, trial: int | None = None) -> Steps[list[Path]]:
        """All files of the best network, or of ``trial``."""
        files = []
        for artifact in (yield from self._artifacts(self._chosen(trial))):
            files.append((yield from ArtifactOperations.download.steps(artifact, folder)))
        return files

    @operation
    def load(self, folder: str | Path, *, trial: int | None = None) -> Steps[torch.nn.Module]:
        """Download ``model.pt2`` of the best network, or of ``trial``, and load it as a module. Needs torch."""
        for artifact in (yield from self._artifacts(self._chosen(trial))):
            if artifact["filename"] == "model.pt2":
                path = yield from ArtifactOperations.download.steps(artifact, folder)
                return (yield from call(partial(load_network, path)))
        raise JobFailed("no_artifact", f"job {self.id} has no model.pt2; ask for it with export=['pt2']")

    @operation
    def plot(self, path: str | Path | None = None, *, cost: str | None = None) -> Steps[Any]:
        """Draw every candidate and the front: the metric against ``cost`` (the first that the job minimizes).

        Returns the matplotlib figure, saved to ``path`` if one is given. Needs ``pip install 'tenfold[plot]'``.
        """
        from .plotting import draw

        shown = cost or self.data["spec"]["minimize"][0]
        trials = yield from Pages(f"{self.path}/trials", dict).all()
        front = yield from fetch("GET", f"{self.path}/front", params={"cost": shown})
        return (yield from call(lambda: draw(self.data, trials, front["points"], shown, path)))

    def _chosen(self, trial: int | None) -> int | None:
        return (self.data.get("best") or {}).get("trial") if trial is None else trial

    def _artifacts(self, trial: int | None) -> Steps[list[ArtifactT]]:
        pages = Pages(f"{self.path}/artifacts", lambda item: self.artifact_type(self._driver, item), trial=trial)
        return (yield from pages.all())

    def _do(self, action: str, body: dict[str, Any] | None = None) -> Steps[None]:
        self.data = yield from fetch("POST", f"{self.path}/{action}", json=body)
        self._etag = None


class Job(JobOperations[Artifact], Sync):
    """A search."""

    artifact_type = Artifact


class AsyncJob(JobOperations[AsyncArtifact], Async):
    """A search."""

    artifact_type = AsyncArtifact
