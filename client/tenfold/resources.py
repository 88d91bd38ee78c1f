"""What the service holds: each is its last known JSON plus what can be done with it."""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._transport import Transport
from .errors import Corrupted, JobFailed, Rejected, WaitTimeout

if TYPE_CHECKING:
    import torch

__all__ = ["Artifact", "Dataset", "Job", "Model", "Resource", "pages"]

LONG_POLL_SECONDS = 20


def pages(transport: Transport, path: str) -> Iterator[dict[str, Any]]:
    """All items of a paged listing."""
    cursor: str | None = None
    while True:
        page = transport.request("GET", path, params={"cursor": cursor, "limit": 100}).json()
        yield from page["items"]
        cursor = page.get("next")
        if not cursor:
            return


class Resource:
    """``resource["field"]`` reads the last known JSON, ``reload()`` fetches it anew."""

    collection = ""

    def __init__(self, transport: Transport, data: dict[str, Any]) -> None:
        self._transport = transport
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
        return f"<{type(self).__name__} {self.id} {self.data.get('state', '')}>"

    def reload(self, *, wait: float | None = None) -> bool:
        """Fetch the newest state; with ``wait`` (seconds) the service answers once something changes. True: changed."""
        headers = {"If-None-Match": self._etag} if self._etag else {}
        reply = self._transport.request("GET", self.path, headers=headers, params={"wait": wait and int(wait)})
        if reply.status_code == 304:
            return False
        self._etag = reply.headers.get("ETag")
        self.data = dict(reply.json())
        return True

    def delete(self) -> None:
        self._transport.request("DELETE", self.path)

    def _until(self, ready: Callable[[], bool], timeout: float | None, what: str) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not ready():
            left = LONG_POLL_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(f"{what} is still {self.data.get('state')} after {timeout:g} s; it goes on")
            began = time.monotonic()
            changed = self.reload(wait=max(1, min(LONG_POLL_SECONDS, left)))
            if not changed and time.monotonic() - began < 0.2:
                time.sleep(0.2)


class _Inspected(Resource):
    def wait(self, timeout: float | None = 600.0) -> None:
        """Until it is inspected.

        Raises:
            Rejected: it was read and refused.
            WaitTimeout: not inspected within ``timeout`` seconds; it goes on.
        """
        self._until(lambda: self.data["state"] != "inspecting", timeout, f"{self.collection[:-1]} {self.id}")
        if self.data["state"] == "rejected":
            raise Rejected(str(self.data.get("reason_code")), str(self.data.get("reason")))


class Model(_Inspected):
    collection = "models"


class Dataset(_Inspected):
    collection = "datasets"


class Artifact(Resource):
    collection = "artifacts"

    def download(self, folder: str | Path) -> Path:
        """Into ``folder`` under its own name, checked against its SHA-256; a partial file is gone on from."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / Path(str(self.data["filename"])).name
        partial = target.with_name(target.name + ".part")
        start = partial.stat().st_size if partial.exists() else 0
        if start >= int(self.data["size"]):
            start = 0
        with self._transport.download(f"{self.path}/content", start=start) as reply:
            mode = "ab" if reply.status_code == 206 else "wb"
            with partial.open(mode) as f:
                for chunk in reply.iter_bytes(1 << 20):
                    f.write(chunk)
        with partial.open("rb") as f:
            got = hashlib.file_digest(f, "sha256").hexdigest()
        if got != self.data["sha256"]:
            partial.unlink()
            raise Corrupted(f"{target.name} arrived with SHA-256 {got}, promised was {self.data['sha256']}; try again")
        partial.replace(target)
        return target


class Job(Resource):
    collection = "jobs"

    TERMINAL = ("done", "failed", "cancelled")

    @property
    def state(self) -> str:
        return str(self.data["state"])

    def wait(self, timeout: float | None = None, *, on_change: Callable[["Job"], None] | None = None) -> "Job":
        """Until it ends.

        Raises:
            JobFailed: it failed or was cancelled; ``reason`` says what to do.
            WaitTimeout: it did not end within ``timeout`` seconds; it goes on.
        """

        def ended() -> bool:
            if on_change:
                on_change(self)
            return self.state in self.TERMINAL

        self._until(ended, timeout, f"job {self.id}")
        if self.state != "done":
            raise JobFailed(str(self.data.get("reason_code")), str(self.data.get("reason")))
        return self

    def cancel(self) -> "Job":
        return self._do("cancel")

    def pause(self) -> "Job":
        return self._do("pause")

    def resume(self) -> "Job":
        return self._do("resume")

    def extend(self, trials: int) -> "Job":
        """``trials`` more candidates for a finished job."""
        return self._do("extend", {"trials": trials})

    def export(self, trial: int) -> "Job":
        """Make files of one more point of the front."""
        return self._do(f"trials/{trial}/export")

    def trials(self) -> list[dict[str, Any]]:
        return list(pages(self._transport, f"{self.path}/trials"))

    def events(self) -> list[dict[str, Any]]:
        return list(pages(self._transport, f"{self.path}/events"))

    @property
    def front(self) -> list[dict[str, Any]]:
        """The trade-off front: points that nothing beats in every objective."""
        return list(self._get("front")["points"])

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Every layer before and after."""
        return list(self._get("layers")["layers"])

    def artifacts(self) -> list[Artifact]:
        return [Artifact(self._transport, item) for item in pages(self._transport, f"{self.path}/artifacts")]

    def download(self, folder: str | Path) -> list[Path]:
        """All files of the best network."""
        best = (self.data.get("best") or {}).get("trial")
        return [a.download(folder) for a in self.artifacts() if best is None or a["trial"] == best]

    def load(self, folder: str | Path) -> "torch.nn.Module":
        """Download ``model.pt2`` and load it as a module. Needs torch."""
        import torch

        for artifact in self.artifacts():
            if artifact["filename"] == "model.pt2":
                return torch.export.load(artifact.download(folder)).module()
        raise JobFailed("no_artifact", f"job {self.id} has no model.pt2; ask for it with export=['pt2']")

    def _get(self, what: str) -> dict[str, Any]:
        return dict(self._transport.request("GET", f"{self.path}/{what}").json())

    def _do(self, action: str, body: dict[str, Any] | None = None) -> "Job":
        reply = self._transport.request("POST", f"{self.path}/{action}", json=body)
        self.data = dict(reply.json())
        self._etag = None
        return self
