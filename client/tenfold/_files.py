"""Files on this side: sent, received whole and checked, loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._wire import Download, Steps, call, fetch
from .errors import Corrupted

if TYPE_CHECKING:
    import torch

__all__ = ["load_network", "received", "sent"]

Progress = Callable[[int, int], None]


def sent(path: Path, progress: Progress | None) -> Steps[str]:
    """The id of a new upload. The file is streamed, and sent again from its start when the connection is lost."""
    upload = yield from fetch("POST", "/v1/uploads", params={"filename": path.name}, file=path, progress=progress)
    return str(upload["id"])


def received(path: str, folder: Path, promised: Mapping[str, Any], progress: Progress | None) -> Steps[Path]:
    """The file of one artifact in ``folder``; ``promised``: its ``filename`` and ``sha256``."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / Path(str(promised["filename"])).name
    digest = str(promised["sha256"])
    if target.exists() and (yield from call(lambda: _sha256(target))) == digest:
        return target
    # Named by its content, so that what is left of another file of the same name is never gone on from.
    partial = target.with_name(f"{target.name}.{digest[:12]}.part")
    if not (partial.exists() and partial.stat().st_size >= int(promised["size"])):
        yield Download(path, partial, progress)
    got = yield from call(lambda: _sha256(partial))
    if got != digest:
        partial.unlink()
        raise Corrupted(f"{target.name} arrived with SHA-256 {got}, promised was {digest}; try again")
    partial.replace(target)
    return target


def load_network(path: Path) -> torch.nn.Module:
    import torch

    return torch.export.load(path).module()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
